"""The loop of the pretext task: a recipe and images in, weights and their curve out; the only one there is.

:func:`pretrain` prepares a run or takes it up again, trains it step by step, and finishes it. What happens between the
steps stands apart, in :mod:`rotation_ssl.pretraining.run`: the curve, checkpoints, requests to stop.
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

from rotation_ssl.eighths import count_correct_eighths, eighths_loss, rotate_eighths
from rotation_ssl.images import normalize
from rotation_ssl.precision import resolved
from rotation_ssl.pretraining.augment import take_boxes, whole_boxes
from rotation_ssl.pretraining.images import UnlabelledImages, fingerprint, stream
from rotation_ssl.pretraining.optim import (
    create_optimizers,
    learning_rate_factor,
    renormalize_filters,
    set_learning_rates,
)
from rotation_ssl.pretraining.outputs import (
    Metrics,
    check_finished,
    describe_run,
    lock_output,
    trained_size,
    write_run,
)
from rotation_ssl.pretraining.recipe import Muon, Recipe
from rotation_ssl.pretraining.run import Checkpoints, Curve, Run, StopRequest, all_broken, check_weights
from rotation_ssl.pretraining.setup import count_training_images, create_accelerator, create_model, run_identity
from rotation_ssl.pretraining.state import (
    Progress,
    find_checkpoint,
    load_checkpoint,
    read_progress,
    remove_checkpoints,
)
from rotation_ssl.progress import progress as show_progress
from rotation_ssl.rotations import count_correct_rotations, rotate_all, rotation_loss

STATISTICS_STEPS = 50  # whose images give averaged weights their batch norm's statistics
EVALUATION_BATCH = 128

Monitor = Callable[[nn.Module], dict[str, Any]]


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
    monitor: Monitor | None = None,
    monitor_every: int = 0,
) -> Path:
    """Train ``recipe`` on ``images`` and write the weights.

    Args:
        recipe: all of the training's settings.
        images: the training images, upright: (N, 3, H, H) uint8, or to be decoded as they come.
        output: folder for checkpoints, weights, run.json, metrics.jsonl and curve.png; made if missing.
        accelerator: devices, processes, precision and parts of a step; None: this process, on the CPU.
        resume: go on from ``output``'s last checkpoint.
        checkpoint_seconds: time between checkpoints.
        workers: processes that decode images, for each process that trains.
        sync_batchnorm: batch norm over the images of all processes, on GPUs.
        commit: of the code, for run.json.
        monitor: looks at the backbone as it trains; what it returns goes to metrics.jsonl. It changes nothing in it.
        monitor_every: steps between two looks.

    Returns:
        The weights file, or the checkpoint when the run was stopped by Ctrl-C or SIGTERM.

    Raises:
        ValueError: what does not fit: images, recipe, processes, checkpoint; a finished run in the way, or another
            training that writes to ``output``; or a loss that is not finite.
        OSError: a checkpoint or the weights cannot be written; the last checkpoint is kept.
    """
    if not checkpoint_seconds >= 0:
        raise ValueError(f"checkpoint_seconds must be 0 or more, got {checkpoint_seconds}")
    accelerator = accelerator or create_accelerator(recipe, cpu=True)
    count = count_training_images(recipe, images, accelerator)
    if sync_batchnorm and accelerator.device.type == "cpu":
        raise ValueError("SyncBatchNorm runs on GPUs alone: leave --sync-batchnorm out, each process keeps its own")
    weights_file = output / "model.safetensors"
    if weights_file.exists() and resume:
        check_finished(recipe, fingerprint(images), output)
        if accelerator.is_main_process:
            # it may have been killed after the last thing that mattered
            remove_checkpoints(output)
        return weights_file
    if resume and not find_checkpoint(output):
        raise ValueError(f"nothing to resume: there is no checkpoint in {output}; start without --resume")
    recipe = resolved(recipe, accelerator.device)
    computed = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    if computed != recipe.precision:
        raise ValueError(f"the accelerator computes in {computed}, {recipe.name} in {recipe.precision}: make them one")
    identity = run_identity(recipe, images, count, accelerator, sync_batchnorm)
    with lock_output(accelerator, output):
        checkpoint = find_checkpoint(output)
        if weights_file.exists() or (checkpoint and not resume):
            raise ValueError(f"{output} holds a run already: --resume an unfinished one, or give another --output")
        progress = read_progress(checkpoint, identity) if checkpoint else Progress(identity, commit)
        run = prepare(recipe, images, output, accelerator, progress, checkpoint, workers, sync_batchnorm)
        stopped = train(run, checkpoint_seconds, monitor, monitor_every)
        if not stopped:
            finish(run)
        accelerator.end_training()
    return stopped or weights_file


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
    """A run of :func:`pretrain` before its first step, or as the checkpoint left it."""
    torch.manual_seed(recipe.seed)
    network = create_model(recipe)
    if sync_batchnorm:
        network = convert_sync_batchnorm(network)
    network.to(accelerator.device).to(memory_format=torch.channels_last)
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
        # TensorBoard takes it for a folder, the others for a project
        project = "tensorboard" if "tensorboard" in map(str, accelerator.log_with) else "rotation-ssl"
        settings = {field.name: str(getattr(recipe, field.name)) for field in dataclasses.fields(recipe)}
        accelerator.init_trackers(project, config=settings)
    return Run(
        recipe, images, output, accelerator, progress, network, model, average, optimizers, broken, workers,
        seconds_before=progress.seconds,
    )  # fmt: skip


def train(run: Run, checkpoint_seconds: float, monitor: Monitor | None = None, monitor_every: int = 0) -> Path | None:
    """The steps that are left; the checkpoint when the run was stopped before its last."""
    recipe, progress, stopped = run.recipe, run.progress, None
    batches = run.batches(progress.step)
    with StopRequest() as stop, _progress_bar(run) as bar, Metrics(run.output, progress, run.accelerator) as metrics:
        curve, checkpoints = Curve(run, bar, metrics), Checkpoints(run, checkpoint_seconds, stop)
        while progress.step < recipe.steps and not stopped:
            factor = learning_rate_factor(recipe.schedule, progress.step, recipe.steps)
            set_learning_rates(run.optimizers, factor)
            curve.losses.append(train_step(recipe, run.model, run.optimizers, batches, run.accelerator))
            if run.average is not None:
                run.average.update_parameters(run.network)
            progress.step += 1
            curve.record(factor)
            if monitor and monitor_every and progress.step % monitor_every == 0:
                metrics.write({"step": progress.step} | monitor(run.network))
            stopped = checkpoints.save(curve.losses)
    batches.close()
    return stopped


def finish(run: Run) -> None:
    """Measure what was held out, write the outputs, and only then remove the checkpoints."""
    recipe, progress, images, network = run.recipe, run.progress, run.images, run.network
    check_weights(run)
    progress.broken = all_broken(run)
    if run.average is not None:
        network.load_state_dict(run.average.module.state_dict())
        renew_statistics(recipe, network, run.batches(max(0, recipe.steps - STATISTICS_STEPS)))
    if not run.accelerator.is_main_process:
        return
    described = describe_run(recipe, progress, run.accelerator)
    if isinstance(images, UnlabelledImages):
        described["broken_images"] = [images.label(index) for index in progress.broken]
    if recipe.holdout:
        correct, total = holdout_accuracy(recipe, network, images, run.accelerator.device)
        described["holdout_rotation_accuracy"] = {"correct": correct, "n": total}
    write_run(run.output, recipe, described, network)
    remove_checkpoints(run.output)


def train_step(
    recipe: Recipe,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Iterator[torch.Tensor],
    accelerator: Accelerator,
) -> torch.Tensor:
    """One optimiser step on this process's next parts of a step's images; their mean loss, a scalar."""
    if isinstance(recipe.optimizer, Muon):
        renormalize_filters(accelerator.unwrap_model(model))
    losses = []
    for _ in range(accelerator.gradient_accumulation_steps):
        batch = next(batches)
        with accelerator.accumulate(model):
            loss = pretext_loss(recipe, model, batch)
            accelerator.backward(loss)
            # accelerate takes the step at the last part alone
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def pretext_loss(recipe: Recipe, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """The recipe's pretext task on a batch of upright images: rotations by quarters or by eighths of a turn."""
    if recipe.rotation_unit == 45:
        return eighths_loss(model, batch, recipe.label_smoothing)
    return rotation_loss(model, batch, recipe.rotations, recipe.label_smoothing)


