"""Where the datasets of reported numbers are: the options of the commands that measure them."""

import argparse
import fnmatch
from pathlib import Path

from training.command import CIFAR10_DIR, add_cifar10
from training.datasets import DATASETS, EXIF_FOLDER, dataset_of
from training.evaluation.outliers import normal_dataset
from training.protocols import PROTOCOLS
from training.reporting.remeasure import TRANSFERS, Source, command_of
from training.reporting.rows import Row

# the option that names the folder of each dataset
OPTIONS = {
    "cifar10": "data",
    "cifar100": "cifar100",
    "tinyimagenet": "tinyimagenet",
    **dict.fromkeys(("miniplaces", "imagenet20", "imagenette", "imagewoof", "caltech101", "voc2007", "exif"), "photos"),
}


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name folders of datasets."""
    add_cifar10(parser)
    parser.add_argument(
        "--photos", type=Path, metavar="DIR",
        help="folder of imagenette2-320, imagewoof2-320, miniplaces, caltech101, VOCdevkit and exif [not measured]",
    )  # fmt: skip
    parser.add_argument("--cifar100", type=Path, metavar="DIR", help="folder of CIFAR-100, as outliers [not measured]")
    parser.add_argument("--tinyimagenet", type=Path, metavar="DIR", help="folder tiny-imagenet-200 [not measured]")
    parser.add_argument("--voc", type=Path, metavar="DIR", help="folder VOCdevkit, for PASCAL VOC [not measured]")
    parser.add_argument("--proposals", type=Path, metavar="FILE", help="region proposals for VOCdevkit, for Fast R-CNN")


def add_only(parser: argparse.ArgumentParser) -> None:
    """Add the option that chooses protocols."""
    parser.add_argument(
        "--only", nargs="+", type=_some_protocols, metavar="ID",
        help="protocols, such as knn, linear-sgd or 'voc-*'; an unknown one lists them [all]",
    )  # fmt: skip


def asked_for(row: Row, args: argparse.Namespace) -> bool:
    """Whether a row is of a protocol that ``--only`` chooses."""
    return args.only is None or any(fnmatch.fnmatchcase(row.protocol, pattern) for pattern in args.only)


def _some_protocols(pattern: str) -> str:
    if not any(fnmatch.fnmatchcase(name, pattern) for name in PROTOCOLS):
        raise argparse.ArgumentTypeError(f"no protocol is called {pattern!r}; there are {', '.join(PROTOCOLS)}")
    return pattern


def option_of(row: Row, args: argparse.Namespace) -> str:
    """The option that names the folder of a row's data, or the file of proposals where that alone is missing."""
    if command_of(row) == "outliers":
        if (normal := normal_dataset(row.weights)) != "cifar10":
            return OPTIONS[normal]
        if not args.data.is_dir() and not args.download:
            return "data"  # CIFAR-10, which they are told from
        # some of them are noise
        return "photos" if row.data == DATASETS["imagenette"].name and args.cifar100 else "cifar100"
    if row.protocol.startswith("voc-fast-rcnn") and args.voc and not args.proposals:
        return "proposals"
    return "voc" if command_of(row) in TRANSFERS else OPTIONS[dataset_of(row.data)]


def advice(row: Row, args: argparse.Namespace) -> str:
    """What to do where the data of a row are missing."""
    option = option_of(row, args)
    if option == "data" and command_of(row) == "outliers":
        return no_cifar10(args.data)
    return f"give --{option} {'FILE' if option == 'proposals' else 'DIR'}"


def no_cifar10(folder: Path) -> str:
    """What is wrong where CIFAR-10 is asked for and is not there."""
    return f"no CIFAR-10 in {folder}: give --data, or --download to fetch it there"


def source_of(row: Row, args: argparse.Namespace, whole: bool = False) -> Source | None:
    """The data that the options name for a row, ``whole`` if a part is an error; None if they name none."""
    option = option_of(row, args)
    folder: Path | None = getattr(args, option)
    if folder is None:
        return None
    if option == "data" and folder == CIFAR10_DIR and not folder.is_dir() and not args.download:
        return None
    if option == "data" and not folder.is_dir() and not args.download:
        raise ValueError(no_cifar10(folder))
    if option != "data" and not folder.is_dir():
        raise ValueError(f"--{option} {folder} is not a folder: give the one that holds {row.data}")
    if option == "voc" and args.proposals and not args.proposals.is_file():
        raise ValueError(f"--proposals {args.proposals} is not a file: make it with the command proposals")
    if command_of(row) == "outliers":
        normal = normal_dataset(row.weights)
        folder = getattr(args, OPTIONS[normal])
        return Source(normal, folder, args.download, cifar100=args.cifar100, photos=args.photos)
    if row.data == DATASETS["exif"].name and not (folder / EXIF_FOLDER).is_dir():
        return None
    # VOC's is the folder of all years
    dataset = "" if command_of(row) in TRANSFERS else dataset_of(row.data)
    return Source(dataset, folder, args.download, args.proposals, whole)
