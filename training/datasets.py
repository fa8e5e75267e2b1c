"""The labelled datasets of the lab, an entry each: name, number of images, and how it is read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from rotation_ssl.images import read_images
from rotation_ssl.labelled import (
    LabelledImages,
    LabelledSplits,
    check_same_classes,
    labelled_files,
    load_folder,
    load_folder_split,
    shuffled,
)
from rotation_ssl.pretraining.images import UnlabelledImages, open_files, open_images
from training.photos import listed_files, open_views, photo_files

# the N files of a split, their labels (N,) int64 (positions in the classes) and the classes
Listed = tuple[list[Path], torch.Tensor, tuple[str, ...]]
EXIF_FOLDER, EXIF_SOURCE = "exif", "https://github.com/recurser/exif-orientation-examples"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class DataSet:
    """A labelled dataset.

    ``name`` is what result rows call it, ``counts`` are its training and test images, ``size`` is the side of its
    images in pixels, 0 where they are resized to what is asked for. ``files`` lists a split, 'train' or 'test', of the
    dataset in a folder; None: it is read otherwise. ``probe_size`` is the side of the squares that small-budget probes
    of all layers take their crops from.
    """

    name: str
    counts: tuple[int, int]
    size: int = 0
    files: Callable[[Path, str], Listed] | None = None
    probe_size: int = 64


def load_cifar10(data_dir: Path, split: str, download: bool = False) -> LabelledImages:
    """CIFAR-10 (Krizhevsky 2009) from a folder ``train|test/<class>/*.png``, or from torchvision's batches.

    Args:
        data_dir: holds ``train/`` and ``test/`` with a folder a class, or ``cifar-10-batches-py/``.
        split: 'train' (50,000 images) or 'test' (10,000).
        download: let torchvision fetch the batches into ``data_dir`` when they are not there.

    Returns:
        The images in their original order, (N, 3, 32, 32), classes in alphabetical order, which is the original one.
    """
    if (data_dir / split).is_dir():
        data = load_folder(data_dir / split, size=32)
        if data.classes != CIFAR10_CLASSES:
            raise ValueError(
                f"{data_dir / split} is not CIFAR-10: its classes are {', '.join(data.classes)}; "
                f"expected {', '.join(CIFAR10_CLASSES)}"
            )
        return data
    if not download and not (data_dir / "cifar-10-batches-py").is_dir():
        raise ValueError(
            f"no CIFAR-10 in {data_dir}: expected {split}/<class>/*.png or cifar-10-batches-py/; "
            "give --data, or --download to fetch it there"
        )
    from torchvision.datasets import CIFAR10

    try:
        dataset = CIFAR10(str(data_dir), train=split == "train", download=download)
    except (RuntimeError, OSError) as error:
        what = "cannot be downloaded to" if download else "cannot be read from"
        again = (
            "copy it there as train/<class>/*.png, or try again" if download else "download it again with --download"
        )
        raise ValueError(f"CIFAR-10 {what} {data_dir} ({error}): {again}") from error
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return LabelledImages(images, torch.tensor(dataset.targets), CIFAR10_CLASSES)


def tinyimagenet_files(data_dir: Path, split: str) -> Listed:
    """The image files of Tiny-ImageNet (200 classes of ImageNet at 64 pixels), their labels and the classes.

    Args:
        data_dir: the folder ``tiny-imagenet-200`` as it is distributed: ``train/<wnid>/images/*.JPEG``,
            ``val/images/*.JPEG`` and ``val/val_annotations.txt``.
        split: 'train' (100,000 images), class by class, or 'test', the 10,000 of ``val``, whose labels are published.

    Returns:
        Files, labels (positions in the classes) and classes, the WordNet ids in alphabetical order.
    """
    train, val = data_dir / "train", data_dir / "val"
    folders = [path for path in train.glob("[!.]*") if path.is_dir()]
    classes = tuple(sorted(folder.name for folder in folders))
    if not classes:
        raise ValueError(f"no Tiny-ImageNet in {data_dir}: expected train/<wnid>/images/*.JPEG; give tiny-imagenet-200")
    files: list[Path] = []
    labels: list[int] = []
    if split == "train":
        for label, name in enumerate(classes):
            own = sorted((train / name / "images").glob("*.JPEG"))
            if not own:
                raise ValueError(f"class {name} of {data_dir} has no images in train/{name}/images: fetch it again")
            files += own
            labels += [label] * len(own)
        return files, torch.tensor(labels), classes
    annotations = val / "val_annotations.txt"
    if not annotations.is_file():
        raise ValueError(f"no labels of Tiny-ImageNet's validation images: {annotations} does not exist")
    for number, line in enumerate(annotations.read_text().splitlines(), 1):
        name, _, wnid = line.partition("\t")
        wnid = wnid.partition("\t")[0]
        if wnid not in classes or not (val / "images" / name).is_file():
            raise ValueError(
                f"{annotations}, line {number} names {name!r} of {wnid!r}: no such image, or no such class"
            )
        files.append(val / "images" / name)
        labels.append(classes.index(wnid))
    return files, torch.tensor(labels), classes


def imagenet20_files(root: Path, split: str) -> Listed:
    """Imagenette and Imagewoof together, 20 classes of ImageNet; ``root`` holds both."""
    folder = "train" if split == "train" else "val"
    nette, woof = (labelled_files(root / name / folder) for name in ("imagenette2-320", "imagewoof2-320"))
    return nette[0] + woof[0], torch.cat([nette[1], woof[1] + len(nette[2])]), nette[2] + woof[2]


def miniplaces_files(root: Path, split: str) -> Listed:
    """MiniPlaces, 100 classes of Places at 128 pixels, as ``data/train.txt`` and ``data/val.txt`` list it.

    Of the 1,000 listed training images of a class 900 are distributed: the others are skipped.
    """
    folder = root / "miniplaces" / "data"
    try:
        lists = {name: (folder / f"{name}.txt").read_text().splitlines() for name in ("train", "val")}
        found = {name: [(folder / "images" / line.split()[0], int(line.split()[1])) for line in lines]
                 for name, lines in lists.items()}  # fmt: skip
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"no MiniPlaces in {folder}: expected images/, train.txt and val.txt there") from error
    names = {label: file.parent.name for file, label in found["train"]}
    chosen = found["val"] if split == "test" else [(file, label) for file, label in found["train"] if file.is_file()]
    labels = torch.tensor([label for _, label in chosen])
    return [file for file, _ in chosen], labels, tuple(names[i] for i in sorted(names))


def held_out(source: str) -> Callable[[Path, str], Listed]:
    """The held-out photographs of one of the sources of `photos`, without labels: for rotation accuracy."""

    def files(root: Path, split: str) -> Listed:
        if split == "train":
            raise ValueError(f"{source} has no training images: only rotation accuracy is measured on it")
        listed = listed_files(root, source)
        return listed, torch.zeros(len(listed), dtype=torch.int64), ("photograph",)

    return files


def exif_files(root: Path, split: str) -> Listed:
    """Two photographs with printed labels, each with the orientation tag 0 to 8, a clone of :data:`EXIF_SOURCE`.

    Shown as the tag says, all are upright.
    """
    if split == "train":
        raise ValueError("the EXIF orientation examples have no training images: only orientation is measured on them")
    files = sorted((root / EXIF_FOLDER).glob("*.jpg"))
    if not files:
        raise ValueError(f"no EXIF orientation examples in {root / EXIF_FOLDER}: clone {EXIF_SOURCE} to it")
    return files, torch.zeros(len(files), dtype=torch.int64), ("photograph",)


DATASETS = {
    "cifar10": DataSet("CIFAR-10 test", (50_000, 10_000), 32, probe_size=32),
    "cifar100": DataSet("CIFAR-100 test", (50_000, 10_000), 32, lambda root, split: labelled_files(root / split), 32),
    "tinyimagenet": DataSet("Tiny-ImageNet val", (100_000, 10_000), 64, tinyimagenet_files),
    "miniplaces": DataSet("MiniPlaces val", (90_000, 10_000), 0, miniplaces_files, 128),
    "imagenet20": DataSet("Imagenette and Imagewoof val", (18_494, 7_854), 0, imagenet20_files, 146),
    "imagenette": DataSet("Imagenette val", (0, 3_925), 0, held_out("imagenette2-320")),
    "imagewoof": DataSet("Imagewoof val", (0, 3_929), 0, held_out("imagewoof2-320")),
    "caltech101": DataSet("Caltech-101 test", (0, 3_049), 0, held_out("caltech101")),
    "voc2007": DataSet("VOC2007 test", (0, 4_952), 0, held_out("VOCdevkit/VOC2007")),
    "exif": DataSet("EXIF orientation examples test", (0, 18), 0, exif_files),
}
FOLDER = "folder"  # of one's own images


def name_of(dataset: str, root: Path, split: str = "test") -> str:
    """What rows call a dataset: its name, or that of the folder and the split."""
    return DATASETS[dataset].name if dataset in DATASETS else f"{root.resolve().name} {split}"


def dataset_of(name: str) -> str:
    """The id of the dataset that rows call ``name``."""
    found = [id for id, dataset in DATASETS.items() if dataset.name == name]
    if not found:
        known = ", ".join(dataset.name for dataset in DATASETS.values())
        raise ValueError(f"no dataset is called {name!r}; there are {known}")
    return found[0]


def load_images(
    dataset: str, data_dir: Path, size: int, download: bool = False, holdout: int = 0, test_only: bool = False
) -> LabelledSplits:
    """Training and test images of a dataset, in memory.

    Args:
        dataset: one of :data:`DATASETS`, or 'folder'.
        size: side of the images, of a dataset without a size of its own.
        download: let torchvision fetch CIFAR-10.
        holdout: take so many of the training images, the last ones, in place of the test images, which are not read.
        test_only: read no training images.
    """
    name = name_of(dataset, data_dir)
    if test_only and not holdout:
        test = load_split(dataset, data_dir, "test", size, download)
        return LabelledSplits(name, test.subset(torch.arange(0)), test)
    # a dataset without training images is refused before its test images are decoded
    train = load_split(dataset, data_dir, "train", size, download)
    if holdout:
        if not 0 < holdout < len(train):
            raise ValueError(f"holdout must be 1 to {len(train) - 1} of the training images, got {holdout}")
        order = torch.arange(len(train))
        name = f"{name.rpartition(' ')[0]}, last {holdout} training image{'s' * (holdout != 1)}"
        return LabelledSplits(name, train.subset(order[:-holdout]), train.subset(order[-holdout:]))
    test = load_split(dataset, data_dir, "test", size, download)
    check_same_classes(train.classes, test.classes)
    return LabelledSplits(name, train, test)


def load_split(dataset: str, data_dir: Path, split: str, size: int, download: bool = False) -> LabelledImages:
    """One split of a dataset, in memory.

    Args:
        dataset: one of :data:`DATASETS`, or 'folder' for ``data_dir/train/<class>/*`` and ``test`` or ``val``.
        split: 'train' or 'test'; training images, but CIFAR-10's, are shuffled, always in the same way.
        size: side of the images, of a dataset without a size of its own.
        download: let torchvision fetch CIFAR-10.
    """
    if dataset == "cifar10":
        return load_cifar10(data_dir, split, download)
    if dataset == FOLDER:
        return load_folder_split(data_dir, split, size)
    files, labels, classes = list_files(dataset, data_dir, split)
    data = LabelledImages(read_images(files, DATASETS[dataset].size or size), labels, classes)
    return data if split == "test" else shuffled(data)


def list_files(dataset: str, data_dir: Path, split: str) -> Listed:
    """The files of a split of a dataset, their labels and the classes."""
    files = DATASETS[dataset].files if dataset in DATASETS else None
    if files is None:
        raise ValueError(f"no dataset {dataset!r}; there are {', '.join((*DATASETS, FOLDER))}")
    return files(data_dir, split)


def check_whole(dataset: str, train: int, test: int) -> None:
    """Refuse a part of a dataset where the whole is meant; training images that were not read are none."""
    if dataset not in DATASETS:
        known = ", ".join(known.name for known in DATASETS.values())
        raise ValueError(f"the card's numbers are of {known}, not of one's own data")
    name, counts = DATASETS[dataset].name, DATASETS[dataset].counts
    if (train, test) not in (counts, (0, counts[1])):
        raise ValueError(
            f"this is not the whole of {name.rpartition(' ')[0]}: {train:,} training and {test:,} test images"
        )


def open_unlabelled(
    data: str, root: Path, size: int, download: bool = False, workers: int = 0
) -> torch.Tensor | UnlabelledImages:
    """The training images of a dataset of the recipes, without their labels.

    Args:
        data: a name of :data:`DATASETS`, 'photos', 'photo-views', or what
            :func:`rotation_ssl.pretraining.images.open_images` takes.
        size: side of the squares.
        download: let torchvision fetch it.
        workers: processes that index tar shards; 0: this one.

    Returns:
        (N, 3, size, size) uint8 of CIFAR-10; others are opened, not read.
    """
    if data == "cifar10":
        if size != 32:
            raise ValueError(f"CIFAR-10's images are of 32 pixels, not {size}: for another size give --dataset folder")
        return load_cifar10(root, "train", download).images
    if data == "photos":
        return open_files(photo_files(root), size)
    if data == "photo-views":
        return open_views(root, size)
    if data in DATASETS and (list_files := DATASETS[data].files):
        return open_files(list_files(root, "train")[0], size)
    return open_images(data, root, size, download, workers)
