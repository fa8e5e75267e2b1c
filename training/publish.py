"""Put a finished run into the package, and the measured numbers into the card.

    python -m training.publish bundle runs/nin rotnet_nin.cifar10
    python -m training.publish render [--check]

`bundle` copies the run's weights, run.json and curve into place, writes their manifest entry and golden outputs.
`render` rewrites MODEL_CARD.md, the rendered parts of README.md and the manifest's metrics from the result rows; with
--check it writes nothing and fails when something would change.
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path
from string import Template
from typing import Any

import timm
import torch
from safetensors.torch import save
from timm.data import resolve_model_data_config

from rotation_ssl import zoo
from rotation_ssl.features import extract_features, layer_modules
from training.data import normalize, read_images
from training.results import RESULTS_DIR, Row, read_rows

ROOT = Path(__file__).parent.parent
CARD_TEMPLATE = Path(__file__).parent / "model_card.md"
FIGURES_DIR = ROOT / "docs" / "figures"
GOLDEN_DIR = ROOT / "tests" / "data"
# the repository has no public address yet: this is the one place that names it
REPOSITORY = "OWNER/rotation_ssl"
PAPER_ROTATED_IMAGES = 100 * 4 * 50_000  # 100 epochs of all four rotations of CIFAR-10's training images
RECOMMENDED_LAYERS = {"rotnet_nin": "block2", "rotnet_nin3": "block2", "rotnet_nin5": "block2"}  # table 1 of the paper
DATA_NAMES = {"cifar10": "CIFAR-10, 50,000 training images without labels"}


def bundle(run_dir: Path, name: str) -> None:
    """Copy a run's weights into the package as ``model.tag`` and enter them into the manifest.

    Everything is checked and computed before the first file is written, and the manifest is written last.

    Raises:
        ValueError: not a finished run, one of another model or of uncommitted code, one that held training images out,
            or weights that do not fit the model.
    """
    weights, run_file, curve = (run_dir / file for file in ("weights.safetensors", "run.json", "curve.png"))
    lacking = [file.name for file in (weights, run_file, curve) if not file.is_file()]
    if lacking:
        raise ValueError(f"{run_dir} is not a finished run: it lacks {', '.join(lacking)}")
    run = json.loads(run_file.read_text())
    recipe = run["recipe"]
    if recipe["model"] != name.split(".", 1)[0]:
        raise ValueError(f"{run_dir} is a run of {recipe['model']}, not of {name.split('.', 1)[0]}")
    if recipe["holdout"]:
        raise ValueError(f"{run_dir} held {recipe['holdout']} images out: it is for tuning, not publishing")
    if not re.fullmatch("[0-9a-f]{40}", run["commit"]):
        raise ValueError(f"{run_dir} was trained by commit {run['commit']!r}: commit, then train what is published")
    content, golden = weights.read_bytes(), golden_outputs(weights, recipe["model"])
    entry = {
        "source": "bundled",
        "file": f"{name}.safetensors",
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
        "license": "mit",
        "origin": "trained by this project",
        "recipe": recipe["name"],
        "data": DATA_NAMES[recipe["data"]],
        "rotated_images": run["rotated_images"],
        "seed": recipe["seed"],
        "commit": run["commit"],
        "recommended_layer": RECOMMENDED_LAYERS[recipe["model"]],
        "metrics": {},
    }
    FIGURES_DIR.mkdir(parents=True, exist_ok=True)
    _replace(FIGURES_DIR / f"{name}.curve.png", curve.read_bytes())
    _replace(GOLDEN_DIR / f"{name}.golden.safetensors", save(golden))
    _replace(RESULTS_DIR / f"{name}.run.json", run_file.read_bytes())
    _replace(zoo.WEIGHTS_DIR / entry["file"], content)
    _replace(zoo.WEIGHTS_DIR / "manifest.json", _json({**_read_manifest(), name: entry}).encode())


def golden_outputs(weights: Path, model_name: str) -> dict[str, torch.Tensor]:
    """What the weights give for every fifth sample image: logits (N, 4) and each layer's global average (N, C).

    Raises:
        ValueError: the weights are damaged or do not fit the model.
    """
    model = timm.create_model(model_name, pretrained=True, pretrained_cfg_overlay={"file": str(weights)})
    files = sorted((zoo.WEIGHTS_DIR.parent / "samples" / "cifar10").glob("*.png"))[::5]
    cfg = resolve_model_data_config(model)
    batch = normalize(read_images(files, cfg["input_size"][-1]), cfg["mean"], cfg["std"])
    with torch.inference_mode():
        logits = model.eval()(batch)
    return {"input": batch, "logits": logits, **extract_features(model, [batch], list(layer_modules(model)))}


def render(check: bool = False) -> list[Path]:
    """Render card, README parts and manifest metrics from the rows; returns the files that differ from it.

    Without ``check`` those files are rewritten.

    Raises:
        ValueError: rows that cannot be read, or rows of other bytes than the manifest's.
    """
    rows = read_rows()
    entries = _read_manifest()
    _check_hashes(rows, entries)
    for name, entry in entries.items():
        entry["metrics"] = {_metric_name(row): row.value for row in _of(rows, name) if _is_headline(row)}
    wanted = {
        zoo.WEIGHTS_DIR / "manifest.json": _json(entries),
        ROOT / "MODEL_CARD.md": render_card(rows, entries),
        ROOT / "README.md": render_readme((ROOT / "README.md").read_text(), rows, entries),
    }
    different = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if not check:
        for path in different:
            _replace(path, wanted[path].encode())
    return different


def render_card(rows: list[Row], entries: dict[str, Any]) -> str:
    """The text of MODEL_CARD.md."""
    sections = [_weights_section(name, entry, rows) for name, entry in entries.items()]
    values = {"repository": REPOSITORY, "weights": weights_table(rows, entries), "sections": "\n\n".join(sections)}
    return Template(CARD_TEMPLATE.read_text()).substitute(values)


def render_readme(text: str, rows: list[Row], entries: dict[str, Any]) -> str:
    """README with its rendered parts, each between ``<!-- rendered: NAME -->`` and ``<!-- end -->``, made anew.

    Raises:
        ValueError: a part that this program does not know.
    """
    parts = {"weights": weights_table(rows, entries), "repository": _hub_snippet()}

    def replace(match: re.Match[str]) -> str:
        if match[1] not in parts:
            raise ValueError(f"README.md has an unknown rendered part {match[1]!r}; there are {', '.join(parts)}")
        return f"<!-- rendered: {match[1]} -->\n{parts[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- rendered: (\w+) -->\n.*?\n?<!-- end -->", replace, text, flags=re.DOTALL)


def weights_table(rows: list[Row], entries: dict[str, Any]) -> str:
    """One line a published weight, its size and its headline numbers."""
    lines = [
        "| weights | trained on | rotated images | size | layer | rotation accuracy | linear probe | k-NN |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in entries.items():
        own, layer = _of(rows, name), entry["recommended_layer"]
        cells = [
            f"`{name}`",
            entry["data"],
            f"{entry['rotated_images']:,}",
            f"{entry['size'] / 1e6:.1f} MB",
            f"`{layer}`",
            _cell(own, "rotation accuracy", ""),
            _cell(own, "linear probe", layer),
            _cell(own, "k-NN", layer),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _weights_section(name: str, entry: dict[str, Any], rows: list[Row]) -> str:
    run = json.loads((RESULTS_DIR / f"{name}.run.json").read_text())
    model = name.split(".", 1)[0]
    minutes, versions = run["seconds"] / 60, run["versions"]
    own = _of(rows, name)
    lines = [
        f"### `{name}`",
        "",
        f"- sha256 `{entry['sha256']}`, {entry['size']:,} bytes, safetensors, fp32, {entry['source']} in the wheel;"
        f" licence {entry['license']}.",
        f"- Training: recipe `{entry['recipe']}`, seed {entry['seed']}, commit `{entry['commit']}`, on {entry['data']}:"
        f" {entry['rotated_images']:,} rotated images in {minutes:.0f} minutes on {run['threads']} threads of"
        f" {run['device']} (torch {versions['torch']}, timm {versions['timm']}).",
        f"- Budget: {entry['rotated_images'] / PAPER_ROTATED_IMAGES:.1%} of the paper's"
        f" {PAPER_ROTATED_IMAGES / 1e6:.0f} million rotated images"
        " (100 epochs of 4 x 50,000). These are small-budget weights: expect less of them than of the paper's.",
        f"- Curve: [`docs/figures/{name}.curve.png`](docs/figures/{name}.curve.png).",
        "",
        *_rotation_lines(own, _of(rows, f"{model}.random"), _quoted(rows, model, "rotation accuracy")),
        "",
        *_probe_table(name, model, rows),
    ]
    measured = {(row.device, row.threads, row.versions.get("torch"), row.commit) for row in own}
    lines += ["", *(f"Measured on {d}, {t} threads, torch {v}, commit `{c}`." for d, t, v, c in sorted(measured))]
    return "\n".join(lines)


def _rotation_lines(own: list[Row], random: list[Row], quoted: list[Row]) -> list[str]:
    lines = ["Rotation accuracy, all four rotations of each image of the CIFAR-10 test set (chance is 25 %):", ""]
    for label, group in (("these weights", own), ("random weights", random)):
        lines += [
            f"- {label}{_seed(row)}: **{_percent(row)}** ({row.correct:,} of {row.n:,})"
            for row in group
            if row.protocol == "rotation accuracy"
        ]
    lines += [f"- {row.settings}: _{_percent(row)}_ ({row.source})" for row in quoted]
    return lines


def _probe_table(name: str, model: str, rows: list[Row]) -> list[str]:
    own, random = _of(rows, name), _of(rows, f"{model}.random")
    quoted = [row for row in rows if row.weights == f"{model}.paper" and row.layer]
    probes = [row for row in own if row.layer]
    layers = sorted({row.layer for row in probes + quoted})
    lines = [
        "Accuracy on the CIFAR-10 test set of classifiers on the frozen features of each block (italics: not ours).",
        "",
        f"| protocol | weights | {' | '.join(layers)} |",
        f"|---|---|{'---|' * len(layers)}",
    ]
    for protocol in dict.fromkeys(row.protocol for row in probes):
        for label, group in ((f"`{name}`", own), ("random", random)):
            cells = {row.layer: _percent(row) for row in group if row.protocol == protocol}
            if cells:
                lines.append(f"| {protocol} | {label} | {' | '.join(cells.get(x, '') for x in layers)} |")
    for protocol in dict.fromkeys(row.protocol for row in quoted):
        cells = {row.layer: f"_{_percent(row)}_" for row in quoted if row.protocol == protocol}
        source = next(row.source for row in quoted if row.protocol == protocol)
        lines.append(f"| _{protocol}_ | _{source}_ | {' | '.join(cells.get(x, '') for x in layers)} |")
    lines += ["", *(f"- {p}: {s}." for p, s in dict.fromkeys((row.protocol, row.settings) for row in probes))]
    return lines


def _hub_snippet() -> str:
    # a pinned commit, not a branch that moves under whoever loads it
    call = f'model = torch.hub.load("{REPOSITORY}:COMMIT", "rotnet_nin", trust_repo=True).eval()'
    return f"```python\nimport torch\n\n{call}\n```"


def _check_hashes(rows: list[Row], entries: dict[str, Any]) -> None:
    for row in rows:
        if row.weights in entries and row.source == "measured" and row.sha256 != entries[row.weights]["sha256"]:
            raise ValueError(
                f"the row of {row.weights}, {row.protocol} {row.layer} is of other bytes (sha256 {row.sha256}) than "
                "the manifest's: measure the weights again with `python -m training.evaluate`"
            )


def _of(rows: list[Row], weights: str) -> list[Row]:
    return [row for row in rows if row.weights == weights]


def _quoted(rows: list[Row], model: str, protocol: str) -> list[Row]:
    return [row for row in rows if row.weights == f"{model}.paper" and row.protocol == protocol]


def _is_headline(row: Row) -> bool:
    return row.protocol in ("rotation accuracy", "linear probe", "k-NN")


def _metric_name(row: Row) -> str:
    return f"{row.protocol} {row.layer}".strip()


def _seed(row: Row) -> str:
    return "" if row.seed is None else f" of seed {row.seed}"


def _percent(row: Row) -> str:
    return f"{100 * row.value:.2f} %"


def _cell(rows: list[Row], protocol: str, layer: str) -> str:
    found = [row for row in rows if (row.protocol, row.layer) == (protocol, layer)]
    return _percent(found[0]) if found else "not measured"


def _read_manifest() -> dict[str, Any]:
    return json.loads((zoo.WEIGHTS_DIR / "manifest.json").read_text())


def _json(entries: dict[str, Any]) -> str:
    return json.dumps(entries, indent=2) + "\n"


def _replace(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training.publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    bundling = commands.add_parser("bundle", help="copy a finished run into the package and the manifest")
    bundling.add_argument("run", type=Path, metavar="RUN", help="output folder of training.pretrain")
    bundling.add_argument("name", metavar="MODEL.TAG", help="the name the weights are published under")
    rendering = commands.add_parser("render", help="write card, README parts and metrics from the result rows")
    rendering.add_argument("--check", action="store_true", help="write nothing; fail when something would change")
    args = parser.parse_args(arguments)
    try:
        if args.command == "bundle":
            bundle(args.run, args.name)
            print(f"bundled {args.name}; now measure it: python -m training.evaluate {args.name}")
            return 0
        different = render(args.check)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in different:
        print(f"{'differs' if args.check else 'wrote'} {path.relative_to(ROOT)}")
    return 1 if args.check and different else 0


if __name__ == "__main__":
    sys.exit(main())
