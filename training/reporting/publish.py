"""Bundle a finished run, render the measured numbers, and upload weights to the Hugging Face Hub.

    python -m training publish bundle runs/nin rotnet_nin.cifar10
    python -m training publish figures --data DIR
    python -m training publish render [--check]
    python -m training publish --namespace ORG [--weights NAME|FOLDER ...] [--dry-run]

`bundle` copies the weights, run.json and curve of a run into the package and writes their manifest entry and golden
outputs. `figures` draws the figures from the result rows, the weights and the test images of CIFAR-10 (DIR). `render`
rewrites the rendered parts of README.md, MODEL_CARD.md and docs/ and the manifest's metrics from the result rows; with
--check it writes nothing, and fails if something would change or a figure was drawn from other rows or weights.
--namespace uploads weights to the Hub as ORG/model.tag, with their card, golden outputs, recipe and curve; it downloads
them again, compares and tags them, and writes the revision into the manifest, which you then commit. Run again, it
uploads only what is missing. --dry-run lists what each repository would contain.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save
from timm.data import resolve_model_data_config

from rotation_ssl import zoo
from rotation_ssl.backbones.about import network_facts
from rotation_ssl.demo import show
from rotation_ssl.files import replace_bytes
from rotation_ssl.images import read_images
from rotation_ssl.messages import counted
from rotation_ssl.zoo.golden import golden_file, golden_outputs
from training.datasets import load_cifar10
from training.protocols import PROTOCOLS
from training.recipes import RECIPES
from training.reporting.figures import (
    draw_accuracy_by_layer,
    draw_few_labels,
    rows_by_layer,
    rows_few_labels,
    rows_stamp,
    stamp_of,
)
from training.reporting.hub import Upload, current_version, hub_files, publish, upload_of, upload_of_folder
from training.reporting.pages import ROOT, pages, render_page
from training.reporting.pictures import draw_attention, draw_filters, draw_neighbours
from training.reporting.required import complaints, main_data
from training.reporting.rows import RESULTS_DIR, Row, read_rows
from training.reporting.tables import select

FIGURES_DIR = ROOT / "docs" / "figures"
DATA_NAMES = {
    "cifar10": "CIFAR-10, 50,000 training images without labels",
    "tinyimagenet": "Tiny-ImageNet, 100,000 training images of 64 pixels without labels",
}


def bundle(run_dir: Path, name: str) -> None:
    """Copy a run's weights into the package as ``model.tag`` and enter them into the manifest.

    Everything is checked and computed before the first file is written, and the manifest is written last.

    Raises:
        ValueError: not a finished run, one of another model or of uncommitted code, one that held training images out
            or departed from its recipe, one of other rotations than the four, or weights that do not fit the model.
    """
    weights, run_file, curve = (run_dir / file for file in ("model.safetensors", "run.json", "curve.png"))
    lacking = [file.name for file in (weights, run_file, curve) if not file.is_file()]
    if lacking:
        raise ValueError(f"{run_dir} is not a finished run: it lacks {', '.join(lacking)}")
    run = json.loads(run_file.read_text())
    recipe = run["recipe"]
    if recipe["model"] != name.split(".", 1)[0]:
        raise ValueError(f"{run_dir} is a run of {recipe['model']}, not of {name.split('.', 1)[0]}")
    if recipe["holdout"]:
        raise ValueError(f"{run_dir} held {counted(recipe['holdout'], 'image')} out: it is for tuning, not publishing")
    if recipe["data"] not in DATA_NAMES:
        raise ValueError(f"{run_dir} is of {recipe['data']}: weights are bundled of {', '.join(DATA_NAMES)}")
    layer = network_facts(recipe["model"]).recommended_layer
    if not layer:
        raise ValueError(f"{run_dir} is of {recipe['model']}, of which no layer is recommended: enter it in its FACTS")
    departures = _departures(recipe)
    if departures:
        raise ValueError(f"{run_dir} departed from its recipe: {'; '.join(departures)}; only the seed may differ")
    if recipe["rotations"] != [0, 1, 2, 3]:
        raise ValueError(
            f"{run_dir} knows the rotations {recipe['rotations']}; published weights have the head of four"
        )
    if not re.fullmatch("[0-9a-f]{40}", run["commit"]):
        raise ValueError(f"{run_dir} was trained by commit {run['commit']!r}: commit, then train what is published")
    content = weights.read_bytes()
    # the size is the recipe's, not that of the weights that are bundled already or of the paper
    input_size = (3, *[RECIPES[recipe["name"]].input_size] * 2)
    overlay = {"file": str(weights), "input_size": input_size}
    model = timm.create_model(recipe["model"], pretrained=True, pretrained_cfg_overlay=overlay)
    cfg = resolve_model_data_config(model)
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
        "recommended_layer": layer,
        **{key: list(cfg[key]) for key in ("input_size", "mean", "std")},
        **({"model_args": dict(recipe["model_args"])} if recipe.get("model_args") else {}),
        "metrics": {},
    }
    FIGURES_DIR.mkdir(parents=True, exist_ok=True)
    replace_bytes(FIGURES_DIR / f"{name}.curve.png", curve.read_bytes())
    replace_bytes(golden_file(name), save(golden_outputs(model)))
    replace_bytes(RESULTS_DIR / f"{name}.run.json", run_file.read_bytes())
    replace_bytes(zoo.WEIGHTS_DIR / entry["file"], content)
    replace_bytes(zoo.WEIGHTS_DIR / "manifest.json", _json({**_read_manifest(), name: entry}).encode())


def render(check: bool = False) -> list[Path]:
    """Render card, parts of README and docs, and manifest metrics from the rows; returns the files that differ.

    Without ``check`` those files are rewritten; with it, figures that are stale differ too.

    Raises:
        ValueError: rows that cannot be read, are missing, or are of other bytes or weights than the manifest's.
    """
    every = _read_manifest()
    entries = {name: entry for name, entry in every.items() if entry["source"] == "bundled"}
    rows = _reportable_rows(every)
    for name, entry in entries.items():
        entry["metrics"] = metrics(select(rows, name))
    wanted = {zoo.WEIGHTS_DIR / "manifest.json": _json(every)}
    wanted |= {page: render_page(page, rows, every) for page in pages()}
    different = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if not check:
        for path in different:
            replace_bytes(path, wanted[path].encode())
        return different
    return different + stale_figures(rows, entries)


def draw_figures(data_dir: Path, download: bool = False) -> list[Path]:
    """Draw the card's figures of every published weight: returns the files written.

    Raises:
        ValueError: as :func:`render`, or no CIFAR-10 in ``data_dir``.
    """
    rows = _reportable_rows(_read_manifest())
    gallery = load_cifar10(data_dir, "test", download).images
    samples = sorted((zoo.WEIGHTS_DIR.parent / "samples" / "cifar10").glob("*.png"))
    queries = read_images(samples[::4], gallery.shape[-1])  # four of each class, in its order
    photos = sorted((zoo.WEIGHTS_DIR.parent / "samples" / "photos").glob("*.jpg"))
    written = [FIGURES_DIR / "demo.png"]
    show([file for file in photos if file.stem in ("chelsea", "rocket")], [1, 3], written[0])
    for name, entry in zoo.bundled().items():
        backbone, stamp = timm.create_model(name, pretrained=True).eval(), entry["sha256"]
        kinds = ("layers", "few-labels", "filters", "attention", "neighbours")
        files = {kind: FIGURES_DIR / f"{name}.{kind}.png" for kind in kinds}
        if rows_by_layer(rows, name):
            draw_accuracy_by_layer(rows, name, files["layers"])
        else:
            files.pop("layers").unlink(missing_ok=True)
        if not draw_few_labels(rows, name, files["few-labels"]):
            files.pop("few-labels").unlink(missing_ok=True)
        draw_filters(backbone, files["filters"], stamp)
        # enlarged small images would show little of a network for larger ones
        side = entry["input_size"][-1]
        looked_at = queries if side <= queries.shape[-1] else read_images(photos, side)
        draw_attention(backbone, looked_at, files["attention"], stamp)
        draw_neighbours(backbone, entry["recommended_layer"], gallery, queries, files["neighbours"], stamp)
        written += files.values()
    return written


def _reportable_rows(every: dict[str, Any]) -> list[Row]:
    """The rows, where they are all there and of the published bytes.

    Raises:
        ValueError: they are not.
    """
    rows = read_rows()
    found = complaints(rows, every)
    if found:
        raise ValueError(found[0] + (f" (and {len(found) - 1} more such)" if len(found) > 1 else ""))
    return rows


def stale_figures(rows: list[Row], entries: dict[str, Any]) -> list[Path]:
    """Figures that are missing, or were drawn from other rows or other weights than those of now."""
    stale = []
    for name, entry in entries.items():
        wanted = {kind: entry["sha256"] for kind in ("filters", "attention", "neighbours")}
        for kind, shown in (("layers", rows_by_layer(rows, name)), ("few-labels", rows_few_labels(rows, name))):
            if shown:
                wanted[kind] = rows_stamp(shown)
        for kind, stamp in wanted.items():
            file = FIGURES_DIR / f"{name}.{kind}.png"
            if not file.is_file() or stamp_of(file) != stamp:
                stale.append(file)
    return stale


def publish_to_hub(uploads: list[Upload], namespace: str, version: str) -> Iterator[tuple[str, str]]:
    """Publish weights one after the other; yields each name with its revision, once the manifest has it.

    Raises:
        OSError: the Hub cannot be reached or refuses.
        ValueError: it serves other bytes than were uploaded, or the version is at another revision.
    """
    rows = read_rows()
    for upload in uploads:
        hub = publish(upload, namespace, version, rows)
        entry = {**upload.entry, "hub": hub}
        replace_bytes(zoo.WEIGHTS_DIR / "manifest.json", _json({**_read_manifest(), upload.name: entry}).encode())
        yield upload.name, hub["revision"]


def metrics(rows: list[Row]) -> dict[str, float]:
    """Accuracy of each protocol, budget and layer of one published weight, the mean over seeds, for the manifest.

    Numbers on other data than those its network is reported on name them.
    """
    values: dict[str, list[float]] = {}
    for row in rows:
        if row.labels_per_class is None:
            data = "" if row.data == main_data(row.weights) else f"on {row.data}"
            what = (PROTOCOLS[row.protocol].title, row.budget, row.layer, data)
            values.setdefault(" ".join(filter(None, what)), []).append(row.value)
    return {name: round(statistics.mean(numbers), 6) for name, numbers in values.items()}


def _model(name: str) -> str:
    return name.split(".", 1)[0]


def _departures(recipe: dict[str, Any]) -> list[str]:
    """What of a run's recipe differs from the named one; a field that an older run.json lacks had its default."""
    if recipe["name"] not in RECIPES:
        return [f"there is no recipe {recipe['name']!r}"]
    ours = RECIPES[recipe["name"]]
    named = json.loads(json.dumps(dataclasses.asdict(ours)))
    run = {**_defaults(ours), **recipe, "schedule": {**_defaults(ours.schedule), **recipe["schedule"]}}
    run = json.loads(json.dumps(run))  # a default is a tuple, what was read a list
    if isinstance(run["flip"], bool):
        run["flip"] = "random" if run["flip"] else "none"
    if named["precision"] == "auto" and run["precision"] in ("bf16", "fp32"):
        named["precision"] = run["precision"]  # what 'auto' was there
    run = {field: run[field] for field in named if field not in ("seed", "note")}
    return [f"{field} {named[field]} -> {value}" for field, value in run.items() if value != named[field]]


