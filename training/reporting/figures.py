"""The figures of the model card, each stamped with what it was drawn from.

A figure of numbers shows result rows, and carries a digest of exactly those; a figure of weights carries the sha256 of
their file. :func:`stamp_of` reads either back, so that a figure older than what it shows can be found out::

    stamp_of(file) == rows_stamp(rows_by_layer(rows, "rotnet_nin.cifar10"))
"""

import hashlib
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, UnidentifiedImageError
from timm.data import resolve_model_data_config
from torch import nn
from torch.nn import functional as F

from rotation_ssl.features import attention_map, extract_features, layer_modules
from rotation_ssl.files import replace_file
from rotation_ssl.images import normalize
from training.reporting.rows import REPORTED, Row

# the palette of Okabe and Ito, which the colour-blind tell apart
COLORS = {
    "k-NN": "#0072B2",
    "linear probe": "#E69F00",
    "ImageNet linear probe": "#E69F00",
    "non-linear probe": "#009E73",
    "ImageNet non-linear probe": "#009E73",
    "convolutional probe": "#CC79A7",
}
FEW_LABELS, SUPERVISED = "few labels, convolutional probe", "supervised"
FEW_COLORS = {FEW_LABELS: "#0072B2", SUPERVISED: "#D55E00"}
MARKERS = {"": "o", "paper": "s", "cached": "D", "cpu": "^"}  # by a row's cost
POWERS = (1.0, 2.0, 4.0)  # of the attention maps of the first, second and third layer, as in the paper
DPI = 120
WIDTH = 960  # pixels; 8 inches
TILE = 96  # pixels; three to a pixel of CIFAR-10
NEIGHBOURS = 6  # with ten queries, one a class, the file stays below 300 kB
STAMP_KEY = "drawn from"


def rows_by_layer(rows: Iterable[Row], name: str, data: str = "") -> list[Row]:
    """The rows that :func:`draw_accuracy_by_layer` shows of weights ``name`` ('rotnet_nin.cifar10') on ``data``.

    Without ``data`` they are those of what the network is reported on. These are the probes of any layer: measured of
    ``name`` and of the model's random weights, and quoted from the paper. There are none, and no figure, where nothing
    was measured of ``name``.
    """
    model = _model_of(name)
    data = data or REPORTED[model].data
    shown = [
        row
        for row in rows
        if row.protocol in COLORS
        and row.layer
        and row.labels_per_class is None
        and row.data == data
        and (
            (_is_measured(row) and row.weights in (name, f"{model}.random"))
            # not what others got when they ran the authors' code
            or (row.source.startswith("paper") and row.weights == f"{model}.paper")
        )
    ]
    return shown if any(row.weights == name for row in shown) else []


def rows_few_labels(rows: Iterable[Row], name: str, data: str = "CIFAR-10 test") -> list[Row]:
    """The rows that :func:`draw_few_labels` shows of weights ``name`` ('rotnet_nin.cifar10') on ``data``.

    These are the convolutional probe on few labels measured of ``name``, the supervised network measured from the
    model's random weights, and every quoted number of that model with ``labels_per_class``. There are none, and no
    figure, where no few labels were measured of ``name``.
    """
    model = _model_of(name)
    measured = ((name, FEW_LABELS), (f"{model}.random", SUPERVISED))
    shown = [
        row
        for row in rows
        if row.labels_per_class is not None
        and row.data == data
        and ((row.weights, row.protocol) in measured if _is_measured(row) else _model_of(row.weights) == model)
    ]
    return shown if any(_is_measured(row) and row.weights == name for row in shown) else []


def rows_stamp(rows: Iterable[Row]) -> str:
    """sha256 of the rows' digests, whatever their order: the stamp of a figure that shows just these rows."""
    return hashlib.sha256("\n".join(sorted(row.digest for row in rows)).encode()).hexdigest()


def stamp_of(file: Path) -> str:
    """What a figure was drawn from: :func:`rows_stamp` of its rows, or the sha256 of its weights.

    Raises:
        ValueError: not an image, or one without a stamp.
        OSError: the file cannot be read.
    """
    try:
        with Image.open(file) as image:
            stamp = image.info.get(STAMP_KEY)
    except UnidentifiedImageError as error:
        raise ValueError(f"{file} is not an image: draw it again") from error
    if not isinstance(stamp, str):
        raise ValueError(f"{file} does not say what it was drawn from: draw it again with training.reporting.figures")
    return stamp


def curve_points(rows: Iterable[Row], position: Callable[[Row], int]) -> list[tuple[int, float, float | None]]:
    """One curve's points from left to right: position, mean of the values there, and their standard deviation.

    Rows at the same position differ by seed or draw. The deviation is that of a sample (n - 1); a single value has
    none. Values and deviations are fractions, as in the rows.
    """
    values: dict[int, list[float]] = {}
    for row in rows:
        values.setdefault(position(row), []).append(row.value)
    return [
        (at, statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None)
        for at, found in sorted(values.items())
    ]


