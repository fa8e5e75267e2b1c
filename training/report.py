"""The report of an evaluation, from its rows: a table to read, a figure to look at, the numbers for programs."""

import dataclasses
import json
import statistics
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.results import Row, read_file


def write_report(folder: Path, rows_file: Path) -> None:
    """Write report.md, report.json and report.png of a results file into a folder.

    Raises:
        ValueError: a results file without rows, or with rows that cannot be read.
    """
    rows = read_file(rows_file)
    if not rows:
        raise ValueError(f"{rows_file} holds no rows: measure something first")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(report_text(rows))
    (folder / "report.json").write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    draw_report(rows, folder / "report.png")


def report_text(rows: list[Row]) -> str:
    """A table of protocol by layer for each weights and data set, with the settings that made the numbers."""
    sections = []
    for weights, data in dict.fromkeys((row.weights, row.data) for row in rows):
        own = [row for row in rows if (row.weights, row.data) == (weights, data)]
        layers = list(dict.fromkeys(row.layer for row in own if row.layer))
        lines = [f"# {weights} on {data}", "", f"sha256 `{own[0].sha256}`", ""]
        lines += [f"{row.protocol}: {100 * row.value:.2f} %" for row in own if not row.layer]
        protocols = list(dict.fromkeys((row.protocol, row.cost) for row in own if row.layer))
        if protocols:
            lines += ["", f"| protocol | {' | '.join(layers)} |", f"|---|{'---|' * len(layers)}"]
        for protocol, cost in protocols:
            cells = [
                spread_text([r for r in own if (r.protocol, r.cost, r.layer) == (protocol, cost, x)]) for x in layers
            ]
            lines.append(f"| {protocol}{f' ({cost})' if cost else ''} | {' | '.join(cells)} |")
        settings = dict.fromkeys((row.protocol, row.settings) for row in own)
        lines += ["", *(f"- {protocol}: {text}." for protocol, text in settings)]
        sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def spread_text(rows: list[Row]) -> str:
    """The mean in percent, with the standard deviation over seeds where there are several; '' without rows."""
    values = [100 * row.value for row in rows]
    if len(values) < 2:
        return f"{values[0]:.2f} %" if values else ""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} %"


def draw_report(rows: list[Row], file: Path) -> None:
    """Accuracy over layers, a line for each weights and protocol; without layers a bar for each number."""
    probed = [row for row in rows if row.layer]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    layers = list(dict.fromkeys(row.layer for row in probed))
    for weights, protocol in dict.fromkeys((row.weights, row.protocol) for row in probed):
        points = {
            x: [100 * r.value for r in probed if (r.weights, r.protocol, r.layer) == (weights, protocol, x)]
            for x in layers
        }
        measured = [x for x in layers if points[x]]
        axes.plot(measured, [statistics.mean(points[x]) for x in measured], marker="o", label=f"{weights}, {protocol}")
    if not probed:
        axes.bar([row.protocol for row in rows], [100 * row.value for row in rows], width=0.4)
    else:
        axes.legend(fontsize="small")
    axes.set(ylabel="accuracy, percent", title=rows[0].data)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
