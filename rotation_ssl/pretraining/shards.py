"""Tar shards of images: where each image is in them, so that images are read by index, as files of a folder are.

Shards are indexed once, by their headers alone. An image is then read by its position, and never written to the disk.
"""

import io
import os
import re
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from rotation_ssl.images import IMAGE_SUFFIXES, NamedBytes, read_image
from rotation_ssl.messages import counted, first_line, printable, some
from rotation_ssl.progress import progress
from rotation_ssl.shards import MAX_IMAGE_BYTES, TAR_SUFFIXES, Member, expand_braces, is_image_member, url_scheme

_LONGEST = 2**32 - 1  # bytes that an index counts: an image of more is too large in any case
_HEADERS = 2**22  # bytes that have the name of an image that is too large to be read
# what compressed files begin with: gzip, bzip2, xz, zstandard
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_Found = tuple[np.ndarray, np.ndarray]  # starts and lengths of a shard's images


@dataclass(frozen=True)
class ShardIndex:
    """Where the N images of S shards are: 12 bytes for an image.

    ``files`` are the shards' names (S,) as bytes, ``firsts`` the index of each one's first image (S,) int64, ``starts``
    the offset of each image's tar header in its shard (N,) int64, ``lengths`` the bytes from there to the image's last
    one (N,) uint32. One array for each: objects would be copied into every worker, one by one, as they are read.
    """

    files: np.ndarray
    firsts: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)


def is_shards(data: str | Path) -> bool:
    """Whether data is a tar file or a brace pattern of tar files, ``{000..999}.tar``, and not a folder."""
    names = re.split("[{},]", str(data).lower())
    # os.path's answer to a list that is too long for a name is no, Path's an error
    return any(name.endswith(TAR_SUFFIXES) for name in names) and not os.path.isdir(data)  # noqa: PTH112


