"""What a folder of features holds: a manifest, parts that are written whole or not at all, and the errors of each part.

    manifest.json            what decides the features
    part-00000.parquet       the rows of shard 0: path, sha1 on request, a column for each layer
    errors/part-00000.parquet  the images of shard 0 that have no features, and why; only where there are such images
    errors.parquet           all of those, once every part is there

With the formats npy and safetensors a part is ``part-00000.npy`` or ``part-00000.safetensors``, and its paths are in
``part-00000.parquet``. The file with the features is renamed into its place last: where it is, the others are too.
"""

import contextlib
import dataclasses
import importlib.util
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from rotation_ssl.files import replace_bytes, replace_file, valid_text
from rotation_ssl.messages import some

FORMATS = ("parquet", "safetensors", "npy")
DTYPES = ("float32", "float16")
_PART = re.compile(r"part-(\d{5,})\.(\w+)")
_OWN = re.compile(r"(part-\d{5,}\.\w+|manifest\.json|errors\.parquet)(\.\d+\.tmp)?|errors|\.lock")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What decides the features and how they are stored; ``--resume`` goes on with the same only.

    Args:
        source: what images, an absolute path or a URL.
        shard_size: images in a part, but for tar files.
        format: of :data:`FORMATS`.
        model: ``model.tag`` of published weights, or another name that timm loads.
        weights_sha256: of :func:`rotation_ssl.models.weights_digest`.
        layers: number of values of each layer.
        pool: 'avg', 'max' or 'flatten'.
        grid: cells a side that the maps are pooled to.
        size: side of the squares that the network gets, in pixels.
        mean: what is subtracted from each channel, of values from 0 to 1.
        std: what they are divided by.
        precision: 'fp32' or 'bf16'.
        dtype: what the features are stored in, of :data:`DTYPES`.
        sha1: whether the rows have the sha1 of the images' bytes.
        batch_size: images in a batch.
        version: of this package.
        decoded_side: pixels of the shorter side that large JPEGs are decoded at, or more: see
            :func:`rotation_ssl.images.read_image`.
    """

    source: str
    shard_size: int
    format: str
    model: str
    weights_sha256: str
    layers: dict[str, int]
    pool: str
    grid: int
    size: int
    mean: list[float]
    std: list[float]
    precision: str
    dtype: str
    sha1: bool
    batch_size: int
    version: str
    decoded_side: int


class Rows:
    """The rows of a part as they come, and of the next part in the same memory.

    Features that were kept batch by batch would lie between the network's large blocks, of which fewer could be used
    again.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._memory = {layer: np.empty((0, width), manifest.dtype) for layer, width in manifest.layers.items()}
        self.clear()

    def clear(self) -> None:
        """Forget the rows."""
        self.paths: list[str] = []
        self.sha1: list[str] = []
        self.errors: list[tuple[str, str]] = []
        self.unopened = 0

    def add(self, paths: Sequence[str], features: Mapping[str, np.ndarray]) -> None:
        """Add the paths of n images and their features by layer, (n, D)."""
        start, end = len(self.paths), len(self.paths) + len(paths)
        for layer, part in features.items():
            there = self._memory[layer]
            if end > len(there):
                self._memory[layer] = np.empty((max(end, 2 * len(there)), there.shape[1]), there.dtype)
                self._memory[layer][:start] = there[:start]
            self._memory[layer][start:end] = part
        self.paths += paths

    @property
    def features(self) -> dict[str, np.ndarray]:
        """The features by layer, (N, D) in the type that is stored; valid until the rows are cleared."""
        return {layer: there[: len(self.paths)] for layer, there in self._memory.items()}


