"""Frozen features of any layer of any timm model, several layers in one pass."""

import contextlib
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

Prepare = Callable[[torch.Tensor], torch.Tensor]
#: What ``pool`` of :func:`extract_features` may be.
POOLS = ("avg", "max", "flatten", None)


def layer_modules(backbone: nn.Module) -> dict[str, str]:
    """The backbone's named feature layers and their modules: ``{'block1': 'blocks.block1', ...}``.

    A layer's name is the last part of its module's name, or the whole name if the last parts are not unique.

    Raises:
        ValueError: not a timm model with a feature_info list, or one that torch.compile wraps.
    """
    if hasattr(backbone, "_orig_mod"):
        raise ValueError(
            "features of a compiled model cannot be extracted: give the model that torch.compile was given"
        )
    info = getattr(backbone, "feature_info", None)
    if not isinstance(info, list):
        raise ValueError(f"{type(backbone).__name__} has no feature_info: give a timm model, without features_only")
    known = dict(backbone.named_modules())
    # some entries of timm name no module
    modules = [entry["module"] for entry in info if entry["module"] in known]
    short = [module.rsplit(".", 1)[-1] for module in modules]
    unique = len(set(short)) == len(short) and not any(name.isdigit() for name in short)
    return dict(zip(short if unique else modules, modules, strict=True))


