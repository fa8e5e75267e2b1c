"""What a run is made of: devices and processes, the backbone, and whether recipe, images and processes fit."""

import dataclasses
import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import gather_object
from torch import nn

import rotation_ssl  # noqa: F401  registers the models with timm
from rotation_ssl.eighths import LARGEST
from rotation_ssl.messages import connection_errors, counted, first_line
from rotation_ssl.precision import resolve_precision
from rotation_ssl.pretraining.images import UnlabelledImages, fingerprint
from rotation_ssl.pretraining.recipe import Muon, Recipe
from rotation_ssl.zoo import published_entry

# the other processes wait while the first one downloads or lists the images: NCCL would end them after 10 minutes
PATIENCE = timedelta(hours=2)


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
    # one process may train several recipes, one after the other, in different precisions and on different devices
    AcceleratorState._reset_state(reset_partial_state=processes == 1)
    try:
        with warnings.catch_warnings():
            # a tracker that is not installed is refused below, in our own words
            warnings.filterwarnings("ignore", message="`log_with=")
            # the device is found first: it decides what 'auto' is
            precision = resolve_precision(recipe.precision, PartialState(cpu=cpu, timeout=PATIENCE).device)
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
            "start them with torchrun or accelerate launch, on GPUs or with --device cpu"
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
        ValueError: no such model, no weights to begin with, a head that cannot be resized, or crops or whole images
            that the model does not take.
    """
    outputs, crops = len(recipe.rotations), sorted({stage.crop for stage in recipe.stages})
    try:
        options: dict[str, Any] = dict(recipe.model_args)
        if takes_one_size(recipe.model):
            options["img_size"] = crops[-1]
        with connection_errors("it could not be downloaded"):
            model = timm.create_model(recipe.model, recipe.pretrained, num_classes=outputs, **options)
    except (RuntimeError, TypeError, ValueError, OSError, AssertionError, ZeroDivisionError) as error:
        instead = "list_pretrained(), or leave --pretrained out" if recipe.pretrained else "list_models()"
        raise ValueError(f"model {recipe.model!r} cannot be made ({first_line(error)}); see timm.{instead}") from error
    # held-out images, and those of whoever uses the weights, have this size: at the end of a training it is too late
    whole = trained_size(recipe)
    if recipe.rotation_unit == 45 and recipe.holdout and whole > LARGEST:
        raise ValueError(
            f"images of {whole} pixels cannot be held out of rotations by 45 degrees, which take at most {LARGEST}: "
            "give an image_size of at most that, or holdout 0"
        )
    model.eval()
    for size in sorted({*crops, whole}):
        try:
            with torch.inference_mode():
                shape = tuple(model(torch.zeros(2, 3, size, size)).shape)
        except (RuntimeError, AssertionError, ValueError, ZeroDivisionError) as error:
            what, advice = ("crops", "") if size in crops else ("whole images", ": give images of a size that it takes")
            raise ValueError(
                f"{recipe.model} does not take {what} of {size} pixels ({first_line(error)}){advice}"
            ) from error
        if shape != (2, outputs):
            raise ValueError(
                f"{recipe.model} gives {shape} for two images, not (2, {outputs}): it has no head that can be resized "
                "to the rotations; take another model"
            )
    return model.train()


def published_weights_of(network: nn.Module) -> dict[str, Any]:
    """The published weights that a network was created with: name, sha256 and the rotated images that they have seen.

    What the manifest does not know is left out; empty for other weights.
    """
    entry = published_entry(network)
    if not entry:
        return {}
    cfg: Any = network.pretrained_cfg
    known = {key: entry[key] for key in ("sha256", "rotated_images") if entry.get(key)}
    return {"name": f"{cfg['architecture']}.{cfg['tag']}", **known}


def takes_one_size(model: str) -> bool:
    """Whether a model, such as a ViT, takes images of a single size, which is set as it is made."""
    # None for a model that was registered without one, and for a folder or a repository
    cfg = timm.get_pretrained_cfg(model.split(".", 1)[0])
    return cfg is not None and cfg.fixed_input_size


def trained_size(recipe: Recipe) -> int:
    """Side of the whole images that the trained network takes: of one that takes a single size, the crops'."""
    return recipe.stages[-1].crop if takes_one_size(recipe.model) else recipe.input_size


def count_training_images(recipe: Recipe, images: torch.Tensor | UnlabelledImages, accelerator: Accelerator) -> int:
    """How many images are trained on, after a look at whether recipe, images and processes fit."""
    shares = accelerator.num_processes * accelerator.gradient_accumulation_steps
    if recipe.holdout >= len(images):
        raise ValueError(f"holdout must be 0 to {len(images) - 1} of the training images, got {recipe.holdout}")
    if isinstance(images, torch.Tensor) and (
        images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]
    ):
        raise ValueError(f"images must be (N, 3, H, H) uint8, got {tuple(images.shape)} {images.dtype}")
    size = images.shape[-1] if isinstance(images, torch.Tensor) else images.size
    if size != recipe.image_size:
        raise ValueError(f"{recipe.name} takes images of {recipe.image_size} pixels, these are of {size}")
    count = len(images) - recipe.holdout
    if count < recipe.images_per_step:
        there = counted(count, "image")
        raise ValueError(f"{there} cannot make a step of {recipe.images_per_step}: give fewer --images-per-step")
    if recipe.images_per_step % shares:
        raise ValueError(
            f"{recipe.images_per_step} images a step cannot be shared by {shares} (processes x parts of a step): give "
            "another --images-per-step"
        )
    return count


def run_identity(
    recipe: Recipe,
    images: torch.Tensor | UnlabelledImages,
    count: int,
    accelerator: Accelerator,
    sync_batchnorm: bool,
) -> dict[str, str]:
    """All that decides the weights but machine, thread count and library versions, by name.

    Raises:
        ValueError: it is not the same in all processes.
    """
    identity = {
        **{f.name: repr(getattr(recipe, f.name)) for f in dataclasses.fields(recipe) if f.name != "note"},
        "number of images": repr(count),
        "images": fingerprint(images),
        "processes": repr(accelerator.num_processes),
        "parts of a step": repr(accelerator.gradient_accumulation_steps),
        "sync_batchnorm": repr(sync_batchnorm),
    }
    others = gather_object([identity])
    different = [name for name in identity if any(other[name] != identity[name] for other in others)]
    if different:
        raise ValueError(
            f"the processes were started with different options or images ({', '.join(different)}): give all machines "
            "the same; copies of images must keep their times (cp -p, rsync -a)"
        )
    return identity
