"""PASCAL VOC in its standard layout, read through torchvision's datasets and checked before anything is trained.

    VOCdevkit/VOC2007/ImageSets/Main/trainval.txt           names of images, one a line
                      ImageSets/Segmentation/train.txt      the same, of those that have masks
                      JPEGImages/000005.jpg
                      Annotations/000005.xml                objects: class, box, difficult
                      SegmentationClass/000005.png          a class for every pixel, 0 background, 255 not counted

Data of one's own goes the same way, with classes of its own. Images are taken as they are stored, not turned by their
EXIF orientation: boxes and masks are in stored pixels.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import VOCDetection, VOCSegmentation

from rotation_ssl.messages import first_line
from training.transfer.metrics import IGNORED
from training.transfer.recipes import Splits

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
# by year and folder of ImageSets, the training and test images of the recipes' splits
COUNTS = {
    ("2007", "Main"): (5_011, 4_952),
    ("2007", "Segmentation"): (422, 210),
    ("2012", "Segmentation"): (1_464, 1_449),
}


@dataclass(frozen=True)
class AnnotatedImage:
    """An image file of ``width`` x ``height`` pixels and its n objects.

    ``boxes`` (n, 4) float32 are left, top, right, bottom in pixels from the image's corner: a box of the whole image is
    0, 0, width, height (the files count from 1 and include the last pixel). ``labels`` (n,) int64 are positions in the
    classes, ``difficult`` (n,) bool.
    """

    file: Path
    width: int
    height: int
    boxes: torch.Tensor
    labels: torch.Tensor
    difficult: torch.Tensor

    @property
    def name(self) -> str:
        """The image's name in the lists, without suffix."""
        return self.file.stem


@dataclass(frozen=True)
class MaskedImage:
    """An image file, the file of its mask, and the pixels that both have."""

    file: Path
    mask: Path
    width: int
    height: int


def read_annotations(
    data_dir: Path, year: str, split: str, classes: Sequence[str] = CLASSES
) -> tuple[AnnotatedImage, ...]:
    """The images of a split with the objects of their annotations, for classification and detection.

    Args:
        data_dir: the folder ``VOCdevkit``, or the one that holds it.
        year: '2007', say, of ``VOC2007``.
        split: 'trainval', 'test' and so on, a list in ``ImageSets/Main``.
        classes: names that objects may have.

    Raises:
        ValueError: no such data, an image or annotation that is missing or does not read, a class that is not one of
            the classes, a box that is empty or more than a pixel outside of its image, or an image of another size than
            its annotation says; the error names the file.
    """
    data = _open(VOCDetection, data_dir, year, split, "Main")
    return tuple(
        _annotated(Path(image), Path(annotation), classes)
        for image, annotation in zip(data.images, data.annotations, strict=True)
    )


def read_masks(data_dir: Path, year: str, split: str) -> tuple[MaskedImage, ...]:
    """The images of a split of ``ImageSets/Segmentation`` with their masks, for segmentation.

    Raises:
        ValueError: no such data, an image or mask that is missing or does not read, or a mask of another size than its
            image; the error names the file.
    """
    data = _open(VOCSegmentation, data_dir, year, split, "Segmentation")
    found = []
    for image, mask in zip(map(Path, data.images), map(Path, data.masks), strict=True):
        size, mask_size = _size(image), _size(mask)
        if size != mask_size:
            raise ValueError(
                f"mask {mask} is of {_pixels(mask_size)}, its image of {_pixels(size)}: they must be of one size"
            )
        found.append(MaskedImage(image, mask, *size))
    return tuple(found)


def check_whole_lists(data_dir: Path, splits: Splits, lists: str) -> None:
    """Refuse a part of PASCAL VOC, or other data in its layout, where the whole is meant.

    Args:
        data_dir: the folder ``VOCdevkit``, or the one that holds it.
        splits: those of a recipe.
        lists: the folder of ``ImageSets``, 'Main' or 'Segmentation'.
    """
    kind = VOCDetection if lists == "Main" else VOCSegmentation
    train, test = (
        len(_open(kind, data_dir, splits.year, split, lists).images) for split in (splits.train, splits.test)
    )
    if (train, test) != (expected := COUNTS[splits.year, lists]):
        raise ValueError(
            f"{data_dir} is not the whole of VOC{splits.year}: {splits.train} and {splits.test} of ImageSets/{lists} "
            f"name {train:,} and {test:,} images, expected {expected[0]:,} and {expected[1]:,}; unpack it again"
        )


def class_labels(images: Sequence[AnnotatedImage], classes: int) -> torch.Tensor:
    """Which classes images show: (N, K) int64, 1 for yes, 0 for no, -1 where only difficult objects do."""
    labels = torch.zeros(len(images), classes, dtype=torch.int64)
    for row, image in zip(labels, images, strict=True):
        row[image.labels[image.difficult]] = -1
        row[image.labels[~image.difficult]] = 1
    return labels


def check_countable(images: Sequence[AnnotatedImage]) -> None:
    """Refuse images to measure on that show no object, or difficult ones only: none counts."""
    if not any(bool((~image.difficult).any()) for image in images):
        raise ValueError("no test image shows an object that is not difficult: there is nothing to measure")


def open_pixels(file: Path) -> Image.Image:
    """An image file as RGB, as it is stored.

    Raises:
        ValueError: it does not decode; the error names it.
    """
    with _opened(file) as image:
        return image.convert("RGB")


