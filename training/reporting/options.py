"""Where the data sets of reported numbers are: the options of the commands that measure them."""

import argparse
from pathlib import Path

# the option that names the folder of each data set
OPTIONS = {
    "cifar10": "data",
    "tinyimagenet": "tinyimagenet",
    **dict.fromkeys(("miniplaces", "imagenet20", "imagenette", "imagewoof", "caltech101", "voc2007"), "photos"),
}


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name folders of data sets."""
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"), help="folder of CIFAR-10 [%(default)s]")
    parser.add_argument("--download", action="store_true", help="let torchvision download CIFAR-10 into --data")
    parser.add_argument("--tinyimagenet", type=Path, metavar="DIR", help="folder tiny-imagenet-200 [do not measure]")
    parser.add_argument(
        "--photos", type=Path, metavar="DIR",
        help="folder of imagenette2-320, imagewoof2-320, miniplaces, caltech101 and VOCdevkit [do not measure]",
    )  # fmt: skip


def data_folder(args: argparse.Namespace, dataset: str) -> Path | None:
    """The folder that the options name for a data set; None where they name none."""
    folder: Path | None = getattr(args, OPTIONS[dataset])
    return folder