def extract_features(
    backbone: nn.Module,
    images: torch.Tensor,
    layers: Sequence[str] | None = None,
    *,
    pool: str | None = "avg",
    grid: int | Mapping[str, int] = 1,
    prepare: Prepare | None = None,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """Features of every image at each layer, from one pass of the frozen backbone in eval mode.

    The pass stops after the last layer asked for. The backbone itself is not changed: it keeps its mode and its
    buffers, and several threads may use it at the same time.

    Args:
        backbone: a timm model, in train or eval mode.
        images: (N, C, H, W), of any dtype that ``prepare`` takes; normalised floats without it.
        layers: names of :func:`layer_modules` ('block1', 'conv3'), or the full name of any module ('blocks.block1.0');
            None: all of :func:`layer_modules`. If a module runs several times in a pass, its first output is used.
        pool: 'avg' or 'max': pool to at most grid x grid cells; 'flatten': the whole map as a vector; None: the map.
        grid: cells per side, one number or one for each layer; a smaller map keeps its size. 1 is global pooling.
        prepare: applied to every batch on the backbone's device, for example to normalise it.
        batch_size: images in a batch.
        dtype: of the result, a floating-point type; torch.bfloat16 halves the memory.
        autocast: compute in this type (torch.bfloat16) where PyTorch considers that safe; None: in the weights' type.

    Returns:
        A tensor on the CPU for each layer, (N, D), channel by channel, D = channels * cells; (N, channels, H', W')
        with ``pool=None``. The tokens of a transformer are a square map, without class tokens. The output of a layer
        that gives vectors is not pooled.

    Raises:
        ValueError: no layers, or one that does not exist (the error lists those that do), no images, an unknown
            pooling, a grid, batch size or dtype out of range, a layer whose output is no vector, map or square of
            tokens, or a ``prepare`` or layer that does not give one row for each image.
    """
    layers = list(layer_modules(backbone)) if layers is None else layers
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive number of images, got {batch_size!r}")
    extract = batch_extractor(backbone, layers, pool=pool, grid=grid, prepare=prepare, dtype=dtype, autocast=autocast)
    if len(images) == 0:
        raise ValueError("no images to extract features from")
    features: dict[str, torch.Tensor] = {}
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        for layer, part in extract(batch).items():
            if layer not in features:
                # outside of a caller's inference mode, in which it could not be trained on
                with torch.inference_mode(False):
                    features[layer] = torch.empty((len(images), *part.shape[1:]), dtype=dtype)
            features[layer][start : start + len(batch)] = part
    return {layer: features[layer] for layer in layers}


def batch_extractor(
    backbone: nn.Module,
    layers: Sequence[str],
    *,
    pool: str | None = "avg",
    grid: int | Mapping[str, int] = 1,
    prepare: Prepare | None = None,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    device: torch.device | str | None = "cpu",
) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """Create the function that :func:`extract_features` runs on each batch: images (B, C, H, W) -> features by layer.

    Arguments and errors are those of :func:`extract_features`. The features are on ``device``, with None on the
    backbone's. Creating the function takes longer than a batch: create it once for many.
    """
    if isinstance(layers, str):
        raise ValueError(f"layers must be a list of names, got the text {layers!r}: give [{layers!r}]")
    modules, names = dict(backbone.named_modules()), layer_modules(backbone)
    unknown = [layer for layer in layers if names.get(layer, layer) not in modules or not layer]
    if unknown or not layers:
        raise ValueError(f"no layer {', '.join(unknown) or 'asked for'} in this backbone; it has {', '.join(names)}")
    cells = _check_options(layers, pool, grid, dtype)
    own = next((parameter.device for parameter in backbone.parameters()), torch.device("cpu"))
    forward = _pooled_layers(backbone, cells, pool, dtype, torch.device(device or own))

    def extract(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.autocast(own.type, autocast, enabled=autocast is not None):
            found = forward(batch.to(own), prepare)
        return {layer: found[layer] for layer in layers}

    return extract


class _Complete(Exception):
    """All layers asked for have run: the rest of the forward pass is not needed."""


def _pooled_layers(
    backbone: nn.Module,
    cells: Mapping[str, int],
    pool: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[[torch.Tensor, Prepare | None], dict[str, torch.Tensor]]:
    """A function from a batch to the pooled output of each layer in ``cells``, on ``device``."""
    names, info = layer_modules(backbone), cast(Any, backbone).feature_info
    channels = {entry["module"]: entry["num_chs"] for entry in info if "num_chs" in entry}
    found: dict[str, torch.Tensor] = {}

    def keep(layer: str, output: torch.Tensor) -> None:
        pooled = _pool(_to_map(output, backbone, layer, channels.get(names.get(layer, layer))), pool, cells[layer])
        # copied at once: the network's next layer may overwrite its input in place
        found.setdefault(layer, pooled.to(device, dtype, copy=True))
        if len(found) == len(cells):
            raise _Complete

    view = _eval_view(backbone)
    for layer in cells:
        module = view.get_submodule(names.get(layer, layer))
        module.register_forward_hook(lambda _, __, output, layer=layer: keep(layer, output))

    # not in inference mode, whose outputs cannot be trained on
    @torch.no_grad()
    def forward(batch: torch.Tensor, prepare: Prepare | None) -> dict[str, torch.Tensor]:
        prepared = batch if prepare is None else prepare(batch)
        if len(prepared) != len(batch):
            raise ValueError(f"prepare gave {len(prepared)} images for {len(batch)}: it must give one for each")
        found.clear()
        with contextlib.suppress(_Complete):
            view(prepared)
        lacking = [layer for layer in cells if layer not in found]
        if lacking:
            raise ValueError(f"layer {', '.join(lacking)} does not run in this backbone's forward pass; use another")
        for layer, part in found.items():
            if len(part) != len(batch):
                raise ValueError(f"layer {layer} gives {len(part)} rows for {len(batch)} images; use another")
        return found

    return forward


def attention_map(features: torch.Tensor, power: float, size: tuple[int, int]) -> torch.Tensor:
    """Attention maps of section 4.1 of the paper: the sum over channels of abs(activation)**power.

    Args:
        features: (N, C, H, W).
        power: 1, 2 and 4 for the paper's first, second and third layer.
        size: (H', W') of the result, that of the images.

    Returns:
        (N, H', W') float32 in 0..1; each map is divided by its largest value.

    Raises:
        ValueError: features are not maps.
    """
    if features.ndim != 4:
        raise ValueError(f"attention maps need features (N, C, H, W), got {tuple(features.shape)}")
    maps = features.float().abs().pow(power).sum(1, keepdim=True)
    maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[:, 0]
    return maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12)


def rankme(features: torch.Tensor) -> float:
    """RankMe, the effective rank of features, from 1 to min(N, D). It needs no labels.

    The exponential of the entropy of the singular values, divided by their sum (Garrido et al. 2023,
    https://arxiv.org/abs/2210.02885).

    Args:
        features: (N, D), of some thousand images.

    Raises:
        ValueError: not a matrix, or features that are not finite.
    """
    if features.ndim != 2 or not features.isfinite().all():
        raise ValueError(f"RankMe takes finite features (N, D), got {tuple(features.shape)}")
    values = torch.linalg.svdvals(features.double())
    parts = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + 1e-7
    return float((-parts * parts.log()).sum().exp())


def _eval_view(backbone: nn.Module) -> nn.Module:
    """A copy of the backbone in eval mode for hooks; parameters and buffers are shared.

    Hooks on the backbone itself would also see the batches of other threads, and eval() would change their mode.
    """
    shared: dict[int, Any] = {}
    for module in backbone.modules():
        for value in vars(module).values():
            # attributes and their items too: weight norm and LeViT keep computed tensors there
            parts = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            )
            for part in parts:
                owner = getattr(part, "__self__", None)
                if isinstance(part, torch.Tensor):
                    shared[id(part)] = part
                elif owner is not None and not isinstance(owner, nn.Module):
                    # of a user's hook
                    shared[id(owner)] = owner
    return copy.deepcopy(backbone, shared).eval()


def _check_options(
    layers: Sequence[str], pool: str | None, grid: int | Mapping[str, int], dtype: torch.dtype
) -> dict[str, int]:
    """Cells a side of each layer."""
    if pool not in POOLS:
        raise ValueError(f"pool must be one of {', '.join(map(repr, POOLS))}, got {pool!r}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, got {dtype}")
    lacking = [layer for layer in layers if isinstance(grid, Mapping) and layer not in grid]
    if lacking:
        raise ValueError(f"grid has no entry for {', '.join(lacking)}")
    cells = {layer: grid[layer] if isinstance(grid, Mapping) else grid for layer in layers}
    wrong = [side for side in cells.values() if not isinstance(side, int) or side < 1]
    if wrong:
        raise ValueError(f"grid must be a positive number of cells a side, got {wrong[0]!r}")
    if pool not in ("avg", "max") and set(cells.values()) - {1}:
        raise ValueError(f"grid is for pool='avg' and pool='max', not for pool={pool!r}: leave it out")
    return cells


def _to_map(output: torch.Tensor, backbone: nn.Module, layer: str, channels: int | None) -> torch.Tensor:
    """A layer's output as (B, C, H, W), whatever the backbone's memory order; vectors (B, D) are returned unchanged.

    ``channels`` is the layer's number of channels in timm's feature_info, if any. It tells which axis they are on:
    output_fmt is only about the blocks of the backbone.
    """
    shape = tuple(getattr(output, "shape", ()))
    if len(shape) == 4:
        last = getattr(backbone, "output_fmt", "NCHW") == "NHWC"
        if channels is not None and shape[1] != shape[3]:
            last = shape[3] == channels
        return output.permute(0, 3, 1, 2) if last else output
    if len(shape) == 3:
        # the blocks of some networks have class tokens first, those of others do not
        for prefix in (getattr(backbone, "num_prefix_tokens", 0), 0):
            side = math.isqrt(max(0, shape[1] - prefix))
            if side and side * side == shape[1] - prefix:
                return output[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
    if len(shape) != 2:
        raise ValueError(f"layer {layer} gives {shape or type(output).__name__}, not a map or a vector")
    return output


def _pool(output: torch.Tensor, pool: str | None, cells: int) -> torch.Tensor:
    if output.ndim == 2 or pool is None:
        return output
    if pool != "flatten":
        size = (min(cells, output.shape[2]), min(cells, output.shape[3]))
        pooling = F.adaptive_avg_pool2d if pool == "avg" else F.adaptive_max_pool2d
        output = pooling(output.float(), size)
    return output.flatten(1)
