"""Ablation of the rotations, the paper's table 2 at a small budget (with --only also the number of blocks, table 1).

    python -m training ablation --data DIR
    python -m training ablation --data DIR --only nin-cifar10-ablation-r8

Every recipe `...-ablation...` of rotnet_nin, or those of --only, pretrains on the training images of CIFAR-10 (`--data
DIR`), all on the same number of rotated images, and is measured by the non-linear probe of block2 on the test images,
with several seeds of the probe. Result rows are written to training/results/ablation/ as they are measured; `python -m
training publish render` renders them. A recipe that has its rows is skipped, a stopped one continues.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rotation_ssl.cli.options import add_precision_argument
from rotation_ssl.evaluation.measure import plan
from rotation_ssl.labelled import LabelledSplits
from rotation_ssl.machine import check_device
from rotation_ssl.precision import warn_if_emulated
from rotation_ssl.pretraining.recipe import Recipe
from rotation_ssl.progress import progress
from training.command import CIFAR10_DIR, add_device, create_parser, run
from training.datasets import check_whole, load_images
from training.evaluation.probes import measure_features
from training.evaluation.subject import load_subject
from training.pretrain import finished_run
from training.recipes import RECIPES
from training.reporting.report import keep_row
from training.reporting.rows import RESULTS_DIR, read_file, require_committed

ROWS = RESULTS_DIR / "ablation" / "runs.jsonl"
LAYER = "block2"
SEEDS = (0, 1, 2)
ABLATIONS = {name: recipe for name, recipe in RECIPES.items() if "-ablation" in name}
ROTATION_SETS = [name for name, recipe in ABLATIONS.items() if recipe.model == "rotnet_nin"]


def measured(file: Path, recipe: str, seeds: Sequence[int] = SEEDS) -> bool:
    """Whether a recipe has its row of every seed of the probe."""
    rows = read_file(file) if file.exists() else []
    return {row.seed for row in rows if row.recipe == recipe} >= set(seeds)


def run_ablation(
    recipe: Recipe, images: LabelledSplits, output: Path, file: Path, seeds: Sequence[int] = SEEDS, device: str = "cpu"
) -> None:
    """Pretrain a recipe, or go on with it, and measure it: a row for each seed of the probe.

    Args:
        recipe: without a holdout.
        images: training images, and the test images to measure on.

    Raises:
        KeyboardInterrupt: pretraining was stopped; its checkpoint is kept.
    """
    weights = finished_run(recipe, images.train.images, output, device)
    subject = load_subject(recipe.model, weights=weights).on(device)
    for row in measure_features(
        subject, images, plan([LAYER], ["nonlinear"], "cached", seeds), device, features=recipe.precision
    ):
        keep_row(dataclasses.replace(row, recipe=recipe.name), file)


def _work(args: argparse.Namespace) -> None:
    check_device(args.device)
    is_published = args.rows.resolve() == ROWS.resolve()
    if is_published:
        require_committed("the card")
    images = load_images("cifar10", args.data, 32)
    if is_published:
        check_whole("cifar10", len(images.train), len(images.test))
    warn_if_emulated(args.precision, args.device)
    todo = [ABLATIONS[name] for name in args.only if not measured(args.rows, name)]
    for recipe in progress("recipes", len(todo), "recipe", todo):
        asked = dataclasses.replace(recipe, precision=args.precision or recipe.precision)
        run_ablation(asked, images, args.output / recipe.name, args.rows, device=args.device)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = create_parser("ablation", __doc__)
    parser.add_argument("--data", type=Path, default=CIFAR10_DIR, help="folder of CIFAR-10 [%(default)s]")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"), help="folder of the runs [%(default)s]")
    parser.add_argument("--rows", type=Path, default=ROWS, help="file of the rows [training/results/ablation/...]")
    parser.add_argument(
        "--only", nargs="+", choices=ABLATIONS, default=ROTATION_SETS, metavar="RECIPE",
        help=f"recipes: {', '.join(ABLATIONS)} [those of rotnet_nin]",
    )  # fmt: skip
    add_precision_argument(parser)
    add_device(parser)
    args = parser.parse_args(arguments)
    return run(lambda: _work(args))
