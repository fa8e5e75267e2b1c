"""Checkpoint files that other people made: untrusted, so read without running anything and within bounds.

A file is told by its content, not by its name: safetensors, a pickle of ``torch.save`` (``weights_only=True``, of any
age), or a gzipped tar archive with such a pickle in it. Nothing is ever unpacked to the disk.
"""

import contextlib
import gzip
import io
import pickle
import pickletools
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from safetensors.torch import load

from rotation_ssl.messages import first_line, some

MAX_BYTES = 2**30  # of a file as unpacked: the largest known, the authors' AlexNet, has 228 MB
MAX_MEMBERS = 1000
MAX_TUPLES = 50_000  # of a pickle: a tensor takes about five
_BLOCK = 1 << 20
_CHECKPOINT = re.compile(r"model_net_epoch(\d{1,9})")  # as the authors' code names them


class _Refused(ValueError):
    """A file that could be read further, but is not; what it says follows the name of the file."""


def read_checkpoint(
    file: Path, epoch: int | None = None, max_bytes: int = MAX_BYTES, content: bytes | None = None
) -> Any:
    """Read a checkpoint file without running code from it: tensors on the CPU, in nested dicts and lists.

    Args:
        file: safetensors, a pickle of ``torch.save``, or a .tar.gz archive with one.
        epoch: which checkpoint of an archive (``model_net_epoch<N>``); None: the last.
        max_bytes: refuse files that unpack to more.
        content: the file's bytes, if they are in memory already.

    Raises:
        ValueError: no such file, none of the three, a damaged one, one that would run code or unpack to more than
            ``max_bytes``, a pickle of more than 50,000 tuples, tensors without plain values (sparse,
            quantized), or an archive with members outside of it, links, or no checkpoint that can be told from the
            others.
    """
    if content is None and not file.is_file():
        raise ValueError(f"there is no checkpoint file {file}")
    try:
        with file.open("rb") if content is None else io.BytesIO(content) as stream:
            checkpoint = _read(stream, epoch, max_bytes)
        _check_tensors(checkpoint, max_bytes)
    except _Refused as error:
        raise ValueError(f"checkpoint {file} {error}") from error
    except Exception as error:
        # damaged bytes make these readers raise nearly anything
        raise ValueError(
            f"{file} is damaged or not a checkpoint, which is safetensors, a pickle of torch.save or a .tar.gz archive"
            f" of one ({type(error).__name__}: {first_line(error)})"
        ) from error
    return checkpoint


def _read(stream: IO[bytes], epoch: int | None, max_bytes: int) -> Any:
    start, size = stream.read(9), stream.seek(0, io.SEEK_END)
    stream.seek(0)
    if start[:2] == b"\x1f\x8b":
        return _read_pickle(_read_archive(stream, epoch, max_bytes), max_bytes)
    if size > max_bytes:
        raise _Refused(f"has {size:,} bytes, more than the {max_bytes:,} allowed")
    return load(stream.read()) if start[8:] == b"{" else _read_pickle(stream.read(), max_bytes)


def _read_pickle(content: bytes, max_bytes: int) -> Any:
    is_zip = content.startswith(b"PK\x03\x04")  # torch's own test
    stream = _rewrite_zip(content, max_bytes) if is_zip else io.BytesIO(content)
    if not is_zip:
        _check_tuples(content)
    try:
        return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
            raise _Refused(f"is not read: its pickle asks for {some([unsafe[1]])}, which could run code") from error
        # torch's own words advise to try again without safety
        raise _Refused("is damaged, not a checkpoint, or contains more than tensors, dicts and lists") from error


def _rewrite_zip(content: bytes, max_bytes: int) -> io.BytesIO:
    """The same entries, none of them compressed, in an archive that every reader reads alike.

    torch's reader can be made to find other entries in a crafted archive than Python's, which counts them here.
    """
    rewritten = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(rewritten, "w") as stored:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > max_bytes:
            raise _Refused(f"unpacks to {unpacked:,} bytes, more than the {max_bytes:,} allowed")
        for entry in archive.infolist():
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise _Refused(f"is a zip archive compressed by method {entry.compress_type}, which torch never reads")
            with archive.open(entry) as stream:
                # without a size, it unpacks first and cuts to the size that the entry claims afterwards
                unpacked_entry = stream.read(entry.file_size)
            # torch's reader takes an entry's name in any case
            if entry.filename.lower().endswith(".pkl"):
                _check_tuples(unpacked_entry)
            stored.writestr(entry.filename, unpacked_entry)
    rewritten.seek(0)
    return rewritten


