"""The study of small networks for the orientation of photographs, each trained for about as long as the others.

    python -m training networks --data SETS/photos --photos SETS

SETS contains imagewoof2-320 and caltech101, SETS/photos is the dataset `photos` of `python -m training photos`. Every
network is trained with the settings of `alexnet-photos-cpu`, but in fp32, and compared on the two datasets that
temperature and thresholds are fitted on; the datasets of the reported numbers are not read. Result rows are written to
training/results/study/ as they are measured; `python -m training publish render` renders the table of
training/studies/networks.md. A network that has its rows is skipped, a stopped training continues.
"""

import argparse
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from rotation_ssl.evaluation.frozen import PARTS
from rotation_ssl.files import sha256_of
from rotation_ssl.machine import check_device
from rotation_ssl.pretraining.images import UnlabelledImages
from rotation_ssl.pretraining.options import WORKERS
from rotation_ssl.pretraining.recipe import Recipe, with_steps
from rotation_ssl.pretraining.setup import create_model
from training.command import add_device, create_parser, run, run_each
from training.datasets import DATASETS, open_unlabelled
from training.evaluation.orientation import (
    FITTED_ON,
    UPRIGHT,
    fit_temperature,
    photo_list,
    picture_logits,
    probabilities,
)
from training.evaluation.subject import Subject, measured_row
from training.pretrain import finished_run
from training.protocols import orientation_settings
from training.recipes import ALEXNET_PHOTOS_CPU
from training.reporting.pages import replace_parts
from training.reporting.report import keep_row
from training.reporting.rows import RESULTS_DIR, Row, read_file, require_committed
from training.reporting.tables import markdown_table

ROWS = RESULTS_DIR / "study" / "networks.jsonl"
PAGE = Path(__file__).with_suffix(".md")
SIZE = 160  # pixels of a square, as `rotation-ssl orient` takes it


def candidate(name: str, model: str, steps: int, **arguments: int | tuple[int, ...]) -> Recipe:
    """The recipe of a network, made with other ``arguments`` than its own, that is trained for ``steps`` steps."""
    recipe = with_steps(ALEXNET_PHOTOS_CPU, steps)
    return dataclasses.replace(
        recipe, name=name, model=model, model_args=tuple(arguments.items()), precision="fp32", note=""
    )


# the slower a network's forward and backward pass, the fewer steps
CANDIDATES = {
    recipe.name: recipe
    for recipe in (
        candidate("alexnet", "rotnet_alexnet", 760, fc_size=0),
        candidate("alexnet-fc-256", "rotnet_alexnet", 760, fc_size=256),
        candidate("regnetx-004", "regnetx_004", 630),
    )
}


def run_candidate(
    recipe: Recipe,
    images: torch.Tensor | UnlabelledImages,
    photos: Mapping[str, Sequence[Path]],
    output: Path,
    file: Path,
    device: str = "cpu",
) -> None:
    """Train a network, or continue its training, and measure it: a row for each of the datasets."""
    weights = finished_run(recipe, images, output, device, WORKERS)
    subject = _trained(recipe, weights).on(device)
    started = time.monotonic()
    logits = {name: picture_logits(subject, photos[name], SIZE) for name in FITTED_ON}
    seconds = (time.monotonic() - started) / len(logits)
    temperature = fit_temperature([each for own in logits.values() for each in own])
    for name, own in logits.items():
        right = probabilities(own, temperature).argmax(1) == UPRIGHT
        row = measured_row(
            subject, [int(part.sum()) for part in right.tensor_split(PARTS)], len(right), DATASETS[name].name,
            orientation_settings(SIZE, temperature), seconds, protocol="orientation", layer="", recipe=recipe.name,
        )  # fmt: skip
        keep_row(row, file)


def _trained(recipe: Recipe, weights: Path) -> Subject:
    # not load_subject, which knows no arguments of a model
    backbone = create_model(recipe).eval()
    backbone.load_state_dict(load_file(weights))
    sha256 = sha256_of(weights)
    return Subject(f"{recipe.model}@{sha256[:12]}", recipe.model, backbone, sha256, SIZE)


def results(file: Path) -> dict[str, dict[str, Row]]:
    """The rows of each network that has all of its numbers, by dataset, in the study's order."""
    rows = read_file(file) if file.exists() else []
    found = {name: {row.data: row for row in rows if row.recipe == name} for name in CANDIDATES}
    return {name: own for name, own in found.items() if len(own) == len(FITTED_ON)}


def table(found: dict[str, dict[str, Row]]) -> str:
    """The page's table, with a line for each network."""
    lines = []
    for name, own in found.items():
        recipe = CANDIDATES[name]
        parameters = sum(p.numel() for p in create_model(recipe).parameters())
        together = sum(row.correct or 0 for row in own.values()) / sum(row.n or 0 for row in own.values())
        values = [f"{100 * value:.2f} %" for value in (*(own[DATASETS[d].name].value for d in FITTED_ON), together)]
        lines.append((f"`{name}`", f"{parameters / 1e6:.2f} M", f"{recipe.rotated_images:,}", *values))
    titles = (*(DATASETS[name].name for name in FITTED_ON), "both together")
    return markdown_table(("network", "parameters", "rotated images", *titles), lines)


def page_text() -> str:
    """The page with its table of the published rows.

    Raises:
        ValueError: a network has no rows.
    """
    found = results(ROWS)
    if lacking := [name for name in CANDIDATES if name not in found]:
        raise ValueError(f"{ROWS} has no rows of {', '.join(lacking)}: run the study first")
    return replace_parts(PAGE.read_text(), {"networks": lambda: table(found)}, PAGE.name)


def _work(args: argparse.Namespace) -> int:
    check_device(args.device)
    if args.rows.resolve() == ROWS.resolve():
        require_committed("the study's page")
    done = results(args.rows)
    todo = [CANDIDATES[name] for name in args.only or CANDIDATES if name not in done]
    if not todo:
        return 0
    photos = {name: photo_list(name, args.photos) for name in FITTED_ON}
    images = open_unlabelled("photos", args.data, ALEXNET_PHOTOS_CPU.image_size)

    def work(recipe: Recipe) -> None:
        run_candidate(recipe, images, photos, args.output / recipe.name, args.rows, args.device)

    return run_each(todo, "network", work)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = create_parser("networks", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the dataset `photos`, to train on")
    parser.add_argument("--photos", type=Path, required=True, metavar="DIR", help="folder of the datasets to measure")
    parser.add_argument("--output", type=Path, default=Path("runs/networks"), help="folder of the runs [%(default)s]")
    parser.add_argument(
        "--rows", type=Path, default=ROWS, help="file of the rows [training/results/study/networks.jsonl]"
    )
    parser.add_argument(
        "--only", nargs="+", choices=CANDIDATES, metavar="NETWORK", help=f"networks: {', '.join(CANDIDATES)} [all]"
    )
    add_device(parser)
    args = parser.parse_args(arguments)
    return run(lambda: _work(args))
