"""Where weights come from when they are not in the wheel: the Hugging Face Hub, or the authors' release.

Files of the Hub lie in its client's cache (HF_HUB_CACHE), weights converted from a release in ``rotation_ssl`` of
torch.hub's (TORCH_HOME). Cached files are hashed at every load: neither the client nor timm checks the bytes of a
cached file. Files are written under a temporary name and then renamed: none is ever half-written.
"""

import contextlib
import datetime
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils import (
    EntryNotFoundError,
    FileMetadataError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save

from rotation_ssl.convert import convert, read_checkpoint
from rotation_ssl.files import replace_bytes
from rotation_ssl.messages import first_line, is_connection_error
from rotation_ssl.zoo.download import download

_SHA256 = re.compile("[0-9a-f]{64}")


class Mismatch(ValueError):
    """A file is not there, or is not the bytes that it should be; the error says which."""


def read_verified(file: Path, sha256: str, size: int) -> bytes:
    """The content of a file of this size and sha256. It is read once: what is returned is what was hashed.

    Raises:
        Mismatch: there is no such file, or it has another size or hash.
    """
    if not file.is_file():
        raise Mismatch(f"{file} does not exist")
    with file.open("rb") as stream:
        # no more than that: what another program put there may be of any size
        content = stream.read(size + 1)
        if len(content) != size:
            raise Mismatch(f"{file} has {os.fstat(stream.fileno()).st_size:,} bytes, not {size:,}")
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise Mismatch(f"{file} has sha256 {digest}, not {sha256}")
    return content


def release_cache(cache_dir: str | Path | None = None) -> Path:
    """The folder of weights converted from a release: the one given, or one in torch.hub's cache."""
    return Path(cache_dir or Path(torch.hub.get_dir()) / "rotation_ssl")


def read_hub(name: str, entry: dict[str, Any], cache_dir: str | Path | None = None) -> tuple[Path, bytes]:
    """A published file of the Hub at its pinned revision, and its verified content.

    It comes from the cache without a request, or is downloaded. A corrupt file is downloaded again, once.

    Args:
        name: ``model.tag``, for errors.
        entry: of the manifest: 'hub' with 'repository', 'revision' and 'file', and 'sha256' and 'size'.
        cache_dir: in place of the client's own cache.

    Raises:
        OSError: not cached, and it could not be downloaded: offline, no such repository, no permission, no space.
        ValueError: the Hub serves other bytes than the manifest says.
    """
    hub = entry["hub"]
    where = f"{hub['file']} of {hub['repository']}@{hub['revision']}"
    wrong: Mismatch | None = None
    for force in (False, True):
        try:
            file = download_from_hub(name, hub["repository"], hub["revision"], hub["file"], cache_dir, force)
            return file, read_verified(file, entry["sha256"], entry["size"])
        except Mismatch as error:
            wrong = error
        except OSError as error:
            if wrong is None:
                raise
            raise OSError(f"{_corrupt(name, wrong)}: {error}") from error
    # of no use to anyone: the next load would only find it corrupt again
    with contextlib.suppress(OSError):
        file.resolve().unlink()
        file.unlink(missing_ok=True)
    raise ValueError(f"{where} is not what rotation_ssl published as {name}: {wrong}; nothing was loaded") from wrong


def cached_hub_file(repository: str, revision: str, file: str, cache_dir: str | Path | None = None) -> Path | None:
    """A file of a Hub repository in the client's cache, not verified; None if it is not there. Makes no request."""
    try:
        return Path(hf_hub_download(repository, file, revision=revision, cache_dir=cache_dir, local_files_only=True))
    except OSError:
        return None


def download_from_hub(
    name: str,
    repository: str,
    revision: str,
    file: str,
    cache_dir: str | Path | None = None,
    force: bool = False,
) -> Path:
    """A file of a Hub repository in the client's cache, as the Hub serves it; its bytes are not checked.

    Raises:
        OSError: it could not be downloaded; the error says which file of which repository and revision, and what to do.
    """
    where, failed = f"{file} of {repository}@{revision}", f"{name} could not be downloaded"
    try:
        with _set_aside(repository, revision, file, cache_dir) if force else contextlib.nullcontext():
            return Path(hf_hub_download(repository, file, revision=revision, cache_dir=cache_dir, force_download=force))
    except (LocalEntryNotFoundError, ValueError) as error:
        # ValueError: force_download without an answer, or an answer that the client cannot read
        unread = isinstance(error, ValueError) and error.__cause__ is None and not constants.HF_HUB_OFFLINE
        if unread or isinstance(error.__cause__, (HfHubHTTPError, FileMetadataError)):
            reason = first_line(error.__cause__ or error)
            raise ConnectionError(f"{failed}: {where}: {reason}") from error
        raise FileNotFoundError(_missing(name, where)) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{failed}: the Hub has no repository {repository}, or it is private: log in with `hf"
            " auth login`, or set HF_TOKEN"
        ) from error
    except (RevisionNotFoundError, EntryNotFoundError) as error:
        raise FileNotFoundError(f"{failed}: the Hub has no {where}") from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 401:
            login = f"the Hub requires a login for {repository}: `hf auth login`, or set HF_TOKEN"
            raise PermissionError(f"{failed}: {login}") from error
        raise ConnectionError(f"{failed}: {where}: {first_line(error)}") from error
    except OSError as error:
        # the client says this of a temporary file that it has deleted
        if sizes := re.search(r"should be of size (\d+) but has size (\d+)", str(error)):
            expected, received = int(sizes[1]), int(sizes[2])
            raise ConnectionError(
                f"{failed}: {where} broke off after {received:,} of {expected:,} bytes: try again"
            ) from error
        # of the system, so of this machine's disk: what the client says of the network has no number
        if error.errno is not None:
            raise OSError(
                f"{failed}: the cache {cache_dir or constants.HF_HUB_CACHE} cannot be written"
                f" ({first_line(error)}): make room, or set HF_HUB_CACHE to another folder"
            ) from error
        if constants.HF_HUB_OFFLINE:
            raise FileNotFoundError(_missing(name, where)) from error
        raise OSError(f"{failed}: {where}: {first_line(error)}") from error
    except Exception as error:
        # hf_xet has RuntimeErrors
        if not isinstance(error, RuntimeError) and not is_connection_error(error):
            raise
        reason = first_line(error)
        raise ConnectionError(f"{failed}: {where}: the connection failed ({reason})") from error


