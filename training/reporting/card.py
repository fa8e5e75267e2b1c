"""The text of MODEL_CARD.md and of README's rendered parts: a function of the result rows and the manifest alone."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import timm

from rotation_ssl.evaluation.report import spread_text
from training.recipes import IMAGENET_IMAGES, RECIPES
from training.reporting.rows import REPORTED, RESULTS_DIR, Row, read_file

ROOT = Path(__file__).parent.parent.parent
CARD_TEMPLATE = Path(__file__).parent / "model_card.md"
FIGURES = "docs/figures"
ABLATION_FILE = RESULTS_DIR / "ablation" / "runs.jsonl"  # written by `training.studies.rotations`
SPEED_FILE = RESULTS_DIR / "speed.json"  # written by `training.studies.benchmark speed --record`
# the repository has no public address yet: this is the one place that names it
REPOSITORY = "OWNER/rotation_ssl"
# rotated images that the paper's networks saw, and what they are
NIN_BUDGET = (100 * 4 * 50_000, "100 epochs of 4 x 50,000")
PAPER_BUDGETS = {
    **dict.fromkeys(("rotnet_nin", "rotnet_nin3", "rotnet_nin5"), NIN_BUDGET),
    "rotnet_alexnet": (30 * 4 * IMAGENET_IMAGES, f"30 epochs of 4 x {IMAGENET_IMAGES:,}"),
}


def render_card(rows: Sequence[Row], entries: dict[str, Any]) -> str:
    """The text of MODEL_CARD.md."""
    values = {"repository": REPOSITORY, "weights": weights_table(rows, entries), "elsewhere": elsewhere(entries)}
    values["defaults"] = default_weights(entries)
    entries = {name: entry for name, entry in entries.items() if entry["source"] == "bundled"}
    for heading, section in (("training", _training), ("evaluation", _evaluation), ("compute", _compute)):
        values[heading] = "\n\n".join("\n".join(section(name, entry, rows)) for name, entry in entries.items())
    ablation = ablation_table(read_file(ABLATION_FILE) if ABLATION_FILE.exists() else [], rows)
    values["evaluation"] += f"\n\n{ablation}" if ablation else ""
    return Template(CARD_TEMPLATE.read_text()).substitute(values)


def render_readme(text: str, rows: Sequence[Row], entries: dict[str, Any]) -> str:
    """README with its rendered parts, each between ``<!-- rendered: NAME -->`` and ``<!-- end -->``, made anew.

    Raises:
        ValueError: a part that this program does not know.
    """
    parts = {"weights": weights_table(rows, entries), "repository": _hub_snippet()}
    parts["defaults"] = default_weights(entries)
    if SPEED_FILE.exists():
        parts["speed"] = speed_tables(json.loads(SPEED_FILE.read_text()))
    return replace_parts(text, parts, "README.md")


def replace_parts(text: str, parts: Mapping[str, str], page: str) -> str:
    """A page's text, each part between ``<!-- rendered: NAME -->`` and ``<!-- end -->`` made anew.

    Raises:
        ValueError: a part that is not among ``parts``.
    """

    def replace(match: re.Match[str]) -> str:
        if match[1] not in parts:
            raise ValueError(f"{page} has an unknown rendered part {match[1]!r}; there are {', '.join(parts)}")
        return f"<!-- rendered: {match[1]} -->\n{parts[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- rendered: (\w+) -->\n.*?\n?<!-- end -->", replace, text, flags=re.DOTALL)


def speed_tables(measured: dict[str, Any]) -> str:
    """The figures of ``training.studies.benchmark speed`` as Markdown."""
    cases = measured["cases"]
    flops = {name: case["images_per_second"] * case["flop"] for name, case in cases.items()}
    products = {name: value for name, value in flops.items() if name.startswith("product")}
    peak_fp32 = max(value for name, value in products.items() if "fp32" in name)
    peak = max(value for name, value in products.items() if "fp32" not in name)
    ours = cases["training"]
    lines = [
        f"On {measured['device']}, {measured['threads']} threads; {measured['rounds']} fresh processes of each, "
        f"taken in turns, and their medians (commit `{measured['commit'][:7]}`); training in bf16 was between "
        f"{ours['slowest']:.0f} and {ours['fastest']:.0f} images/s. 32 pixels, 512 turned images a step, 128 a batch"
        f" of features. Square matrix products reach {peak / 1e9:.0f} GFLOP/s in bf16 and {peak_fp32 / 1e9:.0f} in"
        " fp32; convolutions may be faster than those.",
        "",
        "| | images/s | ratio | to the products | peak memory |",
        "|---|---|---|---|---|",
    ]
    rows = (
        ("training, naive: one image at a time, fp32, NCHW", "naive", "naive", peak_fp32),
        ("training in fp32", "training in fp32", "naive", peak_fp32),
        ("training in bf16, memory given back", "training without kept blocks", "naive", peak),
        ("**training in bf16, as the commands do it**", "training", "naive", peak),
        ("features in bf16, memory given back", "features without kept blocks", "features without kept blocks", peak),
        ("**features in bf16, as the commands do it**", "features", "features without kept blocks", peak),
    )
    for title, name, base, highest in rows:
        rate, memory = cases[name]["images_per_second"], cases[name]["peak_bytes"] / 2**30
        ratio = rate / cases[base]["images_per_second"]
        lines.append(f"| {title} | {rate:.0f} | {ratio:.2f} | {flops[name] / highest:.0%} | {memory:.1f} GiB |")
    return "\n".join(lines)


def weights_table(rows: Sequence[Row], entries: dict[str, Any]) -> str:
    """One line a published weight, its size and its headline numbers."""
    lines = [
        "| weights | trained on | rotated images | size | measured on | rotation accuracy | layer | non-linear probe"
        " | linear probe | k-NN |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in entries.items():
        layer, reported = entry["recommended_layer"], REPORTED.get(_model_of(name))
        own = [row for row in select(rows, name) if reported and row.data == reported.data]
        images = entry.get("rotated_images")
        probes = {numbers.protocol: numbers.cost for numbers in reported.numbers} if reported else {}
        cells = [
            f"`{name}`",
            entry["data"],
            f"{images:,}" if images else "not known",
            f"{entry['size'] / 1e6:.1f} MB" if entry["size"] else "not known",
            reported.data if reported and own else "",
            _cell(own, "rotation accuracy", "", ""),
            f"`{layer}`",
        ]
        for kind in ("non-linear probe", "linear probe", "k-NN"):
            # ImageNet's linear and non-linear probes in the columns of the others
            found = [protocol for protocol in probes if protocol in (kind, f"ImageNet {kind}")]
            cells.append(_cell(own, found[0], probes[found[0]], layer) if found else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def default_weights(entries: dict[str, Any]) -> str:
    """Which networks have weights by default, the bundled ones, and which have none."""
    bundled = {_model_of(name) for name, entry in entries.items() if entry["source"] == "bundled"}
    with_weights: list[str] = []
    without: list[str] = []
    for model in timm.list_models("rotnet_*"):
        (with_weights if model in bundled else without).append(f"`{model}`")
    return (
        f"Bundled, and so the default of `pretrained=True`: weights of {_and(with_weights)}. By default"
        f" {_and(without)} have none, and `pretrained=True` says so."
    )


def elsewhere(entries: dict[str, Any]) -> str:
    """One line for each of the weights that are not in the wheel."""
    return "\n".join(
        f"- `{name}`: {entry['origin']}; {entry['data']}; {_address(entry)}; licence {entry['license']}."
        for name, entry in entries.items()
        if entry["source"] != "bundled"
    )


def ablation_table(measured: Sequence[Row], rows: Sequence[Row]) -> str:
    """The paper's ablations at this project's small budget, the paper's numbers beside; '' where nothing is measured.

    Args:
        measured: rows of ``training.studies.rotations``.
        rows: all others, the quoted ones among them.
    """
    if not measured:
        return ""
    seen = {RECIPES[row.recipe].rotated_images for row in measured}
    lines = [
        "### Which rotations to tell apart",
        "",
        f"Networks pretrained on {' or '.join(f'{count:,}' for count in sorted(seen))} rotated images each (recipes"
        " `nin-cifar10-ablation...`, `python -m training ablation`; not published). ± is the standard deviation over"
        " seeds of the probe: pretraining was done once each, and another seed of it alone moves such numbers by some"
        " tenths of a point (training/studies/nin_cifar10.md): differences of that size say nothing. As many rotated"
        " images of"
        " fewer rotations are of more upright ones: two rotations have seen twice as many as four, eight half as many."
        " In steps of 45 degrees all eight views are resampled and masked to a circle. Features are computed in bf16.",
        "",
        "| network, degrees | recipe | non-linear probe (cached) of block2 | paper, 100 epochs |",
        "|---|---|---|---|",
    ]
    for name in dict.fromkeys(row.recipe for row in measured):
        recipe = RECIPES[name]
        degrees = ", ".join(str(rotation * recipe.rotation_unit) for rotation in recipe.rotations)
        quoted = f"{recipe.model}{name.partition('-ablation')[2]}.paper"
        paper = [
            row for row in rows if (row.weights, row.layer, row.protocol) == (quoted, "block2", "non-linear probe")
        ]
        cells = [f"_{spread_text([row])}_ ({row.source})" for row in paper if row.source.startswith("paper")]
        own = spread_text([row for row in measured if row.recipe == name])
        lines.append(f"| `{recipe.model}`: {degrees} | `{name}` | {own} | {', '.join(cells)} |")
    return "\n".join(lines)


def select(rows: Iterable[Row], weights: str, measured: bool = True) -> list[Row]:
    """The rows of some weights that this project measured, or those that it quotes."""
    return [row for row in rows if row.weights == weights and (row.source == "measured") == measured]


def _training(name: str, entry: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    budget, of = PAPER_BUDGETS[_model_of(name)]
    return [
        f"### `{name}`",
        "",
        f"- sha256 `{entry['sha256']}`, {entry['size']:,} bytes, safetensors, fp32, {entry['source']} in the wheel;"
        f" licence {entry['license']}.",
        f"- Recipe `{entry['recipe']}`, seed {entry['seed']}, commit `{entry['commit']}`, on {entry['data']}:"
        f" {entry['rotated_images']:,} rotated images.",
        f"- Budget: {entry['rotated_images'] / budget:.1%} of the paper's {budget / 1e6:.0f} million rotated images"
        f" ({of}). These are small-budget weights: expect less of them than of the paper's.",
        "",
        *_figures(name, {"curve": "Training loss", "filters": "Filters of the first layer"}),
    ]


def _evaluation(name: str, entry: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    model = _model_of(name)
    titles = {
        "layers": "Accuracy by layer",
        "few-labels": "Accuracy with few labels",
        "attention": "Attention maps of sample images",
        "neighbours": f"Nearest CIFAR-10 test images of sample images by {entry['recommended_layer']}",
    }
    return [
        f"### `{name}`",
        "",
        *evaluation_lines(name, rows),
        *_few_labels_table(name, model, rows),
        *paper_tables(name, rows),
        *_figures(name, titles),
    ]


def evaluation_lines(name: str, rows: Sequence[Row]) -> list[str]:
    """Rotation accuracy and every probe of published weights, on each data set that they were measured on."""
    model, lines = _model_of(name), []
    for data in dict.fromkeys(row.data for row in select(rows, name)):
        there = [row for row in rows if row.data == data]
        own, random = select(there, name), select(there, f"{model}.random")
        if any(row.protocol == "rotation accuracy" for row in own):
            lines += [*rotation_lines(own, random, select(there, f"{model}.paper", measured=False), data), ""]
        if any(row.layer and row.labels_per_class is None for row in own):
            lines += probe_table(name, model, there, data)
    return lines


def paper_tables(name: str, rows: Sequence[Row]) -> list[str]:
    """What the paper has of a published network on data that these weights were not measured on."""
    model = _model_of(name)
    quoted = [row for row in rows if row.source != "measured" and _model_of(row.weights) == model]
    measured = {row.data for row in select(rows, name)}
    lines = []
    for data in dict.fromkeys(row.data for row in quoted if row.data not in measured):
        own = [row for row in quoted if row.data == data]
        layers = sorted({row.layer for row in own})
        lines += [
            f"What others report on {_images_of(data)}, the paper's networks at its full budget among them; for want of"
            " the data nothing of it was run by this project:",
            "",
            f"| protocol | pretrained | {' | '.join(layers)} |",
            f"|---|---|{'---|' * len(layers)}",
        ]
        for key in dict.fromkeys((row.protocol, row.weights, row.settings) for row in own):
            chosen = [row for row in own if (row.protocol, row.weights, row.settings) == key]
            cells = []
            for layer in layers:
                texts = [
                    f"_{_percent(row)}_{' (unchecked)' if 'unchecked' in row.source else ''}"
                    for row in chosen
                    if row.layer == layer
                ]
                cells.append(", ".join(texts))
            sources = ", ".join(dict.fromkeys(row.source.replace(" (unchecked)", "") for row in chosen))
            whose = f"{chosen[0].settings or 'by rotation'} ({sources})"
            lines.append(f"| _{chosen[0].protocol}_ | _{whose}_ | {' | '.join(cells)} |")
        lines.append("")
    return lines


def _compute(name: str, entry: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    run = json.loads((RESULTS_DIR / f"{name}.run.json").read_text())
    versions = run["versions"]
    measured = [*select(rows, name), *select(rows, f"{_model_of(name)}.random")]
    return [
        f"- `{name}` was pretrained in {_minutes(run['seconds'])} on {run['threads']} threads of {run['device']}"
        f" (torch {versions['torch']}, timm {versions['timm']}).",
        *_origin_lines(measured),
    ]


def rotation_lines(own: Sequence[Row], random: Sequence[Row], quoted: Sequence[Row], data: str) -> list[str]:
    """Rotation accuracy of some weights, of random ones and of others."""
    lines = [f"Rotation accuracy, all four rotations of each of {_images_of(data)} (chance is 25 %):", ""]
    for label, group in (("these weights", own), ("random weights", random)):
        lines += [
            f"- {label}: **{_percent(row)}** ({row.correct:,} of {row.n:,})"
            for row in group
            if row.protocol == "rotation accuracy"
        ]
    lines += [f"- {r.settings}: _{_percent(r)}_ ({r.source})" for r in quoted if r.protocol == "rotation accuracy"]
    return lines


def probe_table(name: str, model: str, rows: Sequence[Row], data: str) -> list[str]:
    """Every probe of every layer of published weights, random weights and the paper beside, and what was set how; all
    of the rows are of ``data``.
    """
    groups = {
        f"`{name}`": select(rows, name),
        "random weights": select(rows, f"{model}.random"),
        **_quoted_groups(rows, f"{model}.paper", ""),
        **_quoted_groups(rows, f"{model}.paper-random", ", random weights"),
    }
    groups = {label: [row for row in group if row.labels_per_class is None] for label, group in groups.items()}
    probed = [row for group in groups.values() for row in group if row.layer]
    layers = sorted({row.layer for row in probed})
    quoting = (
        " Numbers in italics are quoted. The gap is to the paper, in percentage points: its number took its whole"
        " budget, of pretraining and of the probe."
    )
    lines = [
        f"Accuracy of classifiers on the features of each layer, frozen but for the fine-tuned and the supervised, on"
        f" {_images_of(data)}. ± is the standard deviation over seeds."
        f"{quoting if any(row.source != 'measured' for row in probed) else ''}",
        "",
        f"| protocol | weights | {' | '.join(layers)} |",
        f"|---|---|{'---|' * len(layers)}",
    ]
    for protocol in dict.fromkeys(row.protocol for row in probed):
        ours: dict[str, list[Row]] = {}
        for label, group in groups.items():
            for cost in dict.fromkeys(row.cost for row in group if row.protocol == protocol):
                chosen = [row for row in group if (row.protocol, row.cost) == (protocol, cost)]
                cells = {layer: [row for row in chosen if row.layer == layer] for layer in layers}
                quoted = chosen[0].source != "measured"
                texts = [spread_text(cells[layer]) for layer in layers]
                if quoted:
                    texts = [f"_{text}_" if text else "" for text in texts]
                title = f"{protocol} ({cost})" if cost else protocol
                lines.append(f"| {f'_{title}_' if quoted else title} | {label} | {' | '.join(texts)} |")
                if label == f"`{name}`":
                    ours = cells
                if chosen[0].source.startswith("paper") and "random" not in label and ours:
                    gaps = [_gap(ours[layer], cells[layer]) for layer in layers]
                    lines.append(f"| gap | {chosen[0].source} | {' | '.join(gaps)} |")
    return [*lines, "", *_settings_lines(groups[f"`{name}`"], groups["random weights"]), ""]


def _settings_lines(own: Sequence[Row], random: Sequence[Row]) -> list[str]:
    """What made the numbers, protocol by protocol: with the layers where they differ, and random weights' where they
    are others.
    """
    ours, theirs = _settings(own), _settings(random)
    shown = []
    for title in dict.fromkeys((*ours, *theirs)):
        for whose, settings in (([], ours.get(title, {})), (["random weights"], theirs.get(title, {}))):
            if whose and settings == ours.get(title):
                continue
            for text, layers in settings.items():
                of = ", ".join(whose + layers * (len(settings) > 1))
                shown.append(f"- {title}{f', {of}' if of else ''}: {text}.")
    return shown


def _settings(rows: Sequence[Row]) -> dict[str, dict[str, list[str]]]:
    """By protocol and cost the settings, each with its layers."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row.layer:
            layers = found.setdefault(_titled(row), {}).setdefault(row.settings, [])
            layers += [row.layer] if row.layer not in layers else []
    return found


