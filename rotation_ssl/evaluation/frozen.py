"""A frozen backbone: its input and its feature maps."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from timm.data import resolve_model_data_config
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from rotation_ssl.features import batch_extractor, extract_features
from rotation_ssl.images import normalize
from rotation_ssl.precision import autocast_type

PARTS = 10  # correct predictions are counted in tenths of the test images, so that one tenth can be checked alone
MAX_VALUES = 192 * 8 * 8  # of block2, the paper's best layer
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A backbone in eval mode, its image size in pixels, its device, and the precision of its features.

    ``precision`` is 'fp32' or 'bf16', which the settings of a number then state; None is fp32, not stated.
    """

    backbone: nn.Module
    size: int
    device: str = "cpu"
    precision: str | None = None

    @property
    def autocast(self) -> torch.dtype | None:
        """The type to autocast to."""
        return autocast_type(self.precision or "fp32")

    def maps(self, images: torch.Tensor, grids: Mapping[str, int], bar: tqdm | None = None) -> dict[str, torch.Tensor]:
        """Average-pooled maps by layer, (N, C, g, g) bfloat16; vectors as (N, D, 1, 1)."""
        taken = extract_features(
            self.backbone,
            images,
            list(grids),
            grid=grids,
            prepare=preparation(self.backbone, self.size, bar),
            batch_size=BATCH,
            dtype=torch.bfloat16,
            autocast=self.autocast,
        )
        return {layer: f.unflatten(1, (-1, grids[layer], grids[layer])) for layer, f in taken.items()}

    def whole_maps(self, layers: Sequence[str]) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
        """A function from uint8 images (B, 3, H, H) to the unpooled maps of layers, (B, C, H', W') or, for vectors,
        (B, D, 1, 1), on the device: float32, or bfloat16 where the features are.
        """
        extract = batch_extractor(
            self.backbone,
            layers,
            pool=None,
            prepare=preparation(self.backbone, self.size),
            dtype=self.autocast or torch.float32,
            autocast=self.autocast,
            device=None,
        )

        def maps(images: torch.Tensor) -> dict[str, torch.Tensor]:
            found = extract(images)
            return {layer: output if output.ndim == 4 else output[:, :, None, None] for layer, output in found.items()}

        return maps


def map_grids(frozen: Frozen, image: torch.Tensor, layers: Sequence[str], grid: int) -> dict[str, int]:
    """Cells a side that each layer's map is pooled to: at most ``grid``, and at most 12,288 values in total."""
    prepare = preparation(frozen.backbone, frozen.size)
    maps = extract_features(frozen.backbone.to(frozen.device), image, layers, pool=None, prepare=prepare)
    return {
        layer: max(1, min(grid, *m.shape[2:], math.isqrt(MAX_VALUES // m.shape[1]))) if m.ndim == 4 else 1
        for layer, m in maps.items()
    }


def preparation(backbone: nn.Module, size: int, bar: tqdm | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from uint8 images (B, 3, H, H) to the backbone's input (B, 3, size, size); it updates the bar."""
    cfg = resolve_model_data_config(backbone)

    def prepare(images: torch.Tensor) -> torch.Tensor:
        batch = normalize(images, cfg["mean"], cfg["std"])
        if batch.shape[-1] != size:
            batch = F.interpolate(batch, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
        if bar is not None:
            bar.update(len(images))
        return batch.contiguous(memory_format=torch.channels_last)

    return prepare
