"""The rendered parts of README.md, MODEL_CARD.md and docs/: functions of result rows, manifest and run files alone.

A part stands between ``<!-- rendered: NAME -->`` and ``<!-- end -->``; the rest of a page is written by hand.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm

from rotation_ssl.backbones.about import network_facts
from rotation_ssl.messages import counted
from training.reporting import applications, tables, transfers
from training.reporting.manifest import rotated_images, seen_in_training
from training.reporting.remeasure import one_of_each_training
from training.reporting.required import RANDOM, RESCALED
from training.reporting.rows import RESULTS_DIR, Row, model_of, read_file

ROOT = Path(__file__).parent.parent.parent
FIGURES = "docs/figures"
FIGURES_DIR = ROOT / FIGURES
ABLATION_FILE = RESULTS_DIR / "ablation" / "runs.jsonl"  # written by `python -m training ablation`
SPEED_FILE = RESULTS_DIR / "speed.json"  # written by `python -m training benchmark speed --record`
EMBEDDING_FILE = RESULTS_DIR / "embedding.json"  # written by `python -m training benchmark features --record`
# the repository has no public address yet: this is the one place that names it
REPOSITORY = "OWNER/rotation_ssl"


def pages() -> list[Path]:
    """The pages that may have rendered parts."""
    return [ROOT / "README.md", ROOT / "MODEL_CARD.md", *sorted((ROOT / "docs").glob("*.md"))]


def render_page(page: Path, rows: Sequence[Row], entries: Mapping[str, Any]) -> str:
    """The text of a page with its parts rendered again."""
    # figures are found from where the page stands
    figures = "figures" if page.parent.name == "docs" else FIGURES
    bundled = {name: entry for name, entry in entries.items() if entry["source"] == "bundled"}
    parts: dict[str, Callable[[], str]] = {
        "weights": lambda: weights_table(entries),
        "headline": lambda: tables.headline_tables(rows, bundled),
        "results": lambda: tables.results_tables(rows, bundled),
        "defaults": lambda: default_weights(bundled),
        "elsewhere": lambda: elsewhere(entries),
        "training": lambda: "\n\n".join(training(name, entry, figures) for name, entry in bundled.items()),
        "evaluation": lambda: "\n\n".join(evaluation(name, entry, rows, figures) for name, entry in bundled.items()),
        "compute": lambda: compute(bundled, rows),
        "ablation": lambda: tables.ablation_table(read_file(ABLATION_FILE), rows),
        "layers": lambda: layer_table(rows),
        "voc": lambda: transfers.transfer_lines(rows),
        "transfers": lambda: transfers.transfer_table(rows),
        "orientation": lambda: applications.orientation_table(rows),
        "coverage": lambda: applications.coverage_table(rows),
        "outliers": lambda: applications.outliers_table(rows),
        "oneclass": lambda: applications.one_class_line(rows),
        "thresholds": lambda: applications.thresholds_line(entries),
        "upright": lambda: applications.orientation_line(rows),
        "belonging": lambda: applications.outliers_line(rows),
        "voctimes": lambda: transfers.transfer_times(rows),
        "margins": lambda: transfers.transfer_margin(rows),
        "repository": hub_snippet,
        "speed": lambda: speed_tables(json.loads(SPEED_FILE.read_text())),
        "embedding": lambda: embedding_text(json.loads(EMBEDDING_FILE.read_text())),
        "embeddingratio": lambda: embedding_line(json.loads(EMBEDDING_FILE.read_text())),
    }
    return replace_parts(page.read_text(), parts, page.name)


def replace_parts(text: str, parts: Mapping[str, Callable[[], str]], page: str) -> str:
    """A page's text with each part between ``<!-- rendered: NAME -->`` and ``<!-- end -->`` rendered again."""

    def replace(match: re.Match[str]) -> str:
        if match[1] not in parts:
            raise ValueError(f"{page} has an unknown rendered part {match[1]!r}; there are {', '.join(parts)}")
        return f"<!-- rendered: {match[1]} -->\n{parts[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- rendered: (\w+) -->\n.*?\n?<!-- end -->", replace, text, flags=re.DOTALL)


