"""The frame of the three PASCAL VOC commands: options, what is trained on what, rows and reports."""

import argparse
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torchvision
from torch import nn
from tqdm import tqdm

from rotation_ssl.cli.options import add_device, add_precision_argument, positive
from rotation_ssl.fit import Checkpoint
from rotation_ssl.machine import cpus, device_name
from rotation_ssl.messages import counted
from rotation_ssl.precision import AnyRecipe, resolved, warn_if_emulated
from training.command import create_parser
from training.evaluation.options import add_model
from training.evaluation.subject import Subject, load_subject, measured_value
from training.reporting.report import check_rows, keep_rows
from training.transfer.checking import file_state
from training.transfer.data import CLASSES
from training.transfer.metrics import mean_over_classes
from training.transfer.network import NETWORK, RunOptions, check_apart, fc_size_of, transfer_network
from training.transfer.recipes import VocRecipe

CHECKPOINT = "checkpoint.pt"
RESCALED = "-rescaled"  # random weights whose layers are rescaled have it after their name
IOU = "IoU"  # the kind of number of segmentation: its protocol has no other
COMMON_HELP = """\
MODEL is any timm model whose batch norm can be folded, with its published weights, --random weights, or those of a file
(--weights FILE). Batch norm is folded and the layers are rescaled before the training; models that are not a chain of
layers, such as ResNets, need --no-rescale. VOCdevkit is the standard folder; docs/transfer.md explains how to use your
own data.

Settings are recipes of training/transfer/recipes.py, chosen by --budget. To resume an interrupted command, run it
again with the same options and --output. Results are written to --output: rows.jsonl, report.md, report.json and
report.png, classes.json with the numbers of every class, and the trained network as network.safetensors.
"""


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A transfer that is ready to be trained: the ``network`` of a ``subject``, and the images of two splits.

    ``settings`` is a part of the rows, written before the network is cut to what the transfer needs. ``output`` is
    the folder of this training, which ``run`` has too; ``started`` is when the command started (time.monotonic()),
    minus the seconds of earlier, interrupted runs.
    """

    recipe: VocRecipe
    subject: Subject
    network: nn.Module
    train: Sequence[Any]
    test: Sequence[Any]
    output: Path
    settings: str
    run: RunOptions
    started: float


def transfer_parser(command: str, head: str | None) -> argparse.ArgumentParser:
    """The parser of a command, with the options and the end of the help that the three commands have in common."""
    parser = create_parser(command, f"{head or ''}\n{COMMON_HELP}")
    add = parser.add_argument
    add_model(parser)
    add("--budget", choices=("paper", "cpu"), default="paper", help="budget of the recipe [%(default)s]")
    add("--data", type=Path, default=Path("data/VOCdevkit"), help="the VOCdevkit folder [%(default)s]")
    add("--year", help="year of VOCdevkit/VOC<year> [the recipe's]")
    add("--train", metavar="SPLIT", help="image list to train on [the recipe's]")
    add("--test", metavar="SPLIT", help="image list to test on [the recipe's]")
    add("--classes", nargs="+", default=list(CLASSES), metavar="CLASS", help="class names of the data [VOC's 20]")
    add("--steps", type=int, help="training steps [the recipe's]")
    add("--images-per-step", type=int, metavar="N", help="images in a training step [the recipe's]")
    add("--lr", type=float, help="learning rate [the recipe's]")
    add("--weight-decay", type=float, metavar="RATE", help="weight decay [the recipe's]")
    add("--clip", type=float, metavar="NORM", help="maximum gradient norm [the recipe's]")
    add("--dropout", type=float, metavar="P", help="dropout after fc6 and fc7 [the recipe's]")
    add("--fc-size", type=int, metavar="N", help="width of AlexNet's fc6 and fc7 [the weights', or the recipe's]")
    add("--no-rescale", dest="rescale", action="store_false", help="do not rescale the layers")
    add_precision_argument(parser)
    add("--seed", type=int, default=0, help="random seed [%(default)s]")
    add("--workers", type=int, default=cpus(), help="data-loading worker processes [one for each CPU]")
    add_device(parser)
    add(
        "--output",
        type=Path,
        help="folder for rows, report and network of this training [runs/voc/<weights>/<what is trained>]",
    )
    return parser


def add_pictures_argument(parser: argparse.ArgumentParser) -> None:
    """The option of the commands whose results can be drawn."""
    told = "draw the results on the first N test images, in the folder pictures of --output [%(default)s]"
    parser.add_argument("--pictures", type=positive, default=0, metavar="N", help=told)


def recipe_of(named: AnyRecipe, args: argparse.Namespace, **own: Any) -> AnyRecipe:
    """A recipe with what the command line changes, on its device: with a setting or data of one's own it has no budget.

    Args:
        named: one of :data:`training.transfer.recipes.VOC_RECIPES`.
        args: of the command line; options are named as the fields are.
        own: fields that no option has the name of.
    """
    named = dataclasses.replace(named, training=resolved(named.training, args.device))
    given = _given(named.training, args)
    if args.random:
        # random weights are reported rescaled and as they are, by other names
        named = dataclasses.replace(named, training=dataclasses.replace(named.training, rescale=given["rescale"]))
    training = resolved(dataclasses.replace(named.training, **given), args.device)
    splits = dataclasses.replace(named.splits, **_given(named.splits, args))
    recipe = dataclasses.replace(named, **_given(named, args) | own, training=training, splits=splits)
    as_it_is = recipe == named and tuple(args.classes) == CLASSES
    return recipe if as_it_is else dataclasses.replace(recipe, budget="")


def prepare_transfer(
    args: argparse.Namespace,
    recipe: VocRecipe,
    what: str,
    read: Callable[[str], Sequence[Any]],
    size: int | None = None,
    given: str = "",
) -> Transfer:
    """What the command line asks for, checked, with the network folded and rescaled.

    Args:
        what: is trained, in a word that is good as a folder's name.
        read: from a split's name to its images.
        size: side of the images the backbone gets; None: its own.
        given: what else decides the training, in words.
    """
    started = time.monotonic()
    warn_if_emulated(args.precision, args.device)
    if len(set(args.classes)) != len(args.classes):
        raise ValueError(f"--classes names a class twice: {', '.join(args.classes)}")
    seed = args.seed if args.random else 0
    subject = load_subject(args.model, random=args.random, seed=seed, weights=args.weights, size=size)
    if args.random:
        # without the seed, which is also that of the training and is in the row
        name = subject.name.removesuffix(str(seed or ""))
        subject = dataclasses.replace(subject, name=f"{name}{RESCALED if recipe.training.rescale else ''}")
    # a folder for each training
    output = args.output or Path("runs") / "voc" / subject.name / f"{what}-seed{args.seed}"
    if (output / NETWORK).exists() and not (output / CHECKPOINT).exists():
        raise ValueError(f"{output / NETWORK} is another training's, or finished: give a new --output, or remove it")
    train, test = read(recipe.splits.train), read(recipe.splits.test)
    check_apart(train, test)
    decided = f"{what}, {recipe}, seed {args.seed}, classes {args.classes}{given}"
    checkpoint = _open_checkpoint(output, decided, subject, train)
    files = [image.file for image in train]
    training = recipe.training
    network = transfer_network(
        subject, len(args.classes), files, training.fc_size, training.rescale, args.seed, training.fresh_fc_size
    )
    check_rows(output / "rows.jsonl")
    run = RunOptions(args.device, args.seed, args.workers, output, checkpoint)
    settings = _settings(recipe, fc_size_of(network), fc_size_of(subject.backbone))
    return Transfer(recipe, subject, network, train, test, output, settings, run, started - checkpoint.seconds)


def keep_numbers(
    transfer: Transfer,
    args: argparse.Namespace,
    by_class: Mapping[str, Sequence[float]],
    settings: str,
    classes: Sequence[str],
    layer: str = "all",
) -> Path:
    """Write a row for each mean over classes, and the numbers of every class as classes.json, which are printed in
    percent; then the checkpoint is deleted.

    Args:
        by_class: by kind of number, a kind of average precision or :data:`IOU`, those of the classes.
        settings: in words, beside those of the transfer.
        classes: their names, as many.
        layer: which layers were trained.

    Returns:
        The rows' file.
    """
    recipe = transfer.recipe
    data = f"VOC{recipe.splits.year} {recipe.splits.test}"
    if tuple(args.classes) != CLASSES:
        data = f"{args.data.resolve().name}, {data}"
    rows = []
    for kind, values in by_class.items():
        row = measured_value(
            transfer.subject, mean_over_classes(values), data, f"{settings}, {transfer.settings}",
            time.monotonic() - transfer.started,
            protocol=recipe.protocol if kind == IOU else f"{recipe.protocol}-{kind}", budget=recipe.budget, layer=layer,
            seed=args.seed,
        )  # fmt: skip
        # the subject itself was not trained: it is where it was loaded
        versions = row.versions | {"torchvision": torchvision.__version__}
        rows.append(dataclasses.replace(row, versions=versions, device=device_name(args.device)))
    numbers = {
        kind: {name: value for name, value in zip(classes, values, strict=True) if not math.isnan(value)}
        for kind, values in by_class.items()
    }
    tqdm.write(f"  {'':24s}{' '.join(f'{name[:8]:>8s}' for name in next(iter(numbers.values())))}")
    for kind, known in numbers.items():
        tqdm.write(f"  {kind:24s}{' '.join(f'{100 * value:8.1f}' for value in known.values())}")
    (transfer.output / "classes.json").write_text(json.dumps(numbers, indent=1) + "\n")
    file = keep_rows(rows, transfer.output / "rows.jsonl")
    # with what kills have left
    for checkpoint in transfer.output.glob(f"{CHECKPOINT}*"):
        checkpoint.unlink()
    return file


def classes_shown(by_class: Mapping[str, Sequence[float]]) -> str:
    """How many classes have a number, in words: those that the measured images show."""
    return counted(sum(not math.isnan(value) for value in next(iter(by_class.values()))), "class", "classes")


def _open_checkpoint(output: Path, decided: str, subject: Subject, train: Sequence[Any]) -> Checkpoint:
    """Open the checkpoint in ``output``, which need not exist yet.

    Raises:
        ValueError: it is another training's.
    """
    states = [[file_state(image.file), file_state(getattr(image, "mask", image.file))] for image in train]
    images = hashlib.sha256(repr((train, states)).encode()).hexdigest()
    return Checkpoint(output / CHECKPOINT, f"{subject.identity}, {decided}, images {images}")


def _settings(recipe: VocRecipe, fc_size: int, before: int) -> str:
    """What the rows say of every transfer: ``before`` is the width of fc6 and fc7 of the weights."""
    training = recipe.training
    fresh = "fresh " if fc_size != before else ""
    told = [
        f"trained on {recipe.splits.train}",
        f"{training.steps:,} step{'s' * (training.steps != 1)} of {counted(training.images_per_step, 'image')}",
        f"rate {training.lr:g}",
        f"{fresh}fc6 and fc7 of {fc_size:,}" if fc_size else "",
        "batch norm folded",
        "layers rescaled" if training.rescale else "",
        training.precision,
    ]
    return ", ".join(filter(None, told))


def _given(fields: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a recipe, or of a part of it, that the command line has options for and gives."""
    names = {field.name for field in dataclasses.fields(fields)}
    return {name: value for name, value in vars(args).items() if name in names - {"budget"} and value is not None}
