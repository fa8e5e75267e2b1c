"""Measure a backbone: rotation accuracy, and k-NN, linear, non-linear and convolutional probes of its frozen layers.

    python -m training evaluate rotnet_nin.cifar10 --data DIR
    python -m training evaluate resnet18 --random --data DIR --size 32 --only knn linear
    python -m training evaluate resnet50 --dataset folder --data MY_IMAGES

DIR holds CIFAR-10; MY_IMAGES holds train/<class>/* and test/<class>/* (or val/). MODEL is any model of timm or of this
package, with its published weights, with --random weights, or with those of a file (--weights FILE). One frozen pass
over the images feeds the probes of all layers. The numbers are printed as they come and written to --output as
rows.jsonl (written after every number), report.md, report.json and report.png.

A probe's settings are recipes (training/protocols.py); the linear probe's strength is chosen on the last tenth of the
training images. Nothing is chosen by test images: with --holdout N the last N training images are measured in place of
the test images, which are not read then, to choose by.
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from rotation_ssl.features import extract_features, layer_modules
from rotation_ssl.labelled import LabelledImages
from rotation_ssl.machine import TURN_OFF, available_memory
from rotation_ssl.messages import counted
from rotation_ssl.precision import (
    add_precision_argument,
    autocast_type,
    resolve_precision,
    resolved,
    warn_if_emulated,
)
from rotation_ssl.pretraining.augment import crop_and_flip
from rotation_ssl.probes import (
    LINEAR_STRENGTHS,
    convolutional_probe,
    knn_predict,
    linear_predict,
    nonlinear_probe,
    probe_predict,
    train_probe,
)
from rotation_ssl.progress import progress
from rotation_ssl.rotations import count_correct_rotations
from training.datasets import DATASETS, NAMES, Images, check_whole, load_images
from training.evaluation.subject import Subject, load_subject, measured_row, preparation, record_file
from training.protocols import PROBES, ProbeRecipe
from training.reporting.report import check_rows, keep_row, run_measuring, write_report
from training.reporting.rows import PARTS, Row

PROTOCOLS = {
    "rotation": "rotation accuracy",
    "knn": "k-NN",
    "linear": "linear probe",
    "nonlinear": "non-linear probe",
    "conv": "convolutional probe",
}
MAX_VALUES = 192 * 8 * 8  # of block2, the paper's best layer
LINEAR_GRID = 4
NEIGHBOURS = 20
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One number to measure: a protocol at its cost, of a layer, with the seed of what is trained for it.

    ``strength`` is the linear probe's L2 penalty; None: it is chosen, on the last tenth of the training images.
    """

    protocol: str
    cost: str = ""
    layer: str = ""
    seed: int | None = None
    strength: float | None = None


def plan(layers: Sequence[str], protocols: Iterable[str], cost: str, seeds: Iterable[int]) -> list[Measurement]:
    """What to measure on frozen features: the protocols, by their names in :data:`PROTOCOLS`, on every layer."""
    wanted = set(protocols)
    measurements = []
    for layer in layers:
        if "knn" in wanted:
            measurements.append(Measurement("k-NN", "", layer))
        if "linear" in wanted:
            measurements.append(Measurement("linear probe", "cached", layer))
        for name in ("nonlinear", "conv"):
            if name in wanted:
                measurements += [Measurement(PROTOCOLS[name], cost, layer, seed) for seed in seeds]
    return measurements


def measure_rotation(
    subject: Subject, test: LabelledImages, data: str, device: str = "cpu", parts: Sequence[int] = range(PARTS)
) -> Row:
    """Rotation accuracy on all four rotations of every test image, or of some tenths of them.

    Raises:
        ValueError: the network does not have 4 outputs.
    """
    started = time.monotonic()
    outputs = getattr(subject.backbone, "num_classes", None)
    if outputs != 4:
        raise ValueError(f"rotation accuracy needs the 4 outputs of the rotations, {subject.name} has {outputs}")
    chosen = [test.images.tensor_split(PARTS)[part] for part in parts]
    counts, total = [], 0
    with progress("rotation accuracy", sum(map(len, chosen))) as bar:
        prepare = preparation(subject.backbone, subject.size, bar)
        for images in chosen:
            batches = (prepare(batch.to(device)) for batch in images.split(BATCH) if len(batch))
            correct, n = count_correct_rotations(subject.backbone, batches)
            counts.append(correct)
            total += n
    settings = "4 rotations of each image"
    return _row(subject, Measurement("rotation accuracy"), counts, total, data, settings, started)


