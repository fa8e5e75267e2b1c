"""Shards -> parts on one machine: processes decode the images, this one runs the network and writes.

Batches are blocks of consecutive images of a shard, always of the same shape: where an image is broken, or the shard
ends, the batch has zeros, whose features are dropped. So the features of an image do not depend on the others in its
batch, nor on who computes it.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from rotation_ssl.embedding.files import read_bytes
from rotation_ssl.embedding.parts import Manifest, Rows, part_name, write_part
from rotation_ssl.embedding.sources import Item, Shard, read_items
from rotation_ssl.features import batch_extractor
from rotation_ssl.images import FAILURES, NamedBytes, large_images_allowed, normalize, read_image, square
from rotation_ssl.machine import release_free_memory
from rotation_ssl.messages import first_line, killed_worker_errors
from rotation_ssl.precision import autocast_type

AHEAD = 2  # batches that each process may be ahead
UNOPENED = 100  # files of a shard, all of which cannot be opened, mean that it is not the files


class Block(NamedTuple):
    """What a process decodes at a time: images of one shard, and whether they are its last."""

    shard: int
    digest: str
    items: list[Item]
    is_last: bool


class Decoded(NamedTuple):
    """A block as pixels (B, 3, size, size) uint8, zeros where there is no image; ``rows`` are those that have one."""

    block: Block
    pixels: torch.Tensor
    rows: list[int]
    paths: list[str]
    sha1: list[str]
    errors: list[tuple[str, str]]
    unopened: int
    failure: str


class Done(NamedTuple):
    """What was written: a part, the number of its images and of its errors."""

    part: int
    images: int
    errors: int


Extractor = Callable[[torch.Tensor], dict[str, torch.Tensor]]


def make_extractor(model: Any, manifest: Manifest) -> Extractor:
    """A function from pixels (B, 3, size, size) uint8 to the features (B, D) of each layer, float32 on the CPU."""
    return batch_extractor(
        model,
        list(manifest.layers),
        pool=manifest.pool,
        grid=manifest.grid,
        prepare=lambda batch: normalize(batch, manifest.mean, manifest.std),
        autocast=autocast_type(manifest.precision),
    )


def embed_shards(
    shards: Iterable[Shard],
    folder: Path,
    manifest: Manifest,
    extract: Extractor,
    workers: int,
    progressed: Callable[[int], object] = lambda images: None,
) -> Iterator[Done]:
    """Write the part of each shard, in their order.

    Args:
        shards: may be found while the first ones are embedded.
        folder: of the parts.
        manifest: what decides the features.
        extract: of :func:`make_extractor`.
        workers: data-loading worker processes; 0: this process.
        progressed: called with a number of images when so many more are done, to show progress.

    Raises:
        ValueError: none of the many files of a shard can be opened.
        OSError: a part cannot be written, a tar or parquet file cannot be opened, or a process was killed.
    """
    rows = Rows(manifest)
    with killed_worker_errors():
        for decoded in _from_thread(_decode(_blocks(shards, manifest.batch_size), manifest, workers)):
            _add(rows, decoded, manifest, extract)
            progressed(len(decoded.paths) + len(decoded.errors))
            if decoded.block.is_last:
                _check_opened(rows, decoded.block.shard)
                write_part(folder, decoded.block.shard, manifest, rows, decoded.block.digest)
                release_free_memory()
                yield Done(decoded.block.shard, len(rows.paths), len(rows.errors))
                rows.clear()


def decode(name: str, content: str | bytes | ValueError, manifest: Manifest) -> tuple[np.ndarray, bytes]:
    """An image's square (size, size, 3) and its bytes; size and how it is decoded are those of the manifest.

    Raises:
        ValueError: it does not decode, or what was wrong with it before.
        OSError: it cannot be opened.
    """
    if isinstance(content, ValueError):
        raise content
    if isinstance(content, str):
        content = read_bytes(content)
    return decode_file(NamedBytes(content, name), manifest), content


def decode_file(file: Path | IO[bytes], manifest: Manifest) -> np.ndarray:
    """The square (size, size, 3) of an image file; size and how it is decoded are those of the manifest.

    Raises:
        ValueError: it does not exist or does not decode.
        OSError: the disk or the network failed.
    """
    with large_images_allowed():
        return np.asarray(square(read_image(file, manifest.decoded_side), manifest.size))


class _Blocks(Dataset[Decoded]):
    """Decodes a block: what is called an index here is the block itself."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def __getitem__(self, block: Block) -> Decoded:
        size = self.manifest.size
        pixels = np.zeros((self.manifest.batch_size, size, size, 3), np.uint8)
        decoded = Decoded(block._replace(items=[]), torch.empty(0), [], [], [], [], 0, "")
        unopened, failure = 0, ""
        for row, (name, content) in enumerate(block.items):
            try:
                pixels[row], original = decode(name, content, self.manifest)
            except (ValueError, OSError) as error:
                unopened += isinstance(error, OSError)
                if isinstance(error, OSError) and error.errno in FAILURES:
                    failure = f"{name} cannot be read ({first_line(error)})"
                decoded.errors.append((name, first_line(error)))
                continue
            decoded.rows.append(row)
            decoded.paths.append(name)
            if self.manifest.sha1:
                decoded.sha1.append(hashlib.sha1(original, usedforsecurity=False).hexdigest())
        # images of channels last stay so in memory: the copy is the network's to make
        return decoded._replace(pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2), unopened=unopened, failure=failure)