def read_release(
    name: str, entry: dict[str, Any], cache_dir: str | Path | None = None, accept_new_hash: bool = False
) -> tuple[Path, bytes]:
    """The file of weights of the authors' release, converted, and its verified content.

    It comes from the cache, or is downloaded and converted now.

    The authors publish no hash. Where the manifest has none either, the first download is trusted: a warning says so,
    and its sha256 and that of the converted file are stored next to it. Later loads and downloads have to match them.

    Args:
        name: ``model.tag``.
        entry: of the manifest: 'url' of the archive, and its 'archive_sha256' where it is known.
        cache_dir: in place of :func:`release_cache`.
        accept_new_hash: download again, and accept and record the hash that the archive has now.

    Raises:
        OSError: not cached, and not downloaded: offline, a failing or cut connection, no space, a read-only cache.
        ValueError: an archive of another hash than before, one that is not safe to read, or other weights in it.
    """
    folder = release_cache(cache_dir)
    file, record = folder / f"{name}.safetensors", folder / f"{name}.json"
    wrong: Mismatch | None = None
    if not accept_new_hash:
        try:
            return file, _read_recorded(file, record, entry)
        except Mismatch as error:
            wrong = error if file.is_file() else None
    try:
        if constants.HF_HUB_OFFLINE:
            raise FileNotFoundError(_missing(name, f"{entry['url']} (converted, {file})"))
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.lock"):
            if not accept_new_hash:
                # another process may have downloaded it in the meantime
                with contextlib.suppress(Mismatch):
                    return file, _read_recorded(file, record, entry)
            return file, _fetch_release(name, entry, file, record, accept_new_hash)
    except OSError as error:
        told = str(error)
        if not isinstance(error, (ConnectionError, FileNotFoundError, TimeoutError)):
            told = f"the cache {folder} cannot be written ({error}): make room, or set TORCH_HOME to another folder"
        if wrong:
            raise OSError(f"{_corrupt(name, wrong)}: {told}") from error
        if told == str(error):
            raise
        raise OSError(told) from error


