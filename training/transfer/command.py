"""The frame of the three PASCAL VOC commands: options, what is trained on what, rows and reports."""

import argparse
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from tqdm import tqdm

from rotation_ssl.cli.options import positive
from rotation_ssl.machine import device_name, library_versions
from rotation_ssl.messages import counted
from rotation_ssl.precision import AnyRecipe, add_precision_argument, resolved, warn_if_emulated
from training.evaluation.subject import Subject, load_subject
from training.reporting.report import check_rows, keep_row, write_report
from training.reporting.rows import Row, current_commit
from training.transfer.data import CLASSES
from training.transfer.metrics import mean_over_classes
from training.transfer.network import NETWORK, check_apart, has_fresh_fc, transfer_network
from training.transfer.recipes import VocRecipe

RESCALED = "-rescaled"  # random weights whose layers are rescaled have it after their name


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A transfer that is ready to be trained: the ``network`` of a ``subject``, and the images of two splits.

    ``output`` is a new folder's path, ``settings`` is a part of the rows, ``started`` is the time (time.monotonic()).
    """

    recipe: VocRecipe

    subject: Subject
    network: nn.Module
    train: Sequence[Any]
    test: Sequence[Any]
    output: Path
    settings: str
    started: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that the three commands have in common."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="any timm model or model.tag, including rotnet_*")
    add("--weights", type=Path, metavar="FILE", help="start from the weights of a safetensors file")
    add("--random", action="store_true", help="start from random weights")
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
    add("--workers", type=int, default=os.cpu_count() or 1, help="data-loading worker processes [all cores]")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, mps [%(default)s]")
    add("--output", type=Path, help="new folder for rows, report and network [runs/voc/<weights>/<what is trained>]")


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

    Raises:
        ValueError: a value out of range.
    """
    named = _changed(named, training=resolved(named.training, args.device))
    given = _given(named.training, args)
    if args.random:
        # random weights are reported rescaled and as they are, by other names
        named = _changed(named, training=_changed(named.training, rescale=given["rescale"]))
    training = resolved(_changed(named.training, **given), args.device)
    splits = _changed(named.splits, **_given(named.splits, args))
    recipe = _changed(named, **_given(named, args) | own, training=training, splits=splits)
    as_it_is = recipe == named and tuple(args.classes) == CLASSES
    return recipe if as_it_is else _changed(recipe, budget="")


def output_of(args: argparse.Namespace, subject: Subject, what: str) -> Path:
    """The folder of a training, a new one for each.

    Args:
        args: of the command line.
        subject: the backbone.
        what: is trained, in a word that is good as a folder's name.

    Raises:
        ValueError: it has a trained network already.
    """
    output = args.output or Path("runs") / "voc" / subject.name / f"{what}-seed{args.seed}"
    if (output / NETWORK).exists():
        raise ValueError(f"{output / NETWORK} is another training's: give a new --output, or remove it")
    return output


def data_name(recipe: VocRecipe, args: argparse.Namespace) -> str:
    """What the row calls the measured images: VOC's own name where the classes are VOC's, else the folder's as well."""
    name = f"VOC{recipe.splits.year} {recipe.splits.test}"
    return name if tuple(args.classes) == CLASSES else f"{args.data.resolve().name}, {name}"


def subject_of(args: argparse.Namespace, size: int | None = None) -> Subject:
    """The backbone that the command line names, as :func:`training.evaluation.subject.load_subject`."""
    if len(set(args.classes)) != len(args.classes):
        raise ValueError(f"--classes names a class twice: {', '.join(args.classes)}")
    seed = args.seed if args.random else 0
    return load_subject(args.model, random=args.random, seed=seed, weights=args.weights, size=size)


def prepare_transfer(
    args: argparse.Namespace,
    recipe: VocRecipe,
    what: str,
    read: Callable[[str], Sequence[Any]],
    size: int | None = None,
) -> Transfer:
    """What the command line asks for, checked, with the network folded and rescaled.

    Args:
        args: of the command line.
        recipe: with what the command line changes.
        what: is trained, in a word that is good as a folder's name.
        read: from a split's name to its images.
        size: side of the images the backbone gets; None: its own.

    Raises:
        ValueError: no such weights or images, images in both splits, a folder that holds a trained network, or a
            network that cannot be rescaled.
    """
    started = time.monotonic()
    warn_if_emulated(args.precision, args.device)
    subject = subject_of(args, size)
    if args.random and recipe.training.rescale:
        subject = dataclasses.replace(subject, name=f"{subject.name}{RESCALED}")
    output = output_of(args, subject, what)
    train, test = read(recipe.splits.train), read(recipe.splits.test)
    check_apart(train, test)
    files = [image.file for image in train]
    training = recipe.training
    network = transfer_network(
        subject, len(args.classes), files, training.fc_size, training.rescale, args.seed, training.fresh_fc_size
    )
    check_rows(output / "rows.jsonl")
    return Transfer(recipe, subject, network, train, test, output, settings_text(recipe, subject, network), started)


