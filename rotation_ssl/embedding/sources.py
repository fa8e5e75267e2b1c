"""What images there are: a folder, tar files or parquet files, as shards that the source alone defines.

A tar file is a shard. Of other sources consecutive blocks are: of a folder's images in the order of their paths, of the
rows of each parquet file. Shards are found one after another: the list of a million images is never in memory.
"""

import dataclasses
import hashlib
import itertools
import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from rotation_ssl.embedding.files import absolute, is_folder, list_folder, open_url
from rotation_ssl.images import IMAGE_SUFFIXES
from rotation_ssl.messages import first_line, some
from rotation_ssl.shards import TAR_SUFFIXES, expand_braces, tar_members, url_scheme

SHARD_SUFFIXES = (*TAR_SUFFIXES, ".parquet")  # in lower case
ROWS = 64  # of a parquet file in memory at a time

Item = tuple[str, str | bytes | ValueError]  # the path of an image, and where it is, its bytes or what is wrong with it


@dataclasses.dataclass(frozen=True)
class Shard:
    """The images that become one part.

    Args:
        number: of the part, from 0.
        kind: 'files' of a folder, a 'tar' file or 'rows' of a parquet file.
        url: the folder or file, an absolute path or a URL.
        name: what the rows of the part call the tar or parquet file.
        names: of files, relative to the folder.
        rows: the first row and the one after the last.
    """

    number: int
    kind: str
    url: str
    name: str = ""
    names: tuple[str, ...] = ()
    rows: tuple[int, int] = (0, 0)

    @property
    def digest(self) -> str:
        """Tells shards with other images apart, as far as names do."""
        text = "\0".join((self.kind, self.name, *map(str, self.rows), *self.names))
        return hashlib.sha256(os.fsencode(text)).hexdigest()


def find_shards(source: str, shard_size: int, others: Counter[str] | None = None) -> Iterator[Shard]:
    """The shards of a source, in their order.

    Args:
        source: a folder, or one or several tar or parquet files (``{000..999}.tar``); paths, or URLs that fsspec opens.
        shard_size: images in a shard, but for tar files.
        others: counts the suffixes of a folder's files that are no images.

    Raises:
        ValueError: no such source, a pattern that is malformed or gives a file twice, or a parquet file without a
            column of images.
        OSError: a folder or file that cannot be read.
    """
    source = absolute(source)
    # a list may be longer than a name, which Path.is_dir refuses
    urls = [source] if os.path.isdir(source) else expand_braces(source)  # noqa: PTH112
    if any("*" in url and is_shard_name(url) and not url_scheme(url) and not Path(url).exists() for url in urls):
        raise ValueError(f"{source} does not exist: patterns are {{000..999}} or {{a,b}} in quotes, not *")
    if twice := [url for url, times in Counter(urls).items() if times > 1]:
        raise ValueError(f"{source} gives files twice: {some(twice, 3)}")
    if all(url.lower().endswith(TAR_SUFFIXES) for url in urls):
        found = _tar_shards(urls)
    elif all(url.lower().endswith(".parquet") for url in urls):
        found = _row_shards(urls, shard_size)
    elif len(urls) == 1:
        found = _file_shards(urls[0].rstrip("/"), shard_size, others)
    else:
        raise ValueError(f"{source} is neither a folder nor tar nor parquet files; give one of these")
    for number, shard in enumerate(found):
        yield dataclasses.replace(shard, number=number)


def is_shard_name(name: str) -> bool:
    """Whether the name of a file is that of a tar or parquet file."""
    return name.lower().endswith(SHARD_SUFFIXES)


def describe_no_images(source: str) -> str:
    """What an error says of a source without images; of a folder that has tar or parquet files, how to give them."""
    told = f"{source} holds no images ({', '.join(IMAGE_SUFFIXES)})"
    path = absolute(source)
    names = sorted(os.listdir(path)) if os.path.isdir(path) else []  # noqa: PTH112, PTH208
    if not (shard := next(filter(is_shard_name, names), "").lower()):
        return told
    suffix = next(suffix for suffix in SHARD_SUFFIXES if shard.endswith(suffix))
    return f"{told}; give its {suffix} files as a pattern, such as {posixpath.join(source, f'{{000..999}}{suffix}')}"


def read_items(shard: Shard) -> Iterator[Item]:
    """The images of a shard, in their order; of a tar or parquet file that is damaged those that are whole, and what
    is wrong.

    Raises:
        OSError: the tar or parquet file cannot be opened.
    """
    if shard.kind == "files":
        yield from ((name, f"{shard.url}/{name}") for name in shard.names)
    elif shard.kind == "tar":
        yield from _read_tar(shard)
    else:
        yield from _read_rows(shard)


def _file_shards(folder: str, shard_size: int, others: Counter[str] | None) -> Iterator[Shard]:
    if not is_folder(folder):
        raise ValueError(f"{folder} is not a folder, nor a .tar or .parquet file; give one of these")
    names = _walk(folder, others)
    while block := tuple(itertools.islice(names, shard_size)):
        yield Shard(0, "files", folder, names=block)


