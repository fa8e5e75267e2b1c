"""Text from outside, in messages of one line: errors of libraries, names in files, answers of servers."""

import contextlib
from collections.abc import Iterator, Sequence


def first_line(error: BaseException) -> str:
    """An error in one line: the first of its text, or its kind where it has none."""
    return printable((str(error).splitlines() or [""])[0] or type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory, of the machine or of its GPU."""
    told = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(t in str(error) for t in told))


def is_of_connection(error: BaseException) -> bool:
    """Whether it is of an HTTP library: clients let a cut connection, a timeout or a proxy's refusal through."""
    return any(library in type(error).__module__ for library in ("httpx", "requests", "http.client"))


@contextlib.contextmanager
def tell_lost_connections(failed: str) -> Iterator[None]:
    """Make a ConnectionError of one line, which begins with ``failed``, of what an HTTP library says."""
    try:
        yield
    except Exception as error:
        if not is_of_connection(error):
            raise
        raise ConnectionError(f"{failed}: the connection failed ({first_line(error)})") from error


def is_of_killed_worker(error: BaseException) -> bool:
    """Whether PyTorch says that a process that decodes was killed: it does so wherever the main process is."""
    return isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)


@contextlib.contextmanager
def tell_killed_workers() -> Iterator[None]:
    """Make an OSError of one line of what PyTorch says when a process that decodes was killed."""
    try:
        yield
    except RuntimeError as error:
        if not is_of_killed_worker(error):
            raise
        raise OSError(
            f"a decoding process was killed ({first_line(error)}): fewer workers need less memory, and a script calls "
            "this below `if __name__ == '__main__':`; run it again, or resume it"
        ) from error


def printable(text: object, most: int = 300) -> str:
    """A text in one line, cut to so many characters: a terminal obeys control characters in what it prints."""
    words = " ".join(str(text).split())[:most]
    return "".join(character if character.isprintable() else "?" for character in words)


def some(names: Sequence[str], most: int = 10, none: str = "nothing") -> str:
    """The first names of a list and how many more there are, or ``none`` where it is empty."""
    told = ", ".join((name if name.isprintable() else repr(name))[:100] for name in names[:most])
    return (told or none) + (f" and {len(names) - most} more" if len(names) > most else "")


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: '1 image', '2 images'."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"