def weights_table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each of the published weights: what they are and where they come from."""
    places = {"bundled": "in the package", "hub": "Hugging Face Hub", "release": "the authors' release"}
    return tables.markdown_table(
        ("weights", "pretrained on", "rotated images", "size", "recommended layer", "source"),
        (
            (
                f"`{name}`",
                entry["data"],
                f"{rotated_images(entry):,}" if entry.get("rotated_images") else "unknown",
                f"{entry['size'] / 1e6:.1f} MB" if entry["size"] else "unknown",
                f"`{entry['recommended_layer']}`",
                places[entry["source"]],
            )
            for name, entry in entries.items()
        ),
    )


def default_weights(bundled: Iterable[str]) -> str:
    """Which weights each network loads by default, the first bundled ones, and which networks have none."""
    default: dict[str, str] = {}
    for name in bundled:
        default.setdefault(model_of(name), name)
    with_weights = _series([f"`{name}` for `{model}`" for model, name in default.items()], "and")
    without = _series([f"`{model}`" for model in timm.list_models("rotnet_*") if model not in default], "or")
    return (
        f"`pretrained=True` loads {with_weights}. This package has no weights for {without}: `pretrained=True`"
        " raises an error for them."
    )


def elsewhere(entries: Mapping[str, Any]) -> str:
    """One line for each of the weights that are not in the wheel."""
    return "\n".join(
        f"- `{name}` was pretrained on {entry['data']}. It comes from {entry['origin']}."
        f" {entry['license'].upper()} licence; {_address(entry)}"
        for name, entry in entries.items()
        if entry["source"] != "bundled"
    )


def training(name: str, entry: Mapping[str, Any], figures: str) -> str:
    """How bundled weights were pretrained, and at what part of the paper's budget."""
    facts = network_facts(name)
    budget = facts.paper_rotated_images
    run = json.loads((RESULTS_DIR / f"{name}.run.json").read_text())
    lines = [
        f"### `{name}`",
        "",
        f"- sha256 `{entry['sha256']}`, {entry['size']:,} bytes, safetensors, {entry.get('dtype', 'fp32')},"
        f" {entry['source']} in the wheel; {entry['license'].upper()} licence.",
        f"- Recipe `{entry['recipe']}`, seed {entry['seed']}, commit `{entry['commit']}`, on {entry['data']}:"
        f" {seen_in_training(entry)}.",
        _settings(run),
        f"- Time: {counted(round(run['seconds'] / 60), 'minute')} on {run['threads']} threads ({run['device']}).",
        f"- Budget: {rotated_images(entry) / budget:.1%} of the paper's {budget / 1e6:.0f} million rotated images"
        f" ({facts.paper_epochs} epochs of 4 x {facts.paper_images:,}). Expect lower accuracy than with"
        " the paper's weights.",
        "",
        *_figures(name, {"curve": "Training loss", "filters": "Filters of the first layer"}, figures),
    ]
    return "\n".join(lines)


def _settings(run: Mapping[str, Any]) -> str:
    """The settings of a pretraining that decide most, in a line."""
    recipe = run["recipe"]
    crops = " then ".join(str(stage["crop"]) for stage in recipe["stages"])
    other = "" if run["optimizer"] == "Sgd" else " (the paper: SGD)"
    return (
        f"- Optimiser: {run['optimizer']}, learning rate {recipe['optimizer']['lr']:g}{other}; crops of {crops} pixels;"
        f" {recipe['images_per_step']} images in {len(recipe['rotations'])} rotations per step; {recipe['precision']}."
    )


def evaluation(name: str, entry: Mapping[str, Any], rows: Sequence[Row], figures: str) -> str:
    """Every number of bundled weights, and the figures that show them."""
    titles = {
        "layers": "Accuracy by layer",
        "few-labels": "Accuracy with few labels",
        "attention": "Attention maps of sample images",
        "neighbours": f"Nearest CIFAR-10 test images of sample images by {entry['recommended_layer']}",
    }
    return "\n".join([f"### `{name}`", "", *tables.evaluation_lines(name, rows), *_figures(name, titles, figures)])


