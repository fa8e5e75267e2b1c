"""Decode every image once before anything is trained, in worker processes, and remember which ones did.

A damaged photograph is found in the first minute, not in the tenth hour. What was decoded is recorded by name, size and
time of change, in the cache folder of this package, so that the next command on the same images starts at once.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rotation_ssl.files import replace_bytes
from rotation_ssl.progress import progress
from rotation_ssl.zoo.sources import release_cache
from training.transfer.data import open_mask, open_pixels
from training.transfer.network import InOrder, batches

FEW = 500  # images that are checked in seconds: nothing is recorded


def check_images(files: Sequence[Path], workers: int = 0) -> None:
    """Decode every image, all of one folder, that has not been decoded before as it is now."""
    _check("image", files, open_pixels, workers)


def check_masks(files: Sequence[Path], classes: int, workers: int = 0) -> None:
    """Decode every mask of ``classes`` classes and the background, as :func:`check_images`."""
    _check(f"mask of {classes} classes", files, functools.partial(open_mask, classes=classes), workers)


def record_file(folder: Path) -> Path:
    """Where the images of a folder that were decoded are recorded."""
    digest = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    return release_cache() / "checked" / f"{folder.name}-{digest}.json"


def _check(kind: str, files: Sequence[Path], read: Callable[[Path], object], workers: int) -> None:
    known = _recorded(files)
    named = {f"{kind} {file.name}": file for file in files}
    now = {name: file_state(file) for name, file in named.items()}
    new = [file for name, file in named.items() if known.get(name) != now[name]]
    if not new:
        return
    with progress(f"checking {kind.split()[0]}s", len(new), disable=len(new) < FEW) as bar:
        for _ in batches(InOrder(new, functools.partial(_decode, read)), 1, workers):
            bar.update()
    if len(files) >= FEW:
        record = record_file(files[0].parent)
        record.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(record, json.dumps(known | now).encode())


def _recorded(files: Sequence[Path]) -> dict[str, Any]:
    if len(files) < FEW:
        return {}
    try:
        known = json.loads(record_file(files[0].parent).read_text())
    except (OSError, ValueError):
        # none, or one that somebody damaged: all are decoded
        return {}
    return known if isinstance(known, dict) else {}


def file_state(file: Path) -> list[int]:
    """Size and time of change of a file, by which another content is noticed."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _decode(read: Callable[[Path], object], file: Path) -> None:
    # what is read stays in the process that read it
    read(file)