def _walk(folder: str, others: Counter[str] | None, above: str = "") -> Iterator[str]:
    """The images below a folder, relative to it and sorted by their whole path; one folder is in memory at a time."""
    for entry in list_folder(folder, others):
        if entry.endswith("/"):
            yield from _walk(f"{folder.rstrip('/')}/{entry[:-1]}", others, f"{above}{entry}")
        else:
            yield f"{above}{entry}"


def _tar_shards(urls: Sequence[str]) -> Iterator[Shard]:
    missing = [url for url in urls if not url_scheme(url) and not Path(url).is_file()]
    if missing:
        raise ValueError(f"{some(missing, 3)} of {len(urls):,} tar files do not exist")
    for url, name in zip(urls, _short_names(urls), strict=True):
        yield Shard(0, "tar", url, name)


def _read_tar(shard: Shard) -> Iterator[Item]:
    skipped: dict[str, str] = {}
    with open_url(shard.url) as stream:
        try:
            for name, content in tar_members(stream, skipped, name=shard.name):
                yield f"{shard.name}/{name}", content
        except ValueError as error:
            yield shard.name, error
        except OSError as error:
            raise OSError(
                f"{shard.name} cannot be read to its end ({first_line(error)}); go on with --resume"
            ) from error
    for name, reason in skipped.items():
        yield f"{shard.name}/{name}", ValueError(reason)


def _row_shards(urls: Sequence[str], shard_size: int) -> Iterator[Shard]:
    for url, name in zip(urls, _short_names(urls), strict=True):
        with open_url(url) as stream:
            file = _parquet_file(stream, url)
            _columns(file.schema_arrow, url)
            number = file.metadata.num_rows
        for start in range(0, number, shard_size):
            yield Shard(0, "rows", url, name, rows=(start, min(start + shard_size, number)))


def _read_rows(shard: Shard) -> Iterator[Item]:
    first, end = shard.rows
    with open_url(shard.url) as stream:
        file = _parquet_file(stream, shard.url)
        image, paths = _columns(file.schema_arrow, shard.url)
        row = 0
        for group in range(file.num_row_groups):
            after = row + file.metadata.row_group(group).num_rows
            is_wanted = row < end and after > first
            batches = file.iter_batches(ROWS, row_groups=[group], columns=sorted({image, *paths})) if is_wanted else ()
            try:
                for batch in batches:
                    start, stop = max(first, row), min(end, row + len(batch))
                    for number, values in enumerate(batch.slice(start - row, max(0, stop - start)).to_pylist(), start):
                        name = values[paths[0]] if paths else None
                        yield name or f"{shard.name}:{number}", _row_image(values[image], shard.url)
                    row += len(batch)
                    if row >= end:
                        return
            except (ValueError, OSError) as error:
                if not _is_damage(error):
                    raise
                # the groups after this one may be whole
                lost = f"rows {max(first, row)} to {min(end, after) - 1}"
                yield shard.name, ValueError(f"{lost} of {shard.name} are damaged ({first_line(error)}); replace it")
            row = after


def _row_image(value: str | bytes | None, url: str) -> str | bytes | ValueError:
    if not value:
        return ValueError(f"the row of {url} has no image")
    if isinstance(value, bytes) or url_scheme(value):
        return value
    return posixpath.join(posixpath.dirname(url), value)


def _parquet_file(stream: IO[bytes], url: str) -> Any:
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(stream)
    except (ValueError, OSError) as error:
        if not _is_damage(error):
            raise
        raise ValueError(f"{url} is damaged or no parquet file ({first_line(error)})") from error


def _is_damage(error: ValueError | OSError) -> bool:
    """Whether a parquet file is damaged: pyarrow says so by an OSError too, a plain one without a number."""
    return isinstance(error, ValueError) or (type(error) is OSError and error.errno is None)


def _columns(schema: Any, url: str) -> tuple[str, list[str]]:
    """The column of images, which is the one of bytes or else 'path', and 'path' where there is one."""
    from pyarrow import types

    content = [field.name for field in schema if types.is_binary(field.type) or types.is_large_binary(field.type)]
    if len(content) > 1:
        raise ValueError(f"{url} has several columns of bytes, {some(content)}; keep that of the images")
    texts = [field.name for field in schema if types.is_string(field.type) or types.is_large_string(field.type)]
    paths = [name for name in texts if name == "path"]
    if not content and not paths:
        raise ValueError(f"{url} has neither a column of bytes nor a text column 'path'; it has {some(schema.names)}")
    return (content or paths)[0], paths


def _short_names(urls: Sequence[str]) -> list[str]:
    """The paths of files below the folder that all of them are in."""
    names = [url.split("/") for url in urls]
    folders = zip(*(name[:-1] for name in names), strict=False)
    depth = sum(1 for _ in itertools.takewhile(lambda level: len(set(level)) == 1, folders))
    return ["/".join(name[depth:]) for name in names]
