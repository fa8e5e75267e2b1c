"""The supervised SGD loop: what trains probes, fine-tunes backbones and transfers them to another task."""

import math
from collections.abc import Callable, Iterable
from itertools import islice
from typing import TypeVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from rotation_ssl.progress import progress

CHECK_EVERY = 20  # steps: reading a loss waits for the GPU
Batch = TypeVar("Batch")


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
) -> None:
    """Train a model in place, one optimizer step for each batch; the model is in eval mode afterwards.

    Args:
        model: trained in training mode, on whatever device it is.
        batches: anything that ``loss_of`` takes.
        loss_of: a batch's loss (), or losses (L,) whose sum is minimised.
        optimizer: over the parameters to train.
        name: what is trained, for the progress bar and errors.
        scheduler: moved on after every step.
        steps: number of steps, which ends endless ``batches`` and gives the bar its time left; None: all batches.
        images_per_step: images in a batch, which the bar counts.
        clip: the largest norm of all gradients together, longer ones are scaled to it; None: no clipping.
        autocast: compute the loss in this type (torch.bfloat16) where PyTorch considers that safe; None: in the type of
            the weights.
        quiet: show no progress bar.

    Raises:
        ValueError: no batches or fewer than ``steps``, or a loss that is not finite; the error names the step.
    """
    device = next(model.parameters()).device.type
    # without the cache, which would keep the weights of the first step inside a caller's autocast
    precision = torch.autocast(device, autocast, enabled=autocast is not None, cache_enabled=False)
    step, losses = 0, []
    model.train()
    with progress(name, steps and steps * images_per_step, disable=quiet) as bar:
        for step, batch in enumerate(islice(batches, steps), 1):
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
