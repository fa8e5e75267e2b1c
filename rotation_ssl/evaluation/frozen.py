"""Frozen layers measured: rotation accuracy, k-NN, and linear, non-linear and convolutional probes.

One frozen pass over the images feeds the probes of all layers. A probe's settings are recipes, of
:mod:`rotation_ssl.evaluation.recipes`; the linear probe's strength is chosen on the last tenth of the training images.
Nothing is chosen by test images.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from timm.data import resolve_model_data_config
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from rotation_ssl.evaluation.recipes import PROBES, ProbeRecipe
from rotation_ssl.features import extract_features
from rotation_ssl.images import normalize
from rotation_ssl.labelled import Images, LabelledImages
from rotation_ssl.machine import available_memory
from rotation_ssl.messages import counted
from rotation_ssl.precision import autocast_type, resolved
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

PROTOCOLS = {
    "rotation": "rotation accuracy",
    "knn": "k-NN",
    "linear": "linear probe",
    "nonlinear": "non-linear probe",
    "conv": "convolutional probe",
}
PARTS = 10  # right answers are counted by tenths of the test images, so that a tenth can be checked by itself
MAX_VALUES = 192 * 8 * 8  # of block2, the paper's best layer
LINEAR_GRID = 4
NEIGHBOURS = 20
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A backbone in eval mode, the side of the images it takes, the device it is on, and the precision of its features.

    ``precision`` is 'fp32' or 'bf16', which the settings of a number say; None is fp32 of which they say nothing.
    """

    backbone: nn.Module
    size: int
    device: str = "cpu"
    precision: str | None = None

    @property
    def autocast(self) -> torch.dtype | None:
        """The type to autocast to."""
        return autocast_type(self.precision or "fp32")

    def maps(self, images: torch.Tensor, grids: Mapping[str, int], bar: tqdm | None = None) -> dict[str, torch.Tensor]:
        """Average-pooled maps by layer, (N, C, g, g) bfloat16; vectors as (N, D, 1, 1)."""
        taken = extract_features(
            self.backbone,
            images,
            list(grids),
            grid=grids,
            prepare=preparation(self.backbone, self.size, bar),
            batch_size=BATCH,
            dtype=torch.bfloat16,
            autocast=self.autocast,
        )
        return {layer: f.unflatten(1, (-1, grids[layer], grids[layer])) for layer, f in taken.items()}

    def whole_map(self, images: torch.Tensor, layer: str) -> torch.Tensor:
        """The map of one layer as it is, (N, C, H', W') float32, on the device."""
        prepare = preparation(self.backbone, self.size)
        maps = extract_features(
            self.backbone, images, [layer], pool=None, prepare=prepare, batch_size=BATCH, autocast=self.autocast
        )[layer]
        return (maps[:, :, None, None] if maps.ndim == 2 else maps).to(self.device)


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


