"""Measure frozen layers: rotation accuracy, k-NN, and linear, non-linear and convolutional probes.

The features of all layers come from one pass over the images. The settings are in
:mod:`rotation_ssl.evaluation.protocols`. The strength of the linear probe is chosen on the last tenth of the training
images. Nothing is chosen on test images.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from rotation_ssl.evaluation.fresh import ProbeSpec, epoch_generator, shuffled_batches, train_fresh, training_identity
from rotation_ssl.evaluation.frozen import BATCH, PARTS, Frozen, map_grids, preparation
from rotation_ssl.evaluation.protocols import PROTOCOLS, ProbeRecipe, find_protocol
from rotation_ssl.fit import Checkpoints
from rotation_ssl.labelled import LabelledImages, LabelledSplits
from rotation_ssl.machine import check_memory
from rotation_ssl.messages import counted
from rotation_ssl.precision import autocast_type, resolved
from rotation_ssl.pretraining.augment import crop_and_flip
from rotation_ssl.probes import LINEAR_STRENGTHS, knn_predict, linear_predict, probe_predict, train_probe
from rotation_ssl.progress import progress
from rotation_ssl.rotations import ROTATIONS, count_correct, rotate_all

# a measurement, the classes it predicts for the test images, its settings, and its seconds
Found = tuple["Measurement", torch.Tensor, str, float]
LINEAR_GRID = 4
NEIGHBOURS = 20


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One number to measure: a protocol, by its id, a budget, a layer, and the random seed of the probe.

    ``strength`` is the linear probe's L2 penalty; None: chosen on the last tenth of the training images.

    Raises:
        ValueError: no such protocol, or no such budget of it.
    """

    protocol: str
    budget: str = ""
    layer: str = ""
    seed: int | None = None
    strength: float | None = None

    def __post_init__(self) -> None:
        find_protocol(self.protocol, self.budget)

    @property
    def recipe(self) -> ProbeRecipe | None:
        """How the probe is trained; None if it is not trained by SGD."""
        recipe: ProbeRecipe | None = PROTOCOLS[self.protocol].recipes[self.budget]
        return recipe

    @property
    def inputs(self) -> tuple[int, int | None]:
        """Views and grid of the cached features that it uses; without a grid it uses new features every epoch."""
        return (self.recipe.views, self.recipe.grid) if self.recipe else (1, LINEAR_GRID)


@dataclasses.dataclass(frozen=True)
class Number:
    """The result of a measurement: correct predictions in each tenth of the ``n`` test images, in order.

    ``settings`` describes what the protocol's name does not, ``seconds`` is how long it took.
    """

    measurement: Measurement
    counts: tuple[int, ...]
    n: int
    settings: str
    seconds: float

    @property
    def value(self) -> float:
        """Accuracy, a fraction."""
        return sum(self.counts) / self.n


def plan(layers: Sequence[str], protocols: Iterable[str], budget: str, seeds: Iterable[int]) -> list[Measurement]:
    """What to measure on frozen features: the protocols, by their ids, on every layer.

    Args:
        layers: their names.
        protocols: ids of :data:`PROTOCOLS`; rotation accuracy, which is not of a layer, is ignored.
        budget: of the probes that are trained by SGD.
        seeds: of these probes.

    Raises:
        ValueError: no such protocol, or no such budget of it.
    """
    wanted = {find_protocol(name).id for name in protocols}
    measurements = []
    for layer in layers:
        for protocol in (PROTOCOLS[name] for name in PROTOCOLS if name in wanted):
            if protocol.build is not None:
                measurements += [Measurement(protocol.id, budget, layer, seed) for seed in seeds]
            elif protocol.id != "rotation":
                measurements.append(Measurement(protocol.id, next(iter(protocol.recipes)), layer))
    return measurements


def measure_rotation(frozen: Frozen, test: LabelledImages, parts: Sequence[int] = range(PARTS)) -> Number:
    """Rotation accuracy on all four rotations of every test image, or of some tenths of them.

    Raises:
        ValueError: the network does not have 4 outputs.
    """
    started, backbone = time.monotonic(), frozen.backbone
    if (outputs := getattr(backbone, "num_classes", None)) != len(ROTATIONS):
        raise ValueError(f"rotation accuracy needs a network with 4 outputs, this one has {outputs}: leave it out")
    chosen = [test.images.tensor_split(PARTS)[part] for part in parts]
    counts, total = [], 0
    with progress("rotation accuracy", sum(map(len, chosen))) as bar:
        prepare = preparation(backbone, frozen.size, bar)
        for images in chosen:
            batches = (prepare(batch.to(frozen.device)) for batch in images.split(BATCH) if len(batch))
            correct, n = count_correct(backbone, map(rotate_all, batches), len(ROTATIONS))
            counts.append(correct)
            total += n
    seconds = time.monotonic() - started
    return Number(Measurement("rotation"), tuple(counts), total, "4 rotations of each image", seconds)


