"""Labelled images in memory, and folders of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rotation_ssl.images import IMAGE_SUFFIXES, is_image_name, read_images
from rotation_ssl.messages import some


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
class LabelledSplits:
    """Training and test images of the same classes, and the name that the dataset has in result rows."""

    name: str
    train: LabelledImages
    test: LabelledImages


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
            raise ValueError(f"labels_per_class must be 1 to {len(own)}, the images of {name}, got {labels_per_class}")
        order = torch.arange(len(own)) if generator is None else torch.randperm(len(own), generator=generator)
        chosen.append(own[order[:labels_per_class]])
    return data.subset(torch.cat(chosen).sort().values)


def check_same_classes(train: Sequence[str], test: Sequence[str]) -> None:
    """Refuse test images of other classes than the training images'.

    Args:
        train: the classes, in the order of their labels.
        test: those of the test images.

    Raises:
        ValueError: the classes differ; the error names those that one of the two lacks.
    """
    if train != test:
        lacking = [f"{name} (not in train)" for name in test if name not in train]
        lacking += [f"{name} (not in test)" for name in train if name not in test]
        raise ValueError(f"training and test images are of different classes: {some(lacking)}; make them the same")


def load_folder(folder: Path, size: int) -> LabelledImages:
    """Images of :func:`labelled_files`, as RGB squares of ``size`` pixels.

    An image of another size is resized (bicubic) so that its shorter side is ``size``, then its centre is taken.
    Grayscale, palette, RGBA and CMYK images are converted to RGB.

    Raises:
        ValueError: as :func:`labelled_files`, or an image does not decode.
    """
    files, labels, classes = labelled_files(folder)
    return LabelledImages(read_images(files, size), labels, classes)


def labelled_files(folder: Path) -> tuple[list[Path], torch.Tensor, tuple[str, ...]]:
    """The files of ``folder/<class>/*``, sorted by name over all classes, their labels (N,) int64, and the classes.

    Files and folders whose name begins with a dot are skipped.

    Raises:
        ValueError: the folder is missing or empty, or a class folder is empty.
    """
    if not folder.is_dir():
        raise ValueError(f"data folder {folder} does not exist; give one that holds a folder of images for each class")
    class_folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not class_folders:
        raise ValueError(f"data folder {folder} holds no class folders; expected {folder}/<class>/*.png")
    files: list[tuple[Path, int]] = []
    for label, class_folder in enumerate(class_folders):
        found = [(path, label) for path in class_folder.iterdir() if is_image_name(path.name)]
        if not found:
            raise ValueError(
                f"class folder {class_folder} holds no images ({', '.join(IMAGE_SUFFIXES)}); fill or remove it"
            )
        files += found
    files.sort(key=lambda item: (item[0].name, item[0]))
    labels = torch.tensor([label for _, label in files])
    return [path for path, _ in files], labels, tuple(path.name for path in class_folders)


def load_folder_split(root: Path, split: str, size: int) -> LabelledImages:
    """The training or test images of ``root/train/<class>/*`` and ``root/test`` or ``root/val``.

    Args:
        root: holds both.
        split: 'train', shuffled with a fixed seed, or 'test'.
        size: side of the squares.

    Raises:
        ValueError: as :func:`load_folder`.
    """
    files, labels, classes = labelled_files(split_folder(root, split))
    # the files, not the images: those would be in memory twice
    order = torch.arange(len(files)) if split == "test" else _mixed(len(files))
    return LabelledImages(read_images([files[i] for i in order], size), labels[order], classes)


def split_folder(root: Path, split: str) -> Path:
    """``root/split``, or ``root/val`` where there are no test images."""
    instead = split == "test" and not (root / "test").is_dir() and (root / "val").is_dir()
    return root / ("val" if instead else split)


def shuffled(data: LabelledImages) -> LabelledImages:
    """Shuffle images with a fixed seed, so that the last ones, on which settings are chosen, are of all classes."""
    return data.subset(_mixed(len(data)))


def _mixed(count: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))
