"""The study that chose the recipe `nin-cifar10-cpu`: one setting is changed at a time, in short runs.

    python -m training study --data DIR
    python -m training study --data DIR --only base muon-lr-0.2

Every variant pretrains on the first 45,000 training images of CIFAR-10 (`--data DIR`) and is compared on the last 5,000
by linear and non-linear probes of block2, trained on the first 10,000; the test images are not read. Result rows are
written to training/results/study/ as they are measured; `python -m training publish render` renders the table of
training/studies/nin_cifar10.md and its figure. A variant that has its rows is skipped, a stopped one continues.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from rotation_ssl.cli.options import add_precision_argument
from rotation_ssl.evaluation.measure import plan
from rotation_ssl.labelled import LabelledSplits
from rotation_ssl.machine import check_device
from rotation_ssl.precision import warn_if_emulated
from rotation_ssl.pretraining.recipe import CosineSchedule, LinearSchedule, Muon, Recipe, Sgd, Stage
from training.command import CIFAR10_DIR, add_device, create_parser, run, run_each
from training.datasets import DATASETS, load_images
from training.evaluation.probes import measure_features
from training.evaluation.subject import load_subject, measured_row
from training.pretrain import finished_run
from training.protocols import PROTOCOLS
from training.reporting.figures import rows_stamp, save_figure, stamp_of
from training.reporting.pages import replace_parts
from training.reporting.report import keep_row
from training.reporting.rows import RESULTS_DIR, Row, read_file, require_committed
from training.reporting.tables import markdown_table

ROWS = RESULTS_DIR / "study" / "runs.jsonl"
BUDGET = 102_400  # rotated images a run
LONG_BUDGET = 409_600
HOLDOUT = 5_000
PROBE_IMAGES = 10_000
FEW_IMAGES = 9_000
LAYER = "block2"
MEASURED = ("nonlinear", "linear", "rotation")
PAGE = Path(__file__).with_suffix(".md")
FIGURE = Path(__file__).parent.parent.parent / "docs" / "figures" / "study.png"

BASE = Recipe(
    name="base",
    model="rotnet_nin",
    data="cifar10",
    stages=(Stage(280, 24), Stage(120, 32)),
    optimizer=Muon(lr=0.1),
    schedule=LinearSchedule(warmup=0.1),
    images_per_step=64,
    precision="auto",
    holdout=HOLDOUT,
)


def variant(
    name: str,
    crops: Sequence[tuple[float, int]] = ((0.7, 24), (0.3, 32)),
    budget: int = BUDGET,
    **changes: object,
) -> Recipe:
    """The base with some settings changed.

    Args:
        crops: the stages: part of the steps, and crop in pixels.
        budget: rotated images.
        changes: fields of the recipe.
    """
    recipe = dataclasses.replace(BASE, name=name, **changes)  # type: ignore[arg-type]
    steps = budget // (recipe.images_per_step * len(recipe.rotations))
    return dataclasses.replace(recipe, stages=tuple(Stage(round(part * steps), crop) for part, crop in crops))


QUESTIONS: dict[str, tuple[Recipe, ...]] = {
    "Chance: the same settings, other seeds": (BASE, variant("seed-1", seed=1)),
    "Learning rate of Muon (0.1)": (
        variant("muon-lr-0.05", optimizer=Muon(lr=0.05)),
        variant("muon-lr-0.2", optimizer=Muon(lr=0.2)),
    ),
    "SGD with Nesterov momentum, linear warm-up over a fifth (Muon)": (
        variant("sgd-lr-0.1", optimizer=Sgd(lr=0.1), schedule=LinearSchedule(warmup=0.2)),
        variant("sgd-lr-0.4", optimizer=Sgd(lr=0.4), schedule=LinearSchedule(warmup=0.2)),
    ),
    "Batch, rotated images (256 at a rate of 0.1; the rate as its square root)": (
        variant("batch-128", images_per_step=32, optimizer=Muon(lr=0.07)),
        variant("batch-512", images_per_step=128, optimizer=Muon(lr=0.14)),
    ),
    "Crops (24 pixels for 70 % of the steps, then 32)": (
        variant("crop-32", crops=((1.0, 32),)),
        variant("crop-16-24-32", crops=((0.3, 16), (0.4, 24), (0.3, 32))),
        variant("crop-24-32-short", crops=((0.9, 24), (0.1, 32))),
        # as many pixels as crop-32 has
        variant("crop-24-32-longer", budget=143_360),
    ),
    "Schedule (warm-up over a tenth, then linearly to 0)": (
        variant("hold", schedule=LinearSchedule(warmup=0.1, hold=0.6)),
        variant("constant-average", schedule=LinearSchedule(warmup=0.1, hold=0.9), average=0.98),
        variant("cosine", schedule=CosineSchedule(warmup=0.1)),
    ),
    "Label smoothing (0)": (variant("smoothing-0.1", label_smoothing=0.1),),
    "Padding of the crops (4 pixels, mirrored)": (
        variant("padding-0", padding=0),
        variant("padding-8", padding=8),
    ),
    "Momentum of Muon (0.6)": (
        variant("momentum-0.3", optimizer=Muon(lr=0.1, momentum=0.3)),
        variant("momentum-0.9", optimizer=Muon(lr=0.1, momentum=0.9)),
    ),
    "Mirroring (random)": (variant("flip-none", flip="none"),),
    # a run of the others is over before it meets an image again
    f"Mirroring, on the first {FEW_IMAGES:,} images, each met three times": (
        variant("few-images"),
        variant("few-images-alternate", flip="alternate"),
    ),
    # as in the recipe's run, which learns its training images nearly by heart
    f"On the first {FEW_IMAGES:,} images, each met eleven times": (
        variant("few-images-long", budget=LONG_BUDGET),
        variant("few-images-long-seed-1", budget=LONG_BUDGET, seed=1),
        variant("few-images-long-padding-8", budget=LONG_BUDGET, padding=8),
        variant("few-images-long-scale", budget=LONG_BUDGET, padding=0, scale=(0.3, 1.0)),
        variant("few-images-long-smoothing-0.2", budget=LONG_BUDGET, label_smoothing=0.2),
        variant("few-images-long-muon-lr-0.3", budget=LONG_BUDGET, optimizer=Muon(lr=0.3)),
        variant("few-images-long-average", budget=LONG_BUDGET, average=0.99),
        variant(
            "few-images-long-sgd",
            budget=LONG_BUDGET,
            optimizer=Sgd(lr=0.1),
            schedule=LinearSchedule(warmup=0.1),
        ),
    ),
}
CHANCE = [recipe.name for recipe in next(iter(QUESTIONS.values()))]
VARIANTS = {recipe.name: recipe for recipes in QUESTIONS.values() for recipe in recipes}


def run_variant(recipe: Recipe, images: LabelledSplits, output: Path, file: Path, device: str = "cpu") -> None:
    """Pretrain a variant, or go on with it, and measure it: three rows.

    Args:
        recipe: the variant, with a holdout.
        images: the training images, and those held out as test images.
    """
    count = FEW_IMAGES if recipe.name.startswith("few-images") else len(images.train)
    everything = torch.cat([images.train.images[:count], images.test.images])
    weights = finished_run(recipe, everything, output, device)
    subject = load_subject(recipe.model, weights=weights).on(device)
    run = json.loads((output / "run.json").read_text())
    accuracy = run["holdout_rotation_accuracy"]
    row = measured_row(
        subject,
        [accuracy["correct"]],
        accuracy["n"],
        images.name,
        "4 rotations of each image",
        run["seconds"],
        protocol="rotation",
        layer="",
    )
    # the run's own: it may have been made by an earlier commit than the one that measures
    keep_row(dataclasses.replace(row, recipe=recipe.name, commit=run["commit"]), file)
    few = dataclasses.replace(images, train=images.train.subset(torch.arange(min(PROBE_IMAGES, len(images.train)))))
    for row in measure_features(
        subject, few, plan([LAYER], ["linear", "nonlinear"], "cached", [0]), device, features=recipe.precision
    ):
        settings = f"{row.settings}; {len(few.train):,} labelled images"
        keep_row(dataclasses.replace(row, recipe=recipe.name, settings=settings), file)


def pixels(recipe: Recipe) -> int:
    """Pixels of all crops of a run: what its time goes with, the network being all convolutions."""
    return sum(stage.steps * recipe.images_per_step * len(recipe.rotations) * stage.crop**2 for stage in recipe.stages)


def results(file: Path) -> dict[str, dict[str, Row]]:
    """The rows of each variant that has all of its numbers, by protocol, in the study's order."""
    rows = read_file(file) if file.exists() else []
    found = {name: {row.protocol: row for row in rows if row.recipe == name} for name in VARIANTS}
    return {name: own for name, own in found.items() if own.keys() >= set(MEASURED)}


