"""Files and folders by their paths, or by URLs that fsspec opens."""

import contextlib
import errno
import io
import os
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from rotation_ssl.images import FAILURES, is_image_name, is_searched, is_system_folder_error
from rotation_ssl.messages import first_line
from rotation_ssl.shards import MAX_IMAGE_BYTES, url_scheme


def absolute(source: str) -> str:
    """The source as any process finds it: a URL as it is, a path from the root."""
    local = source.removeprefix("file://")
    return source if url_scheme(local) else os.path.abspath(local)  # noqa: PTH100  keeps braces and links


def check_local(output: str | Path, kind: str = "folder") -> None:
    """Refuse an output with the scheme of a URL, which would become a folder of that name on the local disk.

    Args:
        output: what is written.
        kind: what the error calls it.

    Raises:
        ValueError: it is a URL.
    """
    if url_scheme(str(output)):
        raise ValueError(f"the output must be a local or mounted {kind}, got {output}; give a path")


def read_bytes(url: str) -> bytes:
    """The bytes of an image file.

    Raises:
        ValueError: no regular file, or one of more than :data:`rotation_ssl.shards.MAX_IMAGE_BYTES`.
        OSError: it cannot be read.
    """
    if not url_scheme(url) and not Path(url).is_file():
        # reading a named pipe would wait for whoever writes to it
        raise ValueError("it is not a regular file") if Path(url).exists() else FileNotFoundError("it does not exist")
    with open_url(url) as stream:
        content = stream.read(MAX_IMAGE_BYTES + 1)
    if len(content) > MAX_IMAGE_BYTES:
        raise ValueError(f"it has more than the {MAX_IMAGE_BYTES:,} bytes allowed")
    return content


def open_url(url: str) -> IO[bytes]:
    """A file to read, by its path or URL.

    Raises:
        ValueError: a URL that fsspec does not open.
        OSError: it cannot be opened; reading the file later raises nothing else either.
    """
    if not url_scheme(url):
        return Path(url).open("rb")
    file_system, path = _file_system(url)
    with _plain_errors(url):
        return cast(IO[bytes], _RemoteFile(file_system.open(path, "rb"), url))


def is_folder(url: str) -> bool:
    """Whether there is a folder of this path or URL.

    Raises:
        ValueError: a URL that fsspec does not open.
        OSError: the remote storage cannot be asked.
    """
    if not url_scheme(url):
        return os.path.isdir(url)  # noqa: PTH112  a name that is too long is none, and no error
    file_system, path = _file_system(url)
    with _plain_errors(url):
        return bool(file_system.isdir(path))


def list_folder(url: str, others: Counter[str] | None = None) -> list[str]:
    """The names of a folder's images, and of its folders with a slash, in the order of the paths in them.

    Names that begin with a dot are neither; see :func:`rotation_ssl.images.is_searched`. A link to a folder is not
    followed.

    Args:
        url: path or URL of the folder.
        others: counts the suffixes, in lower case, of its other files.

    Raises:
        OSError: it cannot be read.
    """
    counted = Counter[str]() if others is None else others
    return sorted(_remote_entries(url, counted) if url_scheme(url) else _local_entries(url, counted))


def _local_entries(folder: str, others: Counter[str]) -> Iterator[str]:
    try:
        found = os.scandir(folder)
    except PermissionError as error:
        if is_system_folder_error(error):
            return
        raise
    with found:
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                if is_searched(entry.name):
                    yield f"{entry.name}/"
            # a link that leads nowhere is an image that cannot be read
            elif is_image_name(entry.name) and (entry.is_file() or not Path(entry.path).exists()):
                yield entry.name
            elif not entry.name.startswith(".") and not (entry.is_symlink() and os.path.isdir(entry.path)):  # noqa: PTH112
                others[Path(entry.name).suffix.lower()] += 1


def _remote_entries(url: str, others: Counter[str]) -> Iterator[str]:
    file_system, path = _file_system(url)
    with _plain_errors(url):
        infos = file_system.ls(path, detail=True)
    for info in infos:
        name = info["name"].rstrip("/").rsplit("/", 1)[-1]
        if info["type"] == "directory":
            if is_searched(name):
                yield f"{name}/"
        elif is_image_name(name):
            yield name
        elif not name.startswith("."):
            others[Path(name).suffix.lower()] += 1
    # it would keep the list of every folder
    file_system.invalidate_cache()


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url))
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url} cannot be opened: {first_line(error)}") from error


@contextlib.contextmanager
def _plain_errors(url: str) -> Iterator[None]:
    """What the clients of remote storage raise, of whatever family, as an OSError that names the URL."""
    try:
        yield
    except Exception as error:
        # fsspec's http says of whatever happens that there is no such file
        cause = error.__cause__ or error if isinstance(error, FileNotFoundError) else error
        number = _number(cause)
        if isinstance(error, FileNotFoundError) and number not in FAILURES:
            raise FileNotFoundError(f"{url} does not exist") from error
        if number is not None:
            # the number tells what failed: see rotation_ssl.embedding.local
            raise OSError(number, getattr(cause, "strerror", None) or first_line(cause), url) from error
        raise ConnectionError(f"{url} cannot be read ({first_line(error)})") from error


def _number(error: BaseException) -> int | None:
    """The errno of an error; clients of remote storage have lost connections and servers that fail without one."""
    number = error.errno if isinstance(error, OSError) else None
    # numbers of name servers are numbers of other errors on some systems
    is_unresolved = isinstance(error, socket.gaierror) and number == socket.EAI_AGAIN
    if number is not None and not is_unresolved:
        return number
    name, status = type(error).__name__, getattr(error, "status", None)
    if isinstance(error, TimeoutError) or "Timeout" in name:
        return errno.ETIMEDOUT
    is_lost = is_unresolved or "Connection" in name or "Disconnected" in name
    return errno.ECONNRESET if is_lost or (isinstance(status, int) and status >= 500) else None


class _RemoteFile(io.RawIOBase):
    """A file of fsspec, whose errors are those of :func:`_plain_errors`."""

    def __init__(self, file: IO[bytes], url: str) -> None:
        self.file, self.url = file, url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.file.seekable()

    def read(self, size: int = -1) -> bytes:
        with _plain_errors(self.url):
            if size < 0:
                return self.file.read(size)
            content = bytearray()
            # fsspec's http gives what has arrived where the server tells no length
            while len(content) < size and (part := self.file.read(size - len(content))):
                content += part
            return bytes(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with _plain_errors(self.url):
            return self.file.seek(offset, whence)

    def tell(self) -> int:
        with _plain_errors(self.url):
            return self.file.tell()

    def close(self) -> None:
        if not self.closed:
            self.file.close()
            super().close()