def measure_features(
    frozen: Frozen,
    images: LabelledSplits,
    measurements: Sequence[Measurement],
    test_parts: Sequence[int] = range(PARTS),
    precision: str | None = None,
    checkpoints: Checkpoints | None = None,
) -> Iterator[Number]:
    """The numbers that are measured on frozen features, layer by layer, each as soon as it is measured.

    Cached features are stored as bfloat16. One pass serves all layers and all measurements on maps of the same size:
    k-NN, linear and non-linear probe share one, the convolutional probe has its own. Probes on new crops every epoch
    (budget 'paper') are trained together, those of all layers in the same pass.

    Args:
        frozen: the backbone.
        images: training and test images.
        measurements: what to measure.
        test_parts: tenths of the test images to measure on.
        precision: of the trained probes; None: as in their recipes. The settings say what 'auto' became.
        checkpoints: where trainings on new crops are saved, and resumed from; None: nothing is saved.

    Raises:
        ValueError: a layer or protocol that does not exist, fewer training images than neighbours, features that do not
            fit into memory, or as the probes.
    """
    if any(m.protocol == "knn" for m in measurements) and len(images.train) < NEIGHBOURS:
        raise ValueError(f"k-NN needs {NEIGHBOURS} training images or more, got {len(images.train)}")
    tenths = torch.arange(len(images.test)).tensor_split(PARTS)
    images = dataclasses.replace(images, test=images.test.subset(torch.cat([tenths[part] for part in test_parts])))
    passes = [
        (grid, [m for m in measurements if m.inputs[1] == grid])
        for grid in dict.fromkeys(m.inputs[1] for m in measurements)
    ]
    caches = {grid: _plan_cache(frozen, images, own, grid) for grid, own in passes if grid is not None}

    def found() -> Iterator[Found]:
        for grid, own in passes:
            if grid is None:
                yield from _fresh_numbers(frozen, images, own, precision, checkpoints or Checkpoints())
            else:
                yield from _cached_numbers(frozen, images, own, caches[grid], precision)

    return _counted_numbers(found(), images.test, [len(tenths[part]) for part in test_parts], frozen.precision)


def _counted_numbers(
    found: Iterable[Found], test: LabelledImages, lengths: Sequence[int], precision: str | None
) -> Iterator[Number]:
    for measurement, predictions, settings, seconds in found:
        counts = tuple(int(part.sum()) for part in (predictions == test.labels).split(list(lengths)))
        settings += "" if precision is None else f"; features in {precision}"
        yield Number(measurement, counts, len(test), settings, seconds)


def _cached_numbers(
    frozen: Frozen,
    images: LabelledSplits,
    measurements: Sequence[Measurement],
    grids: dict[str, int],
    precision: str | None,
) -> Iterator[Found]:
    """Each measurement on the features of one pass, layer by layer."""
    train, test, views = images.train, images.test, max(m.inputs[0] for m in measurements)
    with progress("features", views * len(train) + len(test)) as bar:
        cached = [frozen.maps(_view(train.images, view), grids, bar) for view in range(views)]
        test_maps = frozen.maps(test.images, grids, bar)
    for layer in grids:
        maps, tested = [view.pop(layer) for view in cached], test_maps.pop(layer)
        for measurement in (m for m in measurements if m.layer == layer):
            started = time.monotonic()
            if measurement.protocol == "linear":
                predictions, settings, strength = _linear_probe(train, maps[0], tested, measurement.strength)
                measurement = dataclasses.replace(measurement, strength=strength)
            elif measurement.protocol == "knn":
                predictions, settings = _nearest(train, maps[0], tested)
            else:
                predictions, settings = _cached_probe(frozen, measurement, train, maps, tested, precision)
            yield measurement, predictions, settings, time.monotonic() - started
        # gigabytes, which the next layers do not need
        del maps, tested


def _plan_cache(
    frozen: Frozen, images: LabelledSplits, measurements: Sequence[Measurement], grid: int
) -> dict[str, int]:
    """Cells a side of each layer's cached map.

    Raises:
        ValueError: the maps of one pass do not fit into memory.
    """
    layers, views = list(dict.fromkeys(m.layer for m in measurements)), max(m.inputs[0] for m in measurements)
    one = images.test.images[:1]
    grids = map_grids(frozen, one, layers, grid)
    each = sum(m.nbytes for m in frozen.maps(one, grids).values())
    needed = each * (views * len(images.train) + len(images.test))
    check_memory(needed, f"the features of {', '.join(layers)}", "measure fewer layers at a time with --layers")
    return grids


def _view(images: torch.Tensor, view: int) -> torch.Tensor:
    """The images themselves (view 0), or random crops and flips of them that are the same at every call."""
    if view == 0:
        return images
    generator = torch.Generator().manual_seed(view)
    return crop_and_flip(images, images.shape[-1], 4, "reflect", True, generator)


