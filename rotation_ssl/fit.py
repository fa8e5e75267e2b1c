"""The supervised SGD loop: what trains probes, fine-tunes backbones and transfers them to another task."""

import hashlib
import math
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from rotation_ssl.files import replace_tensors
from rotation_ssl.messages import first_line
from rotation_ssl.progress import progress

CHECK_EVERY = 20  # steps: reading a loss waits for the GPU
CHECKPOINT_SECONDS = 60.0
Batch = TypeVar("Batch")


class Checkpoint:
    """Saves the state of a training to a file and resumes from it.

    ``done`` and ``seconds`` are the steps (or epochs) and the time before the interruption, 0 without a file.

    Args:
        file: read if it exists; None: nothing is saved.
        identity: one line with everything that decides the training, except machine and library versions.

    Raises:
        ValueError: the file is not a checkpoint, or has another identity.
        OSError: the file cannot be read.
    """

    def __init__(self, file: Path | None = None, identity: str = "") -> None:
        self.file, self.identity, self.parts = file, identity, dict[str, Any]()
        self.done, self.seconds, self.state = 0, 0.0, None
        self.started = self.saved = time.monotonic()
        if file is None or not file.exists():
            return
        try:
            self.state = torch.load(file, map_location="cpu", weights_only=True)
            found, self.done = str(self.state["identity"]), int(self.state["done"])
            self.seconds = float(self.state["seconds"])
        except OSError:
            raise
        except Exception as error:
            # whatever torch raises for bytes that it did not write
            raise ValueError(f"{file} is no checkpoint ({first_line(error)}): remove it") from error
        if found != identity:
            raise ValueError(f"{file} belongs to other options, images or weights: remove it, or give another --output")

    def restore(self, **parts: Any) -> None:
        """Load the saved state into ``parts`` and the random number generators; without a file nothing changes.

        The generators are PyTorch's, of the CPU and of CUDA.

        Args:
            parts: objects with a ``state_dict``, such as model and optimizer, and random number generators of the CPU,
                by name: they are saved from now on.

        Raises:
            ValueError: the file lacks a part, or has one of something else.
        """
        self.parts = parts
        if self.state is None:
            return
        try:
            for name, part in parts.items():
                load = part.set_state if isinstance(part, torch.Generator) else part.load_state_dict
                load(self.state[name])
            torch.set_rng_state(self.state["random"])
            # there may be fewer GPUs now
            for index, state in enumerate(self.state["random_cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(state, index)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{self.file} is no checkpoint ({first_line(error)}): remove it") from error
        self.state = None

    def save(self, done: int, at_once: bool = False) -> None:
        """Save the state after ``done`` steps (or epochs), at most once a minute unless ``at_once``.

        Raises:
            OSError: the file cannot be written; the one before is kept.
        """
        if self.file is None or not (at_once or time.monotonic() - self.saved >= CHECKPOINT_SECONDS):
            return
        state = {
            "identity": self.identity,
            "done": done,
            "seconds": self.seconds + time.monotonic() - self.started,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }
        for name, part in self.parts.items():
            state[name] = part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        replace_tensors(self.file, lambda path: torch.save(state, path))
        self.saved = time.monotonic()


class Checkpoints:
    """Checkpoints of several trainings in one folder: a file for each, under a name that no other training has.

    Args:
        folder: need not exist yet; None: nothing is saved.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self.opened = folder, list[Path]()

    def open(self, identity: str) -> Checkpoint:
        """The checkpoint of the training with this ``identity``; errors as of :class:`Checkpoint`."""
        if self.folder is None:
            return Checkpoint()
        file = self.folder / f"training-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.pt"
        self.opened.append(file)
        return Checkpoint(file, identity)

    def remove(self) -> None:
        """Remove the files of the trainings that were opened, whose results are written by now."""
        for file in self.opened:
            # with what kills have left
            for left in file.parent.glob(f"{file.name}*"):
                left.unlink()
        self.opened.clear()


def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_of: Callable[[Batch], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    name: str,
    scheduler: LRScheduler | None = None,
    steps: int | None = None,
    images_per_step: int = 1,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
    quiet: bool = False,
    checkpoint: Checkpoint | None = None,
) -> None:
    """Train a model in place, one optimizer step for each batch; the model is in eval mode afterwards.

    Args:
        model: trained in training mode, on whatever device it is.
        batches: anything that ``loss_of`` takes.
        loss_of: from a batch to its loss (), or to losses (L,) whose sum is minimised.
        optimizer: over the parameters to train.
        name: what is trained, for the progress bar and errors.
        scheduler: stepped after every step.
        steps: number of steps, needed if ``batches`` never ends; None: all batches.
        images_per_step: images in a batch, which the bar counts.
        clip: the largest norm of all gradients together, longer ones are scaled to it; None: no clipping.
        autocast: compute the loss in this type (torch.bfloat16) where PyTorch considers that safe; None: in the type of
            the weights.
        quiet: show no progress bar.
        checkpoint: where to continue, restored by the caller; ``batches`` must begin after its ``done`` steps. It is
            saved about once a minute and after step ``steps``, if all losses so far are finite.

    Raises:
        ValueError: no batches or fewer than ``steps``, or a loss that is not finite; the error names the step.
    """
    device = next(model.parameters()).device.type
    # without the cache, which would keep the weights of the first step inside a caller's autocast
    precision = torch.autocast(device, autocast, enabled=autocast is not None, cache_enabled=False)
    done = checkpoint.done if checkpoint else 0
    step, losses = done, []
    model.train()
    with progress(name, steps and steps * images_per_step, disable=quiet, initial=done * images_per_step) as bar:
        for step, batch in enumerate(islice(batches, steps and steps - done), done + 1):
            with precision:
                loss = loss_of(batch)
            optimizer.zero_grad()
            loss.sum().backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            losses.append(loss.detach())
            bar.update(images_per_step)
            if step % CHECK_EVERY == 0 or step == steps:
                bar.set_postfix_str(f"loss {_mean_loss(losses, step, name)}")
                losses.clear()
                if checkpoint:
                    checkpoint.save(step, at_once=step == steps)
        _mean_loss(losses, step, name)
    if step < (steps or 1):
        raise ValueError(f"{name} got {step} batches to train on, and needs {steps or 'at least 1'}")
    model.eval()


def _mean_loss(losses: list[torch.Tensor], last: int, name: str) -> str:
    """The mean over the steps up to ``last``, as text; several losses are listed in their order.

    Raises:
        ValueError: a loss that is not finite.
    """
    if not losses:
        return ""
    values = torch.stack(losses).reshape(len(losses), -1)
    for step, row in enumerate(values.tolist(), last - len(losses) + 1):
        for value in row:
            if not math.isfinite(value):
                raise ValueError(
                    f"the loss of {name} became {value} in step {step}: lower the learning rate, or check the inputs"
                )
    return " ".join(f"{value:.3f}" for value in values.mean(0).tolist())