def table(found: dict[str, dict[str, Row]]) -> str:
    """The page's table: a line a variant, question by question."""
    lines: list[tuple[str, ...]] = []
    for question, recipes in QUESTIONS.items():
        own = [recipe for recipe in recipes if recipe.name in found]
        if own:
            lines.append((f"**{question}**", "", "", "", "", ""))
        for recipe in own:
            values = [f"{100 * found[recipe.name][protocol].value:.2f} %" for protocol in MEASURED]
            cost = pixels(recipe) / pixels(BASE)
            lines.append((f"`{recipe.name}`", *values, f"{recipe.rotated_images:,}", f"{cost:.2f}"))
    titles = (PROTOCOLS[protocol].title for protocol in MEASURED)
    return markdown_table(("variant", *titles, "rotated images", "pixels, of the base's"), lines)


def draw(found: dict[str, dict[str, Row]], file: Path) -> None:
    """The two probes of every variant beside the base's, as a figure stamped with its rows."""
    names = [name for name in VARIANTS if name in found][::-1]
    figure = Figure(figsize=(8.0, 1.2 + 0.3 * len(names)), layout="constrained")
    for axes, protocol in zip(figure.subplots(1, 2, sharey=True), MEASURED[:2], strict=True):
        values = [100 * found[name][protocol].value for name in names]
        chance = [100 * found[name][protocol].value for name in CHANCE if name in found]
        axes.axvspan(min(chance) - 0.1, max(chance) + 0.1, color="#E69F00", alpha=0.25, lw=0)
        axes.plot(values, range(len(names)), "o", color="#0072B2")
        axes.set_xlabel(f"{PROTOCOLS[protocol].title} of {LAYER} (%)")
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].set_yticks(range(len(names)), names)
    figure.suptitle("one setting changed; the band is the base with several seeds", fontsize=10)
    rows = [row for own in found.values() for row in own.values()]
    save_figure(figure, file, rows_stamp(rows))


