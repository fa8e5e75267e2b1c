"""One row a number: what was measured, on which bytes, by which commit, on what; the only source of every table.

Rows live in ``training/results/*.jsonl``, one JSON object a line. Numbers quoted from the paper are rows too, with
``source`` 'paper' (or 'paper (unchecked)' where no printed copy was at hand), and are never shown as ours.
"""

import dataclasses
import json
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch

import rotation_ssl

RESULTS_DIR = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """A number: ``value`` is a fraction, ``correct / n`` where it was counted.

    ``weights`` is a published ``model.tag``, ``model.random`` for a network as initialised with ``seed``, or for quoted
    numbers the model that they are of. ``settings`` says of the protocol what its name leaves open.
    """

    weights: str
    protocol: str
    layer: str
    value: float
    source: str
    data: str
    settings: str = ""
    seed: int | None = None
    correct: int | None = None
    n: int | None = None
    sha256: str = ""
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    threads: int | None = None
    seconds: float | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """What the number is of: a file holds one row for each."""
        return self.weights, self.protocol, self.layer, self.source, self.data, self.seed


def read_rows(folder: Path = RESULTS_DIR) -> list[Row]:
    """All rows of a results folder, file by file.

    Raises:
        ValueError: a line that is not a row, or two rows of the same number; the error names file and line.
    """
    rows: dict[tuple[object, ...], Row] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for row in read_file(file):
            if row.key in rows:
                raise ValueError(f"{file} has a second row of {row.weights}, {row.protocol} {row.layer}: remove one")
            rows[row.key] = row
    return list(rows.values())


def read_file(file: Path) -> list[Row]:
    """The rows of one file.

    Raises:
        ValueError: a line that is not a row.
    """
    rows = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            rows.append(Row(**json.loads(line)))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file}, line {number} is not a result row ({error})") from error
    return rows


def write_rows(file: Path, new: list[Row]) -> None:
    """Add rows to a file, replacing those of the same numbers; a kill while writing leaves the file as it was."""
    rows = {row.key: row for row in (read_file(file) if file.exists() else [])}
    rows |= {row.key: row for row in new}
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows.values()))
    unfinished.replace(file)


def current_commit() -> str:
    """The commit of this clone, marked when tracked files differ from it; 'unknown' outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def library_versions() -> dict[str, str]:
    """Versions of what decides a number."""
    return {
        "rotation_ssl": rotation_ssl.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def check_device(device: str) -> None:
    """Refuse a device that is not there before any work is done.

    Raises:
        ValueError: no such device.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used ({reason}); give --device cpu or another") from error


def device_name(device: torch.device | str) -> str:
    """The GPU, or the processor as /proc/cpuinfo names it, or the platform's word where there is none."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