def read_record(name: str, cache_dir: str | Path | None = None) -> dict[str, Any] | None:
    """Where cached weights of a release came from, as recorded at the download; None if there was none.

    'url', 'archive_sha256' and 'archive_size' of what was downloaded, 'sha256' and 'size' of the converted file.
    """
    return _read_record(release_cache(cache_dir) / f"{name}.json")


@contextlib.contextmanager
def _set_aside(repository: str, revision: str, file: str, cache_dir: str | Path | None) -> Iterator[None]:
    """Where a cache has no symbolic links the client keeps the file that is there, even if told to download it."""
    there = cached_hub_file(repository, revision, file, cache_dir)
    if there is None or there.is_symlink():
        yield
        return
    aside = there.with_name(f"{there.name}.aside")
    there.replace(aside)
    try:
        yield
    finally:
        if there.exists():
            aside.unlink()
        else:
            aside.replace(there)


def _fetch_release(name: str, entry: dict[str, Any], file: Path, record: Path, accept_new_hash: bool) -> bytes:
    archive = file.with_name(f"{name}.archive")  # one name: what a killed process left is written over
    for left in file.parent.glob(f"{name}.*.tmp"):
        left.unlink(missing_ok=True)
    try:
        download(entry["url"], archive, what=name)
        before = _read_record(record) or {}
        pinned, known = entry.get("archive_sha256"), before.get("archive_sha256")
        downloaded = archive.read_bytes()
        digest = hashlib.sha256(downloaded).hexdigest()
        if pinned and digest != pinned:
            raise ValueError(f"{entry['url']} has sha256 {digest}, not the {pinned} of the manifest; nothing was kept")
        if known and digest != known and not pinned and not accept_new_hash:
            raise ValueError(
                f"{entry['url']} has sha256 {digest}, it was {known}: the release changed; nothing was kept. If that is"
                f" right: rotation-ssl fetch {name} --accept-new-hash"
            )
        converted = convert(read_checkpoint(archive, content=downloaded))
        if converted.model != name.split(".", 1)[0]:
            raise ValueError(f"{entry['url']} contains a {converted.model}, not {name}; nothing was kept")
        content = save(converted.state_dict)
        provenance = {
            "name": name,
            "url": entry["url"],
            "archive_sha256": digest,
            "archive_size": len(downloaded),
            "sha256": hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "fetched": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        # the record last: a file without one counts as not downloaded
        replace_bytes(file, content)
        replace_bytes(record, (json.dumps(provenance, indent=1) + "\n").encode())
    finally:
        archive.unlink(missing_ok=True)
    if not pinned and digest != known:
        warnings.warn(
            f"no published hash of {name} exists: the downloaded archive has sha256"
            f" {digest}, recorded in {record}; later loads must match it",
            stacklevel=2,
        )
    return content


def _read_recorded(file: Path, record: Path, entry: dict[str, Any]) -> bytes:
    """The content of a converted file that is what was recorded at the download; Mismatch if it is not."""
    known = _read_record(record)
    if known is None:
        raise Mismatch(f"{record} does not exist")
    if entry.get("archive_sha256") not in (None, known["archive_sha256"]):
        raise Mismatch(f"{record} is of another archive than the manifest's")
    return read_verified(file, known["sha256"], known["size"])


def _read_record(record: Path) -> dict[str, Any] | None:
    try:
        known = json.loads(record.read_text())
        kinds = {"url": str, "archive_sha256": str, "sha256": str, "size": int}
        is_whole = all(type(known.get(key)) is kind for key, kind in kinds.items())
        return known if is_whole and all(map(_SHA256.fullmatch, (known["archive_sha256"], known["sha256"]))) else None
    # json raises the last of deeply nested brackets
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def _corrupt(name: str, wrong: Mismatch) -> str:
    return f"the cached weights of {name} are corrupt ({wrong}), and downloading them failed"


def _missing(name: str, where: str) -> str:
    return (
        f"weights of {name} are not cached, and there is no network or HF_HUB_OFFLINE is set: {where} is missing;"
        f" with a network, run: rotation-ssl fetch {name}"
    )
