"""Detections and segmentations drawn over their images, as PNG files, and all of them on one sheet."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from training.transfer.data import open_pixels, pixels_tensor

COLUMNS, CELL = 4, (300, 225)  # of the sheet; width and height in pixels
NAMES, LINE = 10, 24  # classes in a line of the legend, and its height in pixels


def draw_detections(output: Path, file: Path, found: Mapping[str, torch.Tensor], classes: Sequence[str]) -> Path:
    """Write an image with the detections whose score is 0.2 or more; returns the picture's file.

    Args:
        output: the folder ``pictures`` is made in.
        found: 'boxes' (n, 4) in pixels, 'labels' (n,) from 1, 'scores' (n,).
        classes: the names of the K classes.
    """
    sure = found["scores"] >= 0.2
    names = [
        f"{classes[label - 1]} {score:.2f}"
        for label, score in zip(found["labels"][sure].tolist(), found["scores"][sure].tolist(), strict=True)
    ]
    image, colors = pixels_tensor(open_pixels(file)).contiguous(), palette(len(classes))
    if names:
        chosen = [colors[label] for label in found["labels"][sure].tolist()]
        image = draw_bounding_boxes(image, found["boxes"][sure], names, chosen, width=3)
    return _written(output, file, image)


def draw_segmentation(output: Path, file: Path, predicted: torch.Tensor, classes: int) -> Path:
    """Write an image with the predicted classes (H, W) of its pixels over it; returns the picture's file."""
    image = pixels_tensor(open_pixels(file)).contiguous()
    masks = torch.stack([predicted == label for label in range(1, classes + 1)])
    return _written(output, file, draw_segmentation_masks(image, masks, alpha=0.6, colors=palette(classes)[1:]))


def draw_sheet(output: Path, pictures: Sequence[Path], classes: Sequence[str]) -> None:
    """Write pictures, made smaller, onto one sheet, pictures.jpg: row by row, and below them the classes' colours."""
    (width, height), legend = CELL, draw_legend(classes)
    below = -(-len(pictures) // COLUMNS) * height
    sheet = Image.new("RGB", (legend.width, below + legend.height), "white")
    sheet.paste(legend, (0, below))
    for number, picture in enumerate(pictures):
        with Image.open(picture) as image:
            small = ImageOps.contain(image, (width - 6, height - 6))
        left, top = number % COLUMNS * width, number // COLUMNS * height
        sheet.paste(small, (left + (width - small.width) // 2, top + (height - small.height) // 2))
    sheet.save(output / "pictures.jpg", quality=85)


def draw_legend(classes: Sequence[str]) -> Image.Image:
    """The classes' names, each beside its colour: an image as wide as a sheet."""
    legend = Image.new("RGB", (COLUMNS * CELL[0], -(-len(classes) // NAMES) * LINE), "white")
    draw, width, font = ImageDraw.Draw(legend), legend.width // NAMES, ImageFont.load_default(14)
    for number, (name, color) in enumerate(zip(classes, palette(len(classes))[1:], strict=True)):
        left, top = number % NAMES * width + 4, number // NAMES * LINE + 4
        draw.rectangle((left, top, left + 15, top + 15), color)
        draw.text((left + 21, top), name, "black", font)
    return legend


def palette(classes: int) -> list[tuple[int, int, int]]:
    """VOC's colours of the background and K classes: bit i of a class is bit 7 - i // 3 of the colour's i % 3."""
    return [(_channel(label, 0), _channel(label, 1), _channel(label, 2)) for label in range(classes + 1)]


def _channel(label: int, channel: int) -> int:
    return sum(((label >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(8))


def _written(output: Path, file: Path, image: torch.Tensor) -> Path:
    folder = output / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"{file.stem}.png"
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(picture)
    return picture
