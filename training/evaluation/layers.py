"""ImageNet-style probes: classifiers on every layer of a frozen backbone, all trained in one pass over fresh crops.

    python -m training probe-layers imagenet-linear-paper rotnet_alexnet.gidaris_in1k --data ILSVRC2012
    python -m training probe-layers imagenet-linear-cpu rotnet_alexnet --dataset tinyimagenet --data DIR
    python -m training probe-layers imagenet-nonlinear-cpu rotnet_alexnet --random --layers conv4 --data DIR

The data are a folder of train/<class>/* and val/<class>/* (ImageNet, Places205), Tiny-ImageNet or CIFAR-10 as they are
distributed, or a labelled data set of torchvision by timm's name (torch/places365). They are decoded by --workers as
they are needed, or held in memory where they fit. The linear classifiers are those of tables 5 and 6 of the paper, the
non-linear ones, the rest of the network trained anew, those of table 4. The last step's classifiers are measured, on
the central crops of the validation images, which choose nothing: with --holdout N the last N training images are
measured in their place, to choose by. Numbers are written to --output as rows.jsonl, report.md, report.json and
report.png.
"""

import argparse
import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional as F

from rotation_ssl.evaluation.frozen import PARTS, preparation
from rotation_ssl.features import layer_modules
from rotation_ssl.fit import fit
from rotation_ssl.machine import TURN_OFF
from rotation_ssl.messages import counted
from rotation_ssl.precision import add_precision_argument, autocast_type, resolved, warn_if_emulated
from rotation_ssl.pretraining.augment import Windows, crop_and_flip, take_windows
from rotation_ssl.probes import max_pooled_probe
from rotation_ssl.progress import progress
from training.datasets import DATASETS, FOLDER, check_whole, name_of
from training.evaluation.labelled import Labelled, check_decoding, open_labelled, read_into_memory, squares_of
from training.evaluation.recipes import LAYER_PROBES, LayerProbeRecipe
from training.evaluation.subject import Subject, load_subject, measured_row, record_file
from training.reporting.report import check_rows, keep_row, run_measuring, write_report
from training.reporting.rows import Row

MAX_VALUES = 9600  # of 12 x 12 x 64, 7 x 7 x 192, 5 x 5 x 384, 6 x 6 x 256: AlexNet's layers at 224 pixels
CROP = 7 / 8  # of the side: 224 of 256 pixels


def square_size(recipe: LayerProbeRecipe, dataset: str) -> int:
    """The side in pixels of the squares that crops are taken from: of small budgets, the data set's own."""
    return DATASETS[dataset].probe_size if recipe.budget == "cpu" and dataset in DATASETS else recipe.image_size


