"""Tar shards (the WebDataset format): their names, and the images in them.

Tar files are untrusted: they are read as a stream, nothing is unpacked to the disk, and only regular files of bounded
size are read.
"""

import contextlib
import itertools
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from rotation_ssl.images import is_image_name
from rotation_ssl.messages import first_line, some

__all__ = ["expand_braces", "tar_members"]

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")  # in lower case
MAX_IMAGE_BYTES = 2**28  # of a member: more than any photograph has
MAX_NAMES = 10_000_000  # that a pattern expands to
_MAX_MEMBER_BYTES = 2**34  # of any member: images lie between them
_MAX_HEADER_BYTES = 2**20  # of a long name or of extended attributes, which tarfile reads whole
_LONG_HEADERS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, b"x", b"g", b"X")
_BRACES = re.compile(r"\{([^{}]*)\}")
# Windows' drives have one letter; a URL that went through Path has one slash
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):/", re.IGNORECASE)
_RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern means, in order: ``{000..010}`` counts, ``{a,b}`` lists.

    With several braces the last one changes fastest. A range is padded with zeros to the width of its ends if one of
    them begins with a zero, as in a shell. A pattern without braces is a single name.

    Raises:
        ValueError: braces that are not closed, are nested or hold neither a range nor a list, a range that counts down,
            or more than ``MAX_NAMES`` names.
    """
    # text and braces in turns: the odd ones are what stood in braces
    pieces = _BRACES.split(pattern)
    if any("{" in text or "}" in text for text in pieces[::2]):
        raise ValueError(f"{pattern!r} has braces that are not closed or are nested; write {{000..999}} or {{a,b}}")
    choices, number = [], 1
    for position, piece in enumerate(pieces):
        choice = _choices(piece, pattern) if position % 2 else [piece]
        number *= len(choice)
        if number > MAX_NAMES:
            raise ValueError(f"{pattern!r} means more than {MAX_NAMES:,} names; split it")
        choices.append(choice)
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def url_scheme(name: str) -> str:
    """The scheme of a URL, 's3' of ``s3://bucket/{000..999}.tar``; that of a path is empty."""
    match = _SCHEME.match(name)
    return match[1] if match else ""


def tar_members(
    file: Path | IO[bytes],
    skipped: dict[str, str] | None = None,
    max_bytes: int = MAX_IMAGE_BYTES,
    name: str = "",
) -> Iterator[tuple[str, bytes]]:
    """The image members of a tar file, one after another: their names and bytes.

    Images are regular files with an image suffix whose name does not begin with a dot. Other members, such as links,
    are skipped. The file may be compressed; it is read once, as a stream.

    Args:
        file: a path, or an open file, which need not be seekable and is not closed.
        skipped: filled with name -> reason of the members larger than ``max_bytes``; None: such a member is an error.
        max_bytes: largest size of a member.
        name: name of an open file, for errors.

    Raises:
        ValueError: no such file, or no tar file; a member that is too large, without ``skipped``; after the members
            that can be read, a tar file that is damaged or cut. The error names the file.
        OSError: it could not be read to its end.
    """
    told = f"tar {name or getattr(file, 'name', '') if not isinstance(file, Path) else file}"
    try:
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(file.open("rb")) if isinstance(file, Path) else file
            archive = stack.enter_context(tarfile.open(fileobj=stream, mode="r|*", tarinfo=Member))
            for member in archive:
                if member.size > _MAX_MEMBER_BYTES:
                    # of an extended header, which frombuf does not see
                    raise _endless(member)
                if is_image_member(member):
                    if member.size <= max_bytes:
                        yield member.name, _read(archive, member)
                    elif skipped is None:
                        raise ValueError(f"{told}: member {_reason(member, max_bytes)}")
                    else:
                        skipped[member.name] = _reason(member, max_bytes)
                # tarfile keeps a list of what it has read
                archive.members = []  # type: ignore[attr-defined]
    except FileNotFoundError as error:
        if not isinstance(file, Path):
            raise
        raise ValueError(f"{told} does not exist") from error
    # an OSError is of the disk or the network, which may work again: the file is not what is wrong
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, RecursionError) as error:
        raise ValueError(f"{told} is damaged, cut or no tar file ({first_line(error)}); replace it") from error


class Member(tarfile.TarInfo):
    """A header; one that tarfile would take for the end of the archive, or that would fill the memory, is an error."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Member":
        """A header of 512 bytes.

        Raises:
            tarfile.HeaderError: of 512 zeros, the end of the archive.
            tarfile.ReadError: of anything else that is no header.
        """
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise
            # tarfile ends quietly at a member that is cut or damaged
            raise tarfile.ReadError(str(error) if buf else "it ends without the marker of its end") from error
        if member.type in _LONG_HEADERS and member.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {member.size:,} bytes")
        if member.size > _MAX_MEMBER_BYTES:
            raise _endless(member)
        return member


def _endless(member: tarfile.TarInfo) -> tarfile.ReadError:
    """tarfile would seek behind the member, block by block, also behind the end of a stream."""
    return tarfile.ReadError(f"a member of {member.size:,} bytes")


def is_image_member(member: tarfile.TarInfo) -> bool:
    """Whether a member is a regular file with an image's suffix, whose name does not begin with a dot."""
    return member.isreg() and not member.issparse() and is_image_name(PurePosixPath(member.name).name)


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    content = stream.read() if stream else b""
    if len(content) != member.size:
        raise tarfile.ReadError(f"member {some([member.name])} is cut")
    return content


def _reason(member: tarfile.TarInfo, max_bytes: int) -> str:
    return f"{some([member.name])} has {member.size:,} bytes, more than the {max_bytes:,} allowed"


def _choices(piece: str, pattern: str) -> list[str]:
    if match := _RANGE.fullmatch(piece):
        first, last = match.groups()
        low, high = int(first), int(last)
        if high < low:
            raise ValueError(f"{{{piece}}} in {pattern!r} counts down; write {{{last}..{first}}}")
        if high - low >= MAX_NAMES:
            raise ValueError(f"{{{piece}}} in {pattern!r} means more than {MAX_NAMES:,} names; split it")
        padded = any(end != "0" and end.startswith("0") for end in (first, last))
        width = max(len(first), len(last)) if padded else 0
        return [f"{number:0{width}d}" for number in range(low, high + 1)]
    if ".." in piece or "," not in piece:
        raise ValueError(
            f"{{{piece}}} in {pattern!r} is neither a range such as {{000..999}} nor a list such as {{a,b}}"
        )
    return piece.split(",")