def index_shards(pattern: str, workers: int = 0) -> ShardIndex:
    """Find all images in the shards of a brace pattern, in the order of the shards and of their members.

    An image is a regular member with one of :data:`rotation_ssl.images.IMAGE_SUFFIXES` whose name does not begin with a
    dot. Other members are skipped.

    Args:
        pattern: ``{000..999}.tar`` or the name of a single tar file.
        workers: processes that read the headers; 0: this one.

    Raises:
        ValueError: shards that are missing, given twice, compressed, cut off or damaged, or no image in any of them.
    """
    files = _find_shards(pattern)
    # as bytes and one array: see ShardIndex
    names = np.array([os.fsencode(file) for file in files])
    # in processes: reading headers is Python's work, not the disk's
    found = DataLoader(_Headers(names), num_workers=min(workers, len(files)), collate_fn=list)
    quiet = os.environ.get("RANK", "0") != "0"
    parts: list[_Found] = []
    damaged: list[ValueError] = []
    for (part,) in progress("indexing shards", len(files), "shard", found, disable=quiet):
        if isinstance(part, ValueError):
            damaged.append(part)
        else:
            parts.append(part)
    if damaged:
        more = f" ({counted(len(damaged) - 1, 'other shard')} too)" if len(damaged) > 1 else ""
        raise ValueError(f"{damaged[0]}{more}")
    counts = [len(starts) for starts, _ in parts]
    if not sum(counts):
        raise ValueError(f"no images ({', '.join(IMAGE_SUFFIXES)}) in {counted(len(files), 'shard')}, {pattern}")
    firsts = np.cumsum([0, *counts[:-1]])
    return ShardIndex(names, firsts, *(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def read_member(index: ShardIndex, image: int) -> Image.Image:
    """An image of the shards as RGB, upright.

    Raises:
        ValueError: it does not decode, or has more than ``MAX_IMAGE_BYTES``.
        OSError: its shard is gone, or is not the one that was indexed.
    """
    content = _open_member(index, image)
    if index.lengths[image] > MAX_IMAGE_BYTES:
        raise ValueError(f"image {content} has more than the {MAX_IMAGE_BYTES:,} bytes allowed; replace or remove it")
    return read_image(content)


def member_name(index: ShardIndex, image: int) -> str:
    """What an image is called: its shard, and its name there.

    Raises:
        OSError: as :func:`read_member`.
    """
    return repr(_open_member(index, image))


def _find_shards(pattern: str) -> list[str]:
    if scheme := url_scheme(pattern):
        raise ValueError(
            f"shards of {scheme}:// are not read: images are read by position, in a random order; copy the shards "
            "to a disk, or mount the place they are in, and give --data as a path"
        )
    files = expand_braces(pattern)
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        raise ValueError(f"{len(missing)} of {counted(len(files), 'shard')} not found: {some(missing, 3)}")
    twice = [file for file, times in Counter(files).items() if times > 1]
    if twice:
        raise ValueError(f"{pattern} gives shards twice: {some(twice, 3)}")
    return files


class _Headers(Dataset[_Found | ValueError]):
    """The images found in each shard, or what is wrong with it: raised in a worker it would come as a traceback."""

    def __init__(self, files: np.ndarray) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, shard: int) -> _Found | ValueError:
        file = os.fsdecode(self.files[shard])
        try:
            with Path(file).open("rb") as stream:
                return _find_members(stream)
        except Exception as error:
            # damaged headers make tarfile raise nearly anything
            return ValueError(f"shard {file} cannot be read ({first_line(error)}): copy it again or make a new one")


def _find_members(stream: IO[bytes]) -> _Found:
    if stream.read(8).startswith(_COMPRESSED):
        raise ValueError("it is compressed: images are read by position, and compressing them saves nothing")
    stream.seek(0)
    starts, lengths, end = [], [], 0
    with tarfile.open(fileobj=stream, mode="r:", tarinfo=Member) as archive:
        # next() fails at an archive without members before Python 3.11
        for member in archive:
            # tarfile would keep all of them
            archive.members = []  # type: ignore[attr-defined]
            if not end <= member.offset < archive.offset:
                # a negative size would lead back, and around for ever
                raise ValueError(f"the size of {some([member.name])} is wrong")
            end = archive.offset
            if is_image_member(member):
                starts.append(member.offset)
                lengths.append(min(member.offset_data + member.size - member.offset, _LONGEST))
    stream.seek(end)
    if any(stream.read(tarfile.BLOCKSIZE)):
        # later versions of tarfile take a negative size for the end
        raise ValueError(f"the header at byte {end:,} is damaged")
    return np.array(starts, dtype=np.int64), np.array(lengths, dtype=np.uint32)


def _open_member(index: ShardIndex, image: int) -> NamedBytes:
    """An image's bytes; of one that is too large to be read none."""
    file = os.fsdecode(index.files[np.searchsorted(index.firsts, image, side="right") - 1])
    length = int(index.lengths[image])
    try:
        with Path(file).open("rb") as stream:
            stream.seek(int(index.starts[image]))
            read = io.BytesIO(stream.read(length if length <= MAX_IMAGE_BYTES else _HEADERS))
        with tarfile.open(fileobj=read, mode="r:", tarinfo=Member) as archive:
            member = next(iter(archive), None)
        if member is None or min(member.offset_data + member.size, _LONGEST) != length:
            raise ValueError("its members are others")
        read.seek(member.offset_data)
        content = read.read() if length <= MAX_IMAGE_BYTES else b""
        if length <= MAX_IMAGE_BYTES and len(content) != member.size:
            raise ValueError("it is cut off")
    except Exception as error:
        # what tarfile raises on other bytes than those that were indexed is not one family
        raise OSError(
            f"shard {file} is not what it was when it was indexed ({first_line(error)}): put that back, then --resume"
        ) from error
    return NamedBytes(content, f"{file}: {printable(member.name, most=4096)}")
