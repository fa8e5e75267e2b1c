"""rotation-ssl outliers."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from rotation_ssl.cli.features import file_name, kinds, read_batches
from rotation_ssl.cli.options import add_command, add_device, check_output, positive
from rotation_ssl.files import replace_file, write_csv
from rotation_ssl.images import find_files, large_images_allowed, read_image, square
from rotation_ssl.messages import counted, printable, some
from rotation_ssl.models import DEFAULT_MODEL, load_model, recommended_layer
from rotation_ssl.outliers import RotationOutlierDetector

BATCH = 64
NEIGHBOURS = 10
SHEET = (6, 5)  # columns and rows
CELL, CAPTION = 160, 16  # pixels
DETAILS = """

With --normal the score is the cosine distance to the Nth nearest normal image in a middle layer (k-NN); without, it is
how badly the network predicts the rotation of the image, which needs a network with four outputs. Higher means more
outlying. FILE gets a row for each image, the most outlying first; --sheet draws the first 30.

Images that cannot be read are skipped and listed, and the exit status is then 1. Files of other kinds are counted.
"""


def add(commands: Any) -> None:
    """Add the command."""
    added = add_command(
        commands, "outliers", run, "rank images by how little they resemble normal ones", DETAILS, as_json=False
    )
    added.add_argument("images", type=Path, metavar="IMAGES", help="folder of images, searched recursively")
    added.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="CSV file of the scores")
    added.add_argument("--normal", type=Path, metavar="FOLDER", help="folder of normal images to compare with")
    added.add_argument("--sheet", type=Path, metavar="PNG", help="picture of the most outlying images")
    added.add_argument("--model", default=DEFAULT_MODEL, help="timm model: model.tag, local-dir:... [%(default)s]")
    added.add_argument("--layer", help="layer to compare in, with --normal [the recommended one]")
    added.add_argument(
        "--neighbours",
        type=positive,
        metavar="N",
        help=f"use the distance to the Nth nearest normal image, with --normal [{NEIGHBOURS}]",
    )
    added.add_argument("--force", action="store_true", help="replace FILE and PNG if they exist")
    add_device(added)


@large_images_allowed()
def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if args.layer and not args.normal:
        raise ValueError("--layer is for the comparison with normal images: add --normal FOLDER")
    if args.neighbours and not args.normal:
        raise ValueError("--neighbours is for the comparison with normal images: add --normal FOLDER")
    if args.sheet and args.sheet.absolute() == args.output.absolute():
        raise ValueError("-o and --sheet are the same file: give another name")
    for option, file, suffix in (("-o", args.output, ".csv"), ("--sheet", args.sheet, ".png")):
        if file and file.suffix.lower() != suffix:
            raise ValueError(f"{option} {file} does not end in {suffix}; give another name")
    images, others = find_files(args.images)
    normal, other_normal = find_files(args.normal) if args.normal else ([], [])
    neighbours = args.neighbours or NEIGHBOURS
    if normal and len(normal) < neighbours:
        raise ValueError(
            f"{args.normal} holds {len(normal)} images: --neighbours {neighbours} needs as many; give a smaller number"
        )
    for file in filter(None, (args.output, args.sheet)):
        check_output(file, [*images, *normal], args.force)
    model = load_model(args.model, args.device)
    layer = (args.layer or recommended_layer(model, args.model, "--layer")) if normal else ""
    score = "knn" if normal else "rotation"
    detector = RotationOutlierDetector(model, score, layer, neighbours)
    broken: dict[Path, str] = {}
    if normal:
        detector.fit(read_batches(model, normal, BATCH, broken))
    scores = [detector.predict(batch.to(args.device)) for batch in read_batches(model, images, BATCH, broken)]
    read = [file for file in images if file not in broken]
    ranked = sorted(zip(torch.cat(scores).tolist(), read, strict=True), key=lambda pair: -pair[0])
    scored = [(file_name(file, args.images), f"{value:.6g}") for value, file in ranked]
    replace_file(args.output, lambda path: write_csv(path, ["file", "score"], scored))
    if args.sheet:
        replace_file(args.sheet, lambda path: draw_sheet(ranked[: SHEET[0] * SHEET[1]], args.images).save(path, "PNG"))
    compared = sum(file not in broken for file in normal)
    by = f"distance in {layer} to {counted(compared, 'normal image')}" if normal else "rotation"
    print(f"{args.output}: {counted(len(read), 'image')} by {by}, with {args.model}")
    for value, file in ranked[:5]:
        print(f"{value:9.4f}  {printable(file_name(file, args.images))}")
    if others:
        print(f"not read: {kinds(others)}")
    if other_normal:
        print(f"not read in {printable(args.normal)}: {kinds(other_normal)}")
    if broken:
        print(f"skipped {counted(len(broken), 'broken image')}: {some([printable(file) for file in broken])}")
    return 1 if broken else 0


def draw_sheet(ranked: Sequence[tuple[float, Path]], folder: Path) -> Image.Image:
    """Images in their order, row by row, each with its score and the end of its name."""
    columns = SHEET[0]
    rows = -(-len(ranked) // columns)
    sheet = Image.new("RGB", (columns * CELL, rows * (CELL + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (value, file) in enumerate(ranked):
        left, top = number % columns * CELL, number // columns * (CELL + CAPTION)
        sheet.paste(square(read_image(file), CELL - 4), (left + 2, top + 2))
        name = printable(file_name(file, folder)).encode("ascii", "replace").decode()
        draw.text((left + 4, top + CELL), f"{value:.3f}  {name[-16:]}", fill="black")
    return sheet
