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

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, UnidentifiedImageError

from rotation_ssl.files import replace_file
from training.protocols import COVERAGES, PROTOCOLS
from training.reporting.required import main_data
from training.reporting.rows import Row, model_of

PROBES = ("knn", "linear", "nonlinear", "conv", "linear-sgd", "nonlinear-sgd")  # of any layer
MARKERS = {"": "o", "paper": "s", "cached": "D", "cpu": "^"}  # by a row's budget
DPI = 120
STAMP_KEY = "drawn from"


def rows_by_layer(rows: Iterable[Row], name: str) -> list[Row]:
    """The rows that :func:`draw_accuracy_by_layer` shows of published weights ``name`` ('rotnet_nin.cifar10').

    These are the probes of any layer, on what the weights are first of all measured on: measured of ``name`` and of the
    model's random weights, and quoted from the paper. There are none, and no figure, where nothing was measured of
    ``name``.
    """
    model = model_of(name)
    shown = [
        row
        for row in rows
        if row.protocol in PROBES
        and row.layer
        and row.labels_per_class is None
        and row.data == main_data(name)
        and (
            (row.measured and row.weights in (name, f"{model}.random"))
            # not what others got when they ran the authors' code
            or (row.source.startswith("paper") and row.weights == f"{model}.paper")
        )
    ]
    return shown if any(row.weights == name for row in shown) else []


def rows_few_labels(rows: Iterable[Row], name: str) -> list[Row]:
    """The rows that :func:`draw_few_labels` shows of published weights ``name`` ('rotnet_nin.cifar10').

    These are the convolutional probe on few labels measured of ``name``, the supervised network measured from the
    model's random weights, and every quoted number of that model with ``labels_per_class``. There are none, and no
    figure, where no few labels were measured of ``name``.
    """
    model = model_of(name)
    measured = ((name, "few-labels"), (f"{model}.random", "supervised"))
    shown = [
        row
        for row in rows
        if row.labels_per_class is not None
        and row.data == main_data(name)
        and ((row.weights, row.protocol) in measured if row.measured else model_of(row.weights) == model)
    ]
    return shown if any(row.measured and row.weights == name for row in shown) else []


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
        raise ValueError(f"{file} does not say what it was drawn from: run python -m training publish figures")
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