def page_text() -> str:
    """The page with its table of the published rows.

    Raises:
        ValueError: the base has no rows.
    """
    return replace_parts(PAGE.read_text(), {"runs": lambda: table(_published())}, PAGE.name)


def render_figure(check: bool = False) -> list[Path]:
    """Draw the figure of the published rows if it is stale; returns it if it was, or is."""
    found = _published()
    stamp = rows_stamp(row for own in found.values() for row in own.values())
    if FIGURE.exists() and stamp_of(FIGURE) == stamp:
        return []
    if not check:
        draw(found, FIGURE)
    return [FIGURE]


def _published() -> dict[str, dict[str, Row]]:
    found = results(ROWS)
    if BASE.name not in found:
        raise ValueError(f"{ROWS} has no rows of the base: run the study first")
    return found


def _work(args: argparse.Namespace) -> int:
    check_device(args.device)
    is_published = args.rows.resolve() == ROWS.resolve()
    if is_published:
        require_committed("the study's page")
    images = load_images("cifar10", args.data, 32, holdout=HOLDOUT)
    if is_published and len(images.train) + HOLDOUT != DATASETS["cifar10"].counts[0]:
        raise ValueError(f"the study's page is of the whole of CIFAR-10, not of {len(images.train) + HOLDOUT:,} images")
    warn_if_emulated(args.precision, args.device)
    done = results(args.rows)
    todo = [VARIANTS[name] for name in args.only or VARIANTS if name not in done]

    def work(recipe: Recipe) -> None:
        asked = dataclasses.replace(recipe, precision=args.precision or recipe.precision)
        run_variant(asked, images, args.output / recipe.name, args.rows, args.device)

    return run_each(todo, "variant", work)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = create_parser("study", __doc__)
    parser.add_argument("--data", type=Path, default=CIFAR10_DIR, help="folder of CIFAR-10 [%(default)s]")
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="folder of the runs [%(default)s]")
    parser.add_argument("--rows", type=Path, default=ROWS, help="file of the rows [training/results/study/runs.jsonl]")
    parser.add_argument(
        "--only", nargs="+", choices=VARIANTS, metavar="VARIANT", help=f"variants: {', '.join(VARIANTS)} [all]"
    )
    add_precision_argument(parser)
    add_device(parser)
    args = parser.parse_args(arguments)
    return run(lambda: _work(args))
