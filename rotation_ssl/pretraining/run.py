"""A training under way: what it is made of, and what happens between its steps: the curve, checkpoints, a stop."""

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim import swa_utils
from torch.optim.lr_scheduler import LambdaLR

from rotation_ssl.pretraining.batches import augmented_batches
from rotation_ssl.pretraining.images import UnlabelledImages
from rotation_ssl.pretraining.optim import learning_rate_factor
from rotation_ssl.pretraining.outputs import Metrics
from rotation_ssl.pretraining.recipe import Recipe
from rotation_ssl.pretraining.state import Progress, find_checkpoint, save_checkpoint

CURVE_EVERY = 10  # steps averaged into one point of the curve, fewer where a run is short
CURVE_POINTS = 20  # at least, of a run of so many steps


@dataclasses.dataclass
class Run:
    """The objects of a training run, and its progress.

    ``network`` is the backbone itself, ``model`` the backbone as accelerate wraps it for several processes,
    ``average`` its exponential moving average or None; ``broken`` are the indices of images that did not decode.
    """

    recipe: Recipe
    images: torch.Tensor | UnlabelledImages
    output: Path
    accelerator: Accelerator
    progress: Progress
    network: nn.Module
    model: nn.Module
    average: swa_utils.AveragedModel | None
    optimizers: list[torch.optim.Optimizer]
    schedulers: list[LambdaLR]
    broken: set[int]
    workers: int
    began: float = dataclasses.field(default_factory=time.monotonic)
    seconds_before: float = 0.0

    def batches(self, start: int) -> Generator[torch.Tensor, None, None]:
        """This process's images from step ``start`` on."""
        count = len(self.images) - self.recipe.holdout
        return augmented_batches(
            self.recipe, self.network, self.images, count, self.accelerator, start, self.broken, self.workers
        )

    def seconds(self) -> float:
        """Seconds trained so far, those before a resume among them."""
        return round(self.seconds_before + time.monotonic() - self.began, 1)


class Curve:
    """The loss, averaged over some steps a point: to the bar, the tracker, metrics.jsonl and the progress."""

    def __init__(self, run: Run, bar: Any, metrics: Metrics) -> None:
        self.run, self.bar, self.metrics = run, bar, metrics
        self.every = max(1, min(CURVE_EVERY, run.recipe.steps // CURVE_POINTS))
        self.losses = [torch.tensor(loss, device=run.accelerator.device) for loss in run.progress.losses]

    def record(self, loss: torch.Tensor) -> None:
        """Count a step and its loss, before the schedulers move on; the last step of a point writes the point.

        Raises:
            ValueError: a loss that is not finite.
        """
        run, recipe, step = self.run, self.run.recipe, self.run.progress.step
        self.losses.append(loss)
        self.bar.update(recipe.images_per_step * len(recipe.rotations))
        if step % self.every and step < recipe.steps:
            return
        values = _mean_over_processes(run, self.losses)
        _check_finite(run, values)
        self.losses.clear()
        run.progress.seconds = run.seconds()
        mean, crop = sum(values) / len(values), recipe.crop_at(step - 1)
        point = {"step": step, "loss": mean, "seconds": run.progress.seconds}
        run.progress.curve.append(point)
        self.metrics.write(point)
        broken = {"broken": len(run.broken)} if run.broken else {}
        self.bar.set_postfix({"loss": f"{mean:.3f}", "crop": crop} | broken)
        rate = run.schedulers[0].get_last_lr()[0]
        run.accelerator.log({"loss": mean, "learning rate": rate, "crop": crop}, step=step)


class Checkpointer:
    """Saves a checkpoint of the run when one is due, and when the run is asked to stop."""

    def __init__(self, run: Run, seconds: float, stop: "StopRequest") -> None:
        self.run, self.seconds, self.stop = run, seconds, stop
        self.saved = time.monotonic()

    def save(self, losses: list[torch.Tensor]) -> Path | None:
        """Save if a checkpoint is due; returns it if the run is to stop, None if the run continues.

        After the last step one is due if averaging or a holdout follows, which is slow; the run then does not stop.

        Raises:
            ValueError: losses or weights that are not finite.
            OSError: it cannot be written; the last one is kept.
        """
        run, progress = self.run, self.run.progress
        stopping, due = self._agreed(time.monotonic() - self.saved > self.seconds)
        if progress.step == run.recipe.steps:
            due, stopping = bool(run.recipe.holdout or run.average), False
        if not (due or stopping):
            return None
        progress.losses = _mean_over_processes(run, losses)
        progress.seconds = run.seconds()
        progress.broken = all_broken(run)
        _check_finite(run, progress.losses)
        check_weights(run)
        checkpoint = save_checkpoint(run.accelerator, run.output, progress, run.average)
        self.saved = time.monotonic()
        return checkpoint if stopping else None

    def _agreed(self, due: bool) -> tuple[bool, bool]:
        """Whether any process was asked to stop, or the first one's checkpoint is due: the same answer in all."""
        accelerator, stop = self.run.accelerator, self.stop.requested
        if accelerator.num_processes == 1:
            return stop, due
        mine = [stop, due and accelerator.is_main_process]
        asked = torch.tensor(mine, dtype=torch.float32, device=accelerator.device)
        stop, due = (accelerator.reduce(asked) > 0).tolist()
        return stop, due


class StopRequest:
    """Ctrl-C and SIGTERM, heard at the end of a step: the state is never saved half-updated.

    A training in another thread than the main one, where Python takes no handlers, cannot be asked to stop.
    """

    def __enter__(self) -> "StopRequest":
        self.requested = False
        heard = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self._previous = {number: signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _hear(self, *_: object) -> None:
        self.requested = True


def _mean_over_processes(run: Run, losses: Sequence[torch.Tensor]) -> list[float]:
    return run.accelerator.reduce(torch.stack(list(losses)), "mean").tolist() if losses else []


def all_broken(run: Run) -> list[int]:
    """The broken images that any process met."""
    return sorted({index for found in gather_object([sorted(run.broken)]) for index in found})


def _check_finite(run: Run, losses: list[float]) -> None:
    """Refuse losses, of the last steps, that are not finite."""
    step = run.progress.step
    for loss, at in zip(losses, range(step - len(losses) + 1, step + 1), strict=True):
        if not math.isfinite(loss):
            raise ValueError(f"the loss became {loss} in step {at} of {run.recipe.name}, {_advice(run, at)}")


def check_weights(run: Run) -> None:
    """Refuse weights that are not finite."""
    step = run.progress.step
    if not all(bool(p.isfinite().all()) for p in run.network.parameters()):
        raise ValueError(f"the weights became infinite by step {step} of {run.recipe.name}, {_advice(run, step)}")


def _advice(run: Run, step: int) -> str:
    rate = run.recipe.optimizer.lr * learning_rate_factor(run.recipe.schedule, step - 1, run.recipe.steps)
    kept = find_checkpoint(run.output)
    left = f"the last good checkpoint is {kept}" if kept else "no checkpoint was due yet"
    return f"at a learning rate of {rate:.3g}: lower it; {left}"