def measure_features(
    subject: Subject,
    images: Images,
    measurements: Sequence[Measurement],
    device: str = "cpu",
    test_parts: Sequence[int] = range(PARTS),
    features: str | None = None,
    probes: str | None = None,
) -> Iterator[Row]:
    """The numbers that are measured on frozen features, layer by layer, each as soon as it is there.

    Features are kept as bfloat16, in one pass for all layers and all measurements that want maps of the same size:
    k-NN, linear and non-linear probe share one, the convolutional probe has its own.

    Args:
        subject: the backbone, on the device.
        images: training and test images.
        measurements: what to measure.
        device: where to train probes.
        test_parts: tenths of the test images to measure on.
        features: precision that the features are computed in, which the rows say then; None: fp32.
        probes: precision of the trained probes; None: their recipes'. The rows say what 'auto' was.

    Raises:
        ValueError: a layer or protocol that does not exist, fewer training images than neighbours, features that do not
            fit into memory, or what the probes refuse.
    """
    if any(m.protocol == "k-NN" for m in measurements) and len(images.train) < NEIGHBOURS:
        raise ValueError(f"k-NN asks {NEIGHBOURS} neighbours of {counted(len(images.train), 'training image')}")
    if features is not None:
        features = resolve_precision(features, device)
    autocast = autocast_type(features or "fp32")
    tenths = torch.arange(len(images.test)).tensor_split(PARTS)
    test = images.test.subset(torch.cat([tenths[part] for part in test_parts]))
    for grid in dict.fromkeys(_inputs(m)[1] for m in measurements):
        own = [m for m in measurements if _inputs(m)[1] == grid]
        layers = list(dict.fromkeys(m.layer for m in own))
        views: list[dict[str, torch.Tensor]] = []
        test_maps: dict[str, torch.Tensor] = {}
        if grid is not None:
            views, test_maps = _cache(
                subject, images.train, test, layers, grid, max(_inputs(m)[0] for m in own), device, autocast
            )
        for layer in layers:
            for measurement in (m for m in own if m.layer == layer):
                started = time.monotonic()
                if grid is None:
                    recipe = _probe_recipe(measurement, device, probes)
                    predictions, settings = _fresh_probe(recipe, subject, images, test, measurement, device, autocast)
                elif measurement.protocol == "linear probe":
                    predictions, settings, strength = _linear_probe(
                        images.train, views[0][layer], test_maps[layer], measurement.strength
                    )
                    measurement = dataclasses.replace(measurement, strength=strength)
                elif measurement.protocol == "k-NN":
                    predictions, settings = _nearest(images.train, views[0][layer], test_maps[layer])
                else:
                    maps = [view[layer] for view in views]
                    recipe = _probe_recipe(measurement, device, probes)
                    predictions, settings = _cached_probe(
                        recipe, images.train, maps, test_maps[layer], measurement, device
                    )
                    del maps
                settings += "" if features is None else f"; features in {features}"
                right = (predictions == test.labels).split([len(tenths[part]) for part in test_parts])
                counts = [int(part.sum()) for part in right]
                yield _row(subject, measurement, counts, len(test), images.name, settings, started)
            # gigabytes: not kept for the layers to come
            for maps_of in (*views, test_maps):
                maps_of.pop(layer, None)


