"""The frame of the three PASCAL VOC commands: options, what is trained on what, rows and reports."""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from tqdm import tqdm

from rotation_ssl.machine import device_name, library_versions
from rotation_ssl.messages import counted
from training.evaluation.subject import Subject, load_subject
from training.reporting.report import check_rows, keep_row, write_report
from training.reporting.rows import Row, current_commit
from training.transfer.data import CLASSES
from training.transfer.metrics import mean_over_classes
from training.transfer.network import NETWORK, check_apart, has_fresh_fc, transfer_network
from training.transfer.recipes import Training

# options that leave the protocol as it is: what is transferred, and where and how it is worked on
NOT_OF_THE_PROTOCOL = frozenset(
    ("model", "weights", "random", "data", "layers", "proposals", "seed", "workers", "device", "output")
)
PAPER_SIZE = 224  # pixels that the paper's AlexNet is for


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A transfer that is ready to be trained: the ``network`` of a ``subject``, and the images of two splits.

    ``output`` is a new folder's path, ``settings`` and ``budget`` are parts of the rows, ``started`` is the time
    (time.monotonic()).
    """

    subject: Subject
    network: nn.Module
    train: Sequence[Any]
    test: Sequence[Any]
    output: Path
    settings: str
    budget: str
    started: float


def add_arguments(parser: argparse.ArgumentParser, year: str, train: str, test: str) -> None:
    """The options that the three commands have in common; the data's defaults are the paper's."""
    parser.add_argument("model", metavar="MODEL", help="any model or model.tag of timm, rotnet_alexnet among them")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="start from a safetensors file")
    parser.add_argument("--random", action="store_true", help="start from random weights")
    parser.add_argument("--data", type=Path, default=Path("data/VOCdevkit"), help="the VOCdevkit [%(default)s]")
    parser.add_argument("--year", default=year, help="of VOCdevkit/VOC<year> [%(default)s]")
    parser.add_argument("--train", default=train, metavar="SPLIT", help="what is trained on [%(default)s]")
    parser.add_argument("--test", default=test, metavar="SPLIT", help="what is measured [%(default)s]")
    parser.add_argument("--classes", nargs="+", default=list(CLASSES), metavar="CLASS", help="of the data [VOC's 20]")
    parser.add_argument("--steps", type=int, help="of the training, instead of the recipe's")
    parser.add_argument("--images-per-step", type=int, metavar="N", help="instead of the recipe's")
    parser.add_argument("--lr", type=float, help="learning rate, instead of the recipe's")
    parser.add_argument(
        "--fc-size", type=int, metavar="N", help="width of AlexNet's fc6 and fc7 [the weights', or 4096]"
    )
    parser.add_argument("--no-rescale", action="store_true", help="leave the layers' scales as they are")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random [%(default)s]")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images [%(default)s]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps [%(default)s]")
    parser.add_argument(
        "--output", type=Path, help="new folder of rows, report and network [runs/voc/<weights>/<what is trained>]"
    )


def training_of(training: Training, args: argparse.Namespace) -> Training:
    """A recipe's training with what the command line changes.

    Raises:
        ValueError: a value out of range.
    """
    given = {"steps": args.steps, "images_per_step": args.images_per_step, "lr": args.lr}
    return dataclasses.replace(training, **{name: value for name, value in given.items() if value is not None})


def budget_of(args: argparse.Namespace, parser: argparse.ArgumentParser, size: int, fresh_fc: bool) -> str:
    """The row's word for what the training costs: 'paper' for the recipe and the data as they are, '' for others.

    Args:
        args: of the command line.
        parser: gives the defaults.
        size: side of the images that the backbone is for.
        fresh_fc: weights without fc6 and fc7 were given new ones.
    """
    as_it_is = all(
        value == parser.get_default(name) for name, value in vars(args).items() if name not in NOT_OF_THE_PROTOCOL
    )
    return "paper" if as_it_is and size == PAPER_SIZE and (args.random or not fresh_fc) else ""


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


def data_name(args: argparse.Namespace) -> str:
    """What the row calls the measured images: VOC's own name where the classes are VOC's, else the folder's as well."""
    name = f"VOC{args.year} {args.test}"
    return name if tuple(args.classes) == CLASSES else f"{args.data.resolve().name}, {name}"


def subject_of(args: argparse.Namespace, size: int | None = None) -> Subject:
    """The backbone that the command line names, as :func:`training.evaluation.subject.load_subject`."""
    if len(set(args.classes)) != len(args.classes):
        raise ValueError(f"--classes names a class twice: {', '.join(args.classes)}")
    seed = args.seed if args.random else 0
    return load_subject(args.model, random=args.random, seed=seed, weights=args.weights, size=size)


def prepare_transfer(
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    training: Training,
    what: str,
    read: Callable[[str], Sequence[Any]],
    size: int | None = None,
) -> Transfer:
    """What the command line asks for, checked, with the network folded and rescaled.

    Args:
        args: of the command line.
        parser: gives the defaults.
        training: with what the command line changes.
        what: is trained, in a word that is good as a folder's name.
        read: from a split's name to its images.
        size: side of the images the backbone gets; None: its own.

    Raises:
        ValueError: no such weights or images, images in both splits, a folder that holds a trained network, or a
            network that cannot be rescaled.
    """
    started = time.monotonic()
    subject = subject_of(args, size)
    output = output_of(args, subject, what)
    train, test = read(args.train), read(args.test)
    check_apart(train, test)
    files = [image.file for image in train]
    network = transfer_network(subject, len(args.classes), files, args.fc_size, not args.no_rescale, args.seed)
    budget = budget_of(args, parser, subject.size, has_fresh_fc(subject, network))
    check_rows(output / "rows.jsonl")
    return Transfer(
        subject, network, train, test, output, settings_text(args, training, subject, network), budget, started
    )


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
        data=data_name(args),
        budget=transfer.budget,
        settings=f"{settings}, {transfer.settings}",
        seed=args.seed,
        sha256=transfer.subject.sha256,
        commit=current_commit(),
        versions=library_versions() | {"torchvision": torchvision.__version__},
        device=device_name(args.device),
        threads=torch.get_num_threads(),
        seconds=round(time.monotonic() - transfer.started, 1),
    )


def settings_text(args: argparse.Namespace, training: Training, subject: Subject, network: nn.Module) -> str:
    """What a row says of its training, in a few words: data, steps, and what was done to the network before."""
    fc_size = getattr(getattr(network, "head", None), "fc_size", 0)
    parts = [
        f"trained on {args.train}",
        f"{training.steps:,} step{'s' * (training.steps != 1)} of {counted(training.images_per_step, 'image')}",
        f"rate {training.lr:g}",
        f"{'fresh ' if has_fresh_fc(subject, network) else ''}fc6 and fc7 of {fc_size:,}" if fc_size else "",
        "batch norm folded",
        "" if args.no_rescale else "layers rescaled",
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