def renew_statistics(recipe: Recipe, network: nn.Module, batches: Iterator[torch.Tensor]) -> None:
    """Take batch norm's statistics anew, of averaged weights, on augmented images: their mean over the batches."""
    eighths = recipe.rotation_unit == 45
    views = (rotate_eighths(b) if eighths else rotate_all(b, recipe.rotations) for b in batches)
    swa_utils.update_bn(views, network)


def holdout_accuracy(
    recipe: Recipe, model: nn.Module, images: torch.Tensor | UnlabelledImages, device: torch.device | str = "cpu"
) -> tuple[int, int]:
    """Right guesses and their number on the held-out images, the last ones, whole, at the size the network takes."""
    cfg = resolve_model_data_config(model)
    indices = torch.arange(len(images) - recipe.holdout, len(images)).split(EVALUATION_BATCH)
    squares = (pixels.to(device) for pixels, _ in stream(images, indices))
    size = trained_size(recipe, model)
    if size != recipe.image_size:
        squares = (take_boxes(pixels, whole_boxes(len(pixels)), size) for pixels in squares)
    batches = (normalize(pixels, cfg["mean"], cfg["std"]) for pixels in squares)
    if recipe.rotation_unit == 45:
        return count_correct_eighths(model, batches)
    return count_correct_rotations(model, batches, recipe.rotations)


def _progress_bar(run: Run) -> Any:
    """Rotated images done, their rate and the time left."""
    recipe = run.recipe
    done = run.progress.step * recipe.images_per_step * len(recipe.rotations)
    return show_progress(recipe.name, recipe.rotated_images, initial=done, disable=not run.accelerator.is_main_process)
