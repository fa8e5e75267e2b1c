"""Augmentation as batched tensor code, on whatever device the images are: random crops, some of them mirrored."""

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F


class Windows(NamedTuple):
    """Where each of N crops is taken: ``top`` and ``left`` (N,) int64 pixels, and ``mirrored`` (N,) bool."""

    top: torch.Tensor
    left: torch.Tensor
    mirrored: torch.Tensor


class Boxes(NamedTuple):
    """What of each of N images is resized to a crop: ``top``, ``left``, ``height`` and ``width`` (N,) float32, in parts
    of the image's side, and ``mirrored`` (N,) bool.
    """

    top: torch.Tensor
    left: torch.Tensor
    height: torch.Tensor
    width: torch.Tensor
    mirrored: torch.Tensor


def draw_windows(
    count: int, size: int, crop: int, padding: int, flip: bool | torch.Tensor, generator: torch.Generator
) -> Windows:
    """Random windows for ``count`` images, drawn on the CPU, so that every device gets the same.

    Args:
        count: N.
        size: side of the images.
        crop: side of the crops, at most size + 2 * padding.
        padding: pixels added on all four sides before cropping (the same on each: one-sided padding would tell the
            orientation).
        flip: mirror each crop left to right with probability 1/2, or not; or (N,) bool that says which.
        generator: on the CPU.

    Raises:
        ValueError: the crop is larger than the padded image.
    """
    if crop > size + 2 * padding or crop < 1:
        raise ValueError(f"crop {crop} does not fit images of {size} pixels padded by {padding}")
    top, left = torch.randint(-padding, size + padding - crop + 1, (2, count), generator=generator)
    drawn = torch.rand(count, generator=generator)
    return Windows(top, left, flip if isinstance(flip, torch.Tensor) else drawn < (0.5 if flip else 0.0))


def take_windows(images: torch.Tensor, windows: Windows, crop: int, padding_mode: str) -> torch.Tensor:
    """The windows' crops, in one gather.

    Args:
        images: (N, C, H, H), any dtype.
        windows: of each image.
        crop: side of the crops.
        padding_mode: 'reflect' mirrors the image at its border, 'constant' pads with zeros.

    Returns:
        (N, C, crop, crop), channels_last in memory, same dtype and device.

    Raises:
        ValueError: the mode is unknown.
    """
    if padding_mode not in ("reflect", "constant"):
        raise ValueError(f"padding_mode must be 'reflect' or 'constant', got {padding_mode!r}")
    size = images.shape[-1]
    steps = torch.arange(crop)
    rows = (windows.top[:, None] + steps).to(images.device)
    cols = (windows.left[:, None] + torch.where(windows.mirrored[:, None], steps.flip(0), steps)).to(images.device)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    # the sliced channel axis goes last: the result is channels_last without a copy
    crops = images[batch, :, _reflect(rows, size)[:, :, None], _reflect(cols, size)[:, None, :]]
    if padding_mode == "constant":
        inside = ((rows >= 0) & (rows < size))[:, :, None] & ((cols >= 0) & (cols < size))[:, None, :]
        crops = crops * inside[..., None].to(crops.dtype)
    return crops.permute(0, 3, 1, 2)


def draw_boxes(count: int, scale: tuple[float, float], flip: bool | torch.Tensor, generator: torch.Generator) -> Boxes:
    """Random boxes for ``count`` images, drawn on the CPU: torchvision's RandomResizedCrop, for square images.

    Args:
        count: N.
        scale: the least and the largest share of the image's area; the aspect is of 3/4 to 4/3, a side that would be
            longer than the image's is cut to it.
        flip: mirror each crop left to right with probability 1/2, or not; or (N,) bool that says which.
        generator: on the CPU.
    """
    area, aspect, top, left, drawn = torch.rand(5, count, generator=generator)
    area = scale[0] + (scale[1] - scale[0]) * area
    aspect = ((2 * aspect - 1) * math.log(4 / 3)).exp()
    height, width = (area / aspect).sqrt().clamp_max(1.0), (area * aspect).sqrt().clamp_max(1.0)
    mirrored = flip if isinstance(flip, torch.Tensor) else drawn < (0.5 if flip else 0.0)
    return Boxes(top * (1 - height), left * (1 - width), height, width, mirrored)


def whole_boxes(count: int) -> Boxes:
    """The whole of each of ``count`` images, not mirrored."""
    zeros, ones = torch.zeros(count), torch.ones(count)
    return Boxes(zeros, zeros, ones, ones, torch.zeros(count, dtype=torch.bool))


def take_boxes(images: torch.Tensor, boxes: Boxes, crop: int) -> torch.Tensor:
    """The boxes resized to crops, bilinearly.

    Without antialiasing: a box of more than twice the crop's side would alias.

    Args:
        images: (N, C, H, H), any dtype.
        boxes: of each image.
        crop: side of the crops.

    Returns:
        (N, C, crop, crop) float32 of the images' values, channels_last in memory, on their device.
    """
    # grid_sample's coordinates go from -1 to 1 over the image
    zero = torch.zeros_like(boxes.top)
    across = torch.where(boxes.mirrored, -boxes.width, boxes.width)
    theta = torch.stack(
        [
            torch.stack([across, zero, 2 * boxes.left + boxes.width - 1], 1),
            torch.stack([zero, boxes.height, 2 * boxes.top + boxes.height - 1], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [len(images), 1, crop, crop], align_corners=False).to(images.device)
    pixels = images.float().contiguous(memory_format=torch.channels_last)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False).contiguous(
        memory_format=torch.channels_last
    )


def crop_and_flip(
    images: torch.Tensor,
    crop: int,
    padding: int,
    padding_mode: str,
    flip: bool | torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """A random square crop of each image, some of them mirrored: :func:`draw_windows`, then :func:`take_windows`."""
    windows = draw_windows(len(images), images.shape[-1], crop, padding, flip, generator)
    return take_windows(images, windows, crop, padding_mode)


def _reflect(index: torch.Tensor, size: int) -> torch.Tensor:
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)
