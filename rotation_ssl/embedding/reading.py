"""Read the parts of a folder of features back, one at a time and mapped into memory where the format allows."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rotation_ssl.embedding.parts import Manifest, find_parts, part_name, read_manifest, require_pyarrow
from rotation_ssl.messages import some

ROWS = 8192  # of a parquet file in memory at a time


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the formats npy and safetensors, whose files are opened when they are used.

    Args:
        folder: of features.
        number: of the part.
        format: 'npy' or 'safetensors'.
        layers: their names.
    """

    folder: Path
    number: int
    format: str
    layers: tuple[str, ...]

    @functools.cached_property
    def paths(self) -> list[str]:
        """The paths of its N images."""
        from pyarrow import parquet

        file = self.folder / f"{part_name(self.number)}.parquet"
        return list(parquet.read_table(file, columns=["path"], partitioning=None).column("path").to_pylist())

    # not kept: a process may have some thousand files open, and a folder has more parts
    @property
    def features(self) -> Mapping[str, np.ndarray]:
        """An array (N, D) for each layer, mapped into memory at every call; its file is open as long as it is used."""
        path = self.folder / f"{part_name(self.number)}.{self.format}"
        if self.format == "npy":
            (layer,) = self.layers
            # a file without rows cannot be mapped
            return {layer: np.load(path, mmap_mode="r" if path.stat().st_size > 1024 else None)}
        from safetensors import safe_open

        # torch's tensors stay mapped, those of numpy would be copies
        with safe_open(path, "pt") as file:
            return {layer: file.get_tensor(layer).numpy() for layer in self.layers}


def load(folder: str | Path) -> Any:
    """The features of a folder.

    Returns:
        For parquet a ``pyarrow.dataset.Dataset`` with the columns 'path', 'sha1' if it was stored, and one for each
        layer; for npy and safetensors a list of :class:`Part`, whose files are mapped into memory when they are used.

    Raises:
        ValueError: no folder of features, or one without parts.
    """
    manifest, parts = _parts(Path(folder))
    if manifest.format == "parquet":
        from pyarrow import dataset

        return dataset.dataset([str(path) for path in parts.values()])
    return [Part(Path(folder), number, manifest.format, tuple(manifest.layers)) for number in parts]


def read_chunks(folder: str | Path, layer: str) -> Iterator[tuple[list[str], np.ndarray]]:
    """The paths and features (n, D) of some thousand images at a time, in the order of the parts.

    Raises:
        ValueError: no folder of features, or one without parts or without the layer.
    """
    folder = Path(folder)
    manifest, parts = _parts(folder)
    if layer not in manifest.layers:
        raise ValueError(f"{folder} has no layer {layer}; it has {some(list(manifest.layers))}")
    for number, path in parts.items():
        if manifest.format == "parquet":
            yield from _parquet_chunks(path, layer, manifest.layers[layer])
        else:
            part = Part(folder, number, manifest.format, tuple(manifest.layers))
            features = part.features[layer]
            for start in range(0, len(features), ROWS):
                yield part.paths[start : start + ROWS], features[start : start + ROWS]


def _parquet_chunks(path: Path, layer: str, width: int) -> Iterator[tuple[list[str], np.ndarray]]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS, columns=["path", layer]):
            values = batch.column(layer).flatten().to_numpy(zero_copy_only=False)
            yield batch.column("path").to_pylist(), values.reshape(-1, width)


def _parts(folder: Path) -> tuple[Manifest, dict[int, Path]]:
    require_pyarrow()
    manifest = read_manifest(folder)
    parts = find_parts(folder, manifest.format)
    if not parts:
        raise ValueError(f"{folder} has no parts yet")
    return manifest, parts
