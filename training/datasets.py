"""Labelled images as one uint8 tensor."""

from pathlib import Path

import torch

from rotation_ssl.images import read_images
from rotation_ssl.labelled import Images, LabelledImages, check_same_classes, load_folder, load_folder_split
from rotation_ssl.pretraining.images import UnlabelledImages, open_files, open_images
from training.photos import photo_files

DATASETS = ("cifar10", "tinyimagenet", "folder")
TINYIMAGENET_SIZE = 64
# what the data sets are called in result rows, and how many training and test images they have
NAMES = {"cifar10": "CIFAR-10 test", "tinyimagenet": "Tiny-ImageNet val"}
WHOLE = {"cifar10": (50_000, 10_000), "tinyimagenet": (100_000, 10_000)}
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def load_images(
    dataset: str, data_dir: Path, size: int, download: bool = False, holdout: int = 0, test_only: bool = False
) -> Images:
    """Training and test images of a data set.

    Args:
        dataset: one of :data:`DATASETS`.
        data_dir: where it is.
        size: side of a folder's images.
        download: let torchvision fetch CIFAR-10.
        holdout: take so many of the training images, the last ones, in place of the test images, which are not read.
        test_only: read no training images: there are none.

    Raises:
        ValueError: as :func:`load_split`, different classes in the two, or a holdout out of range.
    """
    name = NAMES.get(dataset) or f"{data_dir.resolve().name} test"
    if holdout:
        train = load_split(dataset, data_dir, "train", size, download)
        if not 0 < holdout < len(train):
            raise ValueError(f"holdout must be 1 to {len(train) - 1} of the training images, got {holdout}")
        order = torch.arange(len(train))
        name = f"{name.rpartition(' ')[0]}, last {holdout} training image{'s' * (holdout != 1)}"
        return Images(name, train.subset(order[:-holdout]), train.subset(order[-holdout:]))
    test = load_split(dataset, data_dir, "test", size, download)
    if test_only:
        return Images(name, test.subset(torch.arange(0)), test)
    train = load_split(dataset, data_dir, "train", size, download)
    check_same_classes(train, test)
    return Images(name, train, test)


def check_whole(dataset: str, train: int, test: int) -> None:
    """Refuse a part of a data set where the whole is meant; training images that were not read are none.

    Raises:
        ValueError: other numbers of images than the data set has, or one of one's own.
    """
    if dataset not in WHOLE:
        raise ValueError(f"the card's numbers are of {', '.join(NAMES.values())}, not of one's own data")
    images = WHOLE[dataset]
    if (train, test) not in (images, (0, images[1])):
        raise ValueError(
            f"this is not the whole of {NAMES[dataset].rpartition(' ')[0]}: {train:,} training and {test:,} test images"
        )


def load_cifar10(data_dir: Path, split: str, download: bool = False) -> LabelledImages:
    """CIFAR-10 (Krizhevsky 2009) from a folder ``train|test/<class>/*.png``, or from torchvision's batches.

    Args:
        data_dir: holds ``train/`` and ``test/`` with a folder a class, or ``cifar-10-batches-py/``.
        split: 'train' (50,000 images) or 'test' (10,000).
        download: let torchvision fetch the batches into ``data_dir`` when they are not there.

    Returns:
        The images in their original order, (N, 3, 32, 32), classes in alphabetical order, which is the original one.

    Raises:
        ValueError: no such data there, a class missing, or an image that does not decode.
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
        raise ValueError(f"CIFAR-10 in {data_dir} cannot be had ({error}); fetch it anew with --download") from error
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return LabelledImages(images, torch.tensor(dataset.targets), CIFAR10_CLASSES)


def tinyimagenet_files(data_dir: Path, split: str) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """The image files of Tiny-ImageNet (200 classes of ImageNet at 64 pixels), their labels and the classes.

    Args:
        data_dir: the folder ``tiny-imagenet-200`` as it is distributed: ``train/<wnid>/images/*.JPEG``,
            ``val/images/*.JPEG`` and ``val/val_annotations.txt``.
        split: 'train' (100,000 images), in an order that is shuffled, always in the same way: the last ones, which are
            held out to tune on, must be of all classes; or 'test', the 10,000 of ``val``, whose labels are published.

    Returns:
        Files, labels (positions in the classes) and classes, the WordNet ids in alphabetical order.

    Raises:
        ValueError: it is not there, a class has no images, or an annotation names no image or no class.
    """
    train, val = data_dir / "train", data_dir / "val"
    classes = tuple(sorted(folder.name for folder in train.iterdir())) if train.is_dir() else ()
    if not classes:
        raise ValueError(f"no Tiny-ImageNet in {data_dir}: expected train/<wnid>/images/*.JPEG; give tiny-imagenet-200")
    files: list[Path] = []
    labels: list[int] = []
    if split == "train":
        for label, name in enumerate(classes):
            own = sorted((train / name / "images").glob("*.JPEG"))
            if not own:
                raise ValueError(f"class {name} of {data_dir} has no images in train/{name}/images: fetch it anew")
            files += own
            labels += [label] * len(own)
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
        return [files[i] for i in order], [labels[i] for i in order], classes
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
    return files, labels, classes


def load_split(dataset: str, data_dir: Path, split: str, size: int, download: bool = False) -> LabelledImages:
    """One split of a data set.

    'cifar10', 'tinyimagenet', or 'folder' for ``data_dir/train/<class>/*`` and ``test`` or ``val`` beside.

    Args:
        dataset: one of :data:`DATASETS`.
        data_dir: where it is.
        split: 'train' or 'test'; a folder's test images may be in ``val/``, its training images are shuffled, always
            in the same way.
        size: side of a folder's images; CIFAR-10 keeps its 32 pixels, Tiny-ImageNet its 64.
        download: let torchvision fetch CIFAR-10.

    Raises:
        ValueError: an unknown data set, or what the loaders refuse.
    """
    if dataset == "cifar10":
        return load_cifar10(data_dir, split, download)
    if dataset == "tinyimagenet":
        files, labels, classes = tinyimagenet_files(data_dir, split)
        return LabelledImages(read_images(files, TINYIMAGENET_SIZE), torch.tensor(labels), classes)
    if dataset != "folder":
        raise ValueError(f"no data set {dataset!r}; there are {', '.join(DATASETS)}")
    return load_folder_split(data_dir, split, size)


def open_unlabelled(data: str, root: Path, size: int, download: bool = False) -> torch.Tensor | UnlabelledImages:
    """The training images of a data set of the recipes, without their labels.

    Args:
        data: 'cifar10', 'tinyimagenet', 'photos', or what :func:`rotation_ssl.pretraining.images.open_images` takes.
        root: where it is.
        size: side of the squares.
        download: let torchvision fetch it.

    Returns:
        (N, 3, size, size) uint8 of CIFAR-10; others are opened, not read.

    Raises:
        ValueError: no such data set, nothing in it, not the whole of it, or another size than it has.
    """
    if data == "cifar10":
        if size != 32:
            raise ValueError(f"CIFAR-10's images are of 32 pixels, not {size}: for another size give --dataset folder")
        return load_cifar10(root, "train", download).images
    if data == "tinyimagenet":
        return open_files(tinyimagenet_files(root, "train")[0], size)
    if data == "photos":
        return open_files(photo_files(root), size)
    return open_images(data, root, size, download)