def require_pyarrow() -> None:
    """Load what reads and writes parts, or say how to install it.

    Raises:
        ImportError: it is not installed.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise ImportError("features in parts need pyarrow: pip install 'rotation-ssl[scale]'")
    # before the first image and not after the first part: memory stays as it is from the start
    importlib.import_module("pyarrow.parquet")


def part_name(number: int) -> str:
    """The name of a part without its suffix."""
    return f"part-{number:05d}"


def find_parts(folder: Path, form: str) -> dict[int, Path]:
    """The parts that are there, by number and in its order."""
    matches = [(match, path) for path in folder.iterdir() if (match := _PART.fullmatch(path.name)) and match[2] == form]
    return dict(sorted((int(match[1]), path) for match, path in matches))


def part_digest(folder: Path, number: int) -> str:
    """The digest of the shard that a part was made of."""
    from pyarrow import parquet

    file = folder / f"{part_name(number)}.parquet"
    return str((parquet.read_schema(file).metadata or {}).get(b"shard", b"").decode())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if it does not exist.

    Raises:
        ValueError: another run has it, or it is no folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"{folder} exists and is not a folder; give another --output") from error
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another run is writing to {folder}; wait for it or give another --output") from error
    with lock:
        yield


def start(folder: Path, manifest: Manifest, resume: bool) -> None:
    """Write the manifest of a new run, or check that of the run to resume.

    Raises:
        ValueError: parts without ``resume``, another manifest, or files of others where there are no parts yet; the
            error names what differs.
    """
    file = folder / "manifest.json"
    others = sorted(path.name for path in folder.iterdir() if not _OWN.fullmatch(path.name))
    has_parts = any(_PART.fullmatch(path.name) for path in folder.iterdir())
    if has_parts and not resume:
        raise ValueError(f"{folder} already has parts; give --resume to go on with them, or another --output")
    if not has_parts and (others or file.exists()):
        if others:
            raise ValueError(f"{folder} has other files, {some(others)}; give an empty --output")
        read_manifest(folder)  # another program's is not replaced
    if has_parts and (differences := _differences(read_manifest(folder), manifest)):
        raise ValueError(
            f"{folder} has other settings: {'; '.join(differences)}; repeat the options of the first run, or give "
            "another --output"
        )
    for unfinished in (*folder.glob("*.tmp"), *folder.glob("errors/*.tmp")):
        # of a run that was killed
        if _OWN.fullmatch(unfinished.name):
            unfinished.unlink(missing_ok=True)
    replace_bytes(file, f"{json.dumps(dataclasses.asdict(manifest), indent=1)}\n".encode())


def read_manifest(folder: Path) -> Manifest:
    """What made the features of a folder.

    Raises:
        ValueError: no manifest, or one that this version does not read.
    """
    file = folder / "manifest.json"
    try:
        return Manifest(**json.loads(file.read_text()))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{folder} has no manifest.json: it is no folder of features; rotation-ssl features IMAGES -o FOLDER/ "
            "writes one"
        ) from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged or of another version ({error})") from error


def write_part(folder: Path, number: int, manifest: Manifest, rows: Rows, digest: str) -> None:
    """Write a part; the file that tells that it is there comes last.

    Raises:
        OSError: it cannot be written, for example because the disk is full; the error names the part.
    """
    import pyarrow

    try:
        _write_errors(folder, number, rows.errors)
        _write_rows(folder, number, manifest, rows, digest)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            f"{part_name(number)} cannot be written to {folder} ({reason}); the parts that are there are whole: "
            "go on with --resume"
        ) from error
    pyarrow.default_memory_pool().release_unused()


def _write_rows(folder: Path, number: int, manifest: Manifest, rows: Rows, digest: str) -> None:
    import pyarrow
    from pyarrow import parquet

    arrays = rows.features
    columns: dict[str, Any] = {"path": pyarrow.array(list(map(valid_text, rows.paths)), pyarrow.string())}
    if manifest.sha1:
        columns["sha1"] = pyarrow.array(rows.sha1, pyarrow.string())
    if manifest.format == "parquet":
        lists = pyarrow.FixedSizeListArray
        columns |= {layer: lists.from_arrays(array.reshape(-1), array.shape[1]) for layer, array in arrays.items()}
    table = pyarrow.table(columns).replace_schema_metadata({"shard": digest})
    # what made these features goes before what tells that they are there
    replace_file(folder / f"{part_name(number)}.parquet", lambda file: parquet.write_table(table, file))
    if manifest.format != "parquet":
        path = folder / f"{part_name(number)}.{manifest.format}"
        replace_file(path, lambda file: _write_arrays(file, manifest.format, arrays))


def merge_errors(folder: Path) -> int:
    """Write errors.parquet of the errors of all parts, in their order; returns how many there are."""
    from pyarrow import parquet

    number = 0

    def write(file: Path) -> None:
        nonlocal number
        with parquet.ParquetWriter(file, _errors_schema()) as writer:
            for path in find_parts(folder / "errors", "parquet").values() if (folder / "errors").is_dir() else ():
                table = parquet.read_table(path, partitioning=None)
                writer.write_table(table)
                number += len(table)

    replace_file(folder / "errors.parquet", write)
    return number


def count_rows(folder: Path, form: str) -> int:
    """The number of images that have features."""
    from pyarrow import parquet

    names = [part_name(number) for number in find_parts(folder, form)]
    return sum(parquet.read_metadata(folder / f"{name}.parquet").num_rows for name in names)


def _write_errors(folder: Path, number: int, errors: Sequence[tuple[str, str]]) -> None:
    import pyarrow
    from pyarrow import parquet

    file = folder / "errors" / f"{part_name(number)}.parquet"
    if not errors:
        # of a run that was killed before the part itself was there
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(exist_ok=True)
    columns = [list(map(valid_text, column)) for column in zip(*errors, strict=True)]
    table = pyarrow.table(columns, schema=_errors_schema())
    replace_file(file, lambda path: parquet.write_table(table, path))


def _errors_schema() -> Any:
    import pyarrow

    return pyarrow.schema([("path", pyarrow.string()), ("reason", pyarrow.string())])


def _write_arrays(file: Path, form: str, arrays: Mapping[str, np.ndarray]) -> None:
    if form == "npy":
        (array,) = arrays.values()
        content = io.BytesIO()
        np.save(content, array)
        # of a full disk np.save itself tells how many values it wrote, and safetensors' save_file has its own error
        file.write_bytes(content.getbuffer())
    else:
        from safetensors.numpy import save

        file.write_bytes(save(dict(arrays)))


def _differences(there: Manifest, now: Manifest) -> list[str]:
    old, new = dataclasses.asdict(there), dataclasses.asdict(now)
    return [f"{key} is {old[key]!r} there and {new[key]!r} now" for key in old if old[key] != new[key]]
