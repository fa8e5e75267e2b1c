"""Write files completely or not at all, write tables, and hash files."""

import csv
import hashlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

from safetensors import SafetensorError

from rotation_ssl.messages import first_line, is_killed_worker_error


def sha256_of(file: Path) -> str:
    """sha256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        # Python 3.10 has no hashlib.file_digest
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def replace_file(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, then rename it; if the process is killed, the old file is still there.

    Args:
        file: to write or replace, in an existing folder.
        write: writes the path that it is given.
    """
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        write(unfinished)
        # a crash of the machine must not leave a moved file without its bytes
        sync(unfinished)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def replace_bytes(file: Path, content: bytes) -> None:
    """:func:`replace_file` with the content given."""
    replace_file(file, lambda path: path.write_bytes(content))


def replace_tensors(file: Path, write: Callable[[Path], object]) -> None:
    """:func:`replace_file` with what torch or safetensors write, which have errors of their own for a full disk.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        replace_file(file, write)
    except (RuntimeError, SafetensorError) as error:
        if is_killed_worker_error(error):
            raise
        raise OSError(f"{file} cannot be written ({first_line(error)}): make room on the disk and try again") from error


def write_csv(file: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a table as UTF-8. File names in it need not be text: see :func:`valid_text`."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        # a row at a time, which is faster than a value at a time
        writer = csv.writer(SimpleNamespace(write=lambda row: stream.write(valid_text(row))))
        writer.writerow(header)
        writer.writerows(rows)


def valid_text(name: str) -> str:
    """A file name as text: bytes that are no UTF-8 are written as \\\\xff."""
    # as os.fsencode, but in every locale
    return name.encode("utf-8", sys.getfilesystemencodeerrors()).decode("utf-8", "backslashreplace")


def sync(path: Path) -> None:
    """Have a file's content, or a folder's entries, written to the disk."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return  # it has no such thing, and writes files alone that are open for writing
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