def draw_accuracy_by_layer(rows: Iterable[Row], name: str, file: Path, data: str = "") -> None:
    """Accuracy over layers, one line a protocol: of ``name``, of random weights (dashed) and the paper's (dotted).

    Raises:
        ValueError: no probe of ``name`` was measured on ``data``.
    """
    data = data or REPORTED[_model_of(name)].data
    shown = rows_by_layer(rows, name, data)
    if not shown:
        raise ValueError(f"no row of a probe of {name} measured on {data}: run `python -m training measure {name}`")
    layers = sorted({row.layer for row in shown}, key=lambda layer: (len(layer), layer))
    looks: dict[str, dict[str, Any]] = {
        f"{_model_of(name)}.random": {"linestyle": "--", "alpha": 0.55},
        f"{_model_of(name)}.paper": {"linestyle": ":", "markerfacecolor": "white"},
        name: {"linestyle": "-", "linewidth": 2.0},
    }
    titles = dict(zip(looks, ("random weights", "the paper's (quoted)", name), strict=True))
    figure, axes = _plot((8.0, 4.4))
    curves = _grouped(shown, lambda r: (r.weights, r.protocol, r.cost, r.source))
    for (weights, protocol, cost, _), group in curves.items():
        points = curve_points(group, lambda row: layers.index(row.layer))
        _line(axes, points, color=COLORS[protocol], marker=MARKERS[cost], **looks[weights])
    axes.set_xticks(range(len(layers)), layers)
    axes.set_xlabel("layer whose frozen features are classified")
    axes.set_ylabel(f"accuracy on {data} (%)")
    axes.margins(x=0.06)
    # colour and marker say the protocol, the line says the weights: a legend each. Quoted points are of the protocol's
    # colour; it has an entry for them only where nothing was measured
    measured = {(row.protocol, row.cost) for row in shown if _is_measured(row)}
    quoted = {(row.protocol, row.cost) for row in shown if row.protocol not in {protocol for protocol, _ in measured}}
    protocols = sorted(measured | quoted, key=lambda key: (list(COLORS).index(key[0]), key[1]))
    colored = [
        Line2D([], [], color=COLORS[protocol], marker=MARKERS[cost], label=f"{protocol} ({cost})" if cost else protocol)
        for protocol, cost in protocols
    ]
    styled = [
        Line2D([], [], color="0.25", marker="o" if weights.endswith(".paper") else "", label=titles[weights], **look)
        for weights, look in reversed(looks.items())
        if any(row.weights == weights for row in shown)
    ]
    place: dict[str, Any] = {
        "loc": "upper left",
        "frameon": False,
        "fontsize": 9,
        "title_fontsize": 9,
        "alignment": "left",
    }
    axes.add_artist(axes.legend(handles=styled, title="weights:", bbox_to_anchor=(1.01, 1.02), **place))
    axes.legend(handles=colored, title="protocol:", bbox_to_anchor=(1.01, 0.93 - 0.05 * len(styled)), **place)
    _save(figure, file, rows_stamp(shown))


def draw_few_labels(rows: Iterable[Row], name: str, file: Path, data: str = "CIFAR-10 test") -> bool:
    """Accuracy over labels a class: ``name`` with a convolutional probe, supervised training, quoted curves (dotted).

    Returns:
        False, and nothing is drawn, where no few labels were measured of ``name`` on ``data``.
    """
    shown = rows_few_labels(rows, name, data)
    if not shown:
        return False
    figure, axes = _plot((8.0, 4.8))
    curves = _grouped(shown, lambda r: (_is_measured(r), r.source, r.weights, r.protocol, r.layer, r.cost, r.draw))
    # ours first, in the legend as well
    for (measured, source, _, protocol, layer, cost, draw), group in sorted(
        curves.items(), key=lambda item: not item[0][0]
    ):
        points = curve_points(group, lambda row: row.labels_per_class or 0)
        ours = {FEW_LABELS: f"{name}, convolutional probe", SUPERVISED: "supervised, from random weights"}
        what = ours[protocol] if measured else protocol
        details = ", ".join(filter(None, (layer, cost, draw if measured else source)))
        look: dict[str, Any] = {"linewidth": 2.0} if measured else {"linestyle": ":", "markerfacecolor": "white"}
        color = FEW_COLORS.get(protocol, "0.4")
        label = f"{what} ({details})" if details else what
        _line(axes, points, color=color, marker=MARKERS[cost], label=label, **look)
    counts = sorted({row.labels_per_class for row in shown if row.labels_per_class})
    axes.set_xscale("log")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("labels per class (log scale)")
    axes.set_ylabel(f"accuracy on {data} (%)")
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=9)
    _save(figure, file, rows_stamp(shown))
    return True


