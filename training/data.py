"""Labelled images as one uint8 tensor."""

from dataclasses import dataclass
from pathlib import Path

import torch

from rotation_ssl.images import IMAGE_SUFFIXES, read_images

DATASETS = ("cifar10", "tinyimagenet", "folder")
TINYIMAGENET_SIZE = 64
# what the data sets are called in result rows, and how many training and test images they have
NAMES = {"cifar10": "CIFAR-10 test", "tinyimagenet": "Tiny-ImageNet val"}
WHOLE = {"cifar10": (50_000, 10_000), "tinyimagenet": (100_000, 10_000)}
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class LabelledImages:
    """N square images of one size in memory: ``images`` (N, 3, H, H) uint8 and ``labels`` (N,) int64."""

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, index: torch.Tensor) -> "LabelledImages":
        """The images at ``index``, in its order."""
        return LabelledImages(self.images[index], self.labels[index], self.classes)


@dataclass(frozen=True)
class Images:
    """Training and test images of the same classes, and the name that the data set has in result rows."""

    name: str
    train: LabelledImages
    test: LabelledImages


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


def labels_subset(
    data: LabelledImages, labels_per_class: int, generator: torch.Generator | None = None
) -> LabelledImages:
    """The first ``labels_per_class`` images of each class, in their order, or as many drawn at random.

    Args:
        data: N images of K classes.
        labels_per_class: images of each class.
        generator: for random ones; None for the first.

    Raises:
        ValueError: a class has fewer images.
    """
    chosen = []
    for label, name in enumerate(data.classes):
        own = (data.labels == label).nonzero()[:, 0]
        if not 1 <= labels_per_class <= len(own):
            raise ValueError(f"labels of class {name} must be 1 to {len(own)}, all that it has, got {labels_per_class}")
        order = torch.arange(len(own)) if generator is None else torch.randperm(len(own), generator=generator)
        chosen.append(own[order[:labels_per_class]])
    return data.subset(torch.cat(chosen).sort().values)


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
            "give --data-dir, or --download to fetch it there"
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
    instead = split == "test" and not (data_dir / "test").is_dir() and (data_dir / "val").is_dir()
    data = load_folder(data_dir / ("val" if instead else split), size)
    if split == "test":
        return data
    # file names often go with the class: the last images, which choose settings, must be of all classes
    return data.subset(torch.randperm(len(data), generator=torch.Generator().manual_seed(0)))


def check_same_classes(train: LabelledImages, test: LabelledImages) -> None:
    """Refuse test images of other classes than the training images'.

    Raises:
        ValueError: the classes differ; the error names those that one of the two lacks.
    """
    if train.classes != test.classes:
        lacking = [f"{name} (not in train)" for name in test.classes if name not in train.classes]
        lacking += [f"{name} (not in test)" for name in train.classes if name not in test.classes]
        raise ValueError(f"training and test images are of different classes: {', '.join(lacking)}; make them the same")


def load_folder(folder: Path, size: int) -> LabelledImages:
    """Images of ``folder/<class>/*``, sorted by file name over all classes, as RGB squares of ``size`` pixels.

    An image of another size is resized (bicubic) so that its shorter side is ``size``, then its centre is taken.
    Grayscale, palette, RGBA and CMYK images are converted to RGB.

    Raises:
        ValueError: the folder is missing or empty, a class folder is empty, or an image does not decode.
    """
    if not folder.is_dir():
        raise ValueError(f"data folder {folder} does not exist; give one that holds a folder of images for each class")
    class_folders = sorted(path for path in folder.iterdir() if path.is_dir())
    if not class_folders:
        raise ValueError(f"data folder {folder} holds no class folders; expected {folder}/<class>/*.png")
    files: list[tuple[Path, int]] = []
    for label, class_folder in enumerate(class_folders):
        found = [(path, label) for path in class_folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
        if not found:
            raise ValueError(
                f"class folder {class_folder} holds no images ({', '.join(IMAGE_SUFFIXES)}); fill or remove it"
            )
        files += found
    files.sort(key=lambda item: (item[0].name, item[0]))
    images = read_images([path for path, _ in files], size)
    return LabelledImages(images, torch.tensor([label for _, label in files]), tuple(p.name for p in class_folders))