def _check_tuples(content: bytes) -> None:
    """Python hashes a key of nested tuples without a bound on their depth: enough of them crash the process."""
    stream, tuples = io.BytesIO(content), 0
    # what is not a pickle is refused by torch, in its own words
    with contextlib.suppress(Exception):
        # outside of a zip archive: magic number, version, system, checkpoint, names of its tensors; then their bytes
        for _ in range(5):
            for operation, _, _ in pickletools.genops(stream):
                tuples += operation.name.startswith("TUPLE")
                if tuples > MAX_TUPLES:
                    break
    if tuples > MAX_TUPLES:
        raise _Refused(f"is not read: its pickle has more than {MAX_TUPLES:,} tuples")


def _check_tensors(checkpoint: Any, max_bytes: int) -> None:
    """A pickle of a few bytes can describe tensors of any size: expanded ones, or ones without values."""
    total = 0
    for _, tensor in tensors_of(checkpoint):
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise _Refused("contains a tensor that is sparse, quantized or without values")
        total += tensor.numel() * tensor.element_size()
    if total > max_bytes:
        raise _Refused(f"contains tensors of {total:,} bytes, more than the {max_bytes:,} allowed")


def tensors_of(checkpoint: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint with their names, whatever is around them, each once."""
    # it may be nested to any depth, and in itself
    left: list[tuple[str, Any]] = [("", checkpoint)]
    seen = set()
    while left:
        name, value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            left += [(f"{name}.{key}".lstrip("."), part) for key, part in value.items()][::-1]
        elif isinstance(value, (list, tuple)):
            left += [(f"{name}[{i}]", part) for i, part in enumerate(value)][::-1]


def _read_archive(file: IO[bytes], epoch: int | None, max_bytes: int) -> bytes:
    """The one checkpoint of a gzipped tar archive, read in one pass that stops at the bounds."""
    found: dict[str, bytes] = {}
    names: list[str] = []
    wanted = -1
    with gzip.open(file) as unpacked:
        bounded = _Bounded(unpacked, max_bytes)
        with tarfile.open(fileobj=bounded, mode="r|") as archive:
            for count, member in enumerate(archive, 1):
                if count > MAX_MEMBERS:
                    raise _Refused(f"is an archive of more than {MAX_MEMBERS} members")
                _check_member(member, max_bytes)
                if not member.isfile() or PurePosixPath(member.name).name.startswith("."):
                    continue
                names.append(member.name)
                match = _CHECKPOINT.fullmatch(PurePosixPath(member.name).name)
                number = int(match[1]) if match else -1
                if number < wanted or (epoch is not None and match and number != epoch):
                    continue
                content = archive.extractfile(member)
                assert content is not None
                if number > wanted:
                    found, wanted = {}, number
                found[member.name] = content.read()
        # gzip compares its checksum at the end, which lies behind that of the tar archive
        while bounded.read(_BLOCK):
            pass
    if epoch is not None and wanted != epoch:
        raise _Refused(f"is an archive that has no checkpoint of epoch {epoch}; it has {some(names, none='no files')}")
    if len(found) != 1:
        raise _Refused(f"is an archive that has no one checkpoint; it has {some(names, none='no files')}")
    return next(iter(found.values()))


def _check_member(member: tarfile.TarInfo, max_bytes: int) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name:
        raise _Refused(f"is an archive whose member {some([member.name])} lies outside of it")
    # the holes of a sparse file take no room in the archive: nothing would bound them
    if not (member.isfile() or member.isdir()) or member.issparse():
        raise _Refused(f"is an archive whose member {some([member.name])} is neither a plain file nor a folder")
    # of a member that is skipped no bytes are read, which are counted, but tarfile seeks its end block by block
    if member.size > max_bytes:
        raise _unpacks_to_more(max_bytes)


class _Bounded(io.RawIOBase):
    """A stream that refuses to give more than so many bytes, whatever the headers in it claim."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile, limit: int) -> None:
        self._stream, self._left, self._limit = stream, limit, limit

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        block = self._stream.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(block)
        if self._left < 0:
            raise _unpacks_to_more(self._limit)
        return block


def _unpacks_to_more(limit: int) -> _Refused:
    return _Refused(f"is an archive that unpacks to more than the {limit:,} bytes allowed")
