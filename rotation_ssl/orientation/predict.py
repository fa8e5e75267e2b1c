"""Which way up: the rotation of a picture, its confidence, and whether that is enough to rotate the picture back.

The network predicts the rotation of the picture in each of its four rotations, and the predictions are averaged.
Therefore rotating a picture by k x 90 degrees adds k to the answer and changes nothing else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import nn
from torch.nn import functional as F

from rotation_ssl import zoo
from rotation_ssl.images import normalize
from rotation_ssl.rotations import rotate_all

ELONGATED = 1.1  # ratio of longer to shorter side from which the whole picture is looked at too


@dataclass(frozen=True)
class Orientation:
    """How a picture is rotated.

    ``rotation`` is k: its content is rotated k x 90 degrees counter-clockwise. ``probabilities`` are those of the four
    k, ``confidence`` is the largest.
    """

    rotation: int
    confidence: float
    probabilities: tuple[float, ...]

    @property
    def fix_cw(self) -> int:
        """Degrees clockwise that turn the picture upright, one of 0, 90, 180 and 270."""
        return 90 * self.rotation

    @property
    def fix_ccw(self) -> int:
        """Degrees counter-clockwise that turn the picture upright, one of 0, 90, 180 and 270."""
        return (360 - self.fix_cw) % 360


class Calibration(NamedTuple):
    """The settings with which a model predicts orientations.

    ``size`` is the side of the square input in pixels, ``temperature`` what the logits are divided by, and
    ``threshold`` the lowest confidence at which a prediction is trusted, None if none was fitted.
    """

    size: int
    temperature: float
    threshold: float | None


def calibration(model: Any) -> Calibration:
    """The calibration of published weights, fitted on photographs; for others their input size and a temperature of 1.

    Args:
        model: a timm model.
    """
    entry = zoo.published_entry(model).get("orientation", {})
    size = entry.get("size") or resolve_model_data_config(model)["input_size"][-1]
    return Calibration(size, entry.get("temperature", 1.0), entry.get("threshold"))


def predict_orientation(
    model: nn.Module,
    images: Sequence[Image.Image],
    temperature: float | None = None,
    batch_size: int = 64,
    size: int | None = None,
) -> list[Orientation]:
    """How each picture is rotated.

    Args:
        model: a timm model whose 4 outputs are the rotations, as those of this package; it is set to eval mode.
        images: RGB, of any size and aspect, as :func:`rotation_ssl.images.read_image` gives them.
        temperature: what the logits are divided by, positive; above 1 the network is less confident. None: that of
            :func:`calibration`, for which the published thresholds were fitted.
        batch_size: squares in a batch, each in four rotations.
        size: side of the squares in pixels; None: that of :func:`calibration`. A convolutional network may be more
            accurate on squares that are larger than its training images (Touvron et al. 2019).

    Raises:
        ValueError: a model with other outputs, an image that is not RGB or is empty, logits that are not finite, or a
            temperature out of range.
    """
    check_head(model)
    fitted, cfg = calibration(model), resolve_model_data_config(model)
    temperature = fitted.temperature if temperature is None else temperature
    weight = next(model.parameters())
    views = [picture_squares(image, size or fitted.size) for image in images]
    if not views:
        return []
    squares = torch.cat(views)
    model.eval()
    with torch.inference_mode():
        parts = []
        for part in squares.split(batch_size):
            # normalised as float32, also for a model of half precision
            normalised = normalize(part.to(weight.device), cfg["mean"], cfg["std"]).to(weight.dtype)
            parts.append(rotation_probabilities(model, normalised, temperature).cpu())
    found = torch.cat(parts).split([len(view) for view in views])
    return [_orientation(probabilities.mean(0)) for probabilities in found]


def rotation_probabilities(model: nn.Module, images: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """The probability of each rotation, averaged over the four rotated copies of every image: (N, 4) float32.

    Rotating the images by 90 degrees counter-clockwise moves each row by one.

    Args:
        model: maps (4 N, C, H, H) to logits (4 N, 4), in eval mode.
        images: (N, C, H, H), normalised.
        temperature: what the logits are divided by, positive.

    Raises:
        ValueError: logits of another shape or that are not finite, or a temperature out of range.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    return F.softmax(rotation_logits(model, images) / temperature, -1).mean(1)


def rotation_logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The logits of each image in each of its four rotated copies, (N, 4, 4) float32: the last axis is the rotation of
    the image itself, not of the copy.

    Raises:
        ValueError: logits of another shape or that are not finite.
    """
    logits = model(rotate_all(images)).float()
    if logits.shape != (4 * len(images), 4):
        raise ValueError(f"the model must give 4 logits for each rotated image, got shape {tuple(logits.shape)}")
    if not logits.isfinite().all():
        raise ValueError("the model's logits are not finite: check its weights and the images")
    # an image that is rotated by k looks rotated by k + turn in its copy that is rotated by turn
    return torch.stack([part.roll(-turn, 1) for turn, part in enumerate(logits.unflatten(0, (4, len(images))))], 1)


def picture_squares(image: Image.Image, size: int) -> torch.Tensor:
    """The views of a picture as squares: (V, 3, size, size) uint8.

    Its central square and, if it is elongated, the whole picture squeezed to a square, both resized with an antialiased
    bicubic filter.

    Raises:
        ValueError: the picture is not RGB, or empty.
    """
    if image.mode != "RGB":
        raise ValueError(
            f"images must be RGB, as rotation_ssl.images.read_image returns them, got mode {image.mode}: "
            "pass it to read_image first"
        )
    if min(image.size) == 0:
        raise ValueError(f"a picture of {image.width} x {image.height} pixels has nothing to look at")
    short, long = sorted(image.size)
    # not rounded: a turned picture is looked at in the same square
    left, top = (image.width - short) / 2, (image.height - short) / 2
    boxes = [(left, top, left + short, top + short)]
    if long >= ELONGATED * short:
        boxes.append((0, 0, *image.size))
    squares = []
    for box in boxes:
        part = image.resize((size, size), Image.Resampling.BICUBIC, box)
        squares.append(torch.frombuffer(bytearray(part.tobytes()), dtype=torch.uint8).view(size, size, 3))
    return torch.stack(squares).permute(0, 3, 1, 2).contiguous()


def check_head(model: nn.Module) -> None:
    """Check that a model has one output for each of the four rotations.

    Raises:
        ValueError: it has another number of outputs.
    """
    if (outputs := getattr(model, "num_classes", None)) != 4:
        raise ValueError(f"the model must have 4 outputs, one for each rotation; this one has {outputs}: use another")


def _orientation(probabilities: torch.Tensor) -> Orientation:
    confidence, rotation = probabilities.max(0)
    return Orientation(int(rotation), float(confidence), tuple(probabilities.tolist()))