def transfer_row(
    transfer: Transfer, args: argparse.Namespace, value: float, protocol: str, settings: str, layer: str = "all"
) -> Row:
    """The row of a number that is no count: a mean of precisions or overlaps.

    Args:
        transfer: what was trained.
        args: of the command line.
        value: the number.
        protocol: its id.
        settings: in words, beside those of the transfer.
        layer: which layers were trained.
    """
    return Row(
        weights=transfer.subject.name,
        protocol=protocol,
        layer=layer,
        value=value,
        source="measured",
        data=data_name(transfer.recipe, args),
        budget=transfer.recipe.budget,
        settings=f"{settings}, {transfer.settings}",
        seed=args.seed,
        sha256=transfer.subject.sha256,
        commit=current_commit(),
        versions=library_versions() | {"torchvision": torchvision.__version__},
        device=device_name(args.device),
        threads=torch.get_num_threads(),
        seconds=round(time.monotonic() - transfer.started, 1),
    )


def transfer_rows(
    transfer: Transfer,
    args: argparse.Namespace,
    by_class: Mapping[str, Sequence[float]],
    protocol: str,
    settings: str,
    layer: str = "all",
) -> list[Row]:
    """A row for each kind of average precision, the mean over classes; arguments as of :func:`transfer_row`."""
    means = averages(by_class).items()
    return [transfer_row(transfer, args, value, f"{protocol}-{kind}", settings, layer) for kind, value in means]


def settings_text(recipe: VocRecipe, subject: Subject, network: nn.Module) -> str:
    """What a row says of its training, in a few words: data, steps, and what was done to the network before."""
    training = recipe.training
    fc_size = getattr(getattr(network, "head", None), "fc_size", 0)
    parts = [
        f"trained on {recipe.splits.train}",
        f"{training.steps:,} step{'s' * (training.steps != 1)} of {counted(training.images_per_step, 'image')}",
        f"rate {training.lr:g}",
        f"{'fresh ' if has_fresh_fc(subject, network) else ''}fc6 and fc7 of {fc_size:,}" if fc_size else "",
        "batch norm folded",
        "layers rescaled" if training.rescale else "",
        training.precision,
    ]
    return ", ".join(filter(None, parts))


def keep_numbers(
    output: Path, rows: Sequence[Row], by_class: Mapping[str, Sequence[float]], classes: Sequence[str]
) -> Path:
    """Write rows and their report into a folder, and the numbers of every class as classes.json; print them in percent.

    Args:
        output: the folder.
        rows: the means.
        by_class: of each row's protocol the numbers of the classes.
        classes: their names, as many.

    Returns:
        The rows' file.
    """
    names = [name for name, value in zip(classes, next(iter(by_class.values())), strict=True) if value == value]
    tqdm.write(f"  {'':24s}{' '.join(f'{name[:8]:>8s}' for name in names)}")
    for title, values in by_class.items():
        known = [f"{100 * value:8.1f}" for value in values if value == value]
        tqdm.write(f"  {title:24s}{' '.join(known)}")
    numbers = {
        title: {name: value for name, value in zip(classes, values, strict=True) if value == value}
        for title, values in by_class.items()
    }
    (output / "classes.json").write_text(json.dumps(numbers, indent=1) + "\n")
    file = output / "rows.jsonl"
    for row in rows:
        keep_row(row, file)
    write_report(output, file)
    return file


def averages(by_class: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean over classes of each kind of number."""
    return {kind: mean_over_classes(values) for kind, values in by_class.items()}


def count_present(by_class: Mapping[str, Sequence[float]]) -> int:
    """How many classes have a number: those that the measured images show."""
    return sum(not math.isnan(value) for value in next(iter(by_class.values())))


def _given(fields: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a recipe, or of a part of it, that the command line has options for and gives."""
    names = {field.name for field in dataclasses.fields(fields)}
    return {name: value for name, value in vars(args).items() if name in names - {"budget"} and value is not None}


def _changed(recipe: AnyRecipe, **changes: Any) -> AnyRecipe:
    return dataclasses.replace(recipe, **changes)