def _defaults(settings: Any) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(settings) if f.default is not dataclasses.MISSING}


def _print_uploads(uploads: list[Upload], namespace: str, version: str) -> None:
    for upload in uploads:
        repository = f"{namespace}/{upload.name}"
        print(f"{repository}, version {version}, would hold")
        for path, content in hub_files(upload, repository, version, read_rows()).items():
            print(f"  {path:24s} {len(content):>12,} bytes  sha256 {hashlib.sha256(content).hexdigest()}")


def _read_manifest() -> dict[str, Any]:
    return json.loads((zoo.WEIGHTS_DIR / "manifest.json").read_text())


def _json(entries: dict[str, Any]) -> str:
    return json.dumps(entries, indent=2) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--namespace", metavar="ORG", help="publish on the Hub under this user or organisation")
    parser.add_argument(
        "--weights", nargs="+", metavar="NAME|FOLDER", help="weights, or folders of rotation-ssl convert [all bundled]"
    )
    parser.add_argument("--version", default=current_version(), help="tag of this upload on the Hub [%(default)s]")
    parser.add_argument("--dry-run", action="store_true", help="list what would be uploaded, and upload nothing")
    parser.add_argument("--license", default="", help="licence of a folder's weights, as the Hub names it")
    parser.add_argument("--trained-on", default="", help="data that a folder's weights were trained on")
    parser.add_argument("--layer", default="", help="recommended layer of a folder's weights")
    commands = parser.add_subparsers(dest="command", metavar="{bundle,figures,render}")
    bundling = commands.add_parser("bundle", help="copy a finished run into the package and the manifest")
    bundling.add_argument("run", type=Path, metavar="RUN", help="output folder of `python -m training pretrain`")
    bundling.add_argument("name", metavar="MODEL.TAG", help="the name the weights are published under")
    drawing = commands.add_parser("figures", help="draw the figures")
    drawing.add_argument("--data", type=Path, default=Path("data/cifar10"), help="folder of CIFAR-10 [%(default)s]")
    drawing.add_argument("--download", action="store_true", help="let torchvision download CIFAR-10 into --data")
    rendering = commands.add_parser("render", help="render the pages and the metrics from the result rows")
    rendering.add_argument("--check", action="store_true", help="write nothing; fail if something would change")
    args = parser.parse_args(arguments)
    if (args.command is None) == (args.namespace is None):
        parser.error("give one of the commands, or --namespace")
    try:
        if args.namespace:
            uploads = [
                upload_of_folder(Path(name), args.license, args.trained_on, args.layer)
                if Path(name).is_dir()
                else upload_of(name)
                for name in args.weights or zoo.bundled()
            ]
            if args.dry_run:
                _print_uploads(uploads, args.namespace, args.version)
                return 0
            for name, revision in publish_to_hub(uploads, args.namespace, args.version):
                print(f"{args.namespace}/{name}@{revision} is verified, {args.version}, and in the manifest: commit it")
            return 0
        if args.command == "bundle":
            bundle(args.run, args.name)
            print(f"bundled {args.name}; commit, then python -m training measure {args.name}")
            return 0
        if args.command == "figures":
            for path in draw_figures(args.data, args.download):
                print(f"wrote {path.relative_to(ROOT)}")
            return 0
        different = render(args.check)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in different:
        print(f"{'differs' if args.check else 'wrote'} {path.relative_to(ROOT)}")
    return 1 if args.check and different else 0
