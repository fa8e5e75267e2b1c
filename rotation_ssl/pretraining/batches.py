"""What a run trains on, step by step: which images, and where they are cropped, follow from recipe and step alone."""

import functools
from collections.abc import Generator

import numpy as np
import torch
from accelerate import Accelerator
from timm.data import resolve_model_data_config
from torch import nn

from rotation_ssl.images import normalize
from rotation_ssl.pretraining.augment import Boxes, Windows, draw_boxes, draw_windows, take_boxes, take_windows
from rotation_ssl.pretraining.images import UnlabelledImages, stream
from rotation_ssl.pretraining.recipe import Recipe

# whose images are shuffled together: what is read at a time, so that a page cache of some GiB holds it
SHARDS_TOGETHER = 16


def augmented_batches(
    recipe: Recipe,
    model: nn.Module,
    images: torch.Tensor | UnlabelledImages,
    count: int,
    accelerator: Accelerator,
    start: int,
    broken: set[int],
    workers: int = 0,
) -> Generator[torch.Tensor, None, None]:
    """This process's parts of the steps from ``start`` on: normalised upright crops (B, 3, crop, crop), channels_last.

    Which images, and where they are cropped, is a function of recipe, ``count`` and step alone, so that resuming is
    exact, and so that processes together take what one would.

    Args:
        recipe: gives all settings.
        model: gives mean and deviation to normalise by.
        images: the first ``count`` of them are trained on.
        count: of the training images.
        accelerator: device, processes, and parts of a step.
        start: first step.
        broken: gets the indices of images that do not decode.
        workers: data-loading worker processes.
    """
    parts, processes = accelerator.gradient_accumulation_steps, accelerator.num_processes
    each = recipe.images_per_step // (parts * processes)
    firsts = [(part * processes + accelerator.process_index) * each for part in range(parts)]
    own = [slice(first, first + each) for first in firsts]
    steps = range(start, recipe.steps)
    shards = images.shards if isinstance(images, UnlabelledImages) else (0,)
    indices = (step_indices(recipe, count, step, shards)[part] for step in steps for part in own)
    squares = stream(images, indices, workers, pin=accelerator.device.type == "cuda")
    cfg = resolve_model_data_config(model)
    for step in steps:
        windows, crop = step_windows(recipe, count, step, shards), recipe.crop_at(step)
        for part in own:
            pixels, found = next(squares)
            broken |= found
            pixels = pixels.to(accelerator.device, non_blocking=True)
            own_windows = type(windows)(*(values[part] for values in windows))
            if isinstance(own_windows, Boxes):
                crops = take_boxes(pixels, own_windows, crop)
            else:
                crops = take_windows(pixels, own_windows, crop, recipe.padding_mode)
            yield normalize(crops, cfg["mean"], cfg["std"])


def step_indices(recipe: Recipe, count: int, step: int, shards: tuple[int, ...] = (0,)) -> torch.Tensor:
    """The images of a step, (images_per_step,) int64: each epoch is a permutation, its incomplete last step dropped.

    Args:
        recipe: gives images_per_step and seed.
        count: of the training images.
        step: counted from 0.
        shards: index of the first image of each shard; a folder, or what is in memory, is one.
    """
    epoch, position = divmod(step, count // recipe.images_per_step)
    order = _epoch_order(count, recipe.seed, epoch, shards)
    return order[position * recipe.images_per_step : (position + 1) * recipe.images_per_step]


def step_windows(recipe: Recipe, count: int, step: int, shards: tuple[int, ...] = (0,)) -> Windows | Boxes:
    """Where the images of a step are cropped, and which are mirrored."""
    flip: bool | torch.Tensor = recipe.flip == "random"
    if recipe.flip == "alternate":
        first = torch.rand(count, generator=_generator(recipe.seed, 2, 0)) < 0.5
        epoch = step // (count // recipe.images_per_step)
        flip = first[step_indices(recipe, count, step, shards)] ^ bool(epoch % 2)
    generator = _generator(recipe.seed, 1, step)
    if recipe.scale is not None:
        return draw_boxes(recipe.images_per_step, recipe.scale, flip, generator)
    return draw_windows(
        recipe.images_per_step, recipe.image_size, recipe.crop_at(step), recipe.padding, flip, generator
    )


def _generator(seed: int, stream: int, index: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, stream, index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


@functools.lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int, shards: tuple[int, ...]) -> torch.Tensor:
    """The shards shuffled and taken some at a time, and all images of those that are taken together shuffled."""
    ends = torch.tensor([*shards[1:], count]).clamp(max=count)  # those held out, the last ones, do not take part
    groups = torch.randperm(len(shards), generator=_generator(seed, 3, epoch)).tensor_split(
        -(-len(shards) // SHARDS_TOGETHER)
    )
    generator = _generator(seed, 0, epoch)
    parts = []
    for group in groups:
        # sorted: then a few shards are in the order that a folder of the same images has
        images = torch.cat([torch.arange(min(shards[s], count), int(ends[s])) for s in group.sort().values.tolist()])
        parts.append(images[torch.randperm(len(images), generator=generator)])
    return torch.cat(parts)
