"""Bundle a finished run, render the measured numbers, and upload weights to the Hugging Face Hub.

    python -m training publish bundle runs/nin rotnet_nin.cifar10 [--half]
    python -m training publish figures --data DIR
    python -m training publish render [--check]
    python -m training publish upload --namespace ORG [--weights NAME|FOLDER ...] [--dry-run]

`bundle` copies the weights, run.json and curve of a run into the package and writes their manifest entry and golden
outputs; with --half the weights are stored in half precision. `figures` draws the figures from the result rows, the
weights and the test images of CIFAR-10 (DIR). `render` rewrites the rendered parts of README.md, MODEL_CARD.md and
docs/, the manifest's metrics, and page and figure of the study, from the result rows; with --check it writes nothing,
and fails if something would change or a figure was drawn from other rows or weights. `upload` uploads weights to the
Hub as ORG/model.tag, with their card, golden outputs, recipe and curve; it downloads them again, compares and tags
them, and writes the revision into the manifest, which you then commit. Run again, it uploads only what is missing.
--dry-run lists what each repository would contain.
"""

import argparse
import hashlib
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm

from rotation_ssl import zoo
from rotation_ssl.demo import show
from rotation_ssl.files import replace_bytes
from rotation_ssl.images import read_images
from training.command import add_cifar10, create_parser, run
from training.datasets import load_cifar10
from training.protocols import PROTOCOLS
from training.reporting.bundle import bundle
from training.reporting.figures import ROW_FIGURES, rows_stamp, stamp_of
from training.reporting.hub.files import hub_files
from training.reporting.hub.upload import current_version, publish
from training.reporting.hub.weights import Upload, upload_of, upload_of_folder
from training.reporting.manifest import enter_manifest, manifest_text, read_manifest
from training.reporting.pages import FIGURES_DIR, ROOT, pages, render_page
from training.reporting.pictures import draw_attention, draw_filters, draw_neighbours
from training.reporting.required import complaints, main_data
from training.reporting.rows import Row, read_rows
from training.reporting.tables import is_application, select
from training.studies import networks, nin_cifar10

WEIGHTS_FIGURES = ("filters", "attention", "neighbours")


def render(check: bool = False) -> list[Path]:
    """Render card, parts of README and docs, the studies and manifest metrics from the rows; returns what differs.

    Without ``check`` those files are rewritten; with it, figures that are stale differ too.
    """
    every = read_manifest()
    entries = {name: entry for name, entry in every.items() if entry["source"] == "bundled"}
    rows = _reportable_rows(every)
    for name, entry in entries.items():
        entry["metrics"] = metrics(select(rows, name))
    wanted = {zoo.WEIGHTS_DIR / "manifest.json": manifest_text(every)}
    wanted |= {page: render_page(page, rows, every) for page in pages()}
    wanted |= {study.PAGE: study.page_text() for study in (nin_cifar10, networks)}
    different = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if check:
        return different + nin_cifar10.render_figure(check) + stale_figures(rows, entries)
    for path in different:
        replace_bytes(path, wanted[path].encode())
    return different + nin_cifar10.render_figure()


def draw_figures(data_dir: Path, download: bool = False) -> list[Path]:
    """Draw the card's figures of every published weight: returns the files written."""
    rows = _reportable_rows(read_manifest())
    gallery = load_cifar10(data_dir, "test", download).images
    samples = sorted((zoo.WEIGHTS_DIR.parent / "samples" / "cifar10").glob("*.png"))
    queries = read_images(samples[::4], gallery.shape[-1])  # four of each class, in its order
    photos = sorted((zoo.WEIGHTS_DIR.parent / "samples" / "photos").glob("*.jpg"))
    written = [FIGURES_DIR / "demo.png"]
    show([file for file in photos if file.stem in ("chelsea", "rocket")], [1, 3], written[0])
    for name, entry in zoo.bundled().items():
        backbone, stamp = timm.create_model(name, pretrained=True).eval(), entry["sha256"]
        files = {kind: FIGURES_DIR / f"{name}.{kind}.png" for kind in (*ROW_FIGURES, *WEIGHTS_FIGURES)}
        for kind, (select_rows, draw) in ROW_FIGURES.items():
            if shown := select_rows(rows, name):
                draw(shown, name, files[kind])
            else:
                files.pop(kind).unlink(missing_ok=True)
        draw_filters(backbone, files["filters"], stamp)
        # enlarged small images would show little of a network for larger ones
        side = entry["input_size"][-1]
        looked_at = queries if side <= queries.shape[-1] else read_images(photos, side)
        draw_attention(backbone, looked_at, files["attention"], stamp)
        draw_neighbours(backbone, entry["recommended_layer"], gallery, queries, files["neighbours"], stamp)
        written += files.values()
    return written


def _reportable_rows(every: dict[str, Any]) -> list[Row]:
    """The rows; an error unless they are all there and of the published bytes."""
    rows = read_rows()
    found = complaints(rows, every)
    if found:
        raise ValueError(found[0] + (f" (and {len(found) - 1} more such)" if len(found) > 1 else ""))
    return rows


