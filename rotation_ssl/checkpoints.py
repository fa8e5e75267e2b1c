"""Checkpoint files that other people made: untrusted, so read without running anything and within bounds.

A file is told by its content, not by its name: safetensors, a pickle of ``torch.save`` (``weights_only=True``, of any
age), or a gzipped tar archive with such a pickle in it. Nothing is ever unpacked to the disk.
"""

import gzip
import io
import pickle
import re
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

MAX_BYTES = 2**30  # of a file as unpacked: the largest known, the authors' AlexNet, has 228 MB
MAX_MEMBERS = 1000
_CHECKPOINT = re.compile(r"model_net_epoch(\d+)")  # as the authors' code names them


def read_checkpoint(file: Path, epoch: int | None = None, max_bytes: int = MAX_BYTES) -> Any:
    """What a checkpoint file holds, on the CPU: tensors in nested dicts and lists.

    Args:
        file: safetensors, a pickle of ``torch.save``, or a .tar.gz archive with one.
        epoch: of an archive's several checkpoints (``model_net_epoch<N>``); None: the last.
        max_bytes: refuse what unpacks to more.

    Raises:
        ValueError: no such file, none of the three, one that would run code or unpack to more than ``max_bytes``, or an
            archive with members outside of it, links, or no checkpoint that can be told from the others.
    """
    if not file.is_file():
        raise ValueError(f"checkpoint {file} does not exist")
    with file.open("rb") as stream:
        start = stream.read(9)
    if start[:2] == b"\x1f\x8b":
        return _read_pickle(_read_archive(file, epoch, max_bytes), file, max_bytes)
    if file.stat().st_size > max_bytes:
        raise ValueError(f"checkpoint {file} has {file.stat().st_size:,} bytes, more than the {max_bytes:,} allowed")
    if start[8:] == b"{":
        try:
            return load(file.read_bytes())
        except SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file ({error}); fetch it anew") from error
    return _read_pickle(file.read_bytes(), file, max_bytes)


def _read_pickle(content: bytes, file: Path, max_bytes: int) -> Any:
    stream = io.BytesIO(content)
    if zipfile.is_zipfile(stream):
        # entries may be compressed: what they claim to unpack to is what torch would allocate
        with zipfile.ZipFile(stream) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > max_bytes:
            raise ValueError(f"checkpoint {file} unpacks to {unpacked:,} bytes, more than the {max_bytes:,} allowed")
    stream.seek(0)
    try:
        return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if unsafe := re.search(r"Unsupported (?:global|class)[^\n]*?GLOBAL (\S+)|Unsupported \w+ (\S+)", str(error)):
            what = next(name for name in unsafe.groups() if name)
            raise ValueError(f"{file} is not read: its pickle asks for {what}, which could run code") from error
        raise ValueError(f"{file} is not a checkpoint that can be read safely ({_first_line(error)})") from error
    except (RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"{file} is not a checkpoint: neither safetensors, nor a pickle of torch.save, nor a .tar.gz archive of one"
            f" ({_first_line(error)})"
        ) from error


def _read_archive(file: Path, epoch: int | None, max_bytes: int) -> bytes:
    """The one checkpoint of a gzipped tar archive, read in one pass that stops at the bounds."""
    found: dict[str, bytes] = {}
    names: list[str] = []
    wanted = -1
    try:
        with gzip.open(file) as unpacked, tarfile.open(fileobj=_Bounded(unpacked, max_bytes), mode="r|") as archive:
            for member in archive:
                _check_member(member, file)
                if len(names) > MAX_MEMBERS:
                    raise ValueError(f"archive {file} has more than {MAX_MEMBERS} members")
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
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"archive {file} is damaged ({error}); fetch it anew") from error
    except OSError as error:
        raise ValueError(f"archive {file} cannot be read ({error})") from error
    if epoch is not None and wanted != epoch:
        raise ValueError(f"archive {file} has no checkpoint of epoch {epoch}; it has {', '.join(names) or 'no files'}")
    if len(found) != 1:
        raise ValueError(f"archive {file} has no one checkpoint; it has {', '.join(names[:10]) or 'no files'}")
    return next(iter(found.values()))


def _check_member(member: tarfile.TarInfo, file: Path) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name:
        raise ValueError(f"archive {file} is refused: member {member.name!r} lies outside of it")
    if not (member.isfile() or member.isdir()):
        raise ValueError(f"archive {file} is refused: member {member.name!r} is neither file nor folder")


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
            raise ValueError(f"the archive unpacks to more than the {self._limit:,} bytes allowed")
        return block


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