def _decode(blocks: Iterable[Block], manifest: Manifest, workers: int) -> Iterator[Decoded]:
    """The blocks in their order, decoded by processes, which are ahead by so many blocks at most."""
    loader = DataLoader(
        _Blocks(manifest),
        batch_size=None,
        sampler=blocks,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        collate_fn=_as_it_is,
    )
    return iter(loader)


def _from_thread(batches: Iterator[Decoded]) -> Iterator[Decoded]:
    """The same batches, which a thread waits for while this one computes.

    Threads allocate apart from each other: the small blocks of what is read and received do not come to lie between
    the network's large ones, of which fewer could be used again.
    """
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while (decoded := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield decoded


def _as_it_is(decoded: Any) -> Any:
    return decoded


def _blocks(shards: Iterable[Shard], batch_size: int) -> Iterator[Block]:
    for shard in shards:
        items = read_items(shard)
        block = list(itertools.islice(items, batch_size))
        while following := list(itertools.islice(items, batch_size)):
            yield Block(shard.number, "", block, False)
            block = following
        # one that is empty has a part too
        yield Block(shard.number, shard.digest, block, True)


def _add(rows: Rows, decoded: Decoded, manifest: Manifest, extract: Extractor) -> None:
    if decoded.failure:
        raise OSError(f"{decoded.failure}; see that the source is there, and go on with --resume")
    rows.errors += decoded.errors
    rows.unopened += decoded.unopened
    if not decoded.rows:
        return
    features = {layer: part[decoded.rows].numpy() for layer, part in extract(decoded.pixels).items()}
    with np.errstate(over="ignore"):
        stored = {layer: part.astype(manifest.dtype) for layer, part in features.items()}
    finite = np.all([np.isfinite(part).all(axis=1) for part in stored.values()], axis=0)
    rows.errors += [
        (path, f"its features are not finite in {manifest.dtype}") for path in _taken(decoded.paths, ~finite)
    ]
    rows.add(_taken(decoded.paths, finite), {layer: part[finite] for layer, part in stored.items()})
    rows.sha1 += _taken(decoded.sha1, finite)


def _taken(values: Sequence[str], mask: np.ndarray) -> list[str]:
    return list(itertools.compress(values, mask))


def _check_opened(rows: Rows, part: int) -> None:
    if not rows.paths and rows.unopened == len(rows.errors) >= UNOPENED:
        path, reason = rows.errors[0]
        raise ValueError(
            f"none of the {rows.unopened:,} files of {part_name(part)} can be opened, like {path} ({reason}); "
            "see that the source is there, and go on with --resume"
        )
