"""The pretext task of RotNet, in one screen: rotate every image by multiples of 90 degrees and predict the rotation.

Rotation k is k x 90 degrees counter-clockwise. A batch of rotations is rotation-major: with R rotations of N images,
row r * N + i is image i rotated by ``rotations[r]``, and its label is r, the position in the set of rotations.

Source: Gidaris et al. 2018, section 3.1 (https://arxiv.org/abs/1803.07728). Augment (flip, crop) **before** rotating:
a flip afterwards makes 90 and 270 degrees indistinguishable.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

#: 0, 90, 180 and 270 degrees counter-clockwise.
ROTATIONS = (0, 1, 2, 3)
ROTATION_NAMES = ("upright", "90° ccw", "180°", "90° cw")


def rotate_all(images: torch.Tensor, rotations: Sequence[int] = ROTATIONS) -> torch.Tensor:
    """Rotate every image by each of the rotations. Pixels move and are not interpolated.

    Args:
        images: (N, C, H, H), any dtype and device; a channels_last batch stays channels_last.
        rotations: R distinct values of 0..3, in units of 90 degrees; ``(0, 2)`` is {0, 180} degrees.

    Returns:
        (R * N, C, H, H), rotation-major, same dtype, device and memory format.

    Raises:
        ValueError: images are not a batch of square images, or the rotations are not distinct values of 0..3.
    """
    check_square(images)
    _check_rotations(rotations)
    return concatenate_views(images, [torch.rot90(images, k, (-2, -1)) for k in rotations])


def rotation_labels(
    num_images: int, rotations: Sequence[int] = ROTATIONS, device: torch.device | str | None = None
) -> torch.Tensor:
    """Labels of :func:`rotate_all`'s batch: (R * N,) int64, the position of each row's rotation in the set.

    Raises:
        ValueError: num_images is negative, or the rotations are not distinct values of 0..3.
    """
    if num_images < 0:
        raise ValueError(f"num_images must not be negative, got {num_images}")
    _check_rotations(rotations)
    return torch.arange(len(rotations), device=device).repeat_interleave(num_images)


def rotation_loss(
    model: nn.Module, images: torch.Tensor, rotations: Sequence[int] = ROTATIONS, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Cross-entropy of the predicted rotation of each image: the whole pretext task.

    Args:
        model: maps (R * N, C, H, H) to logits (R * N, R).
        images: (N, C, H, H), augmented and normalised, upright.
        rotations: as in :func:`rotate_all`.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``; the paper uses none.

    Returns:
        Scalar, the mean over the R * N rotated images, computed in float32; differentiable.

    Raises:
        ValueError: as :func:`rotate_all`, no images, or the model does not give R logits an image.
    """
    logits = model(rotate_all(images, rotations))
    return cross_entropy_of_rotations(logits, len(rotations), label_smoothing)


def cross_entropy_of_rotations(logits: torch.Tensor, num_rotations: int, label_smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy of a rotation-major batch's logits (R * N, R), in float32: a differentiable scalar.

    Raises:
        ValueError: no logits, or not R of them an image.
    """
    _check_logits(logits, num_rotations)
    if len(logits) == 0:
        raise ValueError("the batch has no images: give at least one")
    return F.cross_entropy(logits.float(), _labels(logits, num_rotations), label_smoothing=label_smoothing)


def count_correct(model: nn.Module, batches: Iterable[torch.Tensor], num_rotations: int) -> tuple[int, int]:
    """Count the rotated images whose rotation the model predicts correctly.

    Args:
        model: maps (R * N, C, H, H) to logits (R * N, R); set to eval mode during the call, after which the mode of
            each module is restored.
        batches: rotation-major batches (R * N, C, H, H), as ``rotate_all`` returns them.
        num_rotations: R.

    Returns:
        The number of correct predictions and of rotated images; their ratio is the accuracy.

    Raises:
        ValueError: the model does not give R logits an image, or gives some that are not finite.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    correct = total = 0
    try:
        with torch.inference_mode():
            for rotated in batches:
                logits = model(rotated)
                _check_logits(logits, num_rotations)
                if not logits.isfinite().all():
                    raise ValueError("the model's logits are not finite: check its weights and the images")
                correct += int((logits.argmax(1) == _labels(logits, num_rotations)).sum())
                total += len(logits)
    finally:
        for module in training:
            module.training = True
    return correct, total


def check_square(images: torch.Tensor) -> None:
    """Check that images are a batch of square images.

    Raises:
        ValueError: another number of dimensions, or images that are not square.
    """
    if images.ndim != 4:
        raise ValueError(
            f"images must be a batch (N, C, H, W), got shape {tuple(images.shape)}; use images[None] for one"
        )
    if images.shape[-2] != images.shape[-1]:
        raise ValueError(f"images must be square, got {tuple(images.shape[-2:])}: crop them before rotating")


def concatenate_views(images: torch.Tensor, views: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rotated views of a batch (N, C, H, H) as one batch of the same memory format.

    Rotating by 90 degrees changes the memory format, and convolutions are fastest in the format of the images.
    """
    keep = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return torch.cat(list(views)).contiguous(memory_format=keep)


def _check_logits(logits: torch.Tensor, num_rotations: int) -> None:
    if logits.ndim != 2 or logits.shape[1] != num_rotations:
        raise ValueError(
            f"the model must give {num_rotations} logits an image, one for each rotation, got shape "
            f"{tuple(logits.shape)}: create it with num_classes={num_rotations}"
        )


def _labels(logits: torch.Tensor, num_rotations: int) -> torch.Tensor:
    """Labels of a rotation-major batch: the position of each row's rotation."""
    return torch.arange(num_rotations, device=logits.device).repeat_interleave(len(logits) // num_rotations)


def _check_rotations(rotations: Sequence[int]) -> None:
    if not rotations or len(set(rotations)) != len(rotations) or not set(rotations) <= set(ROTATIONS):
        raise ValueError(f"rotations must be distinct values of 0, 1, 2, 3 (times 90 degrees), got {tuple(rotations)}")