def draw_filters(backbone: nn.Module, file: Path, stamp: str) -> None:
    """The first layer's filters as RGB tiles in the network's order, each scaled to its own range; grey is zero.

    Args:
        backbone: any network whose first convolution of three input channels is to be shown.
        file: the png to write.
        stamp: sha256 of the weights.

    Raises:
        ValueError: no convolution takes three channels.
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

    Raises:
        ValueError: images of another shape or type, or none.
    """
    _check_images("images", images)
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

    Raises:
        ValueError: images of another shape or type, none, an unknown layer, or a gallery of fewer than k other images.
    """
    _check_images("gallery", gallery)
    _check_images("queries", queries)
    if gallery.shape[1:] != queries.shape[1:]:
        raise ValueError(f"gallery {tuple(gallery.shape)} and queries {tuple(queries.shape)} differ in size")
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

    Args, errors: as for :func:`nearest`; ``file`` is the png to write, ``stamp`` the sha256 of the weights.
    """
    indices, similarities = nearest(backbone, layer, gallery, queries)
    lines = []
    for query, found, values in zip(queries, indices.tolist(), similarities.tolist(), strict=True):
        titles = ["query", *(f"{value:.3f}" for value in values)]
        pictures = [query, *(gallery[i] for i in found)]
        lines.append([(p.cpu().float() / 255, title) for p, title in zip(pictures, titles, strict=True)])
    _draw_tiles(lines, TILE, 8, (0,), file, stamp)


def _features(backbone: nn.Module, images: torch.Tensor, layers: list[str], maps: bool) -> dict[str, torch.Tensor]:
    cfg = resolve_model_data_config(backbone)
    size = cfg["input_size"][-1]

    def prepare(batch: torch.Tensor) -> torch.Tensor:
        normalized = normalize(batch, cfg["mean"], cfg["std"])
        if batch.shape[-1] < size:
            # smaller images than the network is for: it may not take them
            normalized = F.interpolate(normalized, (size, size), mode="bicubic", antialias=True)
        return normalized

    return extract_features(backbone, images, layers, pool=None if maps else "avg", prepare=prepare)


def _model_of(weights: str) -> str:
    return weights.split("@", 1)[0].split(".", 1)[0]


def _is_measured(row: Row) -> bool:
    return row.source == "measured"


def _grouped(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> dict[Any, list[Row]]:
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _check_images(what: str, images: torch.Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"{what} must be uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")


def _heat(attention: torch.Tensor) -> torch.Tensor:
    colors = matplotlib.colormaps["inferno"](attention.numpy())
    return torch.from_numpy(colors[..., :3]).permute(2, 0, 1).float()


def _plot(inches: tuple[float, float]) -> tuple[Any, Any]:
    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _line(axes: Any, points: list[tuple[int, float, float | None]], color: str, **look: Any) -> None:
    positions, means = [at for at, _, _ in points], [100 * mean for _, mean, _ in points]
    axes.plot(positions, means, color=color, markersize=5, **look)
    spread = [(at, 100 * mean, 100 * deviation) for at, mean, deviation in points if deviation is not None]
    if spread:
        at, mean, deviation = zip(*spread, strict=True)
        axes.errorbar(at, mean, yerr=deviation, fmt="none", ecolor=color, capsize=3, alpha=look.get("alpha"))
        axes.set_title("bars: standard deviation over seeds and draws", fontsize=9, color="0.35", loc="left")


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
    figure = Figure(figsize=(x / DPI, y / DPI))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    for top, line in zip(tops, lines, strict=True):
        for left, (picture, title) in zip(lefts, line, strict=False):
            canvas[:, top : top + side, left : left + side] = _resized(picture, side)
            axes.text(left + side / 2, top - 3, title, fontsize=8, ha="center", va="bottom")
    axes.imshow(canvas.permute(1, 2, 0).numpy(), interpolation="nearest", extent=(0, x, y, 0))
    axes.axis("off")
    _save(figure, file, stamp)


def _resized(picture: torch.Tensor, side: int) -> torch.Tensor:
    if side % picture.shape[-1] == 0 and side % picture.shape[-2] == 0:
        return F.interpolate(picture[None], (side, side), mode="nearest-exact")[0]
    return F.interpolate(picture[None], (side, side), mode="bilinear", antialias=True)[0].clamp(0, 1)


def _save(figure: Any, file: Path, stamp: str) -> None:
    # without matplotlib's version, which would change the file and not the figure
    metadata = {STAMP_KEY: stamp, "Software": None}
    options = {"format": "png", "dpi": DPI, "metadata": metadata, "pil_kwargs": {"optimize": True}}
    replace_file(file, lambda path: figure.savefig(path, **options))
