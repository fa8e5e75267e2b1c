"""Frozen features of any layer of any timm model, several layers in one pass."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn import functional as F


def layer_modules(backbone: nn.Module) -> dict[str, str]:
    """The backbone's named feature layers and their modules: ``{'block1': 'blocks.block1', ...}``.

    A layer's name is the last part of its module's, or the whole of it where that would not be unique.

    Raises:
        ValueError: not a whole timm model: it has no feature_info of its own.
    """
    info = getattr(backbone, "feature_info", None)
    if not isinstance(info, list):
        raise ValueError(f"{type(backbone).__name__} has no feature_info: give a timm model, without features_only")
    modules = [entry["module"] for entry in info]
    short = [module.rsplit(".", 1)[-1] for module in modules]
    return dict(zip(short if len(set(short)) == len(short) else modules, modules, strict=True))


def extract_features(
    backbone: nn.Module,
    batches: Iterable[torch.Tensor],
    layers: Sequence[str],
    grid: int | None = 1,
) -> dict[str, torch.Tensor]:
    """Features of every image at each layer, from one pass of the frozen backbone in eval mode.

    Args:
        backbone: a timm model; each module's train/eval mode is as before afterwards, no buffer moves.
        batches: normalised images (B, C, H, W), on the backbone's device.
        layers: names of :func:`layer_modules` ('block1', 'conv3'), or any module's own name ('blocks.block1.0').
        grid: average-pool each map to grid x grid; 1 is the global average, None keeps the map.

    Returns:
        By layer, float32 on the CPU: (N, D) with D = channels * grid**2, channel by channel; (N, C, H', W') with
        ``grid=None``.

    Raises:
        ValueError: no layer asked for, one that does not exist (the error lists those that do), no images, or a pooled
            layer whose output is not a map.
    """
    modules = dict(backbone.named_modules())
    names = layer_modules(backbone)
    unknown = [layer for layer in layers if names.get(layer, layer) not in modules or not layer]
    if unknown or not layers:
        raise ValueError(f"no layer {', '.join(unknown) or 'asked for'} in this backbone; it has {', '.join(names)}")
    taken: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}

    def keep(layer: str, output: torch.Tensor) -> None:
        if grid is not None:
            if output.ndim != 4:
                raise ValueError(f"layer {layer} gives {tuple(output.shape)}, not a map to pool: use grid=None")
            output = F.adaptive_avg_pool2d(output.float(), grid).flatten(1)
        # a copy: the network's next layer may overwrite its input in place
        taken[layer].append(output.to("cpu", torch.float32, copy=True))

    hooks = [
        modules[names.get(layer, layer)].register_forward_hook(lambda _, __, output, layer=layer: keep(layer, output))
        for layer in layers
    ]
    training = [module for module in backbone.modules() if module.training]
    backbone.eval()
    try:
        with torch.inference_mode():
            for images in batches:
                backbone(images)
    finally:
        for module in training:
            module.training = True
        for hook in hooks:
            hook.remove()
    if not taken[layers[0]]:
        raise ValueError("no images to extract features from")
    return {layer: torch.cat(parts) for layer, parts in taken.items()}


def attention_map(features: torch.Tensor, power: float, size: tuple[int, int]) -> torch.Tensor:
    """Where a layer is active: the sum over channels of abs(activation)**power, as in section 4.1 of the paper.

    Args:
        features: (N, C, H, W).
        power: 1, 2 and 4 for the paper's first, second and third layer.
        size: (H', W') of the images to lay it over.

    Returns:
        (N, H', W') float32 in 0..1, each map divided by its largest value.

    Raises:
        ValueError: features are not maps.
    """
    if features.ndim != 4:
        raise ValueError(f"attention maps need features (N, C, H, W), got {tuple(features.shape)}")
    maps = features.float().abs().pow(power).sum(1, keepdim=True)
    maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[:, 0]
    return maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12)
