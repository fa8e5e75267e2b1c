"""Pretrain a backbone by predicting rotations: a recipe in, weights and their curve out.

    python -m training pretrain nin-cifar10-cpu --data-dir DIR --output runs/nin
    python -m training pretrain folder --model resnet18 --data-dir MY_IMAGES --output runs/mine
    torchrun --nproc_per_node 2 -m training pretrain RECIPE ...

DIR holds CIFAR-10 as train/<class>/*.png, or --download fetches it there; MY_IMAGES holds images, in any folders below
it. Images that fit into memory are read once, others are decoded by --workers as they come (--stream); broken ones are
passed over, counted and named. The device is the GPU where there is one, several processes share a step's images.

The output folder gets a checkpoint every few minutes, of which the last two are kept, and at the end what
timm.create_model("local-dir:OUTPUT", pretrained=True) takes (model.safetensors, config.json), run.json (recipe, images,
curve, commit, versions) and curve.png. One training at a time writes to it.
Ctrl-C saves a checkpoint and stops; --resume goes on from the last one, to the same weights as without the stop.
TensorBoard shows the curve while it runs: tensorboard --logdir OUTPUT.
"""

import argparse
import dataclasses
import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from timm.data import resolve_model_data_config
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.optim import swa_utils
from tqdm import tqdm

import rotation_ssl  # noqa: F401  registers the models with timm
from rotation_ssl.images import normalize
from rotation_ssl.messages import first_line
from rotation_ssl.rotations import count_correct_rotations, rotation_loss
from training.augment import take_boxes, whole_boxes
from training.batches import augmented_batches
from training.checkpoint import (
    Progress,
    find_checkpoint,
    load_checkpoint,
    read_progress,
    remove_checkpoints,
    save_checkpoint,
)
from training.eighths import count_correct_eighths, eighths_loss
from training.memory import TURN_OFF, keep_large_blocks
from training.optimizers import create_optimizers, learning_rate_factor, renormalize_filters, set_learning_rates
from training.outputs import describe_run, lock_output, trained_size, write_run
from training.precision import resolve_precision, resolved, warn_if_emulated
from training.progress import progress as show_progress
from training.recipes import PRECISIONS, RECIPES, Muon, Recipe, with_image_size, with_steps
from training.reporting.rows import counted, current_commit
from training.unlabelled import UnlabelledImages, fingerprint, open_images, stream

CURVE_EVERY = 10  # steps averaged into one point of the curve, fewer where a run is short
CURVE_POINTS = 20  # at least, of a run of so many steps
STATISTICS_STEPS = 50  # whose images give averaged weights their batch norm's statistics
EVALUATION_BATCH = 128