def stale_figures(rows: list[Row], entries: dict[str, Any]) -> list[Path]:
    """Figures that are missing, or were drawn from other rows or other weights than those of now."""
    stale = []
    for name, entry in entries.items():
        wanted = dict.fromkeys(WEIGHTS_FIGURES, entry["sha256"])
        for kind, (select_rows, _) in ROW_FIGURES.items():
            # of no rows there is to be no figure
            wanted[kind] = rows_stamp(shown) if (shown := select_rows(rows, name)) else ""
        for kind, stamp in wanted.items():
            file = FIGURES_DIR / f"{name}.{kind}.png"
            if (stamp_of(file) if file.is_file() else "") != stamp:
                stale.append(file)
    return stale


def publish_to_hub(uploads: list[Upload], namespace: str, version: str) -> Iterator[tuple[str, str]]:
    """Publish weights one after the other; yields each name with its revision, once the manifest has it."""
    rows = _reportable_rows(read_manifest())
    for upload in uploads:
        hub = publish(upload, namespace, version, rows)
        entry = {**upload.entry, "hub": hub}
        enter_manifest(upload.name, entry)
        yield upload.name, hub["revision"]


def metrics(rows: list[Row]) -> dict[str, float]:
    """Rotation and probe accuracies of one published weight, the mean over seeds, for the manifest and the Hub.

    Numbers on other data than those its network is reported on name them.
    """
    values: dict[str, list[float]] = {}
    for row in rows:
        if row.labels_per_class is None and not is_application(row):
            data = "" if row.data == main_data(row.weights) else f"on {row.data}"
            what = (PROTOCOLS[row.protocol].title, row.budget, row.layer, data)
            values.setdefault(" ".join(filter(None, what)), []).append(row.value)
    return {name: round(statistics.mean(numbers), 6) for name, numbers in values.items()}


def _print_uploads(uploads: list[Upload], namespace: str, version: str) -> None:
    rows = _reportable_rows(read_manifest())
    for upload in uploads:
        repository = f"{namespace}/{upload.name}"
        print(f"{repository}, version {version}, would hold")
        for path, content in hub_files(upload, repository, version, rows).items():
            print(f"  {path:24s} {len(content):>12,} bytes  sha256 {hashlib.sha256(content).hexdigest()}")


def _upload(args: argparse.Namespace) -> None:
    uploads = [
        upload_of_folder(Path(name), args.license, args.trained_on, args.layer)
        if Path(name).is_dir()
        else upload_of(name)
        for name in args.weights or zoo.bundled()
    ]
    if args.dry_run:
        _print_uploads(uploads, args.namespace, args.version)
        return
    for name, revision in publish_to_hub(uploads, args.namespace, args.version):
        print(f"{args.namespace}/{name}@{revision} is verified, {args.version}, and in the manifest: commit it")


def _bundle(args: argparse.Namespace) -> None:
    bundle(args.run, args.name, args.half)
    print(f"bundled {args.name}; commit, then python -m training measure {args.name}")


def _draw(args: argparse.Namespace) -> None:
    for path in draw_figures(args.data, args.download):
        print(f"wrote {path.relative_to(ROOT)}")


def _render(args: argparse.Namespace) -> int:
    changed = render(args.check)
    for path in changed:
        print(f"{'differs' if args.check else 'wrote'} {path.relative_to(ROOT)}")
    return 1 if args.check and changed else 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = create_parser("publish", __doc__)
    commands = parser.add_subparsers(required=True, metavar="{bundle,figures,render,upload}")
    bundling = commands.add_parser("bundle", help="copy a finished run into the package and the manifest")
    bundling.add_argument("run", type=Path, metavar="RUN", help="output folder of `python -m training pretrain`")
    bundling.add_argument("name", metavar="MODEL.TAG", help="the name the weights are published under")
    bundling.add_argument("--half", action="store_true", help="store the weights in half precision")
    bundling.set_defaults(work=_bundle)
    drawing = commands.add_parser("figures", help="draw the figures")
    add_cifar10(drawing)
    drawing.set_defaults(work=_draw)
    rendering = commands.add_parser("render", help="render the pages and the metrics from the result rows")
    rendering.add_argument("--check", action="store_true", help="write nothing; fail if something would change")
    rendering.set_defaults(work=_render)
    uploading = commands.add_parser("upload", help="upload weights to the Hugging Face Hub")
    uploading.add_argument("--namespace", required=True, metavar="ORG", help="user or organisation on the Hub")
    uploading.add_argument(
        "--weights", nargs="+", metavar="NAME|FOLDER", help="weights, or folders of rotation-ssl convert [all bundled]"
    )
    uploading.add_argument("--version", default=current_version(), help="tag of this upload on the Hub [%(default)s]")
    uploading.add_argument("--dry-run", action="store_true", help="list what would be uploaded, and upload nothing")
    uploading.add_argument("--license", default="", help="licence of a folder's weights, as the Hub names it")
    uploading.add_argument("--trained-on", default="", help="data that a folder's weights were trained on")
    uploading.add_argument("--layer", default="", help="recommended layer of a folder's weights")
    uploading.set_defaults(work=_upload)
    args = parser.parse_args(arguments)
    return run(lambda: args.work(args))
