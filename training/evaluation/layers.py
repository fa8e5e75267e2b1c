"""ImageNet-style probes: classifiers on every layer of a frozen backbone, trained together on the same crops.

    python -m training probe-layers imagenet-linear-paper rotnet_alexnet.gidaris_in1k --data ILSVRC2012
    python -m training probe-layers imagenet-linear-cpu rotnet_alexnet --dataset miniplaces --data DIR
    python -m training probe-layers imagenet-nonlinear-cpu rotnet_alexnet --random --layers conv4 --data DIR

The images are a folder of train/<class>/* and val/<class>/* (ImageNet, Places205), one of the datasets below in its
original layout, or a labelled dataset of torchvision by timm's name (torch/places365). They are kept in memory if they
fit, else --workers decode them as they are needed. The linear classifiers are those of tables 5 and 6 of the paper. The
non-linear ones are the remaining layers of the network, trained from random weights, as in table 4. The classifiers of
the last step are tested on the center crops of the validation images; nothing is selected on them. --holdout N tests on
N random training images instead, to tune on. Results are written to --output: rows.jsonl, report.md, report.json and
report.png. To resume an interrupted command, run it again with the same options and --output.
"""

import argparse
import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional as F

from rotation_ssl.cli.options import positive
from rotation_ssl.evaluation.frozen import PARTS, Frozen
from rotation_ssl.features import layer_modules
from rotation_ssl.fit import Checkpoint, Checkpoints, fit
from rotation_ssl.labelled import check_same_classes
from rotation_ssl.messages import counted
from rotation_ssl.precision import resolved, warn_if_emulated
from rotation_ssl.pretraining.augment import crop_and_flip
from rotation_ssl.pretraining.images import fingerprint
from rotation_ssl.probes import max_pooled_probe
from rotation_ssl.progress import progress
from training.command import create_parser
from training.datasets import DATASETS, check_whole, name_of
from training.evaluation import options
from training.evaluation.labelled import (
    Labelled,
    check_decoding,
    identity_of,
    open_labelled,
    read_into_memory,
    split_holdout,
    squares_of,
)
from training.evaluation.recipes import LAYER_PROBES, LayerProbeRecipe
from training.evaluation.subject import Subject, measured_row
from training.reporting.report import keep_rows, run_measuring
from training.reporting.rows import Row

MAX_VALUES = 9600  # of 12 x 12 x 64, 7 x 7 x 192, 5 x 5 x 384, 6 x 6 x 256: AlexNet's layers at 224 pixels
CROP = 7 / 8  # of the side: 224 of 256 pixels


def square_size(recipe: LayerProbeRecipe, dataset: str) -> int:
    """Side in pixels of the squares that crops are taken from; small budgets use the dataset's own size."""
    return DATASETS[dataset].probe_size if recipe.budget == "cpu" and dataset in DATASETS else recipe.image_size


