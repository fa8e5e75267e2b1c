"""What comes of measuring: rows as they are measured, and the report of a file of them."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm

from rotation_ssl.evaluation import report
from rotation_ssl.fit import Checkpoints
from rotation_ssl.machine import check_device
from training.command import run
from training.reporting.rows import RESULTS_DIR, Row, current_commit, read_file, write_rows


def run_measuring(measure: Callable[[], Path], device: str) -> int:
    """Do the work of a command that measures: an error is one line, and what was measured before it is kept.

    Args:
        measure: the work; it returns the file of its rows. Beside rows of the user's own their report is written.
        device: where it is to be done, checked first.

    Returns:
        The exit status.
    """

    def work() -> None:
        current_commit()  # of the code that runs, whatever is committed meanwhile
        check_device(device)
        file = measure()
        if file.parent == RESULTS_DIR:
            print(f"rows are in {file}")
        else:
            report.write_report(file.parent, read_file(file))
            print(f"rows are in {file}; report.md, report.json and report.png beside it")

    return run(work, "stopped; numbers that were measured are kept")


def check_rows(file: Path) -> None:
    """Refuse a results file that rows cannot be written to, before hours go into them; nothing is made yet."""
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


def keep_rows(rows: Iterable[Row], file: Path, checkpoints: Checkpoints | None = None) -> Path:
    """:func:`keep_row` of rows that are measured as they are asked for; returns the file.

    The ``checkpoints`` that the measuring opened are removed when all rows are written.
    """
    for row in rows:
        keep_row(row, file)
    if checkpoints:
        checkpoints.remove()
    return file