def _titled(row: Row) -> str:
    return f"{row.protocol} ({row.cost})" if row.cost else row.protocol


def _quoted_groups(rows: Sequence[Row], weights: str, suffix: str) -> dict[str, list[Row]]:
    quoted = [row for row in select(rows, weights, measured=False) if row.layer]
    return {
        f"_{s}{suffix}_": [row for row in quoted if row.source == s] for s in dict.fromkeys(r.source for r in quoted)
    }


def _few_labels_table(name: str, model: str, rows: Sequence[Row]) -> list[str]:
    own = [row for row in (*select(rows, name), *select(rows, f"{model}.random")) if row.labels_per_class]
    if not own:
        return []
    quoted = [row for row in select(rows, f"{model}.paper", measured=False) if row.labels_per_class]
    labels = sorted({row.labels_per_class or 0 for row in own})
    everything = " (5,000 are all of CIFAR-10)" if 5000 in labels else ""
    lines = [
        f"Accuracy with as many labels of each class{everything}:",
        "",
        f"| protocol | weights | {' | '.join(f'{count:,}' for count in labels)} |",
        f"|---|---|{'---|' * len(labels)}",
    ]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in (*own, *quoted):
        groups.setdefault((row.protocol, row.cost, row.layer, row.draw, row.weights, row.source), []).append(row)
    for (protocol, cost, layer, draw, weights, source), chosen in groups.items():
        texts = [spread_text([row for row in chosen if row.labels_per_class == count]) for count in labels]
        title, label = f"{protocol} ({cost}) on {layer}, {draw} images", f"`{weights}`"
        if source != "measured":
            title, label, texts = f"_{title}_", f"_{source}_", [f"_{text}_" if text else "" for text in texts]
        lines.append(f"| {title} | {label} | {' | '.join(texts)} |")
    return [*lines, ""]


