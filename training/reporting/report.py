"""What comes of measuring: rows as they are measured, and their report, a table, a figure and numbers for programs."""

import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from rotation_ssl.machine import keep_large_blocks
from training.reporting.rows import RESULTS_DIR, Row, check_device, read_file, write_rows


def run_measuring(measure: Callable[[], Path], device: str) -> int:
    """Do the work of a command that measures: an error is one line, and what was measured before it is kept.

    Args:
        measure: the work; it returns the file of its rows, with the report beside where they are the user's own.
        device: where it is to be done, checked first.

    Returns:
        The exit status.
    """
    keep_large_blocks()
    try:
        check_device(device)
        file = measure()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; numbers that were measured are kept", file=sys.stderr)
        return 130
    recorded = file.parent == RESULTS_DIR
    print(f"rows are in {file}" + ("" if recorded else "; report.md, report.json and report.png beside it"))
    return 0


def check_rows(file: Path) -> None:
    """Refuse a results file that rows cannot be written to, before hours go into them; nothing is made yet.

    Raises:
        ValueError: rows are there already that cannot be read.
        OSError: the folder cannot be made or written to.
    """
    there = next(folder for folder in file.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise OSError(
            f"{file} cannot be written, for {there} is no folder that one may write to: give another --output"
        )
    if file.exists():
        read_file(file)


def keep_row(row: Row, file: Path) -> None:
    """Print a number, past any progress bar, and write it to its results file, as soon as it is measured."""
    counted = "" if row.correct is None or row.n is None else f"{row.correct:,} of {row.n:,}, "
    tqdm.write(f"  {row.number}: {100 * row.value:.2f} % ({counted}{row.seconds or 0:.0f} s)")
    write_rows(file, [row])


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


def spread_text(rows: list[Row]) -> str:
    """The mean in percent, with the standard deviation over seeds where there are several; '' without rows."""
    values = [100 * row.value for row in rows]
    if len(values) < 2:
        return f"{values[0]:.2f} %" if values else ""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} %"


def series_name(row: Row) -> str:
    """What rows have in common that differ by layer and seed alone: protocol, cost, and the labels of each class."""
    cost = f" ({row.cost})" if row.cost else ""
    labels = f", {row.draw} {row.labels_per_class} of each class" if row.labels_per_class else ""
    return f"{row.protocol}{cost}{labels}"


def draw_report(rows: list[Row], file: Path) -> None:
    """Accuracy over layers, a line for each weights, data set and protocol; without layers a bar for each number."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
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
        # positions, not names: a series that lacks a layer must not reorder the others
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
        axes.bar([f"{row.weights}\n{row.protocol}" for row in rows], [100 * row.value for row in rows], width=0.4)
    # what is no count is a mean of precisions or overlaps
    axes.set(
        ylabel="accuracy, percent" if all(row.n for row in rows) else "percent", title="" if several else rows[0].data
    )
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