def _cache(
    subject: Subject,
    train: LabelledImages,
    test: LabelledImages,
    layers: Sequence[str],
    grid: int,
    views: int,
    device: str,
    autocast: torch.dtype | None,
) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Pooled maps by layer, (N, C, g, g) bfloat16, of each view of the training images and of the test images."""
    grids = map_grids(subject, test.images[:1], layers, grid, device)
    one = _maps(subject.backbone, test.images[:1], grids, preparation(subject.backbone, subject.size))
    needed = sum(m.nbytes for m in one.values()) * (views * len(train) + len(test))
    available = available_memory()
    if available is not None and needed > available:
        raise ValueError(
            f"the features of {', '.join(layers)} need {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} are "
            "available: take fewer layers at a time with --layers"
        )
    with progress("features", views * len(train) + len(test)) as bar:
        prepare = preparation(subject.backbone, subject.size, bar)
        cached = [_maps(subject.backbone, _view(train.images, view), grids, prepare, autocast) for view in range(views)]
        return cached, _maps(subject.backbone, test.images, grids, prepare, autocast)


def images_to_run(measurements: Sequence[Measurement], train: int, test: int) -> int:
    """How many images :func:`measure_features` runs through the backbone, of so many training and test images."""
    total = 0
    for grid in {_inputs(m)[1] for m in measurements} - {None}:
        total += max(_inputs(m)[0] for m in measurements if _inputs(m)[1] == grid) * train + test
    return total


def map_grids(
    subject: Subject, image: torch.Tensor, layers: Sequence[str], grid: int, device: str = "cpu"
) -> dict[str, int]:
    """The side, in cells, that each layer's map is pooled to: at most ``grid``, and at most 12,288 values in all."""
    prepare = preparation(subject.backbone, subject.size)
    maps = extract_features(subject.backbone.to(device), image, layers, pool=None, prepare=prepare)
    return {
        layer: max(1, min(grid, *m.shape[2:], math.isqrt(MAX_VALUES // m.shape[1]))) if m.ndim == 4 else 1
        for layer, m in maps.items()
    }


def _inputs(measurement: Measurement) -> tuple[int, int | None]:
    """Views and grid of the cached features that a measurement takes; grid None: it takes fresh ones."""
    if (measurement.protocol, measurement.cost) in (("k-NN", ""), ("linear probe", "cached")):
        return 1, LINEAR_GRID
    recipe = _recipe(measurement)
    return recipe.views, recipe.grid


def _recipe(measurement: Measurement) -> ProbeRecipe:
    key = measurement.protocol, measurement.cost
    if key not in PROBES:
        known = ", ".join(f"{protocol} ({cost})" for protocol, cost in PROBES)
        raise ValueError(f"no recipe for {measurement.protocol} ({measurement.cost}); there are {known}")
    return PROBES[key]


def _probe_recipe(measurement: Measurement, device: str, precision: str | None) -> ProbeRecipe:
    recipe = _recipe(measurement)
    return resolved(dataclasses.replace(recipe, precision=precision or recipe.precision), device)


def _view(images: torch.Tensor, view: int, padding: int = 4, padding_mode: str = "reflect") -> torch.Tensor:
    """The images as they are (view 0), or crops and mirrorings of them that are the same at every call."""
    if view == 0:
        return images
    generator = torch.Generator().manual_seed(view)
    return crop_and_flip(images, images.shape[-1], padding, padding_mode, True, generator)


def _maps(
    backbone: nn.Module,
    images: torch.Tensor,
    grids: dict[str, int],
    prepare: Callable[[torch.Tensor], torch.Tensor],
    autocast: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """bfloat16 maps (N, C, g, g) by layer; vectors as (N, D, 1, 1)."""
    taken = extract_features(
        backbone,
        images,
        list(grids),
        grid=grids,
        prepare=prepare,
        batch_size=BATCH,
        dtype=torch.bfloat16,
        autocast=autocast,
    )
    return {layer: f.unflatten(1, (-1, grids[layer], grids[layer])) for layer, f in taken.items()}


def _linear_probe(
    train: LabelledImages, features: torch.Tensor, test: torch.Tensor, strength: float | None
) -> tuple[torch.Tensor, str, float]:
    strengths = LINEAR_STRENGTHS if strength is None else (strength,)
    classes, tenth, side = len(train.classes), max(1, len(train) // 10), test.shape[-1]
    # L-BFGS gives up after 125 evaluations of the loss in 100 iterations; where it converges it stops before
    fits = len(strengths) + (len(strengths) > 1)
    with progress("linear probe", fits * 125, "evaluation") as bar:
        predictions, strength = linear_predict(
            features.flatten(1).float(), train.labels, test.flatten(1).float(), classes, tenth, strengths,
            evaluated=bar.update,
        )  # fmt: skip
    candidates = ", ".join(f"{s:g}" for s in LINEAR_STRENGTHS)
    settings = f"logistic regression, {side} x {side} average pooling, L2 {strength:g}, chosen of {candidates}"
    return predictions, settings, strength


def _nearest(train: LabelledImages, maps: torch.Tensor, test: torch.Tensor) -> tuple[torch.Tensor, str]:
    side = test.shape[-1]
    # where the cells are of equal size, as those of maps of 8, 16 or 32, this is the global average
    pooled = [m.float().mean((2, 3)) for m in (maps, test)]
    predictions = knn_predict(pooled[0], train.labels, pooled[1], len(train.classes), k=NEIGHBOURS)
    return predictions, f"k = {NEIGHBOURS}, cosine, mean of the {side} x {side} average-pooled cells"


def _cached_probe(
    recipe: ProbeRecipe,
    train: LabelledImages,
    maps: list[torch.Tensor],
    test: torch.Tensor,
    measurement: Measurement,
    device: str,
) -> tuple[torch.Tensor, str]:
    classes, side = len(train.classes), test.shape[-1]
    probe = _new_probe(measurement, test[:1], classes, device)
    views = maps[: recipe.views]
    with progress(f"{measurement.layer} {recipe.protocol}", recipe.epochs * len(train)) as bar:

        def batches(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            generator = _epoch_generator(measurement.seed, epoch)
            for chosen in _shuffled(len(train), recipe.batch_size, generator):
                picks = torch.randint(len(views), (len(chosen),), generator=generator)
                features = torch.empty((len(chosen), *test.shape[1:]))
                for number, view in enumerate(views):
                    features[picks == number] = view[chosen[picks == number]].float()
                yield features.to(device), train.labels[chosen].to(device)
                bar.update(len(chosen))

        _train(probe, recipe, batches)
    trained = f"{counted(len(views), 'view')}, {counted(recipe.epochs, 'epoch')} of SGD in {recipe.precision}"
    return probe_predict(probe, test), f"{side} x {side} average pooling, {trained}"


def _fresh_probe(
    recipe: ProbeRecipe,
    subject: Subject,
    images: Images,
    test: LabelledImages,
    measurement: Measurement,
    device: str,
    autocast: torch.dtype | None,
) -> tuple[torch.Tensor, str]:
    train, prepare = images.train, preparation(subject.backbone, subject.size)

    def features(batch: torch.Tensor) -> torch.Tensor:
        layer = measurement.layer
        maps = extract_features(
            subject.backbone, batch, [layer], pool=None, prepare=prepare, batch_size=BATCH, autocast=autocast
        )
        return (maps[layer][:, :, None, None] if maps[layer].ndim == 2 else maps[layer]).to(device)

    probe = _new_probe(measurement, features(test.images[:1]), len(train.classes), device)
    with progress(f"{measurement.layer} {recipe.protocol}", recipe.epochs * len(train)) as bar:

        def batches(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            generator = _epoch_generator(measurement.seed, epoch)
            for chosen in _shuffled(len(train), recipe.batch_size, generator):
                crops = crop_and_flip(
                    train.images[chosen], train.images.shape[-1], recipe.padding, recipe.padding_mode, True, generator
                )
                yield features(crops), train.labels[chosen].to(device)
                bar.update(len(chosen))

        _train(probe, recipe, batches)
    parts = test.images.split(1000)
    found = [probe_predict(probe, features(part)) for part in progress("measuring", len(parts), "batch", parts)]
    trained = f"{counted(recipe.epochs, 'epoch')} of SGD in {recipe.precision}"
    return torch.cat(found), f"whole map, fresh crops and flips every epoch, {trained}"


def _new_probe(measurement: Measurement, example: torch.Tensor, classes: int, device: str) -> nn.Module:
    torch.manual_seed(measurement.seed or 0)
    if measurement.protocol == "non-linear probe":
        return nonlinear_probe(example[0].numel(), classes).to(device)
    if measurement.protocol == "convolutional probe":
        return convolutional_probe(example.shape[1], classes).to(device).to(memory_format=torch.channels_last)
    raise ValueError(f"{measurement.protocol!r} is no probe that is trained: non-linear or convolutional probe")


def _train(
    probe: nn.Module, recipe: ProbeRecipe, batches: Callable[[int], Iterable[tuple[torch.Tensor, torch.Tensor]]]
) -> None:
    names = ("epochs", "milestones", "factor", "lr", "momentum", "weight_decay")
    settings = {name: getattr(recipe, name) for name in names}
    train_probe(probe, batches, **settings, autocast=autocast_type(recipe.precision))


def _shuffled(count: int, size: int, generator: torch.Generator) -> list[torch.Tensor]:
    parts = torch.randperm(count, generator=generator).split(size)
    # batch norm has nothing to normalise by in a batch of one
    return [part for part in parts if len(part) > 1]


def _epoch_generator(seed: int | None, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * (seed or 0) + epoch)


def _row(
    subject: Subject, measurement: Measurement, counts: Sequence[int], n: int, data: str, settings: str, started: float
) -> Row:
    return measured_row(subject, counts, n, data, settings, started, **dataclasses.asdict(measurement))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training evaluate",
        description=__doc__,
        epilog=TURN_OFF,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="any model or model.tag of timm, rotnet_* among them")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="measure the weights of a safetensors file")
    parser.add_argument("--random", action="store_true", help="measure the network with random weights")
    parser.add_argument("--random-seed", type=int, default=0, help="of the random weights [%(default)s]")
    parser.add_argument(
        "--only", nargs="+", choices=PROTOCOLS, default=["rotation", "knn", "linear", "nonlinear"],
        help="what to measure [rotation, where the network has 4 outputs, knn, linear, nonlinear]",
    )  # fmt: skip
    parser.add_argument(
        "--layers", nargs="+", metavar="LAYER", help="layers to probe [all feature layers of the model]"
    )
    parser.add_argument("--seeds", type=int, default=1, help="how often each trained probe is trained [%(default)s]")
    parser.add_argument("--cost", choices=("cached", "paper"), default="cached", help="of the trained probes [cached]")
    parser.add_argument("--dataset", choices=DATASETS, default="cifar10", help="what --data holds [%(default)s]")
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"), help="where it is [%(default)s]")
    parser.add_argument("--size", type=int, help="side of the images the backbone gets [the model's own]")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch CIFAR-10 into --data")
    parser.add_argument(
        "--holdout", type=int, default=0, metavar="N", help="measure the last N training images instead"
    )
    add_precision_argument(parser, "features in fp32, probes in their recipes'")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps [%(default)s]")
    parser.add_argument("--output", type=Path, help="folder of rows and report [runs/evaluate/<weights>]")
    parser.add_argument("--record", action="store_true", help="write the rows to training/results/, for the card")
    args = parser.parse_args(arguments)

    def measure() -> Path:
        warn_if_emulated(args.precision, args.device)
        subject = load_subject(
            args.model, random=args.random, seed=args.random_seed, weights=args.weights, size=args.size
        )
        layers = args.layers or list(layer_modules(subject.backbone))
        subject.backbone.to(args.device).to(memory_format=torch.channels_last)
        wanted = set(args.only)
        if "rotation" in wanted and args.only == parser.get_default("only") and subject.backbone.num_classes != 4:
            wanted.remove("rotation")
        output = args.output or Path("runs") / "evaluate" / subject.name
        own = args.dataset not in NAMES or args.holdout or args.size or args.precision
        file = record_file(subject, bool(own)) if args.record else output / "rows.jsonl"
        measurements = plan(layers, wanted, args.cost, range(args.seeds))
        images = load_images(
            args.dataset, args.data, subject.size, args.download, args.holdout, test_only=not measurements
        )
        if args.size:
            images = dataclasses.replace(images, name=f"{images.name} at {args.size} pixels")
        if measurements:
            map_grids(subject, images.test.images[:1], layers, LINEAR_GRID, args.device)
        if args.record:
            check_whole(args.dataset, len(images.train), len(images.test))
        check_rows(file)
        if "rotation" in wanted:
            keep_row(measure_rotation(subject, images.test, images.name, args.device), file)
        if measurements:
            rows = measure_features(
                subject, images, measurements, args.device, features=args.precision, probes=args.precision
            )
            for row in progress("numbers", len(measurements), "number", rows):
                keep_row(row, file)
        if not args.record:
            write_report(output, file)
        return file

    return run_measuring(measure, args.device)