def compute(bundled: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Minutes and machines of the measured rows."""
    random = [f"{model}.{tag}" for model in dict.fromkeys(map(model_of, bundled)) for tag in (RANDOM, RESCALED)]
    own = [row for name in (*bundled, *random) for row in tables.select(rows, name)]
    seconds: dict[tuple[Any, ...], float] = {}
    for row in one_of_each_training(own):
        machine = f"{counted(row.threads or 0, 'thread')} ({row.device})"
        key = f"`{row.weights}`", machine, row.versions["torch"], f"`{row.commit[:7]}`"
        seconds[key] = seconds.get(key, 0.0) + (row.seconds or 0.0)
    header = ("numbers of", "machine", "torch", "commit", "time, without passes to cache features")
    lines = ((*key, counted(round(value / 60), "minute")) for key, value in sorted(seconds.items()))
    return tables.markdown_table(header, lines)


def layer_table(rows: Sequence[Row]) -> str:
    """Probes of AlexNet's layers in one table a dataset: ours, and the paper's on ImageNet and Places205."""
    probes = [row for row in rows if row.protocol in ("linear-sgd", "nonlinear-sgd")]
    probes = [row for row in probes if row.measured or row.source.startswith("paper")]
    parts = []
    for data in dict.fromkeys(row.data for row in sorted(probes, key=lambda row: not row.measured)):
        own = [row for row in probes if row.data == data]
        layers = {layer: layer for layer in sorted({row.layer for row in own})}
        header = ("protocol", "weights")
        table = tables.cell_table(
            header, own, lambda row: (row.title, tables.whose(row)), lambda row: row.layer, layers
        )
        parts.append(f"{data}:\n\n{table}")
    return "\n\n".join(parts)


def speed_tables(measured: Mapping[str, Any]) -> str:
    """The results of `python -m training benchmark speed` as Markdown."""
    cases = measured["cases"]
    flops = {name: case["images_per_second"] * case["flop"] for name, case in cases.items()}
    products = {name: value for name, value in flops.items() if name.startswith("product")}
    peak_fp32 = max(value for name, value in products.items() if "fp32" in name)
    peak = max(value for name, value in products.items() if "fp32" not in name)
    ours = cases["training"]
    rows = (
        ("training, naive: one image at a time, fp32, NCHW", "naive", "naive", peak_fp32),
        ("training in fp32", "training in fp32", "naive", peak_fp32),
        ("training in bf16, default memory settings", "training without kept blocks", "naive", peak),
        ("**training in bf16, as in our commands**", "training", "naive", peak),
        (
            "features in bf16, default memory settings",
            "features without kept blocks",
            "features without kept blocks",
            peak,
        ),
        ("**features in bf16, as in our commands**", "features", "features without kept blocks", peak),
    )
    lines = []
    for title, name, base, highest in rows:
        rate, memory = cases[name]["images_per_second"], cases[name]["peak_bytes"] / 2**30
        ratio = rate / cases[base]["images_per_second"]
        lines.append((title, f"{rate:.0f}", f"{ratio:.2f}", f"{flops[name] / highest:.0%}", f"{memory:.1f} GiB"))
    header = ("", "images/s", "ratio", "fraction of matmul speed", "peak memory")
    return (
        f"Measured on {measured['threads']} threads ({measured['device']}, commit `{measured['commit'][:7]}`): each"
        f" number is the median of {measured['rounds']} interleaved runs, each in a new process. Training in bf16"
        f" ranged from {ours['slowest']:.0f} to {ours['fastest']:.0f} images/s. Training uses 512 rotated 32-pixel"
        " images per step, feature extraction uses batches of 128."
        f" Square matrix multiplications reach {peak / 1e9:.0f} GFLOP/s in bf16 and {peak_fp32 / 1e9:.0f} in fp32;"
        f" convolutions can be faster.\n\n{tables.markdown_table(header, lines)}"
    )


def embedding_text(measured: Mapping[str, Any]) -> str:
    """The results of `python -m training benchmark features` in two sentences."""
    rates = measured["images_per_second"]
    slower = min(rates["decoding"], rates["network"])
    return (
        f"Measured on {measured['threads']} threads ({measured['device']}, commit `{measured['commit'][:7]}`), with"
        f" {measured['workers']} data-loading workers, in {measured['precision']}: `rotation-ssl features` with"
        f" `{measured['model']}` writes the features of {measured['images']:,} photographs at {rates['ours']:.0f}"
        f" images/s, {rates['ours'] / rates['timm']:.2f} times the rate of timm's loader and `forward_features`"
        f" ({rates['timm']:.0f} images/s). This is {rates['ours'] / slower:.0%} of the slower of decoding alone"
        f" ({rates['decoding']:.0f} images/s) and the network alone ({rates['network']:.0f} images/s); each number is"
        f" the median of {measured['rounds']} interleaved runs, each in a new process."
    )


def embedding_line(measured: Mapping[str, Any]) -> str:
    """What README says of :func:`embedding_text`."""
    rates = measured["images_per_second"]
    return (
        f"On {measured['threads']} threads, writing the features of {measured['images']:,} photographs with"
        f" `{measured['model']}` is {rates['ours'] / rates['timm']:.2f} times as fast as timm's loader and"
        " `forward_features` (large JPEGs are decoded at a smaller scale)."
    )


def hub_snippet() -> str:
    """How torch.hub loads a model from the repository."""
    # a pinned commit, not a branch that moves under whoever loads it
    call = f'model = torch.hub.load("{REPOSITORY}:COMMIT", "rotnet_nin", trust_repo=True).eval()'
    return f"```python\nimport torch\n\n{call}\n```"


def _series(words: Sequence[str], conjunction: str) -> str:
    return f" {conjunction} ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _figures(name: str, titles: Mapping[str, str], figures: str) -> list[str]:
    return [
        f"![{title} of {name}]({figures}/{name}.{kind}.png)"
        for kind, title in titles.items()
        if (ROOT / FIGURES / f"{name}.{kind}.png").exists()
    ]


def _address(entry: Mapping[str, Any]) -> str:
    if entry["source"] == "release":
        return str(entry["url"])
    return f"https://huggingface.co/{entry['hub']['repository']}, sha256 `{entry['sha256']}`"