def draw_accuracy_by_layer(shown: Sequence[Row], name: str, file: Path) -> None:
    """Accuracy over layers, one line a protocol: of ``name``, of random weights (dashed) and the paper's (dotted)."""
    layers = sorted({row.layer for row in shown}, key=lambda layer: (len(layer), layer))
    looks: dict[str, dict[str, Any]] = {
        f"{model_of(name)}.random": {"linestyle": "--", "alpha": 0.55},
        f"{model_of(name)}.paper": {"linestyle": ":", "markerfacecolor": "white"},
        name: {"linestyle": "-", "linewidth": 2.0},
    }
    titles = dict(zip(looks, ("random weights", "the paper's (quoted)", name), strict=True))
    figure, axes = _plot((8.0, 4.4))
    curves = _grouped(shown, lambda r: (r.weights, r.protocol, r.budget, r.source))
    for (weights, protocol, budget, _), group in curves.items():
        points = curve_points(group, lambda row: layers.index(row.layer))
        _line(axes, points, color=PROTOCOLS[protocol].color, marker=MARKERS[budget], **looks[weights])
    axes.set_xticks(range(len(layers)), layers)
    axes.set_xlabel("layer whose frozen features are classified")
    axes.set_ylabel(f"accuracy on {shown[0].data} (%)")
    axes.margins(x=0.06)
    # colour and marker say the protocol, the line says the weights: a legend each. Quoted points are of the protocol's
    # colour; it has an entry for them only where nothing was measured
    measured = {(row.protocol, row.budget) for row in shown if row.measured}
    quoted = {(row.protocol, row.budget) for row in shown if row.protocol not in {protocol for protocol, _ in measured}}
    colored = [
        Line2D([], [], color=PROTOCOLS[id].color, marker=MARKERS[budget], label=PROTOCOLS[id].titled(budget))
        for id, budget in sorted(measured | quoted, key=lambda key: (PROBES.index(key[0]), key[1]))
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
    save_figure(figure, file, rows_stamp(shown))


def draw_few_labels(shown: Sequence[Row], name: str, file: Path) -> None:
    """Accuracy over labels a class: ``name`` with a convolutional probe, supervised training, quotes (dotted)."""
    figure, axes = _plot((8.0, 4.8))
    curves = _grouped(shown, lambda r: (r.measured, r.source, r.weights, r.protocol, r.layer, r.budget, r.draw))
    # ours first, in the legend as well
    for (measured, source, _, protocol, layer, budget, draw), group in sorted(
        curves.items(), key=lambda item: not item[0][0]
    ):
        points = curve_points(group, lambda row: row.labels_per_class or 0)
        ours = {"few-labels": f"{name}, convolutional probe", "supervised": "supervised, from random weights"}
        what = ours[protocol] if measured else PROTOCOLS[protocol].title
        details = ", ".join(filter(None, (layer, budget, draw if measured else source)))
        look: dict[str, Any] = {"linewidth": 2.0} if measured else {"linestyle": ":", "markerfacecolor": "white"}
        color = PROTOCOLS[protocol].color or "0.4"
        label = f"{what} ({details})" if details else what
        _line(axes, points, color=color, marker=MARKERS[budget], label=label, **look)
    counts = sorted({row.labels_per_class for row in shown if row.labels_per_class})
    axes.set_xscale("log")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("labels per class (log scale)")
    axes.set_ylabel(f"accuracy on {shown[0].data} (%)")
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=9)
    save_figure(figure, file, rows_stamp(shown))


def rows_coverage(rows: Iterable[Row], name: str) -> list[Row]:
    """The rows that :func:`draw_coverage` shows of weights ``name``: orientation, of all and of the most confident."""
    wanted = ("orientation", *(f"orientation-top-{share}" for share in COVERAGES))
    shown = [row for row in rows if row.weights == name and row.protocol in wanted]
    ranked = {row.data for row in shown if row.protocol != "orientation"}
    return [row for row in shown if row.data in ranked]


def draw_coverage(shown: Sequence[Row], name: str, file: Path) -> None:
    """Accuracy of the orientation of photographs over the share of them that is decided, a line a dataset."""
    figure, axes = _plot((6.4, 4.0))
    for (data,), group in _grouped(shown, lambda row: (row.data,)).items():
        points = curve_points(group, lambda row: 100 if row.protocol == "orientation" else int(row.protocol[-2:]))
        shares, values = [share for share, _, _ in points], [100 * value for _, value, _ in points]
        axes.plot(shares, values, marker="o", markersize=5, label=data)
    axes.set_xlabel("most confident photographs (%)")
    axes.set_ylabel("correct (%)")
    axes.legend(frameon=False)
    save_figure(figure, file, rows_stamp(shown))


def _grouped(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> dict[Any, list[Row]]:
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _plot(inches: tuple[float, float]) -> tuple[Any, Any]:
    figure = Figure(figsize=inches, layout="constrained")
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


def save_figure(figure: Any, file: Path, stamp: str) -> None:
    """Write a figure as a png that says what it was drawn from: see :func:`stamp_of`."""
    # without matplotlib's version, which would change the file and not the figure
    metadata = {STAMP_KEY: stamp, "Software": None}
    options = {"format": "png", "dpi": DPI, "metadata": metadata, "pil_kwargs": {"optimize": True}}
    replace_file(file, lambda path: figure.savefig(path, **options))


# by kind of figure, the rows that it shows, none where there is no figure, and what draws them
ROW_FIGURES = {
    "layers": (rows_by_layer, draw_accuracy_by_layer),
    "few-labels": (rows_few_labels, draw_few_labels),
    "coverage": (rows_coverage, draw_coverage),
}