def create_accelerator(
    recipe: Recipe, cpu: bool = False, accumulate: int = 1, trackers: str | None = None, output: Path | None = None
) -> Accelerator:
    """Devices and processes as accelerate finds them, in the recipe's precision: 'auto' is what suits the device.

    Args:
        recipe: gives the precision.
        cpu: take the CPU even where there is a GPU.
        accumulate: parts that a step's images are taken in, one after the other.
        trackers: name of accelerate's tracker, 'tensorboard' or another; None for none.
        output: where trackers write.

    Raises:
        ValueError: a precision that the device does not have, or a tracker whose package is not installed.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    # without this accelerate takes each process for the only one where there is no GPU
    cpu = cpu or (processes > 1 and not torch.cuda.is_available())
    # one process may train several recipes, one after the other, in different precisions
    AcceleratorState._reset_state()
    try:
        with warnings.catch_warnings():
            # a tracker that is not installed is refused below, in our own words
            warnings.filterwarnings("ignore", message="`log_with=")
            # the device is found first: it decides what 'auto' is
            precision = resolve_precision(recipe.precision, PartialState(cpu=cpu).device)
            accelerator = Accelerator(
                cpu=cpu,
                mixed_precision="no" if precision == "fp32" else precision,
                gradient_accumulation_steps=accumulate,
                log_with=trackers,
                project_dir=output,
                # each process keeps its own batch norm statistics; the first one's are saved
                kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
            )
    except (ValueError, ImportError) as error:
        raise ValueError(f"training cannot be set up: {first_line(error)}") from error
    if accelerator.num_processes != processes:
        raise ValueError(
            f"{processes} processes were started, accelerate sees {accelerator.num_processes} on {accelerator.device}: "
            "start them with torchrun or accelerate launch, on GPUs or with --cpu"
        )
    if recipe.precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("precision fp16 needs a GPU: take bf16 or fp32 on the CPU")
    if recipe.precision == "fp16" and isinstance(recipe.optimizer, Muon):
        # its gradients are scaled, and accelerate changes the scale between the steps of the two
        raise ValueError("precision fp16 does not go with Muon, which is two optimisers: take bf16 or fp32")
    if trackers and not accelerator.log_with:
        raise ValueError(f"tracker {trackers!r} is not installed: pip install it, or --tracker none")
    return accelerator


def create_model(recipe: Recipe) -> nn.Module:
    """The recipe's backbone with an output for each rotation.

    Raises:
        ValueError: no such model, one whose head cannot be resized, or one that does not take the recipe's crops.
    """
    outputs, crops = len(recipe.rotations), sorted({stage.crop for stage in recipe.stages})
    try:
        options: dict[str, Any] = dict(recipe.model_args)
        cfg = timm.get_pretrained_cfg(recipe.model) if timm.is_model(recipe.model) else None
        if cfg is not None and cfg.fixed_input_size:
            options["img_size"] = crops[-1]
        model = timm.create_model(recipe.model, num_classes=outputs, **options)
    except (RuntimeError, TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise ValueError(
            f"model {recipe.model!r} cannot be made ({first_line(error)}); see timm.list_models()"
        ) from error
    model.eval()
    for crop in crops:
        try:
            with torch.inference_mode():
                shape = tuple(model(torch.zeros(2, 3, crop, crop)).shape)
        except (RuntimeError, AssertionError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"{recipe.model} does not take crops of {crop} pixels ({first_line(error)})") from error
        if shape != (2, outputs):
            raise ValueError(
                f"{recipe.model} gives {shape} for two images, not (2, {outputs}): it has no head that can be resized "
                "to the rotations; take another model"
            )
    return model.train()


def pretrain(
    recipe: Recipe,
    images: torch.Tensor | UnlabelledImages,
    output: Path,
    accelerator: Accelerator | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 180.0,
    workers: int = 0,
    sync_batchnorm: bool = False,
) -> Path:
    """Train ``recipe`` on ``images`` and write the weights.

    Args:
        recipe: all of the training's settings.
        images: the training images, upright: (N, 3, H, H) uint8, or to be decoded as they come.
        output: folder for checkpoints, weights, run.json and curve.png; made if missing.
        accelerator: devices, processes, precision and parts of a step; None: this process, on the CPU.
        resume: go on from ``output``'s last checkpoint.
        checkpoint_seconds: time between checkpoints.
        workers: processes that decode images, for each process that trains.
        sync_batchnorm: batch norm over the images of all processes, on GPUs.

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
    count = _count_training_images(recipe, images, accelerator)
    if sync_batchnorm and accelerator.device.type == "cpu":
        raise ValueError("SyncBatchNorm runs on GPUs alone: leave --sync-batchnorm out, each process keeps its own")
    weights_file = output / "model.safetensors"
    if weights_file.exists() and resume:
        _check_finished(recipe, fingerprint(images), output)
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
    identity = _identity(recipe, images, count, accelerator, sync_batchnorm)
    with lock_output(accelerator, output):
        checkpoint = find_checkpoint(output)
        if weights_file.exists() or (checkpoint and not resume):
            raise ValueError(f"{output} holds a run already: --resume an unfinished one, or give another --output")
        progress = read_progress(checkpoint, identity) if checkpoint else Progress(identity, current_commit())
        return _train(recipe, images, output, accelerator, progress, checkpoint_seconds, workers, sync_batchnorm)