@dataclasses.dataclass(frozen=True)
class Number:
    """A measurement's outcome: right answers in each tenth of the ``n`` test images, in their order.

    ``settings`` says what the protocol's name leaves open, ``seconds`` how long it took.
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


def measure_rotation(frozen: Frozen, test: LabelledImages, parts: Sequence[int] = range(PARTS)) -> Number:
    """Rotation accuracy on all four rotations of every test image, or of some tenths of them.

    Raises:
        ValueError: the network does not have 4 outputs.
    """
    started, backbone = time.monotonic(), frozen.backbone
    outputs = getattr(backbone, "num_classes", None)
    if outputs != 4:
        raise ValueError(f"rotation accuracy needs the 4 outputs of the rotations, the network has {outputs}")
    chosen = [test.images.tensor_split(PARTS)[part] for part in parts]
    counts, total = [], 0
    with progress("rotation accuracy", sum(map(len, chosen))) as bar:
        prepare = preparation(backbone, frozen.size, bar)
        for images in chosen:
            batches = (prepare(batch.to(frozen.device)) for batch in images.split(BATCH) if len(batch))
            correct, n = count_correct_rotations(backbone, batches)
            counts.append(correct)
            total += n
    seconds = time.monotonic() - started
    return Number(Measurement("rotation accuracy"), tuple(counts), total, "4 rotations of each image", seconds)


def measure_features(
    frozen: Frozen,
    images: Images,
    measurements: Sequence[Measurement],
    test_parts: Sequence[int] = range(PARTS),
    precision: str | None = None,
) -> Iterator[Number]:
    """The numbers that are measured on frozen features, layer by layer, each as soon as it is there.

    Features are kept as bfloat16, in one pass for all layers and all measurements that want maps of the same size:
    k-NN, linear and non-linear probe share one, the convolutional probe has its own.

    Args:
        frozen: the backbone.
        images: training and test images.
        measurements: what to measure.
        test_parts: tenths of the test images to measure on.
        precision: of the trained probes; None: their recipes'. The settings say what 'auto' was.

    Raises:
        ValueError: a layer or protocol that does not exist, fewer training images than neighbours, features that do not
            fit into memory, or what the probes refuse.
    """
    if any(m.protocol == "k-NN" for m in measurements) and len(images.train) < NEIGHBOURS:
        raise ValueError(f"k-NN asks {NEIGHBOURS} neighbours of {counted(len(images.train), 'training image')}")
    tenths = torch.arange(len(images.test)).tensor_split(PARTS)
    test = images.test.subset(torch.cat([tenths[part] for part in test_parts]))
    lengths = [len(tenths[part]) for part in test_parts]
    for grid in dict.fromkeys(_inputs(m)[1] for m in measurements):
        own = [m for m in measurements if _inputs(m)[1] == grid]
        layers = list(dict.fromkeys(m.layer for m in own))
        views: list[dict[str, torch.Tensor]] = []
        test_maps: dict[str, torch.Tensor] = {}
        if grid is not None:
            views, test_maps = _cache(frozen, images.train, test, layers, grid, max(_inputs(m)[0] for m in own))
        for layer in layers:
            maps = [view.pop(layer) for view in views]
            tested = test_maps.pop(layer, None)
            for measurement in (m for m in own if m.layer == layer):
                started = time.monotonic()
                predictions, settings, measurement = _measure(
                    frozen, measurement, images.train, test, maps, tested, precision
                )
                right = (predictions == test.labels).split(lengths)
                counts = tuple(int(part.sum()) for part in right)
                settings += "" if frozen.precision is None else f"; features in {frozen.precision}"
                yield Number(measurement, counts, len(test), settings, time.monotonic() - started)
            # gigabytes: not kept for the layers to come
            del maps, tested


def _measure(
    frozen: Frozen,
    measurement: Measurement,
    train: LabelledImages,
    test: LabelledImages,
    maps: list[torch.Tensor],
    test_maps: torch.Tensor | None,
    precision: str | None,
) -> tuple[torch.Tensor, str, Measurement]:
    """Predictions, settings, and the measurement with the strength that it chose; without cached maps fresh ones."""
    if measurement.protocol == "linear probe" and test_maps is not None:
        found = _linear_probe(train, maps[0], test_maps, measurement.strength)
        return found[0], found[1], dataclasses.replace(measurement, strength=found[2])
    if measurement.protocol == "k-NN" and test_maps is not None:
        return (*_nearest(train, maps[0], test_maps), measurement)
    recipe = _recipe(measurement)
    recipe = resolved(dataclasses.replace(recipe, precision=precision or recipe.precision), frozen.device)
    if test_maps is None:
        return (*_fresh_probe(recipe, frozen, train, test, measurement), measurement)
    return (*_cached_probe(recipe, train, maps, test_maps, measurement, frozen.device), measurement)


def _cache(
    frozen: Frozen, train: LabelledImages, test: LabelledImages, layers: Sequence[str], grid: int, views: int
) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Pooled maps by layer, (N, C, g, g) bfloat16, of each view of the training images and of the test images."""
    grids = map_grids(frozen, test.images[:1], layers, grid)
    one = frozen.maps(test.images[:1], grids)
    needed = sum(m.nbytes for m in one.values()) * (views * len(train) + len(test))
    available = available_memory()
    if available is not None and needed > available:
        raise ValueError(
            f"the features of {', '.join(layers)} need {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} are "
            "available: take fewer layers at a time with --layers"
        )
    with progress("features", views * len(train) + len(test)) as bar:
        cached = [frozen.maps(_view(train.images, view), grids, bar) for view in range(views)]
        return cached, frozen.maps(test.images, grids, bar)


def images_to_run(measurements: Sequence[Measurement], train: int, test: int) -> int:
    """How many images :func:`measure_features` runs through the backbone, of so many training and test images."""
    total = 0
    for grid in {_inputs(m)[1] for m in measurements} - {None}:
        total += max(_inputs(m)[0] for m in measurements if _inputs(m)[1] == grid) * train + test
    return total


def map_grids(frozen: Frozen, image: torch.Tensor, layers: Sequence[str], grid: int) -> dict[str, int]:
    """The side, in cells, that each layer's map is pooled to: at most ``grid``, and at most 12,288 values in all."""
    prepare = preparation(frozen.backbone, frozen.size)
    maps = extract_features(frozen.backbone.to(frozen.device), image, layers, pool=None, prepare=prepare)
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


def _view(images: torch.Tensor, view: int, padding: int = 4, padding_mode: str = "reflect") -> torch.Tensor:
    """The images as they are (view 0), or crops and mirrorings of them that are the same at every call."""
    if view == 0:
        return images
    generator = torch.Generator().manual_seed(view)
    return crop_and_flip(images, images.shape[-1], padding, padding_mode, True, generator)


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
    recipe: ProbeRecipe, frozen: Frozen, train: LabelledImages, test: LabelledImages, measurement: Measurement
) -> tuple[torch.Tensor, str]:
    def features(batch: torch.Tensor) -> torch.Tensor:
        return frozen.whole_map(batch, measurement.layer)

    side, classes = train.images.shape[-1], len(train.classes)
    probe = _new_probe(measurement, features(test.images[:1]), classes, frozen.device)
    with progress(f"{measurement.layer} {recipe.protocol}", recipe.epochs * len(train)) as bar:

        def batches(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            generator = _epoch_generator(measurement.seed, epoch)
            for chosen in _shuffled(len(train), recipe.batch_size, generator):
                crops = crop_and_flip(train.images[chosen], side, recipe.padding, recipe.padding_mode, True, generator)
                yield features(crops), train.labels[chosen].to(frozen.device)
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


def preparation(backbone: nn.Module, size: int, bar: tqdm | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from uint8 images (B, 3, H, H) to what the backbone takes, (B, 3, size, size), that moves a bar on."""
    cfg = resolve_model_data_config(backbone)

    def prepare(images: torch.Tensor) -> torch.Tensor:
        batch = normalize(images, cfg["mean"], cfg["std"])
        if batch.shape[-1] != size:
            batch = F.interpolate(batch, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
        if bar is not None:
            bar.update(len(images))
        return batch.contiguous(memory_format=torch.channels_last)

    return prepare