def open_mask(file: Path, classes: int) -> torch.Tensor:
    """A mask (H, W) uint8: classes 0 (background) to K, or 255.

    Args:
        file: a palette or grey png.
        classes: K, without the background.

    Raises:
        ValueError: it does not decode, has colours in place of classes, or a class out of range; the error names it.
    """
    with _opened(file, "mask") as image:
        mode, pixels = image.mode, np.array(image)
    if mode not in ("P", "L"):
        raise ValueError(f"mask {file} has colours ({mode}) in place of classes: write a palette or grey png")
    mask = torch.from_numpy(pixels)
    wrong = mask[(mask > classes) & (mask != IGNORED)]
    if len(wrong):
        raise ValueError(f"mask {file} has class {int(wrong[0])}: there are 0 (background) to {classes}, and {IGNORED}")
    return mask


def pixels_tensor(image: Image.Image) -> torch.Tensor:
    """(3, H, W) uint8 of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def check_large_enough(file: Path, width: int, height: int, smallest: int, scaled: str = "") -> None:
    """Refuse an image with a side under ``smallest`` pixels: the network's strides leave nothing of it."""
    if min(width, height) < smallest:
        raise ValueError(
            f"image {file} is of {_pixels((width, height))}{scaled}: the network's strides leave nothing of a side "
            f"under {smallest} pixels; remove it from the list, or make it larger"
        )


def _open(kind: Any, data_dir: Path, year: str, split: str, lists: str) -> Any:
    if year == "2011":
        raise ValueError("VOC2011 is not read, for torchvision looks for it in another layout: take VOC2012")
    root = data_dir.absolute().parent if data_dir.name == "VOCdevkit" else data_dir
    folder = root / "VOCdevkit" / f"VOC{year}"
    if not folder.is_dir():
        raise ValueError(f"no PASCAL VOC in {data_dir}: expected VOCdevkit/VOC{year} there; give --data or --year")
    names = folder / "ImageSets" / lists / f"{split}.txt"
    if not names.is_file():
        there = ", ".join(sorted(file.stem for file in names.parent.glob("*.txt") if "_" not in file.stem))
        raise ValueError(f"{names} does not exist: there are the splits {there or 'none'}")
    try:
        data = kind(root, year=year, image_set=split)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{folder}, {split}: {first_line(error)}") from error
    if not data.images:
        raise ValueError(f"{names} names no images")
    if any(not name.strip() for name in names.read_text().splitlines()):
        raise ValueError(f"{names} has an empty line: one image's name a line")
    return data


def _annotated(image: Path, annotation: Path, classes: Sequence[str]) -> AnnotatedImage:
    if not annotation.is_file():
        raise ValueError(f"annotation {annotation} is missing: the list names its image")
    width, height = _size(image)
    try:
        content: dict[str, Any] = VOCDetection.parse_voc_xml(ElementTree.parse(annotation).getroot())["annotation"]
        objects = [
            (
                str(entry["name"]),
                [float(entry["bndbox"][side]) for side in ("xmin", "ymin", "xmax", "ymax")],
                str(entry.get("difficult", "0")) == "1",
            )
            for entry in content["object"]
        ]
        said = tuple(int(content["size"][side]) for side in ("width", "height")) if "size" in content else None
    except (ElementTree.ParseError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"annotation {annotation} does not read ({type(error).__name__}: {error}); expected VOC's XML"
        ) from error
    if said not in (None, (width, height)):
        raise ValueError(
            f"annotation {annotation} says {_pixels(said)}, image {image} is of {_pixels((width, height))}"
        )
    boxes = torch.tensor([box for _, box, _ in objects], dtype=torch.float32).view(-1, 4)
    boxes[:, :2] -= 1
    edges = torch.tensor([width, height, width, height], dtype=torch.float32)
    for (name, said_box, _), box in zip(objects, boxes, strict=True):
        called = f"box {', '.join(f'{value:g}' for value in said_box)} of {name} in {annotation}"
        if name not in classes:
            raise ValueError(f"{annotation} has an object of class {name!r}: the classes are {', '.join(classes)}")
        # the smallest box that makes sense has two pixels a side: one that begins where it ends is a mistake
        if not (said_box[0] < said_box[2] and said_box[1] < said_box[3]):
            raise ValueError(f"{called} is empty: xmin must be under xmax, ymin under ymax")
        # files that count from 0 are off by one, which harms little
        if not (box.min() >= -1 and (box <= edges + 1).all()):
            raise ValueError(f"{called} is outside of the image's {_pixels((width, height))}")
    return AnnotatedImage(
        image,
        width,
        height,
        torch.minimum(boxes.clamp_min(0), edges),
        torch.tensor([classes.index(name) for name, _, _ in objects], dtype=torch.int64),
        torch.tensor([hard for _, _, hard in objects], dtype=torch.bool),
    )


def _size(file: Path) -> tuple[int, int]:
    kind = "mask" if file.suffix == ".png" else "image"
    if not file.is_file():
        raise ValueError(f"{kind} {file} is missing: the list names it")
    with _opened(file, kind) as image:
        return image.size


@contextlib.contextmanager
def _opened(file: Path, kind: str = "image") -> Iterator[Image.Image]:
    try:
        with Image.open(file) as image:
            yield image
    except Exception as error:
        # what Pillow's many readers raise on damaged files is not one family
        raise ValueError(f"{kind} {file} does not decode ({error}); replace or remove it") from error


def _pixels(size: tuple[int, ...] | None) -> str:
    return "unknown pixels" if size is None else f"{size[0]} x {size[1]} pixels"
