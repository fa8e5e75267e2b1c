"""From options to written weights: what `rotation_ssl.pretrain` and the commands share."""

import argparse
import dataclasses
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from rotation_ssl.machine import keep_large_blocks
from rotation_ssl.messages import counted, first_line, killed_worker_errors, some
from rotation_ssl.precision import resolve_precision, warn_if_emulated
from rotation_ssl.pretraining.images import UnlabelledImages, open_images
from rotation_ssl.pretraining.loop import check_begun, pretrain
from rotation_ssl.pretraining.monitor import Monitor
from rotation_ssl.pretraining.options import WORKERS
from rotation_ssl.pretraining.recipe import FOLDER, Recipe, with_image_size, with_steps
from rotation_ssl.pretraining.setup import create_accelerator, create_model, trained_size

NAMED = 3  # broken images that are named on the terminal; run.json lists all
Opener = Callable[[Recipe], "torch.Tensor | UnlabelledImages"]


def run(
    recipe: Recipe,
    open_set: Opener,
    output: Path,
    *,
    resume: bool = False,
    device: str = "auto",
    workers: int = WORKERS,
    stream: bool = False,
    accumulate: int = 1,
    sync_batchnorm: bool = False,
    checkpoint_seconds: float = 180.0,
    tracker: str | None = "tensorboard",
    monitor: str | Path | None = None,
    monitor_every: int = 500,
    commit: str = "",
) -> Path:
    """Open the images and pretrain.

    Args:
        recipe: all settings of the training.
        open_set: from the recipe to the images: (N, 3, H, H) uint8, or an ``UnlabelledImages``.
        output: folder for weights, curve and checkpoints.
        resume: continue from the last checkpoint.
        device: 'auto', what accelerate finds, or 'cpu'.
        workers: data-loading worker processes.
        stream: decode images as they are needed, even if they fit in memory.
        accumulate: number of parts that a step is split into (gradient accumulation).
        sync_batchnorm: batch norm over the images of all processes, on GPUs.
        checkpoint_seconds: time between checkpoints.
        tracker: name of an Accelerate tracker; None: no tracker.
        monitor: folder of labelled images, one folder per class, to measure the middle layers on during training.
        monitor_every: steps between two measurements.
        commit: commit of the code, for run.json.

    Returns:
        The weights file, or the checkpoint if the run was stopped.

    Raises:
        ValueError: a wrong option, or options that do not fit together.
        OSError: a file cannot be written.
    """
    if accumulate < 1 or workers < 0 or monitor_every < 1:
        raise ValueError("--accumulate and --monitor-every must be at least 1, --workers at least 0")
    if device not in ("auto", "cpu"):
        raise ValueError(f"device must be 'auto' or 'cpu', got {device!r}; CUDA_VISIBLE_DEVICES selects a GPU")
    # what does not fit is told before the images are read, which takes long
    check_begun(output, resume)
    accelerator = create_accelerator(recipe, device == "cpu", accumulate, tracker, output)
    if accelerator.is_main_process:
        warn_if_emulated(recipe.precision, accelerator.device)
    model, watch = create_model(recipe), None
    if monitor is not None and accelerator.is_main_process:
        precision = resolve_precision(recipe.precision, accelerator.device)
        watch = Monitor(Path(monitor), trained_size(recipe), precision)
        watch.check(model)
    del model
    with accelerator.local_main_process_first():
        # the other processes find what the first one downloads
        images = open_set(recipe)
    if isinstance(images, UnlabelledImages):
        images.set_holdout(recipe.holdout)
        if not stream and images.fits_memory(accelerator.num_processes):
            images.read_all(workers, quiet=not accelerator.is_main_process)
    # PyTorch may tell of a killed process wherever this one is, mostly in a step
    with killed_worker_errors():
        return pretrain(
            recipe, images, output, accelerator, resume=resume, checkpoint_seconds=checkpoint_seconds, workers=workers,
            sync_batchnorm=sync_batchnorm, commit=commit, monitor=watch, monitor_every=monitor_every,
        )  # fmt: skip


def pretrain_model(
    data: str | Path | torch.Tensor, output: Path, model: str | None = None, recipe: Recipe = FOLDER, **options: Any
) -> Path:
    """:func:`rotation_ssl.pretrain`. Options are fields of the recipe, or arguments of :func:`run`.

    Raises:
        TypeError: another option; the error lists those that there are.
    """
    given = {f.name for f in dataclasses.fields(Recipe)} | {"steps"}
    fields = {name: options.pop(name) for name in list(options) if name in given}
    known = list(inspect.signature(run).parameters)[3:]
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"no option {some(unknown)}; there are {', '.join(sorted({*given, *known} - {'commit'}))}")
    if isinstance(data, torch.Tensor):
        recipe = changed(recipe, model=model, **{"image_size": data.shape[-1]} | fields)
        return run(recipe, lambda _: data, output, **options)
    recipe, root = changed(recipe, model=model, **fields), Path(data)
    workers = options.get("workers", WORKERS)
    return run(recipe, lambda r: open_images(r.data, root, r.image_size, workers=workers), output, **options)


def changed(recipe: Recipe, **fields: Any) -> Recipe:
    """The recipe with other fields; ``image_size`` and ``steps`` scale what depends on them, and another model is made
    without the arguments of the recipe's own.

    Raises:
        ValueError: a value that a field does not allow.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    if fields.get("model", recipe.model) != recipe.model:
        fields = {"model_args": (), **fields}
    if "image_size" in fields:
        recipe = with_image_size(recipe, fields.pop("image_size"))
    if "steps" in fields:
        recipe = with_steps(recipe, fields.pop("steps"))
    return dataclasses.replace(recipe, **fields)


def execute(args: argparse.Namespace, recipe: Recipe, open_set: Opener, commit: str = "") -> int:
    """Run what the options ask for and print the result; returns the exit status."""
    keep_large_blocks()
    try:
        names = ("model", "pretrained", "images_per_step", "precision", "holdout", "seed", "steps")
        recipe = changed(recipe, image_size=args.size, **{name: getattr(args, name) for name in names})
        output = args.output or Path("runs") / recipe.name
        same = (
            "resume", "device", "workers", "stream", "accumulate", "sync_batchnorm", "checkpoint_seconds", "monitor",
            "monitor_every",
        )  # fmt: skip
        tracker = None if args.tracker == "none" else args.tracker
        result = run(recipe, open_set, output, tracker=tracker, commit=commit, **{n: getattr(args, n) for n in same})
    except (ValueError, OSError, RuntimeError) as error:
        short = should_reduce_batch_size(error)
        if isinstance(error, RuntimeError) and not short:
            raise
        hint = " (use fewer --images-per-step, or split a step: --accumulate)" if short else ""
        _tell(f"error{f' (process {_rank()})' if _rank() else ''}: {first_line(error)}{hint}")
        return 2
    if result.name != "model.safetensors":
        if not _rank():
            _tell(f"stopped; continue with --resume --output {output}")
        return 130
    if not _rank():
        broken = json.loads((output / "run.json").read_text()).get("broken_images", [])
        if broken:
            named = ", ".join(broken[:NAMED]) + (", ..." if len(broken) > NAMED else "")
            _tell(f"skipped {counted(len(broken), 'broken image')}: {named} (run.json lists all)")
        _tell(f"wrote {result}, and run.json, metrics.jsonl and curve.png next to it", sys.stdout)
    return 0


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _tell(line: str, stream: Any = None) -> None:
    print(line, file=stream or sys.stderr)
