"""Checkpoints of a training run: folders that appear whole, so that a kill at any moment leaves the last one loadable.

``output/checkpoints/step-000120/`` contains what accelerate saves (model, optimisers, random states), progress.json and
SHA256SUMS, the hashes of them all. It is written under another name and renamed. The last two checkpoints are kept, so
that a run whose last one is corrupt can go on from the one before: they take twice the disk space of one, and three
times while one is written.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import RNG_STATE_NAME
from accelerate.utils.other import load
from safetensors.torch import load_file, save_file
from torch import nn

from rotation_ssl.files import sha256_of, sync
from rotation_ssl.messages import first_line, is_killed_worker_error

PROGRESS = "progress.json"
AVERAGE = "average.safetensors"
HASHES = "SHA256SUMS"
KEPT = 2  # checkpoints


@dataclass
class Progress:
    """How far a run is, as JSON.

    ``identity`` is all that makes it the run that it is, by name: resuming with another is refused. ``losses`` are
    those of the steps since the curve's last point. ``commit`` began the run, with the published weights
    ``begun_with``, if any.
    """

    identity: dict[str, str]
    commit: str
    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)
    begun_with: dict[str, Any] = field(default_factory=dict)


def find_checkpoint(output: Path) -> Path | None:
    """The last whole checkpoint of a run, or None."""
    return next(reversed(_find_checkpoints(output)), None)


def _find_checkpoints(output: Path) -> list[Path]:
    """The whole checkpoints of a run, the last one at the end."""
    found = [path for path in (output / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def save_checkpoint(accelerator: Accelerator, output: Path, progress: Progress, average: nn.Module | None) -> Path:
    """Write all that resuming needs and remove all older checkpoints but the last; called by every process.

    Raises:
        OSError: it cannot be written, the disk is full, say; those before are kept.
    """
    folder = output / "checkpoints" / f"step-{progress.step:06d}"
    unfinished = folder.with_suffix(".tmp")
    with _together(accelerator, output, progress.step):
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
    with _together(accelerator, output, progress.step):
        accelerator.save_state(str(unfinished))
        if accelerator.is_main_process:
            if average is not None:
                save_file(copied_state(average), unfinished / AVERAGE)
            (unfinished / PROGRESS).write_text(json.dumps(dataclasses.asdict(progress)) + "\n")
    with _together(accelerator, output, progress.step):
        if accelerator.is_main_process:
            # now that all processes have written their files
            write_hashes(unfinished)
            # on the disk, not in a cache, before an older one goes
            for path in (*unfinished.iterdir(), unfinished):
                sync(path)
            if not folder.exists():
                unfinished.rename(folder)
                sync(folder.parent)
            # older ones, and what kills have left
            kept = _find_checkpoints(output)[-KEPT:]
            for other in folder.parent.iterdir():
                if other not in kept and re.fullmatch(r"step-\d+(\.tmp)?", other.name):
                    shutil.rmtree(other)
    return folder


def copied_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's state dict as safetensors takes it: on the CPU, and tensors that share memory copied for each name."""
    state = model.state_dict().items()
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state}


@contextlib.contextmanager
def _together(accelerator: Accelerator, output: Path, step: int) -> Iterator[None]:
    """A part of saving that fails in all processes where it fails in one; torch and safetensors have errors of their
    own for a full disk.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        if is_killed_worker_error(caught):
            raise
        error = caught
    failed = accelerator.reduce(torch.tensor(float(error is not None), device=accelerator.device)).item()
    if failed:
        kept = find_checkpoint(output)
        reason = first_line(error) if error else "in another process"
        raise OSError(
            f"the checkpoint of step {step} cannot be written ({reason}); "
            f"{f'{kept} is kept' if kept else 'there is none before it'}: make room, then --resume"
        ) from error


def write_hashes(folder: Path) -> None:
    """Write SHA256SUMS, as ``sha256sum --check`` takes it: a hash for each file, and one of these lines before them."""
    files = sorted(path for path in folder.iterdir() if path.name != HASHES)
    lines = "".join(f"{sha256_of(path)}  {path.name}\n" for path in files).encode()
    (folder / HASHES).write_bytes(_header(lines) + lines)


def check_hashes(folder: Path) -> None:
    """Compare every file of a checkpoint with its hash.

    Raises:
        ValueError: a file is corrupt or missing. The error names it and tells how to go on.
    """
    try:
        content = (folder / HASHES).read_bytes()
    except OSError as error:
        raise ValueError(_not_a_checkpoint(folder, f"{HASHES} cannot be read: {first_line(error)}")) from error
    header, end, lines = content.partition(b"\n")
    if header + end != _header(lines):
        raise ValueError(_not_a_checkpoint(folder, f"{HASHES} is corrupt"))
    for line in lines.decode().splitlines():
        digest, _, name = line.partition("  ")
        try:
            found = sha256_of(folder / name)
        except OSError as error:
            raise ValueError(_not_a_checkpoint(folder, f"{name} cannot be read: {first_line(error)}")) from error
        if found != digest:
            raise ValueError(_not_a_checkpoint(folder, f"{name} is corrupt: its sha256 is not the one in {HASHES}"))


def _header(lines: bytes) -> bytes:
    return f"# sha256 of the lines below: {hashlib.sha256(lines).hexdigest()}\n".encode()


def read_progress(folder: Path, identity: dict[str, str]) -> Progress:
    """How far a checkpoint is, once all of its files are compared with their hashes.

    Raises:
        ValueError: it is corrupt, or of another run than ``identity``: what differs is named.
    """
    check_hashes(folder)
    try:
        progress = Progress(**json.loads((folder / PROGRESS).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(_not_a_checkpoint(folder, first_line(error))) from error
    saved = progress.identity
    different = [
        f"{'the images changed:' if name == 'images' else name} {saved.get(name)} -> {ours}"
        for name, ours in identity.items()
        if saved.get(name) != ours
    ]
    if different:
        raise ValueError(
            f"{folder} is of another run ({'; '.join(different)}): resume with the same settings and images, or start "
            "another run with another --output"
        )
    return progress


def load_checkpoint(accelerator: Accelerator, folder: Path, average: nn.Module | None) -> None:
    """Restore model, optimisers and random states, in every process.

    Raises:
        ValueError: a file does not fit this run or this version of the libraries.
    """
    try:
        # accelerate goes on without random states that it cannot read: the run would not be the same
        load(folder / f"{RNG_STATE_NAME}_{accelerator.process_index}.pkl")
        accelerator.load_state(str(folder))
        if average is not None:
            average.load_state_dict(load_file(folder / AVERAGE))
    except Exception as error:
        raise ValueError(_not_a_checkpoint(folder, first_line(error))) from error


def remove_checkpoints(output: Path) -> None:
    """Remove all of a run's checkpoints, once its weights are written."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(output / "checkpoints")


def _not_a_checkpoint(folder: Path, reason: str) -> str:
    earlier = [path for path in _find_checkpoints(folder.parent.parent) if _step(path) < _step(folder)]
    then = f"--resume to go on from {earlier[-1]}" if earlier else "start without --resume: there is no earlier one"
    return f"{folder} is not a checkpoint that can be resumed ({reason}); remove it, then {then}"
