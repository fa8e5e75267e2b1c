"""Checkpoints of a training run: folders that appear whole, so that a kill at any moment leaves the last one loadable.

``output/checkpoints/step-000120/`` holds what accelerate saves (model, optimisers, random states) and progress.json. It
is written under another name and renamed; only then older ones are removed.
"""

import contextlib
import dataclasses
import json
import os
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

PROGRESS = "progress.json"
AVERAGE = "average.safetensors"
STATE_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, IndexError, AttributeError, EOFError)


@dataclass
class Progress:
    """How far a run is, as JSON.

    ``identity`` is all that makes it the run that it is, by name: resuming with another is refused. ``losses`` are
    those of the steps since the curve's last point. ``commit`` began the run.
    """

    identity: dict[str, str]
    commit: str
    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)


def find_checkpoint(output: Path) -> Path | None:
    """The last whole checkpoint of a run, or None."""
    found = [path for path in (output / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return max(found, key=lambda path: int(path.name[5:]), default=None)


def save_checkpoint(accelerator: Accelerator, output: Path, progress: Progress, average: nn.Module | None) -> Path:
    """Write all that resuming needs and remove older checkpoints; called by every process.

    Raises:
        OSError: it cannot be written, the disk is full, say; the one before is kept.
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
                state = {name: tensor.cpu().contiguous() for name, tensor in average.state_dict().items()}
                save_file(state, unfinished / AVERAGE)
            (unfinished / PROGRESS).write_text(json.dumps(dataclasses.asdict(progress)) + "\n")
    with _together(accelerator, output, progress.step):
        if accelerator.is_main_process:
            # on the disk, not in a cache, before the one before goes
            for path in (*unfinished.iterdir(), unfinished):
                sync(path)
            if not folder.exists():
                unfinished.rename(folder)
                sync(folder.parent)
            # older ones, and what kills have left
            for other in folder.parent.iterdir():
                if other != folder:
                    shutil.rmtree(other)
    return folder


@contextlib.contextmanager
def _together(accelerator: Accelerator, output: Path, step: int) -> Iterator[None]:
    """A part of saving that fails in all processes where it fails in one; torch and safetensors have errors of their
    own for a full disk.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    failed = accelerator.reduce(torch.tensor(float(error is not None), device=accelerator.device)).item()
    if failed:
        kept = find_checkpoint(output)
        reason = first_line(error) if error else "in another process"
        raise OSError(
            f"the checkpoint of step {step} cannot be written ({reason}); "
            f"{f'{kept} is kept' if kept else 'there is none before it'}: make room, then --resume"
        ) from error


def sync(path: Path) -> None:
    """Have a file's content, or a folder's entries, written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_progress(folder: Path, identity: dict[str, str]) -> Progress:
    """How far a checkpoint is.

    Raises:
        ValueError: it is damaged, or of another run than ``identity``: what differs is named.
    """
    try:
        progress = Progress(**json.loads((folder / PROGRESS).read_text()))
        saved = dict(progress.identity)
    except STATE_ERRORS as error:
        raise ValueError(_not_a_checkpoint(folder, error)) from error
    different = [f"{name} {saved.get(name)} -> {ours}" for name, ours in identity.items() if saved.get(name) != ours]
    if different:
        raise ValueError(f"{folder} is of another run ({'; '.join(different)}): resume with those settings, or anew")
    return progress


def load_checkpoint(accelerator: Accelerator, folder: Path, average: nn.Module | None) -> None:
    """Restore model, optimisers and random states, in every process.

    Raises:
        ValueError: a file is damaged or missing.
    """
    try:
        # accelerate goes on without random states that it cannot read: the run would not be the same
        load(folder / f"{RNG_STATE_NAME}_{accelerator.process_index}.pkl")
        accelerator.load_state(str(folder))
        if average is not None:
            average.load_state_dict(load_file(folder / AVERAGE))
    except Exception as error:
        raise ValueError(_not_a_checkpoint(folder, error)) from error


def remove_checkpoints(output: Path) -> None:
    """Remove all of a run's checkpoints, once its weights are written."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(output / "checkpoints")


def _not_a_checkpoint(folder: Path, error: Exception) -> str:
    return f"{folder} is not a checkpoint of this program ({first_line(error)}); remove it and start anew"


def first_line(error: Exception) -> str:
    """An error in one line: the first of its text, or its kind where it has none."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__
