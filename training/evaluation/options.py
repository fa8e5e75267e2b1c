"""Options that several commands of this folder have: the same name and the same meaning everywhere."""

import argparse
import dataclasses
from pathlib import Path

from rotation_ssl.cli.options import add_device, add_precision_argument, positive
from rotation_ssl.labelled import LabelledSplits
from rotation_ssl.precision import AnyRecipe, resolved
from training.command import CIFAR10_DIR
from training.datasets import DATASETS, FOLDER, check_whole, load_images
from training.evaluation.subject import Subject, load_subject
from training.reporting.report import check_rows
from training.reporting.rows import RESULTS_DIR, require_committed


def add_model(parser: argparse.ArgumentParser) -> None:
    """The backbone and its weights."""
    parser.add_argument("model", metavar="MODEL", help="any timm model or model.tag, including rotnet_*")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="use the weights of a safetensors file")
    parser.add_argument("--random", action="store_true", help="use random weights")


def add_data(parser: argparse.ArgumentParser, torchvision: bool = False) -> None:
    """The labelled images; with ``torchvision`` its datasets too, and no default."""
    sets = (*DATASETS, FOLDER)
    if torchvision:
        known = f"{', '.join(sets)}, or torch/NAME of torchvision"
        parser.add_argument("--dataset", default=FOLDER, metavar="SET", help=f"{known} [%(default)s]")
        parser.add_argument("--data", type=Path, required=True, help="folder of the images")
    else:
        known = ", ".join(sets)
        parser.add_argument("--dataset", choices=sets, default="cifar10", metavar="SET", help=f"{known} [%(default)s]")
        parser.add_argument("--data", type=Path, default=CIFAR10_DIR, help="folder of the images [%(default)s]")
    parser.add_argument("--download", action="store_true", help="let torchvision download the images to --data")
    parser.add_argument(
        "--holdout", type=positive, default=0, metavar="N",
        help=f"hold out {'N random' if torchvision else 'the last N'} training images and test on them",
    )  # fmt: skip
    parser.add_argument("--size", type=positive, help="input size of the backbone in pixels [the model's own]")


def add_run(parser: argparse.ArgumentParser, output: str, precision: str = "the recipe's") -> None:
    """How it is computed and where the results go; ``output`` and ``precision`` say what the defaults are."""
    parser.add_argument("--seed", type=int, default=0, help="random seed [%(default)s]")
    parser.add_argument(
        "--seeds", type=positive, default=1, metavar="N", help="number of seeds, starting at --seed [1]"
    )
    add_precision_argument(parser, precision)
    add_output(parser, output)


def add_output(parser: argparse.ArgumentParser, output: str) -> None:
    """Where it is computed and where the results go; ``output`` is the default folder."""
    add_device(parser)
    parser.add_argument("--output", type=Path, help=f"folder of rows and report [{output}/<weights>]")
    parser.set_defaults(runs=Path(output))
    parser.add_argument("--record", action="store_true", help="write the rows to training/results/, for the model card")


def own_recipe(named: AnyRecipe, recipe: AnyRecipe, device: str) -> AnyRecipe:
    """The recipe on the device; one that is not ``named`` as it is has no budget, so no column in the card."""
    recipe = resolved(recipe, device)
    return recipe if recipe == resolved(named, device) else dataclasses.replace(recipe, budget="")


def seeds(args: argparse.Namespace) -> range:
    """The seeds that ``--seed`` and ``--seeds`` ask for."""
    return range(args.seed, args.seed + args.seeds)


def subject_of(args: argparse.Namespace) -> Subject:
    """The backbone that the options name, on the device; errors as of ``load_subject``."""
    subject = load_subject(args.model, random=args.random, seed=args.seed, weights=args.weights, size=args.size)
    return subject.on(args.device)


def images_of(args: argparse.Namespace, size: int, test_only: bool = False) -> LabelledSplits:
    """The images that the options name, in memory: the whole dataset where rows are to be recorded."""
    images = load_images(args.dataset, args.data, size, args.download, args.holdout, test_only)
    if args.record:
        check_whole(args.dataset, len(images.train), len(images.test))
    return dataclasses.replace(images, name=sized_name(images.name, args))


def output_of(args: argparse.Namespace, subject: Subject) -> Path:
    """The folder of a subject's rows and report."""
    return Path(args.output or args.runs / subject.name)


def rows_file(args: argparse.Namespace, subject: Subject, own_settings: object = False) -> Path:
    """The file of a subject's rows, with --record the project's own, whose numbers the card reports.

    Nothing is written yet, but it can be.

    Raises:
        ValueError: the project does not report such numbers: weights without an entry in the manifest, ``own_settings``
            of the user (data, image size, budget), or code that is not committed; and as :func:`check_rows`.
        OSError: as :func:`check_rows`.
    """
    if args.record:
        _check_reported(subject, own_settings)
    file = RESULTS_DIR / f"{subject.name}.jsonl" if args.record else output_of(args, subject) / "rows.jsonl"
    check_rows(file)
    return file


def _check_reported(subject: Subject, own_settings: object) -> None:
    if not (subject.published or subject.name == f"{subject.architecture}.random"):
        raise ValueError(f"--record is for weights of the manifest and random ones: {subject.name} has no entry there")
    if own_settings:
        raise ValueError("--record is for whole datasets and the recipes as they are: leave out what changes them")
    require_committed("--record")


def sized_name(data: str, args: argparse.Namespace) -> str:
    """The data's name in result rows, which says an image size that is not the model's own."""
    return f"{data} at {args.size} pixels" if args.size else data
