"""One-line messages from errors of libraries, file names and answers of servers."""

import contextlib
from collections.abc import Iterator, Sequence


def first_line(error: BaseException) -> str:
    """An error in one line: the first of its text, or its kind where it has none."""
    return printable((str(error).splitlines() or [""])[0] or type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory, of the machine or of its GPU."""
    told = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(t in str(error) for t in told))


def is_connection_error(error: BaseException) -> bool:
    """Whether an error comes from an HTTP library, whose clients pass on lost connections and timeouts as they are."""
    return any(library in type(error).__module__ for library in ("httpx", "requests", "http.client"))


@contextlib.contextmanager
def connection_errors(failed: str) -> Iterator[None]:
    """Turn an error of an HTTP library into a one-line ConnectionError that begins with ``failed``."""
    try:
        yield
    except Exception as error:
        if not is_connection_error(error):
            raise
        raise ConnectionError(f"{failed}: the connection failed ({first_line(error)})") from error


def is_killed_worker_error(error: BaseException) -> bool:
    """Whether PyTorch reports a killed data-loading worker; it may do so anywhere in the main process."""
    return isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)


@contextlib.contextmanager
def killed_worker_errors() -> Iterator[None]:
    """Turn PyTorch's error about a killed data-loading worker into a one-line OSError."""
    try:
        yield
    except RuntimeError as error:
        if not is_killed_worker_error(error):
            raise
        raise OSError(
            f"a data-loading worker was killed ({first_line(error)}): use fewer workers if memory ran out, and in a "
            "script call this below `if __name__ == '__main__':`; run it again, or resume it"
        ) from error


def printable(text: object, most: int = 300) -> str:
    """A text in one line of at most ``most`` characters, without control characters, which a terminal would obey."""
    words = " ".join(str(text).split())[:most]
    return "".join(character if character.isprintable() else "?" for character in words)


def some(names: Sequence[str], most: int = 10, none: str = "nothing") -> str:
    """The first names of a list and how many more there are, or ``none`` where it is empty."""
    told = ", ".join((name if name.isprintable() else repr(name))[:100] for name in names[:most])
    return (told or none) + (f" and {len(names) - most} more" if len(names) > most else "")


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: '1 image', '2 images'."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"
