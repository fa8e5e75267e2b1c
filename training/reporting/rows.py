"""One row a number: what was measured, on which bytes, by which commit, on what; the only source of every table.

Rows live in ``training/results/*.jsonl``, one JSON object a line. Each carries a digest of its other fields, against
slips: a row edited by hand no longer matches it. Rows are written by commands, through :func:`write_rows`. Numbers
quoted from the paper are rows too, with ``source`` 'paper, ...' (or 'paper (unchecked)' where no printed copy was at
hand), and are never shown as ours.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock

from rotation_ssl.evaluation.protocols import find_protocol
from rotation_ssl.files import replace_bytes
from rotation_ssl.messages import counted
from training.protocols import PROTOCOLS

RESULTS_DIR = Path(__file__).parent.parent / "results"


@dataclass(frozen=True)
class Row:
    """A number: ``value`` is a fraction, ``correct / n`` where it was counted.

    ``weights`` is a published ``model.tag``, ``model.random`` for a network as initialised (``model.tag-random`` for
    that of weights that are not bundled), ``model@sha256`` (12 digits) for other weights, or for quoted numbers the
    model that they are of. ``protocol`` is an id of :data:`training.protocols.PROTOCOLS`, ``budget`` one that it has.
    ``counts`` are the correct predictions in each tenth of the test images, in order.
    ``settings`` says what the protocol's name leaves open. ``strength`` is the L2 penalty that a linear probe chose;
    the number is reproduced with the same penalty, because another machine might choose another one.
    ``recipe`` names the recipe, of one of ``training/studies``, that made unpublished weights.
    """

    weights: str
    protocol: str
    layer: str
    value: float
    source: str
    data: str
    budget: str = ""
    settings: str = ""
    labels_per_class: int | None = None
    draw: str = ""
    seed: int | None = None
    strength: float | None = None
    correct: int | None = None
    n: int | None = None
    counts: tuple[int, ...] = ()
    sha256: str = ""
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    threads: int | None = None
    seconds: float | None = None
    recipe: str = ""

    def __post_init__(self) -> None:
        find_protocol(self.protocol, self.budget, PROTOCOLS)
        if self.correct is not None and self.n is not None and self.value != self.correct / self.n:
            raise ValueError(f"{self.number} says {self.value}, but {self.correct} of {self.n} were correct")
        if self.counts and sum(self.counts) != self.correct:
            raise ValueError(f"{self.number} counts {sum(self.counts)} in its tenths and {self.correct} in all")

    @property
    def key(self) -> tuple[object, ...]:
        """What the number is of: a file holds one row for each."""
        few = (self.labels_per_class, self.draw)
        return self.weights, self.protocol, self.budget, self.layer, self.source, self.data, *few, self.seed

    @property
    def measured(self) -> bool:
        """Whether this project measured the number; others are quoted."""
        return self.source == "measured"

    @property
    def number(self) -> str:
        """The number's name in one line, for tables and errors."""
        few = f"{counted(self.labels_per_class, 'label')} a class ({self.draw})" if self.labels_per_class else ""
        seed = "" if self.seed is None else f"seed {self.seed}"
        parts = (self.weights, self.title, self.layer, few, seed, f"on {self.data}")
        return " ".join(part for part in parts if part)

    @property
    def precision(self) -> str:
        """What it was measured in: its settings say so where it may be anything but fp32."""
        found = re.search(r"\b(bf16|fp32)\b", self.settings)
        return found[0] if found else "fp32"

    @property
    def title(self) -> str:
        """Protocol and budget, as text shows them."""
        return PROTOCOLS[self.protocol].titled(self.budget)

    @property
    def digest(self) -> str:
        """sha256 of all fields, as canonical JSON."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


def model_of(weights: str) -> str:
    """The network of ``model.tag`` or ``model@sha256``."""
    return weights.split("@", 1)[0].split(".", 1)[0]


def read_rows(folder: Path = RESULTS_DIR) -> list[Row]:
    """All rows of a results folder, file by file.

    Raises:
        ValueError: a line that is not a row, a row that was edited, or two rows of the same number.
    """
    rows: dict[tuple[object, ...], Row] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for row in read_file(file):
            if row.key in rows:
                raise ValueError(f"{file} has a row of {row.number} that another file has too: remove one")
            rows[row.key] = row
    return list(rows.values())


def read_file(file: Path) -> list[Row]:
    """The rows of one file.

    Raises:
        ValueError: a line that is not a row, one that was edited since it was written, or two rows of the same number;
            the error names file and line.
    """
    rows: dict[tuple[object, ...], Row] = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            fields = json.loads(line)
            digest = fields.pop("digest")
            row = Row(**(fields | {"counts": tuple(fields.get("counts", ()))}))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{file}, line {number} is not a result row ({type(error).__name__}: {error})") from error
        if row.digest != digest:
            raise ValueError(
                f"{file}, line {number} ({row.number}) does not match its digest: it was edited; measure it again"
            )
        if row.key in rows:
            raise ValueError(f"{file}, line {number} is a second row of {row.number}: remove one")
        rows[row.key] = row
    return list(rows.values())


def write_rows(file: Path, new: list[Row]) -> None:
    """Add rows to a file, replacing those of the same numbers and those of other bytes under the same name.

    A row of new weights removes all rows of older weights of the same name, or of the same recipe, so that rows of both
    are never mixed. If the process is killed while writing, the file is unchanged.
    """
    bytes_of = {_made_of(row): row.sha256 for row in new if row.measured}
    file.parent.mkdir(parents=True, exist_ok=True)
    # two commands may measure at the same time: each adds to what the other wrote
    with FileLock(f"{file}.lock"):
        old = [
            row
            for row in (read_file(file) if file.exists() else [])
            if not row.measured or bytes_of.get(_made_of(row), row.sha256) == row.sha256
        ]
        rows = {row.key: row for row in (*old, *new)}
        lines = [json.dumps(dataclasses.asdict(row) | {"digest": row.digest}) + "\n" for row in rows.values()]
        replace_bytes(file, "".join(lines).encode())


def _made_of(row: Row) -> tuple[str, int | None]:
    """What has one content at a time; trainings that start from random weights take those of their own seed."""
    from_own_seed = row.protocol == "supervised" or (row.protocol.startswith("voc-") and ".random" in row.weights)
    return row.recipe or row.weights, row.seed if from_own_seed else None


def require_committed(what: str) -> None:
    """Refuse to measure by code that no commit has: a row of the card names the commit that made it."""
    if len(current_commit()) != 40:
        raise ValueError(f"{what} needs committed code, this is {current_commit()}: commit, then measure")


@functools.cache
def current_commit() -> str:
    """The commit of this clone as the process began, '-dirty' where tracked files differ.

    Result rows do not count: a command that measures several numbers writes them as it goes. Of a copy without its
    history, as on a cluster, it is what ROTATION_SSL_COMMIT says, else 'unknown'.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    changes = ["status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)training/results"]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, *changes], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return os.environ.get("ROTATION_SSL_COMMIT", "unknown")
    return commit.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")