def _linear_probe(
    train: LabelledImages, features: torch.Tensor, test: torch.Tensor, strength: float | None
) -> tuple[torch.Tensor, str, float]:
    strengths = LINEAR_STRENGTHS if strength is None else (strength,)
    classes, tenth, side = len(train.classes), max(1, len(train) // 10), test.shape[-1]
    # L-BFGS stops after 125 evaluations of the loss in 100 iterations, or earlier if it converges
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
    # if the cells are of equal size, as in maps of 8, 16 or 32, this is the global average
    pooled = [m.float().mean((2, 3)) for m in (maps, test)]
    predictions = knn_predict(pooled[0], train.labels, pooled[1], len(train.classes), k=NEIGHBOURS)
    return predictions, f"k = {NEIGHBOURS}, cosine, mean of the {side} x {side} average-pooled cells"


def _cached_probe(
    frozen: Frozen,
    measurement: Measurement,
    train: LabelledImages,
    maps: list[torch.Tensor],
    test: torch.Tensor,
    precision: str | None,
) -> tuple[torch.Tensor, str]:
    device, side = frozen.device, test.shape[-1]
    recipe, build = _training(measurement, device, precision)
    torch.manual_seed(measurement.seed or 0)
    probe = build(test[:1], len(train.classes)).to(device)
    views = maps[: recipe.views]
    with progress(f"{measurement.layer} {PROTOCOLS[measurement.protocol].title}", recipe.epochs * len(train)) as bar:

        def batches(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            generator = epoch_generator(measurement.seed, epoch)
            for chosen in shuffled_batches(len(train), recipe.batch_size, generator):
                picks = torch.randint(len(views), (len(chosen),), generator=generator)
                features = torch.empty((len(chosen), *test.shape[1:]))
                for number, view in enumerate(views):
                    features[picks == number] = view[chosen[picks == number]].float()
                yield features.to(device), train.labels[chosen].to(device)
                bar.update(len(chosen))

        names = ("epochs", "milestones", "factor", "lr", "momentum", "weight_decay")
        settings = {name: getattr(recipe, name) for name in names}
        train_probe(probe, batches, **settings, autocast=autocast_type(recipe.precision))
    trained = f"{counted(len(views), 'view')}, {counted(recipe.epochs, 'epoch')} of SGD in {recipe.precision}"
    return probe_predict(probe, test), f"{side} x {side} average pooling, {trained}"


def _fresh_numbers(
    frozen: Frozen,
    images: LabelledSplits,
    measurements: Sequence[Measurement],
    precision: str | None,
    checkpoints: Checkpoints,
) -> Iterator[Found]:
    """Each measurement on new crops, an equal part of the time for each: one training of all of a seed."""
    classes = len(images.train.classes)
    for seed in dict.fromkeys(m.seed for m in measurements):
        own = [m for m in measurements if m.seed == seed]
        specs = [_probe_spec(m, classes, frozen.device, precision) for m in own]
        # features that are computed every epoch have the precision of the probes
        backbone = dataclasses.replace(frozen, precision=frozen.precision or specs[0].recipe.precision)
        checkpoint = checkpoints.open(training_identity(backbone, images.train, specs, seed or 0))
        started = time.monotonic() - checkpoint.seconds
        probes = train_fresh(backbone, images.train, specs, seed or 0, checkpoint)
        maps = backbone.whole_maps(list(dict.fromkeys(m.layer for m in own)))
        parts = images.test.images.split(1000)
        predicted = []
        for part in progress("measuring", len(parts), "batch", parts):
            found = maps(part)
            predicted.append([probe_predict(probe, found[m.layer]) for probe, m in zip(probes, own, strict=True)])
        seconds = (time.monotonic() - started) / len(own)
        for measurement, spec, predictions in zip(own, specs, zip(*predicted, strict=True), strict=True):
            trained = f"{counted(spec.recipe.epochs, 'epoch')} of SGD, network and probe in {spec.recipe.precision}"
            settings = f"whole map, fresh crops and flips every epoch, {trained}"
            yield measurement, torch.cat(predictions), settings, seconds


def _probe_spec(measurement: Measurement, classes: int, device: str, precision: str | None) -> ProbeSpec:
    recipe, build = _training(measurement, device, precision)
    name = f"{measurement.protocol} of {measurement.layer}"
    return ProbeSpec(name, measurement.layer, recipe, lambda example: build(example, classes))


def _training(
    measurement: Measurement, device: str, precision: str | None
) -> tuple[ProbeRecipe, Callable[[torch.Tensor, int], nn.Module]]:
    """How the probe of a protocol is trained on a device, and what builds it."""
    build, recipe = PROTOCOLS[measurement.protocol].build, measurement.recipe
    assert build is not None and recipe is not None
    return resolved(dataclasses.replace(recipe, precision=precision or recipe.precision), device), build
