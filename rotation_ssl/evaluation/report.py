"""The report of numbers: a table, a figure, and JSON."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rotation_ssl.evaluation.measure import Number
from rotation_ssl.evaluation.protocols import PROTOCOLS
from rotation_ssl.files import replace_bytes

Result = Any  # with the fields of :class:`Reported`: one of these, or a row of the lab


@dataclasses.dataclass
class Reported:
    """A number with its weights and its data."""

    weights: str
    data: str
    protocol: str
    budget: str
    layer: str
    seed: int | None
    strength: float | None
    value: float
    correct: int
    n: int | None
    settings: str
    seconds: float
    labels_per_class: int | None = None
    draw: str = ""
    sha256: str = ""

    @property
    def title(self) -> str:
        """Protocol and budget, as text shows them."""
        return PROTOCOLS[self.protocol].titled(self.budget)


def reported(number: Number, weights: str, data: str) -> Reported:
    """A number with the names of its weights and its data."""
    return Reported(
        weights, data, **dataclasses.asdict(number.measurement), value=number.value, correct=sum(number.counts),
        n=number.n, settings=number.settings, seconds=round(number.seconds, 1),
    )  # fmt: skip


def write_report(folder: Path, rows: Sequence[Result]) -> None:
    """Write report.md, report.json and report.png into a folder, which is created if missing.

    Args:
        folder: the folder.
        rows: dataclasses with the fields and the title of :class:`Reported`.

    Raises:
        ImportError: matplotlib is not installed; the first two files are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    replace_bytes(folder / "report.md", report_text(rows).encode())
    described = json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n"
    replace_bytes(folder / "report.json", described.encode())
    draw_report(rows, folder / "report.png")


def new_figure() -> Any:
    """An empty matplotlib figure that can be saved to files.

    Raises:
        ImportError: matplotlib is not installed; the error tells how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("no figure without matplotlib: pip install 'rotation-ssl[demo]'") from error
    return Figure(figsize=(8, 5), layout="constrained")


def report_text(rows: Sequence[Result]) -> str:
    """A table of protocols and layers for each weights and dataset, with the settings of the numbers."""
    sections = []
    for weights, data in dict.fromkeys((row.weights, row.data) for row in rows):
        own = [row for row in rows if (row.weights, row.data) == (weights, data)]
        layers = list(dict.fromkeys(row.layer for row in own if row.layer))
        lines = [f"# {weights} on {data}", ""]
        lines += [f"sha256 `{own[0].sha256}`", ""] if own[0].sha256 else []
        lines += [f"{row.title}: {100 * row.value:.2f} %" for row in own if not row.layer]
        if layers:
            lines += ["", f"| protocol | {' | '.join(layers)} |", f"|---|{'---|' * len(layers)}"]
        for series in dict.fromkeys(series_name(row) for row in own if row.layer):
            chosen = [row for row in own if series_name(row) == series]
            cells = [spread_text([row for row in chosen if row.layer == layer]) for layer in layers]
            lines.append(f"| {series} | {' | '.join(cells)} |")
        settings: dict[tuple[str, str], dict[str, None]] = {}
        for row in own:
            settings.setdefault((series_name(row), row.settings), {}).setdefault(row.layer)
        lines += [""]
        lines += [f"- {', '.join(filter(None, (series, *of)))}: {text}." for (series, text), of in settings.items()]
        sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def spread_text(rows: Sequence[Result]) -> str:
    """The mean in percent, and the standard deviation over several seeds; '' without rows."""
    values = [100 * row.value for row in rows]
    if len(values) < 2:
        return f"{values[0]:.2f} %" if values else ""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} %"


def series_name(row: Result) -> str:
    """The name that rows of all layers and seeds share: protocol, budget, and the labels of each class."""
    labels = f", {row.draw} {row.labels_per_class} of each class" if row.labels_per_class else ""
    return f"{row.title}{labels}"


def draw_report(rows: Sequence[Result], file: Path) -> None:
    """Plot accuracy over layers, a line for each weights, dataset and protocol; without layers draw bars."""
    figure = new_figure()
    axes = figure.subplots()
    probed = [row for row in rows if row.layer]
    layers = list(dict.fromkeys(row.layer for row in probed))
    several = len({row.data for row in rows}) > 1
    for weights, data, series in dict.fromkeys((row.weights, row.data, series_name(row)) for row in probed):
        values: dict[str, list[float]] = {}
        for row in probed:
            if (row.weights, row.data, series_name(row)) == (weights, data, series):
                values.setdefault(row.layer, []).append(100 * row.value)
        measured = [layer for layer in layers if layer in values]
        label = f"{weights}, {series}{f', {data}' if several else ''}"
        # positions, not names: a series without some layer must not change the order
        axes.plot(
            [layers.index(layer) for layer in measured],
            [statistics.mean(values[layer]) for layer in measured],
            marker="o",
            label=label,
        )
    if probed:
        axes.set_xticks(range(len(layers)), layers)
        axes.legend(fontsize="small")
    else:
        axes.bar([f"{row.weights}\n{row.title}" for row in rows], [100 * row.value for row in rows], width=0.4)
    # without a count it is a mean of precisions or overlaps
    axes.set(
        ylabel="accuracy, percent" if all(row.n for row in rows) else "percent", title="" if several else rows[0].data
    )
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