def _train(
    recipe: Recipe,
    images: torch.Tensor | UnlabelledImages,
    output: Path,
    accelerator: Accelerator,
    progress: Progress,
    checkpoint_seconds: float,
    workers: int,
    sync_batchnorm: bool,
) -> Path:
    """The rest of :func:`pretrain`, from the last checkpoint on where there is one."""
    count, checkpoint = len(images) - recipe.holdout, find_checkpoint(output)
    torch.manual_seed(recipe.seed)
    raw_model = create_model(recipe)
    if sync_batchnorm:
        raw_model = convert_sync_batchnorm(raw_model)
    raw_model.to(accelerator.device).to(memory_format=torch.channels_last)
    average = None
    if recipe.average:
        average = swa_utils.AveragedModel(raw_model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(recipe.average))
    model = accelerator.prepare(raw_model)
    optimizers = [accelerator.prepare(o) for o in create_optimizers(recipe.optimizer, raw_model, recipe.precision)]
    if checkpoint:
        load_checkpoint(accelerator, checkpoint, average)
    if isinstance(images, torch.Tensor):
        images = images.to(accelerator.device)
    if isinstance(images, UnlabelledImages):
        images.set_holdout(recipe.holdout)
    broken = set(progress.broken) | (images.broken if isinstance(images, UnlabelledImages) else set())
    batches = augmented_batches(recipe, raw_model, images, count, accelerator, progress.step, broken, workers)
    if accelerator.log_with:
        # TensorBoard takes it for a folder, the others for a project
        project = "tensorboard" if "tensorboard" in map(str, accelerator.log_with) else "rotation-ssl"
        accelerator.init_trackers(project, config=_tracked(recipe))
    losses: list[torch.Tensor] = [torch.tensor(loss, device=accelerator.device) for loss in progress.losses]

    curve_every = max(1, min(CURVE_EVERY, recipe.steps // CURVE_POINTS))
    with StopRequest() as stop, progress_bar(recipe, progress.step, accelerator.is_main_process) as bar:
        began = saved = time.monotonic()
        seconds, stopping = progress.seconds, False
        while progress.step < recipe.steps and not stopping:
            factor = learning_rate_factor(recipe.schedule, progress.step, recipe.steps)
            set_learning_rates(optimizers, factor)
            losses.append(train_step(recipe, model, optimizers, batches, accelerator))
            if average is not None:
                average.update_parameters(raw_model)
            progress.step += 1
            bar.update(recipe.images_per_step * len(recipe.rotations))
            if progress.step % curve_every == 0 or progress.step == recipe.steps:
                values = accelerator.reduce(torch.stack(losses), "mean").tolist()
                _check_finite(recipe, values, progress.step, output)
                progress.seconds = round(seconds + time.monotonic() - began, 1)
                loss_now, crop = sum(values) / len(values), recipe.crop_at(progress.step - 1)
                progress.curve.append({"step": progress.step, "loss": loss_now, "seconds": progress.seconds})
                bar.set_postfix(_postfix(loss_now, crop, len(broken)))
                accelerator.log(
                    {"loss": loss_now, "learning rate": factor * recipe.optimizer.lr, "crop": crop}, step=progress.step
                )
                losses.clear()
            due = time.monotonic() - saved > checkpoint_seconds
            stopping, due = _agreed(accelerator, stop.requested, due)
            if (due or stopping) and progress.step < recipe.steps:
                progress.losses = accelerator.reduce(torch.stack(losses), "mean").tolist() if losses else []
                progress.seconds = round(seconds + time.monotonic() - began, 1)
                progress.broken = _all_broken(accelerator, broken)
                _check_finite(recipe, progress.losses, progress.step, output)
                _check_weights(recipe, raw_model, progress.step, output)
                checkpoint = save_checkpoint(accelerator, output, progress, average)
                saved = time.monotonic()
    batches.close()
    if progress.step < recipe.steps and checkpoint:
        accelerator.end_training()
        return checkpoint
    _check_weights(recipe, raw_model, progress.step, output)
    progress.broken = _all_broken(accelerator, broken)
    if average is not None:
        raw_model.load_state_dict(average.module.state_dict())
        last = max(0, recipe.steps - STATISTICS_STEPS)
        again = augmented_batches(recipe, raw_model, images, count, accelerator, last, broken, workers)
        renew_statistics(recipe, raw_model, again)
    if accelerator.is_main_process:
        _finish(recipe, raw_model, images, output, progress, accelerator)
    accelerator.end_training()
    return output / "model.safetensors"


def finished_run(recipe: Recipe, images: torch.Tensor, output: Path, device: str = "cpu") -> Path:
    """The weights of a run: those that are there, or made by beginning it or going on with it.

    Raises:
        ValueError: as :func:`pretrain`.
        KeyboardInterrupt: the run was stopped; its checkpoint is kept.
    """
    weights = output / "model.safetensors"
    begun = weights.exists() or find_checkpoint(output) is not None
    if pretrain(recipe, images, output, create_accelerator(recipe, cpu=device == "cpu"), resume=begun) != weights:
        raise KeyboardInterrupt
    return weights


def _finish(
    recipe: Recipe,
    model: nn.Module,
    images: torch.Tensor | UnlabelledImages,
    output: Path,
    progress: Progress,
    accelerator: Accelerator,
) -> None:
    """Measure what was held out, write the outputs, and only then remove the checkpoints."""
    run = describe_run(recipe, progress, accelerator)
    if isinstance(images, UnlabelledImages):
        run["broken_images"] = [images.label(index) for index in progress.broken]
    if recipe.holdout:
        correct, total = holdout_accuracy(recipe, model, images, accelerator.device)
        run["holdout_rotation_accuracy"] = {"correct": correct, "n": total}
    write_run(output, recipe, run, model)
    remove_checkpoints(output)


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


@torch.no_grad()
def renew_statistics(recipe: Recipe, model: nn.Module, batches: Iterator[torch.Tensor]) -> None:
    """Take batch norm's statistics anew, of averaged weights, on augmented images."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    for batch in batches:
        pretext_loss(recipe, model, batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


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


class StopRequest:
    """Ctrl-C and SIGTERM, heard at the end of a step: the state is never saved half-updated."""

    def __enter__(self) -> "StopRequest":
        self.requested = False
        self._previous = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _hear(self, *_: object) -> None:
        self.requested = True


def progress_bar(recipe: Recipe, step: int, shown: bool) -> tqdm:
    """Rotated images done, their rate and the time left."""
    per_step = recipe.images_per_step * len(recipe.rotations)
    return show_progress(recipe.name, recipe.rotated_images, initial=step * per_step, disable=not shown)


def _identity(
    recipe: Recipe,
    images: torch.Tensor | UnlabelledImages,
    count: int,
    accelerator: Accelerator,
    sync_batchnorm: bool,
) -> dict[str, str]:
    """All that decides the weights but machine, thread count and library versions, by name."""
    return {
        **{f.name: repr(getattr(recipe, f.name)) for f in dataclasses.fields(recipe) if f.name != "note"},
        "number of images": repr(count),
        "images": fingerprint(images),
        "processes": repr(accelerator.num_processes),
        "parts of a step": repr(accelerator.gradient_accumulation_steps),
        "sync_batchnorm": repr(sync_batchnorm),
    }


def _count_training_images(recipe: Recipe, images: torch.Tensor | UnlabelledImages, accelerator: Accelerator) -> int:
    """How many images are trained on, after a look at whether recipe, images and processes fit."""
    shares = accelerator.num_processes * accelerator.gradient_accumulation_steps
    if not 0 <= recipe.holdout < len(images):
        raise ValueError(f"holdout must be 0 to {len(images) - 1} of the training images, got {recipe.holdout}")
    size = images.shape[-1] if isinstance(images, torch.Tensor) else images.size
    if size != recipe.image_size:
        raise ValueError(f"{recipe.name} takes images of {recipe.image_size} pixels, these are of {size}")
    count = len(images) - recipe.holdout
    if count < recipe.images_per_step:
        raise ValueError(f"{recipe.name} takes {recipe.images_per_step} images a step, there are {count}")
    if recipe.images_per_step % shares:
        raise ValueError(
            f"{recipe.images_per_step} images a step cannot be shared by {shares} (processes x parts of a step): give "
            "another --images-per-step"
        )
    return count


def _check_finished(recipe: Recipe, images: str, output: Path) -> None:
    """Refuse to take a finished run of other settings, or of images of another fingerprint, for the one asked for."""
    try:
        run = json.loads((output / "run.json").read_text())
        finished = dict(run["recipe"])
        # earlier versions did not record them
        trained_on = run.get("images", images)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{output} holds weights of an unknown run ({error}): give another --output") from error
    asked = json.loads(json.dumps(dataclasses.asdict(recipe)))
    # nothing is computed any more: 'auto' was what it was
    if recipe.precision == "auto" and finished.get("precision") in ("bf16", "fp32"):
        del asked["precision"]
    different = [name for name in asked if name != "note" and finished.get(name) != asked[name]]
    if different:
        raise ValueError(
            f"{output} holds a finished run of another recipe ({', '.join(different)} differ): give another --output"
        )
    if trained_on != images:
        raise ValueError(
            f"{output} holds a finished run of other images ({trained_on} -> {images}): give another --output"
        )


def _check_finite(recipe: Recipe, losses: list[float], step: int, output: Path) -> None:
    """Refuse losses, of the steps up to ``step``, that are not finite."""
    for loss, at in zip(losses, range(step - len(losses) + 1, step + 1), strict=True):
        if not math.isfinite(loss):
            raise ValueError(f"the loss became {loss} in step {at} of {recipe.name}, {_advice(recipe, at, output)}")


def _check_weights(recipe: Recipe, model: nn.Module, step: int, output: Path) -> None:
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise ValueError(
            f"the weights became infinite by step {step} of {recipe.name}, {_advice(recipe, step, output)}"
        )


def _advice(recipe: Recipe, step: int, output: Path) -> str:
    rate = recipe.optimizer.lr * learning_rate_factor(recipe.schedule, step - 1, recipe.steps)
    kept = find_checkpoint(output)
    left = f"the last good checkpoint is {kept}" if kept else "no checkpoint was due yet"
    return f"at a learning rate of {rate:.3g}: lower it; {left}"


def _agreed(accelerator: Accelerator, stop: bool, due: bool) -> tuple[bool, bool]:
    """Whether any process was asked to stop, or the first one's checkpoint is due: the same answer in all."""
    if accelerator.num_processes == 1:
        return stop, due
    asked = torch.tensor([stop, due and accelerator.is_main_process], dtype=torch.float32, device=accelerator.device)
    stop, due = (accelerator.reduce(asked) > 0).tolist()
    return stop, due


def _postfix(loss: float, crop: int, broken: int) -> dict[str, Any]:
    return {"loss": f"{loss:.3f}", "crop": crop} | ({"broken": broken} if broken else {})


def _all_broken(accelerator: Accelerator, broken: set[int]) -> list[int]:
    return sorted({index for found in gather_object([sorted(broken)]) for index in found})


def _tracked(recipe: Recipe) -> dict[str, str]:
    return {field.name: str(getattr(recipe, field.name)) for field in dataclasses.fields(recipe)}


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    recipes = "\n".join(
        f"  {r.name:24s} {r.model}, {r.rotated_images:,} rotated images of {r.data}{'; ' + r.note if r.note else ''}"
        for r in RECIPES.values()
    )
    parser = argparse.ArgumentParser(
        prog="python -m training pretrain",
        description=__doc__,
        epilog=f"recipes:\n{recipes}\n\n{TURN_OFF}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", choices=sorted(RECIPES), metavar="RECIPE", help="one of the recipes below")
    where = parser.add_argument_group("where things are")
    where.add_argument("--data-dir", type=Path, default=Path("data/cifar10"), help="where the images are [%(default)s]")
    where.add_argument("--download", action="store_true", help="let torchvision fetch them into --data-dir")
    where.add_argument("--output", type=Path, help="folder for checkpoints, weights and curve [runs/RECIPE]")
    where.add_argument("--resume", action="store_true", help="go on from the output folder's last checkpoint")
    where.add_argument("--checkpoint-seconds", type=float, default=180.0, help="between checkpoints [%(default)s]")
    where.add_argument("--tracker", default="tensorboard", help="one of accelerate's, or none [%(default)s]")
    how = parser.add_argument_group("how it is computed")
    how.add_argument("--cpu", action="store_true", help="on the CPU, even where there is a GPU")
    how.add_argument("--accumulate", type=int, default=1, metavar="N", help="take a step's images in N parts [1]")
    how.add_argument("--sync-batchnorm", action="store_true", help="batch norm over all processes' images (GPUs)")
    how.add_argument("--stream", action="store_true", help="decode images as they come, even where they fit in memory")
    how.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="that decode [%(default)s]")
    instead = parser.add_argument_group("in place of the recipe's")
    instead.add_argument("--model", help="any model of timm")
    instead.add_argument("--data", help="cifar10, folder, or a name of timm's create_dataset (torch/..., hfds/...)")
    instead.add_argument("--image-size", type=int, help="side of the squares, crops and padding in proportion")
    instead.add_argument("--images-per-step", type=int, help="upright ones; each is turned by every rotation")
    instead.add_argument("--steps", type=int, help="each stage in proportion")
    instead.add_argument("--precision", choices=PRECISIONS, help="auto: bf16 where it is fast, else fp32")
    instead.add_argument("--holdout", type=int, help="training images kept out, the last ones, to tune on")
    instead.add_argument("--seed", type=int)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(arguments)
    keep_large_blocks()
    try:
        recipe = RECIPES[args.recipe]
        names = ("model", "data", "images_per_step", "precision", "holdout", "seed")
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        if args.image_size is not None:
            recipe = with_image_size(recipe, args.image_size)
        if args.steps is not None:
            recipe = with_steps(recipe, args.steps)
        recipe = dataclasses.replace(recipe, **given)
        if args.accumulate < 1 or args.workers < 0:
            raise ValueError("--accumulate must be at least 1, --workers at least 0")
        output = args.output or Path("runs") / recipe.name
        tracker = None if args.tracker == "none" else args.tracker
        accelerator = create_accelerator(recipe, args.cpu, args.accumulate, tracker, output)
        with accelerator.local_main_process_first():
            # the others find what the first one downloads
            images = open_images(recipe.data, args.data_dir, recipe.image_size, args.download)
        if accelerator.is_main_process:
            warn_if_emulated(recipe.precision, accelerator.device)
        if isinstance(images, UnlabelledImages):
            images.set_holdout(recipe.holdout)
        if isinstance(images, UnlabelledImages) and not args.stream and images.fits_memory(accelerator.num_processes):
            images.read_all(args.workers, quiet=not accelerator.is_main_process)
        result = pretrain(
            recipe,
            images,
            output,
            accelerator,
            args.resume,
            args.checkpoint_seconds,
            args.workers,
            args.sync_batchnorm,
        )
    except (ValueError, OSError, RuntimeError) as error:
        short = should_reduce_batch_size(error)
        if isinstance(error, RuntimeError) and not short:
            raise
        hint = " (give fewer --images-per-step, or take them in parts: --accumulate)" if short else ""
        rank = os.environ.get("RANK", "0")
        print(f"error{f' (process {rank})' if rank != '0' else ''}: {first_line(error)}{hint}", file=sys.stderr)
        return 2
    if result.name != "model.safetensors":
        if accelerator.is_main_process:
            print(f"stopped; go on with --resume --output {output}", file=sys.stderr)
        return 130
    if accelerator.is_main_process:
        broken = json.loads((output / "run.json").read_text()).get("broken_images", [])
        if broken:
            named = ", ".join(broken[:3]) + (", ..." if len(broken) > 3 else "")
            print(
                f"skipped {counted(len(broken), 'broken image')}: {named} (run.json has all)",
                file=sys.stderr,
            )
        print(f"wrote {result}, run.json and curve.png beside it")
    return 0
