"""Pictures of what weights see: filters, attention maps and nearest neighbours, stamped with the weights' sha256."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from timm.data import resolve_model_data_config
from torch import nn
from torch.nn import functional as F

from rotation_ssl.evaluation.frozen import preparation
from rotation_ssl.features import attention_map, extract_features, layer_modules
from training.reporting.figures import DPI, save_figure

POWERS = (1.0, 2.0, 4.0)  # of the attention maps of the first, second and third layer, as in the paper
WIDTH = 960  # pixels; 8 inches
TILE = 96  # pixels; three to a pixel of CIFAR-10
NEIGHBOURS = 6  # with ten queries, one a class, the file stays below 300 kB


def draw_filters(backbone: nn.Module, file: Path, stamp: str) -> None:
    """The first layer's filters as RGB tiles in the network's order, each scaled to its own range; grey is zero.

    Args:
        backbone: any network whose first convolution of three input channels is to be shown.
        file: the png to write.
        stamp: sha256 of the weights.
    """
    first = next((m for m in backbone.modules() if isinstance(m, nn.Conv2d) and m.weight.shape[1] == 3), None)
    if first is None:
        raise ValueError(f"{type(backbone).__name__} has no convolution of three channels whose filters are colours")
    filters = first.weight.detach().float().cpu()
    pictures = filters / filters.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12) / 2 + 0.5
    columns = min(24, len(pictures))
    lines = [[(picture, "") for picture in line] for line in pictures.split(columns)]
    gap = 5
    # whole multiples: every weight of a filter is as large as the others
    side = max(1, (WIDTH // columns - gap) // filters.shape[-1]) * filters.shape[-1]
    _draw_tiles(lines, side, gap, (), file, stamp)


def draw_attention(backbone: nn.Module, images: torch.Tensor, file: Path, stamp: str) -> None:
    """Images and where the first three layers are active: attention maps of powers 1, 2 and 4, from dark to bright.

    Args:
        backbone: a timm model.
        images: a handful, (N, 3, H, W) uint8, on the backbone's device.
        file: the png to write.
        stamp: sha256 of the weights.
    """
    powers = dict(zip(layer_modules(backbone), POWERS, strict=False))
    size = (images.shape[-2], images.shape[-1])
    maps = {
        layer: attention_map(features, powers[layer], size)
        for layer, features in _features(backbone, images, list(powers), maps=True).items()
    }
    titles = ["image", *(f"{layer}, p = {power:g}" for layer, power in powers.items())]
    columns = 2 if len(images) > 1 else 1
    lines: list[list[tuple[torch.Tensor, str]]] = []
    for i, image in enumerate(images):
        pictures = [image.cpu().float() / 255, *(_heat(attention[i]) for attention in maps.values())]
        if i % columns == 0:
            lines.append([])
        lines[-1] += zip(pictures, titles if i < columns else [""] * len(titles), strict=True)
    _draw_tiles(lines, TILE, 8, (len(titles) - 1,) if columns > 1 else (), file, stamp)


def nearest(
    backbone: nn.Module, layer: str, gallery: torch.Tensor, queries: torch.Tensor, count: int = NEIGHBOURS
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gallery images most like each query, by cosine similarity of a layer's globally averaged features.

    Args:
        backbone: a timm model.
        layer: a name of its layers ('block2').
        gallery: (M, 3, H, W) uint8, on the backbone's device.
        queries: (N, 3, H, W) uint8, of the same size and device; a copy of a query is none of its neighbours.
        count: neighbours of each query, k.

    Returns:
        Indices into the gallery (N, k) int64 and similarities (N, k) float32 in -1..1, the largest first.
    """
    known, asked = (
        F.normalize(_features(backbone, images, [layer], maps=False)[layer]) for images in (gallery, queries)
    )
    similarity = asked @ known.T
    copies = torch.stack([(gallery == query).flatten(1).all(1) for query in queries]).cpu()
    others = int((~copies).sum(1).min())
    if not 1 <= count <= others:
        raise ValueError(f"count must be 1 to {others}, the gallery's images other than a query, got {count}")
    best = similarity.masked_fill(copies, float("-inf")).topk(count, dim=1)
    return best.indices, best.values


def draw_neighbours(
    backbone: nn.Module, layer: str, gallery: torch.Tensor, queries: torch.Tensor, file: Path, stamp: str
) -> None:
    """A row for each query: the image and its six nearest of the gallery, each under its cosine similarity.

    Args: as for :func:`nearest`; ``file`` is the png to write, ``stamp`` the sha256 of the weights.
    """
    indices, similarities = nearest(backbone, layer, gallery, queries)
    lines = []
    for query, found, values in zip(queries, indices.tolist(), similarities.tolist(), strict=True):
        titles = ["query", *(f"{value:.3f}" for value in values)]
        pictures = [query, *(gallery[i] for i in found)]
        lines.append([(p.cpu().float() / 255, title) for p, title in zip(pictures, titles, strict=True)])
    _draw_tiles(lines, TILE, 8, (0,), file, stamp)


def _features(backbone: nn.Module, images: torch.Tensor, layers: list[str], maps: bool) -> dict[str, torch.Tensor]:
    # a network may not take smaller images than it is for
    size = max(resolve_model_data_config(backbone)["input_size"][-1], images.shape[-1])
    prepare = preparation(backbone, size)
    return extract_features(backbone, images, layers, pool=None if maps else "avg", prepare=prepare)


def _heat(attention: torch.Tensor) -> torch.Tensor:
    colors = matplotlib.colormaps["inferno"](attention.numpy())
    return torch.from_numpy(colors[..., :3]).permute(2, 0, 1).float()


def _draw_tiles(
    lines: list[list[tuple[torch.Tensor, str]]], side: int, gap: int, wide_after: Sequence[int], file: Path, stamp: str
) -> None:
    # pasted pixel by pixel, not laid out as axes: small images stay crisp, and the file small
    lefts, x = [], gap
    for column in range(max(map(len, lines))):
        lefts.append(x)
        x += side + (3 * gap if column in wide_after else gap)
    tops, y = [], gap
    for line in lines:
        y += 18 if any(title for _, title in line) else 0
        tops.append(y)
        y += side + gap
    canvas = torch.ones(3, y, x)
    # Matplotlib before 3.11 cuts pixels off: 964.9999 would be 964
    figure = Figure(figsize=((x + 1e-6) / DPI, (y + 1e-6) / DPI))
    axes = figure.add_axes((0, 0, 1, 1))
    for top, line in zip(tops, lines, strict=True):
        for left, (picture, title) in zip(lefts, line, strict=False):
            canvas[:, top : top + side, left : left + side] = _resized(picture, side)
            axes.text(left + side / 2, top - 3, title, fontsize=8, ha="center", va="bottom")
    axes.imshow(canvas.permute(1, 2, 0).numpy(), interpolation="nearest", extent=(0, x, y, 0))
    axes.axis("off")
    save_figure(figure, file, stamp)


def _resized(picture: torch.Tensor, side: int) -> torch.Tensor:
    if side % picture.shape[-1] == 0 and side % picture.shape[-2] == 0:
        return F.interpolate(picture[None], (side, side), mode="nearest-exact")[0]
    return F.interpolate(picture[None], (side, side), mode="bilinear", antialias=True)[0].clamp(0, 1)
