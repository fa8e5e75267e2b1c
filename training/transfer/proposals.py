"""Regions that Fast R-CNN looks at: one safetensors file for all images of a dataset.

A tensor (n, 4) for each image's name ('000005'): left, top, right, bottom in pixels from the image's corner, a box of
the whole image being 0, 0, width, height. The surest regions come first, so that the first k of them are a fair choice.
``python -m training proposals`` writes such a file by selective search.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rotation_ssl.files import replace_tensors
from rotation_ssl.messages import counted
from training.transfer.data import AnnotatedImage


def write_proposals(file: Path, proposals: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write the regions that Fast R-CNN looks at.

    Args:
        file: a safetensors file, written whole or not at all.
        proposals: by image name, '000005', (n, 4): left, top, right, bottom in pixels from the image's corner.
        metadata: kept in the file's header.

    Raises:
        ValueError: regions of another shape, empty ones, or ones that are not finite; the error names the image.
        OSError: the file cannot be written.
    """
    for name, boxes in proposals.items():
        check_boxes(name, boxes)
    tensors = {name: boxes.float().contiguous() for name, boxes in proposals.items()}
    replace_tensors(file, lambda path: save_file(tensors, path, metadata))


def read_proposals(file: Path, image: AnnotatedImage, most: int | None = None) -> torch.Tensor:
    """The first ``most`` regions of an image (None: all), (n, 4) float32, clipped to its pixels.

    Regions more than a pixel outside of the image are refused.
    """
    boxes = opened(file).get_tensor(image.name).float()[:most]
    check_boxes(f"{image.name} in {file}", boxes)
    edges = torch.tensor([image.width, image.height] * 2)
    if (boxes < -1).any() or (boxes > edges + 1).any():
        raise ValueError(
            f"proposals of {image.name} in {file} are outside of its {image.width} x {image.height} pixels: are they "
            "left, top, right, bottom?"
        )
    return torch.minimum(boxes.clamp_min(0), edges)


def check_proposals_file(file: Path, images: Sequence[AnnotatedImage]) -> None:
    """Refuse proposals that do not fit the images, before anything is trained."""
    if not file.is_file():
        raise ValueError(f"proposals {file} do not exist: write them with python -m training proposals")
    try:
        known = set(opened(file).keys())
    except SafetensorError as error:
        raise ValueError(f"proposals {file} are no safetensors file ({error}); write them again") from error
    missing = [image.name for image in images if image.name not in known]
    if missing:
        raise ValueError(f"proposals {file} lack {counted(len(missing), 'image')}, {missing[0]} among them")
    for image in images:
        read_proposals(file, image)


def check_boxes(name: str, boxes: torch.Tensor) -> None:
    """Refuse boxes that are not (n, 4), none at all, empty ones and ones that are not finite."""
    if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) == 0:
        raise ValueError(f"proposals of {name} must be (n, 4), at least one, got {tuple(boxes.shape)}")
    if not (boxes.isfinite().all() and (boxes[:, 2:] > boxes[:, :2]).all()):
        raise ValueError(f"proposals of {name} are empty or not finite: they are left, top, right, bottom")


def opened(file: Path) -> Any:
    """The file, read by name; kept open while it is the same, for a header of 10,000 names takes a while."""
    status = file.stat()
    return _opened(file, (status.st_ino, status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=2)
def _opened(file: Path, state: tuple[int, ...]) -> Any:
    return safe_open(file, framework="pt")