def _model_of(name: str) -> str:
    return name.split(".", 1)[0]


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _images_of(data: str) -> str:
    """The data's name in a row, in words."""
    name, _, split = data.rpartition(" ")
    return f"the {'validation' if split == 'val' else split} images of {name}"


def _figures(name: str, titles: dict[str, str]) -> list[str]:
    return [
        f"![{title} of {name}]({FIGURES}/{name}.{kind}.png)"
        for kind, title in titles.items()
        if (ROOT / FIGURES / f"{name}.{kind}.png").exists()
    ]


def _origin_lines(rows: Sequence[Row]) -> list[str]:
    origins: dict[tuple[Any, ...], float] = {}
    for row in rows:
        key = row.weights, row.device, row.threads, row.versions.get("torch"), row.commit
        origins[key] = origins.get(key, 0.0) + (row.seconds or 0.0)
    return [
        f"- {_minutes(seconds)} for numbers of `{weights}`, its passes to cache features not counted, on"
        f" {threads} threads of {device} (torch {torch}), at commit `{commit}`."
        for (weights, device, threads, torch, commit), seconds in sorted(origins.items())
    ]


def _minutes(seconds: float) -> str:
    minutes = round(seconds / 60)
    return "1 minute" if minutes == 1 else f"{minutes} minutes"


def _hub_snippet() -> str:
    # a pinned commit, not a branch that moves under whoever loads it
    call = f'model = torch.hub.load("{REPOSITORY}:COMMIT", "rotnet_nin", trust_repo=True).eval()'
    return f"```python\nimport torch\n\n{call}\n```"


def _address(entry: dict[str, Any]) -> str:
    if entry["source"] == "release":
        return str(entry["url"])
    return f"https://huggingface.co/{entry['hub']['repository']}, sha256 `{entry['sha256']}`"


def _gap(ours: Sequence[Row], theirs: Sequence[Row]) -> str:
    if not ours or not theirs:
        return ""
    return f"{100 * (sum(r.value for r in ours) / len(ours) - sum(r.value for r in theirs) / len(theirs)):+.2f}"


def _percent(row: Row) -> str:
    return f"{100 * row.value:.2f} %"


def _cell(rows: Sequence[Row], protocol: str, cost: str, layer: str) -> str:
    found = [row for row in rows if (row.protocol, row.cost, row.layer) == (protocol, cost, layer)]
    return spread_text(found) or "not measured"
