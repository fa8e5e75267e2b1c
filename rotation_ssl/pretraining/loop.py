"""The training loop of the pretext task: a recipe and images in, weights and their curve out.

:func:`pretrain` prepares or resumes a run, trains it step by step, and finishes it. The curve, checkpoints and requests
to stop, which come between the steps, are in :mod:`rotation_ssl.pretraining.run`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import resolve_model_data_config
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.optim import swa_utils

from rotation_ssl.eighths import rotate_eighths
from rotation_ssl.images import normalize
from rotation_ssl.precision import resolved
from rotation_ssl.pretraining.augment import take_boxes, whole_boxes
from rotation_ssl.pretraining.images import UnlabelledImages, fingerprint, stream
from rotation_ssl.pretraining.optim import (
    create_optimizers,
    create_scheduler,
    renormalize_filters,
)
from rotation_ssl.pretraining.outputs import (
    Metrics,
    check_finished,
    describe_run,
    lock_output,
    write_run,
)
from rotation_ssl.pretraining.recipe import Muon, Recipe
from rotation_ssl.pretraining.run import Checkpointer, Curve, Run, StopRequest, all_broken, check_weights
from rotation_ssl.pretraining.setup import (
    count_training_images,
    create_accelerator,
    create_model,
    published_weights_of,
    run_identity,
    trained_size,
)
from rotation_ssl.pretraining.state import (
    Progress,
    find_checkpoint,
    load_checkpoint,
    read_progress,
    remove_checkpoints,
)
from rotation_ssl.progress import progress as show_progress
from rotation_ssl.rotations import count_correct, cross_entropy_of_rotations, rotate_all

STATISTICS_STEPS = 50  # batch norm statistics of averaged weights are recomputed on the images of the last steps
EVALUATION_BATCH = 128

MonitorFunction = Callable[[nn.Module], dict[str, Any]]


def pretrain(
    recipe: Recipe,
    images: torch.Tensor | UnlabelledImages,
    output: Path,
    accelerator: Accelerator | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 180.0,
    workers: int = 0,
    sync_batchnorm: bool = False,
    commit: str = "",
    monitor: MonitorFunction | None = None,
    monitor_every: int = 0,
) -> Path:
    """Train ``recipe`` on ``images`` and write the weights.

    Arguments that are not described here are those of :func:`rotation_ssl.pretraining.command.run`.

    Args:
        recipe: all settings of the training.
        images: the upright training images: (N, 3, H, H) uint8, or files that are decoded as they are needed.
        output: folder for checkpoints, weights, run.json, metrics.jsonl and curve.png; created if missing.
        accelerator: devices, processes, precision and gradient accumulation; None: this process, on the CPU.
        monitor: called with the backbone during training; what it returns goes to metrics.jsonl. It changes nothing.

    Returns:
        The weights file, or the checkpoint if the run was stopped by Ctrl-C or SIGTERM.

    Raises:
        ValueError: images, recipe, processes or checkpoint do not fit together, ``output`` contains a finished run or
            is used by another one, or a loss is not finite.
        OSError: a checkpoint or the weights cannot be written; the last checkpoint is kept.
    """
    if not checkpoint_seconds >= 0:
        raise ValueError(f"checkpoint_seconds must be 0 or more, got {checkpoint_seconds}")
    accelerator = accelerator or create_accelerator(recipe, cpu=True)
    count = count_training_images(recipe, images, accelerator)
    if sync_batchnorm and accelerator.device.type == "cpu":
        raise ValueError("SyncBatchNorm runs on GPUs alone: leave --sync-batchnorm out, each process keeps its own")
    weights_file = output / "model.safetensors"
    if resume:
        check_begun(output, resume)
    if resume and weights_file.exists():
        check_finished(recipe, fingerprint(images), output)
        if accelerator.is_main_process:
            # a kill after the weights were written leaves them
            remove_checkpoints(output)
        return weights_file
    recipe = resolved(recipe, accelerator.device)
    identity = run_identity(recipe, images, count, accelerator, sync_batchnorm)
    with lock_output(accelerator, output):
        # another process may have finished it in the meantime
        check_begun(output, resume and not weights_file.exists())
        checkpoint = find_checkpoint(output)
        progress = read_progress(checkpoint, identity) if checkpoint else Progress(identity, commit)
        run = prepare(recipe, images, output, accelerator, progress, checkpoint, workers, sync_batchnorm)
        stopped = train(run, checkpoint_seconds, monitor, monitor_every)
        if not stopped:
            finish(run)
        accelerator.end_training()
    return stopped or weights_file


def check_begun(output: Path, resume: bool) -> None:
    """Refuse to begin a run where there is one, and to resume one where there is none.

    Raises:
        ValueError: there is one, or none.
    """
    begun = (output / "model.safetensors").exists() or find_checkpoint(output) is not None
    if begun and not resume:
        raise ValueError(f"{output} already contains a run: --resume it if unfinished, or give another --output")
    if resume and not begun:
        raise ValueError(f"nothing to resume: there is no checkpoint in {output}; start without --resume")


def prepare(
    recipe: Recipe,
    images: torch.Tensor | UnlabelledImages,
    output: Path,
    accelerator: Accelerator,
    progress: Progress,
    checkpoint: Path | None,
    workers: int,
    sync_batchnorm: bool,
) -> Run:
    """A run of :func:`pretrain` before its first step, or at the step of the checkpoint."""
    torch.manual_seed(recipe.seed)
    network = create_model(recipe)
    if recipe.pretrained and not checkpoint:
        # kept in checkpoints: what is published under this name may be replaced before the run is resumed
        progress.begun_with = published_weights_of(network)
    if sync_batchnorm:
        network = convert_sync_batchnorm(network)
    network.to(accelerator.device)
    for tensor in (*network.parameters(), *network.buffers()):
        # Module.to would ask the same of the five dimensions of a Conv3d, which raises
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    average = None
    if recipe.average:
        average = swa_utils.AveragedModel(network, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(recipe.average))
    model = accelerator.prepare(network)
    optimizers = [accelerator.prepare(o) for o in create_optimizers(recipe.optimizer, network, recipe.precision)]
    if checkpoint:
        load_checkpoint(accelerator, checkpoint, average)
    broken = set(progress.broken)
    if isinstance(images, UnlabelledImages):
        images.set_holdout(recipe.holdout)
        broken |= images.broken
    else:
        images = images.to(accelerator.device)
    if accelerator.log_with:
        # TensorBoard takes this as a folder, the others as a project
        project = "tensorboard" if "tensorboard" in map(str, accelerator.log_with) else "rotation-ssl"
        settings = {field.name: str(getattr(recipe, field.name)) for field in dataclasses.fields(recipe)}
        accelerator.init_trackers(project, config=settings)
    schedulers = [create_scheduler(recipe.schedule, optimizer, recipe.steps, progress.step) for optimizer in optimizers]
    return Run(
        recipe, images, output, accelerator, progress, network=network, model=model, average=average,
        optimizers=optimizers, schedulers=schedulers, broken=broken, workers=workers, seconds_before=progress.seconds,
    )  # fmt: skip


def train(
    run: Run, checkpoint_seconds: float, monitor: MonitorFunction | None = None, monitor_every: int = 0
) -> Path | None:
    """Train the remaining steps; returns the checkpoint if the run was stopped before its last step."""
    recipe, progress, stopped = run.recipe, run.progress, None
    batches = run.batches(progress.step)
    with StopRequest() as stop, _progress_bar(run) as bar, Metrics(run.output, progress, run.accelerator) as metrics:
        curve, checkpointer = Curve(run, bar, metrics), Checkpointer(run, checkpoint_seconds, stop)
        while progress.step < recipe.steps and not stopped:
            loss = train_step(recipe, run.model, run.optimizers, batches, run.accelerator)
            if run.average is not None:
                run.average.update_parameters(run.network)
            progress.step += 1
            curve.record(loss)
            for scheduler in run.schedulers:
                scheduler.step()
            if monitor and monitor_every and progress.step % monitor_every == 0:
                metrics.write({"step": progress.step} | monitor(run.network))
            stopped = checkpointer.save(curve.losses)
    batches.close()
    return stopped


def finish(run: Run) -> None:
    """Measure the held-out images, write the outputs, and only then remove the checkpoints."""
    recipe, progress, images, network = run.recipe, run.progress, run.images, run.network
    check_weights(run)
    progress.broken = all_broken(run)
    if run.average is not None:
        network.load_state_dict(run.average.module.state_dict())
        update_statistics(recipe, network, run.batches(max(0, recipe.steps - STATISTICS_STEPS)))
    if not run.accelerator.is_main_process:
        return
    described = describe_run(recipe, progress, run.accelerator)
    broken = set(progress.broken)
    if recipe.holdout:
        correct, total = holdout_accuracy(recipe, network, images, run.accelerator.device, run.workers, broken)
        described["holdout_rotation_accuracy"] = {"correct": correct, "n": total}
    if isinstance(images, UnlabelledImages):
        described["broken_images"] = [images.name_of(index) for index in sorted(broken)]
    write_run(run.output, recipe, described, network)
    remove_checkpoints(run.output)


def train_step(
    recipe: Recipe,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Iterator[torch.Tensor],
    accelerator: Accelerator,
) -> torch.Tensor:
    """One optimizer step on this process's next images, in one or several parts; returns their mean loss, a scalar."""
    if isinstance(recipe.optimizer, Muon):
        renormalize_filters(accelerator.unwrap_model(model))
    losses = []
    for _ in range(accelerator.gradient_accumulation_steps):
        batch = next(batches)
        with accelerator.accumulate(model):
            loss = pretext_loss(recipe, model, batch)
            accelerator.backward(loss)
            # accelerate only steps after the last part
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def pretext_loss(recipe: Recipe, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """The pretext task: cross-entropy of the predicted rotation of each of the recipe's views of the upright images."""
    logits = model(rotated(recipe, batch))
    return cross_entropy_of_rotations(logits, len(recipe.rotations), recipe.label_smoothing)


def rotated(recipe: Recipe, images: torch.Tensor) -> torch.Tensor:
    """The images in each of the recipe's R rotations, by 90 or by 45 degrees: (R * N, C, H, H), rotation-major."""
    return rotate_eighths(images) if recipe.rotation_unit == 45 else rotate_all(images, recipe.rotations)


def update_statistics(recipe: Recipe, network: nn.Module, batches: Iterator[torch.Tensor]) -> None:
    """Recompute the batch norm statistics of averaged weights: their mean over batches of augmented images."""
    swa_utils.update_bn((rotated(recipe, batch) for batch in batches), network)


def holdout_accuracy(
    recipe: Recipe,
    model: nn.Module,
    images: torch.Tensor | UnlabelledImages,
    device: torch.device,
    workers: int,
    broken: set[int],
) -> tuple[int, int]:
    """Correct and all predictions on the held-out images, the last ones, uncropped, at the size the network takes.

    The indices of those that do not decode, in whose place others are taken, are added to ``broken``.
    """
    cfg = resolve_model_data_config(model)
    indices = torch.arange(len(images) - recipe.holdout, len(images)).split(EVALUATION_BATCH)
    squares = _squares(stream(images, indices, workers), device, broken)
    size = trained_size(recipe)
    if size != recipe.image_size:
        squares = (take_boxes(pixels, whole_boxes(len(pixels)), size) for pixels in squares)
    batches = (normalize(pixels, cfg["mean"], cfg["std"]) for pixels in squares)
    return count_correct(model, (rotated(recipe, batch) for batch in batches), len(recipe.rotations))


def _squares(
    batches: Iterator[tuple[torch.Tensor, set[int]]], device: torch.device | str, broken: set[int]
) -> Iterator[torch.Tensor]:
    for pixels, found in batches:
        broken |= found
        yield pixels.to(device)


def _progress_bar(run: Run) -> Any:
    """Rotated images seen, their rate and the time left."""
    recipe = run.recipe
    done = run.progress.step * recipe.images_per_step * len(recipe.rotations)
    return show_progress(recipe.name, recipe.rotated_images, initial=done, disable=not run.accelerator.is_main_process)