def split_holdout(data: Labelled, holdout: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices to train on, and ``holdout`` others, of all classes alike but for chance: a permutation's last ones.

    Raises:
        ValueError: a holdout out of range.
    """
    if not 0 < holdout < len(data):
        raise ValueError(f"holdout must be 1 to {len(data) - 1} of the training images, got {holdout}")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return order[:-holdout], order[-holdout:]


def build_probes(
    recipe: LayerProbeRecipe, subject: Subject, layers: Sequence[str], classes: int
) -> dict[str, nn.Module]:
    """A new classifier on each layer, by its name, which may have dots in it.

    Raises:
        ValueError: no such layer, a backbone that gives no maps of its layers, or whose rest cannot be trained anew.
    """
    backbone: Any = subject.backbone
    known = layer_modules(backbone)
    unknown = [layer for layer in layers if layer not in known]
    if unknown:
        raise ValueError(f"no layer {', '.join(unknown)} in this backbone; it has {', '.join(known)}")
    if not hasattr(backbone, "forward_intermediates"):
        raise ValueError(f"{subject.name} gives no maps of its layers: timm gives it no forward_intermediates")
    device = next(backbone.parameters()).device
    with torch.no_grad():
        maps = layer_maps(subject, torch.zeros(2, 3, subject.size, subject.size, device=device), layers)
    probes: dict[str, nn.Module] = {}
    for layer, features in maps.items():
        if recipe.classifier == "linear":
            channels, side = features.shape[1], min(features.shape[2:])
            cells = max(1, min(side, math.isqrt(MAX_VALUES // channels)))
            probes[layer] = max_pooled_probe(channels, cells, classes)
        else:
            probes[layer] = _rest_of_network(subject, list(known).index(layer), classes, recipe.fc_size)
        probes[layer].to(device)
    return probes


def layer_maps(subject: Subject, images: torch.Tensor, layers: Sequence[str]) -> dict[str, torch.Tensor]:
    """The maps (B, C, H', W') of the layers, in one pass of the frozen backbone over prepared images (B, 3, H, H).

    The backbone is in eval mode afterwards, whatever it was in.
    """
    backbone: Any = subject.backbone.eval()
    modules = [entry["module"] for entry in backbone.feature_info]
    indices = [modules.index(module) for name, module in layer_modules(backbone).items() if name in layers]
    names = [name for name in layer_modules(backbone) if name in layers]
    maps = backbone.forward_intermediates(images, indices, stop_early=True, intermediates_only=True)
    return dict(zip(names, maps, strict=True))


def train_probes(
    recipe: LayerProbeRecipe,
    subject: Subject,
    probes: Mapping[str, nn.Module],
    data: Labelled,
    chosen: torch.Tensor,
    seed: int = 0,
    workers: int = 0,
    autocast: torch.dtype | None = None,
) -> None:
    """Train the classifiers in place, each by its own loss; they are in eval mode afterwards.

    Args:
        recipe: all settings.
        subject: the backbone; it stays in eval mode and as it is.
        probes: by layer.
        data: the images.
        chosen: (M,) indices of those to train on.
        seed: of the order and the crops.
        workers: processes that decode.
        autocast: what the backbone and the classifiers compute in (torch.bfloat16); None: as the weights are.

    Raises:
        ValueError: fewer images than a batch, an image that does not decode, or a loss that is not finite.
    """
    if len(chosen) < recipe.batch_size:
        raise ValueError(f"{recipe.name} takes {recipe.batch_size} images a step, got {len(chosen)}")
    device = next(subject.backbone.parameters()).device
    prepare, layers = preparation(subject.backbone, subject.size), list(probes)
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
    indices = (chosen[part] for _ in range(recipe.epochs) for part in _epoch(len(chosen), recipe.batch_size, orders))

    def loss_of(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        pixels, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
        crops = crop_and_flip(pixels, round(CROP * pixels.shape[-1]), 0, "reflect", True, generator)
        with torch.no_grad():
            maps = layer_maps(subject, prepare(crops), layers)
        return torch.stack([F.cross_entropy(probes[layer](maps[layer]).float(), labels) for layer in layers])

    with contextlib.closing(squares_of(data, indices, workers, pin=device.type == "cuda")) as squares:
        fit(
            classifiers,
            squares,
            loss_of,
            optimizer,
            name=f"{recipe.name}, {', '.join(layers)}",
            scheduler=torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, recipe.factor),
            steps=recipe.epochs * steps,
            images_per_step=recipe.batch_size,
            autocast=autocast,
        )


@torch.inference_mode()
def count_correct(
    subject: Subject,
    probes: Mapping[str, nn.Module],
    data: Labelled,
    chosen: torch.Tensor,
    workers: int = 0,
    autocast: torch.dtype | None = None,
) -> dict[str, list[int]]:
    """By layer, how many of the images at ``chosen`` (M,) each classifier names rightly, in each tenth of them.

    Raises:
        ValueError: an image that does not decode, or logits that are not finite.
    """
    device = next(subject.backbone.parameters()).device
    prepare, layers = preparation(subject.backbone, subject.size), list(probes)
    right: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}
    with (
        progress("measuring", len(chosen)) as bar,
        torch.autocast(device.type, autocast, enabled=autocast is not None),
    ):
        for pixels, labels in squares_of(data, iter(chosen.split(100)), workers, pin=device.type == "cuda"):
            maps = layer_maps(subject, prepare(_central(pixels.to(device, non_blocking=True))), layers)
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
) -> Iterator[Row]:
    """Train the recipe's classifiers on the layers and measure them: a row a layer.

    Images to measure on that are not in memory are all decoded first: a broken one is no reason to train in vain.

    Args:
        recipe: all settings; the rows say which precision 'auto' was.
        subject: the backbone, on the device to work on.
        layers: names of the backbone's layers.
        train: the training images.
        val: the validation images, which are not read where there is a holdout.
        name: of the data in the rows.
        holdout: measure so many of the training images in their place.
        seed: of the classifiers, the order and the crops.
        workers: processes that decode.

    Raises:
        ValueError: as :func:`build_probes`, :func:`train_probes` and :func:`count_correct`.
    """
    started = time.monotonic()
    recipe = resolved(recipe, next(subject.backbone.parameters()).device)
    torch.manual_seed(seed)
    probes = build_probes(recipe, subject, layers, len(train.classes))
    autocast = autocast_type(recipe.precision)
    chosen, measured, of = torch.arange(len(train)), torch.arange(len(val)), val
    if holdout:
        chosen, measured = split_holdout(train, holdout)
        of, name = train, f"{name.rpartition(' ')[0]}, {counted(holdout, 'training image')}"
    check_decoding(of, measured, workers)
    train_probes(recipe, subject, probes, train, chosen, seed, workers, autocast)
    found = count_correct(subject, probes, of, measured, workers, autocast)
    seconds = time.monotonic() - started
    for layer, counts in found.items():
        probe: Any = probes[layer]
        if recipe.classifier == "linear":
            kind = f"max-pooled to {probe[0].output_size} x {probe[0].output_size}, batch norm, linear"
        else:
            kind = f"the rest of the network, fc layers of {recipe.fc_size}"
        epochs = counted(recipe.epochs, "epoch")
        settings = f"{kind}; {epochs} of SGD, {subject.size} pixels, {recipe.precision}"
        row = measured_row(
            subject, counts, len(measured), name, settings, time.monotonic() - started,
            protocol=recipe.protocol, budget=recipe.budget, layer=layer, seed=seed,
        )  # fmt: skip
        # one pass for all: each its share
        yield dataclasses.replace(row, seconds=round(seconds / len(probes), 1))


def _rest_of_network(subject: Subject, index: int, classes: int, fc_size: int) -> nn.Module:
    if subject.architecture != "rotnet_alexnet":
        raise ValueError(
            f"the rest of {subject.architecture} after a layer is not known: take rotnet_alexnet, or linear"
        )
    fresh = timm.create_model("rotnet_alexnet", num_classes=classes, fc_size=fc_size)
    return nn.Sequential(fresh.features[fresh.feature_ends[index] + 1 :], fresh.head)


def _epoch(count: int, batch_size: int, generator: torch.Generator) -> list[torch.Tensor]:
    """The batches of an epoch, the last, incomplete one dropped."""
    return list(torch.randperm(count, generator=generator).split(batch_size))[: count // batch_size]


def _central(pixels: torch.Tensor) -> torch.Tensor:
    size = pixels.shape[-1]
    crop = round(CROP * size)
    start = torch.full((len(pixels),), (size - crop) // 2)
    return take_windows(pixels, Windows(start, start, torch.zeros(len(pixels), dtype=torch.bool)), crop, "reflect")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    recipes = "\n".join(f"  {r.name:26s} {r.epochs:2d} epochs; {r.note}" for r in LAYER_PROBES.values())
    parser = argparse.ArgumentParser(
        prog="python -m training probe-layers", description=__doc__, epilog=f"recipes:\n{recipes}\n\n{TURN_OFF}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("recipe", choices=LAYER_PROBES, metavar="RECIPE", help="one of the recipes below")
    parser.add_argument("model", metavar="MODEL", help="any model or model.tag of timm, rotnet_* among them")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="measure the weights of a safetensors file")
    parser.add_argument("--random", action="store_true", help="measure the network with random weights")
    parser.add_argument("--layers", nargs="+", metavar="LAYER", help="layers to probe [all]")
    parser.add_argument("--seeds", type=int, default=1, help="how often the classifiers are trained [%(default)s]")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's, rates falling in proportion")
    parser.add_argument(
        "--dataset", default=FOLDER, help=f"folder, {', '.join(DATASETS)}, or torch/NAME of torchvision [%(default)s]"
    )
    parser.add_argument("--data", type=Path, required=True, help="where it is")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch it into --data")
    parser.add_argument("--size", type=int, help="side of the images the backbone gets [the model's own]")
    parser.add_argument("--holdout", type=int, default=0, metavar="N", help="measure N training images instead")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images [%(default)s]")
    add_precision_argument(parser)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps [%(default)s]")
    parser.add_argument("--output", type=Path, help="folder of rows and report [runs/imagenet/<weights>]")
    parser.add_argument("--record", action="store_true", help="write the rows to training/results/, for the card")
    args = parser.parse_args(arguments)

    def measure() -> Path:
        warn_if_emulated(args.precision, args.device)
        named = resolved(LAYER_PROBES[args.recipe], args.device)
        recipe = LAYER_PROBES[args.recipe]
        if args.epochs is not None:
            recipe = with_epochs(recipe, args.epochs)
        if args.precision is not None:
            recipe = dataclasses.replace(recipe, precision=args.precision)
        recipe = resolved(recipe, args.device)
        if recipe != named:
            recipe = dataclasses.replace(recipe, budget="")
        subject = load_subject(args.model, random=args.random, weights=args.weights, size=args.size)
        subject.backbone.to(args.device).to(memory_format=torch.channels_last)
        layers = args.layers or list(layer_modules(subject.backbone))
        build_probes(recipe, subject, layers, classes=2)
        output = args.output or Path("runs") / "imagenet" / subject.name
        own = args.dataset not in DATASETS or args.holdout or args.size or recipe != named
        file = record_file(subject, bool(own)) if args.record else output / "rows.jsonl"
        side = square_size(LAYER_PROBES[args.recipe], args.dataset)
        train = open_labelled(args.dataset, args.data, "train", side, args.download)
        val = train if args.holdout else open_labelled(args.dataset, args.data, "val", side, args.download)
        if val.classes != train.classes:
            raise ValueError(f"there are {len(train.classes)} classes to train on and {len(val.classes)} to measure on")
        if args.record:
            check_whole(args.dataset, len(train), len(val))
        train = read_into_memory(train, args.workers)
        val = train if args.holdout else read_into_memory(val, args.workers)
        name = name_of(args.dataset, args.data, "val")
        check_rows(file)
        for seed in progress("seeds", args.seeds, "seed", range(args.seeds), disable=args.seeds == 1):
            for row in measure_layers(recipe, subject, layers, train, val, name, args.holdout, seed, args.workers):
                keep_row(dataclasses.replace(row, data=f"{row.data} at {args.size} pixels") if args.size else row, file)
        if not args.record:
            write_report(output, file)
        return file

    return run_measuring(measure, args.device)


def with_epochs(recipe: LayerProbeRecipe, epochs: int) -> LayerProbeRecipe:
    """The recipe in so many epochs, its milestones in proportion.

    Raises:
        ValueError: fewer than one.
    """
    if epochs < 1:
        raise ValueError(f"--epochs must be at least 1, got {epochs}")
    # at 0 the first epoch would begin with a rate that has fallen already
    milestones = tuple(max(1, round(milestone * epochs / recipe.epochs)) for milestone in recipe.milestones)
    return dataclasses.replace(recipe, epochs=epochs, milestones=milestones)
