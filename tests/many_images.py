"""Many small images, some of them broken, as a folder, tar files or a parquet file; and the rows that came of them."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from pyarrow import parquet

from rotation_ssl.embedding import load
from rotation_ssl.embedding.parts import read_manifest

BROKEN = b"no image"


def image_bytes(number, size=16):
    """A PNG of noise, another one for each number."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def contents(count, broken_every=0, size=16):
    """Names and bytes of images; each ``broken_every``-th one is broken."""
    for number in range(count):
        is_broken = broken_every and number % broken_every == broken_every - 1
        yield f"{number % 7}/{number:06d}.png", BROKEN if is_broken else image_bytes(number, size)


def write_folder(folder, images):
    for name, content in images:
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def tar_of(members, mode="w", **options):
    """The bytes of a tar file of members: names and bytes, or a TarInfo and its bytes."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode, **options) as archive:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def write_tar(file, members, **options):
    file.write_bytes(tar_of(members, **options))
    return file


def rows_of(folder):
    """Path -> bytes of the features and the sha1, of all parts; a path that is there twice is an error."""
    manifest, loaded = read_manifest(Path(folder)), load(folder)
    rows = {}
    if manifest.format == "parquet":
        table = loaded.to_table()
        columns = [(table.column(layer).combine_chunks(), width) for layer, width in manifest.layers.items()]
        paths, sha1 = table.column("path").to_pylist(), table.column("sha1").to_pylist() if manifest.sha1 else None
        arrays = [column.flatten().to_numpy().reshape(len(paths), width) for column, width in columns]
        batches = [(paths, sha1, arrays)]
    else:
        batches = [(part.paths, None, list(part.features.values())) for part in loaded]
    for paths, sha1, arrays in batches:
        for number, path in enumerate(paths):
            assert path not in rows
            rows[path] = (*(array[number].tobytes() for array in arrays), sha1 and sha1[number])
    return rows


def errors_of(folder):
    """Path -> reason of errors.parquet; a path that is there twice is an error."""
    rows = parquet.read_table(Path(folder) / "errors.parquet").to_pylist()
    errors = {row["path"]: row["reason"] for row in rows}
    assert len(errors) == len(rows)
    return errors


def part_bytes(folder):
    """Name -> bytes of every file but the lock."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(Path(folder).rglob("*"))
        if file.is_file() and file.name != ".lock"
    }