def build_probes(
    recipe: LayerProbeRecipe, subject: Subject, layers: Sequence[str], classes: int
) -> dict[str, nn.Module]:
    """A new classifier on each layer, by the layer's name, which may contain dots."""
    known, frozen = list(layer_modules(subject.backbone)), _frozen(recipe, subject)
    maps = frozen.whole_maps(layers)(torch.zeros(2, 3, subject.size, subject.size, dtype=torch.uint8))
    probes: dict[str, nn.Module] = {}
    for layer, features in maps.items():
        if recipe.classifier == "linear":
            channels, side = features.shape[1], min(features.shape[2:])
            cells = max(1, min(side, math.isqrt(MAX_VALUES // channels)))
            probes[layer] = max_pooled_probe(channels, cells, classes)
        else:
            probes[layer] = _rest_of_network(subject, known.index(layer), classes, recipe.fc_size)
        probes[layer].to(frozen.device)
    return probes


def train_probes(
    recipe: LayerProbeRecipe,
    subject: Subject,
    probes: Mapping[str, nn.Module],
    data: Labelled,
    chosen: torch.Tensor,
    seed: int = 0,
    workers: int = 0,
    checkpoint: Checkpoint | None = None,
) -> None:
    """Train the classifiers in place, each on its own loss; they are in eval mode afterwards.

    Args:
        recipe: all settings, without 'auto' precision.
        subject: the backbone, which stays frozen.
        probes: by layer.
        chosen: (M,) indices of the images to train on.
        seed: of the order and the crops.
        checkpoint: where the state is saved, and resumed from.
    """
    if len(chosen) < recipe.batch_size:
        raise ValueError(f"{recipe.name} takes {recipe.batch_size} images a step, got {len(chosen)}")
    layers, frozen = list(probes), _frozen(recipe, subject)
    whole_maps = frozen.whole_maps(layers)
    classifiers = nn.ModuleList(probes.values())
    optimizer = torch.optim.SGD(
        classifiers.parameters(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True,
        fused=True,
    )  # fmt: skip
    steps = len(chosen) // recipe.batch_size  # of an epoch
    milestones = [milestone * steps for milestone in recipe.milestones]
    generator = torch.Generator().manual_seed(seed)
    # the order has a generator of its own: decoding runs ahead of the crops
    orders = torch.Generator().manual_seed(seed + 1)
    permutations = (torch.randperm(len(chosen), generator=orders) for _ in range(recipe.epochs))
    indices = (chosen[part] for order in permutations for part in order.split(recipe.batch_size)[:steps])
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, recipe.factor)
    checkpoint = checkpoint or Checkpoint()
    rest = islice(indices, checkpoint.done, None)
    checkpoint.restore(probes=classifiers, optimizer=optimizer, scheduler=scheduler, crops=generator)

    def loss_of(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        pixels, labels = (tensor.to(frozen.device, non_blocking=True) for tensor in batch)
        crops = crop_and_flip(pixels, round(CROP * pixels.shape[-1]), 0, "reflect", True, generator)
        maps = whole_maps(crops)
        return torch.stack([F.cross_entropy(probes[layer](maps[layer]).float(), labels) for layer in layers])

    with contextlib.closing(squares_of(data, rest, workers, pin=frozen.device.startswith("cuda"))) as squares:
        fit(
            classifiers, squares, loss_of, optimizer, name=f"{recipe.name}, {', '.join(layers)}",
            scheduler=scheduler, steps=recipe.epochs * steps, images_per_step=recipe.batch_size,
            autocast=frozen.autocast, checkpoint=checkpoint,
        )  # fmt: skip


@torch.inference_mode()
def count_correct(
    recipe: LayerProbeRecipe,
    subject: Subject,
    probes: Mapping[str, nn.Module],
    data: Labelled,
    chosen: torch.Tensor,
    workers: int = 0,
) -> dict[str, list[int]]:
    """By layer, the number of correct predictions in each tenth of the images at ``chosen`` (M,)."""
    layers, frozen = list(probes), _frozen(recipe, subject)
    whole_maps = frozen.whole_maps(layers)
    right: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}
    autocast = torch.autocast(torch.device(frozen.device).type, frozen.autocast, enabled=frozen.autocast is not None)
    with progress("measuring", len(chosen)) as bar, autocast:
        for pixels, labels in squares_of(data, iter(chosen.split(100)), workers, pin=frozen.device.startswith("cuda")):
            maps = whole_maps(_central(pixels.to(frozen.device, non_blocking=True)))
            for layer in layers:
                logits = probes[layer](maps[layer])
                if not logits.isfinite().all():
                    raise ValueError(f"the logits of {layer} are not finite: check the weights and the images")
                right[layer].append(logits.argmax(1).cpu() == labels)
            bar.update(len(labels))
    return {layer: [int(p.sum()) for p in torch.cat(found).tensor_split(PARTS)] for layer, found in right.items()}


def measure_layers(
    recipe: LayerProbeRecipe,
    subject: Subject,
    layers: Sequence[str],
    train: Labelled,
    val: Labelled,
    name: str,
    holdout: int = 0,
    seed: int = 0,
    workers: int = 0,
    checkpoints: Checkpoints | None = None,
) -> Iterator[Row]:
    """Train the recipe's classifiers on the layers and test them; one row for each layer.

    Test images that are not in memory are all decoded before the training, to find a broken one in time.

    Args:
        recipe: all settings; the rows say which precision 'auto' became.
        subject: the backbone, on the device to use.
        val: the validation images, which are not read if there is a holdout.
        name: of the data in the rows.
        holdout: test on this many training images instead.
        seed: of the classifiers, the order and the crops.
        checkpoints: where the training is saved, and resumed from; None: nothing is saved.
    """
    recipe = resolved(recipe, next(subject.backbone.parameters()).device)
    torch.manual_seed(seed)
    probes = build_probes(recipe, subject, layers, len(train.classes))
    chosen, measured, of = torch.arange(len(train)), torch.arange(len(val)), val
    if holdout:
        chosen, measured = split_holdout(train, holdout)
        of, name = train, f"{name.rpartition(' ')[0]}, {counted(holdout, 'training image')}"
    trained = f"{recipe}, {', '.join(layers)}, seed {seed}, images {fingerprint(chosen)} of {identity_of(train)}"
    checkpoint = (checkpoints or Checkpoints()).open(f"{subject.identity}, {trained}")
    started = time.monotonic() - checkpoint.seconds
    check_decoding(of, measured, workers)
    train_probes(recipe, subject, probes, train, chosen, seed, workers, checkpoint)
    found = count_correct(recipe, subject, probes, of, measured, workers)
    # all are trained in one pass: each row gets its share of the time
    seconds = (time.monotonic() - started) / len(probes)
    for layer, counts in found.items():
        probe: Any = probes[layer]
        if recipe.classifier == "linear":
            kind = f"max-pooled to {probe[0].output_size} x {probe[0].output_size}, batch norm, linear"
        else:
            kind = f"the rest of the network, fc layers of {recipe.fc_size}"
        epochs = counted(recipe.epochs, "epoch")
        settings = f"{kind}; {epochs} of SGD, {subject.size} pixels, {recipe.precision}"
        yield measured_row(
            subject, counts, len(measured), name, settings, seconds,
            protocol=recipe.protocol, budget=recipe.budget, layer=layer, seed=seed,
        )  # fmt: skip


def _frozen(recipe: LayerProbeRecipe, subject: Subject) -> Frozen:
    device = next(subject.backbone.parameters()).device
    return Frozen(subject.backbone, subject.size, str(device), recipe.precision)


def _rest_of_network(subject: Subject, index: int, classes: int, fc_size: int) -> nn.Module:
    if subject.architecture != "rotnet_alexnet":
        raise ValueError(
            f"the layers of {subject.architecture} after a layer are not known: use rotnet_alexnet or a linear recipe"
        )
    fresh = timm.create_model("rotnet_alexnet", num_classes=classes, fc_size=fc_size)
    return nn.Sequential(fresh.features[fresh.feature_ends[index] + 1 :], fresh.head)


def _central(pixels: torch.Tensor) -> torch.Tensor:
    crop = round(CROP * pixels.shape[-1])
    start = (pixels.shape[-1] - crop) // 2
    return pixels[..., start : start + crop, start : start + crop]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    lines = (f"{r.name:26s} {counted(r.epochs, 'epoch')}; {r.note}" for r in LAYER_PROBES.values())
    parser = create_parser("probe-layers", __doc__, lines)
    parser.add_argument("recipe", choices=LAYER_PROBES, metavar="RECIPE", help="one of the recipes below")
    options.add_model(parser)
    parser.add_argument("--layers", nargs="+", metavar="LAYER", help="layers to probe [all]")
    parser.add_argument("--epochs", type=positive, help="number of epochs, milestones in proportion [the recipe's]")
    options.add_data(parser, torchvision=True)
    parser.add_argument("--workers", type=int, default=0, help="data-loading worker processes [%(default)s]")
    options.add_run(parser, "runs/imagenet")
    args = parser.parse_args(arguments)
    return run_measuring(lambda: _measure(args), args.device)


def _measure(args: argparse.Namespace) -> Path:
    """Train and measure what the options ask for; returns the file of the rows."""
    warn_if_emulated(args.precision, args.device)
    recipe = _recipe(args)
    subject = options.subject_of(args)
    layers = args.layers or list(layer_modules(subject.backbone))
    # a wrong layer is an error now, not after the images are read
    build_probes(recipe, subject, layers, classes=2)
    own = args.dataset not in DATASETS or args.holdout or args.size or not recipe.budget
    file = options.rows_file(args, subject, own)
    train, val = _open(args)
    if args.record:
        check_whole(args.dataset, len(train), len(val))
    train = read_into_memory(train, args.workers)
    val = train if args.holdout else read_into_memory(val, args.workers)
    name, checkpoints = name_of(args.dataset, args.data, "val"), Checkpoints(options.output_of(args, subject))
    rows = (
        dataclasses.replace(row, data=options.sized_name(row.data, args))
        for seed in progress("seeds", args.seeds, "seed", options.seeds(args), disable=args.seeds == 1)
        for row in measure_layers(
            recipe, subject, layers, train, val, name, args.holdout, seed, args.workers, checkpoints
        )
    )
    return keep_rows(rows, file, checkpoints)


def _recipe(args: argparse.Namespace) -> LayerProbeRecipe:
    """The recipe with what the options change, on the device."""
    recipe = named = LAYER_PROBES[args.recipe]
    if args.epochs is not None:
        recipe = with_epochs(recipe, args.epochs)
    if args.precision is not None:
        recipe = dataclasses.replace(recipe, precision=args.precision)
    return options.own_recipe(named, recipe, args.device)


def _open(args: argparse.Namespace) -> tuple[Labelled, Labelled]:
    """The training and the validation images; with a holdout the training images twice."""
    side = square_size(LAYER_PROBES[args.recipe], args.dataset)
    train = open_labelled(args.dataset, args.data, "train", side, args.download)
    val = train if args.holdout else open_labelled(args.dataset, args.data, "val", side, args.download)
    check_same_classes(train.classes, val.classes)
    return train, val


def with_epochs(recipe: LayerProbeRecipe, epochs: int) -> LayerProbeRecipe:
    """The recipe with another number of epochs, its milestones in proportion."""
    # at 0 the rate would fall before the first epoch
    milestones = tuple(max(1, round(milestone * epochs / recipe.epochs)) for milestone in recipe.milestones)
    return dataclasses.replace(recipe, epochs=epochs, milestones=milestones)
