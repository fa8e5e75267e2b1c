"""Measuring reported numbers again, and for the first time: from rows to rows, by the protocol that each one names."""

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rotation_ssl.evaluation.frozen import PARTS
from rotation_ssl.evaluation.measure import Measurement
from rotation_ssl.labelled import Images
from rotation_ssl.pretraining.options import WORKERS
from rotation_ssl.progress import progress
from training.datasets import DATASETS, check_whole, dataset_of, load_images
from training.evaluation.finetune import measure_transfer, transfer_subject
from training.evaluation.labelled import Labelled, open_labelled, read_into_memory
from training.evaluation.layers import measure_layers, square_size
from training.evaluation.orientation import calibration_of, measure_orientation, photo_list
from training.evaluation.outliers import measure_outliers, outlier_data
from training.evaluation.probes import measure_features, measure_rotation
from training.evaluation.subject import Subject, recommended_layer, subject_of_row
from training.protocols import PROTOCOLS
from training.reporting.rows import Row, read_file
from training.transfer import classification, detection, segmentation
from training.transfer.command import RESCALED

QUICK_PARTS = (0, 1)
Load = Callable[[int, bool], Images]  # of a side in pixels, and whether test images alone are wanted
Open = Callable[[int], tuple[Labelled, Labelled]]  # of a side in pixels
Pairs = Iterator[tuple[Row, Row]]
TRANSFERS: dict[str, ModuleType] = {"voc": classification, "detect": detection, "segment": segmentation}


@dataclass(frozen=True)
class Source:
    """One dataset: its id, its ``folder``, for detection the file of ``proposals``, for outliers the folders
    ``cifar100`` and ``photos``; ``whole``: a part is an error.
    """

    dataset: str
    folder: Path
    download: bool = False
    proposals: Path | None = None
    whole: bool = False
    cifar100: Path | None = None
    photos: Path | None = None


def command_of(row: Row) -> str:
    """The command of the lab that measures the row's protocol."""
    return PROTOCOLS[row.protocol].command


@dataclass(frozen=True)
class Setting:
    """How rows are measured again: on which tenths of the test images and where, and the folder that trainings on new
    crops keep their state in; None: nothing is kept.
    """

    load: Load
    open_splits: Open
    parts: Sequence[int]
    device: str
    checkpoints: Path | None


def measure_source(
    rows: Sequence[Row], source: Source, quick: bool = False, device: str = "cpu", checkpoints: Path | None = None
) -> Pairs:
    """Each row and what is measured now, of rows that all are of one dataset; arguments as :func:`measure_again`.

    Raises:
        ValueError: as :func:`measure_again` and :func:`transfer_again`.
    """

    @functools.cache
    def load(size: int, test_only: bool) -> Images:
        images = load_images(source.dataset, source.folder, size, source.download, test_only=test_only)
        if source.whole:
            check_whole(source.dataset, len(images.train), len(images.test))
        return images

    def open_splits(size: int) -> tuple[Labelled, Labelled]:
        train, val = (
            open_labelled(source.dataset, source.folder, split, size, source.download) for split in ("train", "val")
        )
        if source.whole:
            check_whole(source.dataset, len(train), len(val))
        return read_into_memory(train, WORKERS), read_into_memory(val, WORKERS)

    own = [row for row in rows if command_of(row) in AGAIN]
    yield from measure_again(own, load, open_splits, quick, device, checkpoints)
    yield from transfer_again([row for row in rows if command_of(row) in TRANSFERS], source, device)
    yield from outliers_again([row for row in rows if command_of(row) == "outliers"], source, device)
    yield from orientation_again([row for row in rows if command_of(row) == "orientation"], source, device)


def measure_sources(
    rows: Sequence[Row],
    sources: Mapping[Any, Source | None],
    quick: bool = False,
    device: str = "cpu",
    checkpoints: Path | None = None,
) -> Pairs:
    """Each row that has a source, by its key, and what is measured now: source by source, with a progress bar."""
    for source in filter(None, dict.fromkeys(sources.values())):
        own = [row for row in rows if sources[row.key] == source]
        yield from progress(own[0].data, len(own), "number", measure_source(own, source, quick, device, checkpoints))


def measure_again(
    rows: Sequence[Row],
    load: Load,
    open_splits: Open,
    quick: bool = False,
    device: str = "cpu",
    checkpoints: Path | None = None,
) -> Pairs:
    """Each row and what is measured now: features of a network are taken once for all of its rows.

    Args:
        rows: all of one dataset.
        load: reads the dataset, as squares of a side.
        open_splits: opens its training and its validation images for probes of all layers, as their command does.
        quick: on the first fifth of the test images.
        device: where to work.
        checkpoints: folder that trainings on new crops keep their state in, and go on from; None: nothing is kept.

    Raises:
        ValueError: rows of weights that are not in the manifest, or that have no recipe, or a checkpoint of another
            training.
    """
    setting = Setting(load, open_splits, QUICK_PARTS if quick else tuple(range(PARTS)), device, checkpoints)
    for subject, own in _by_subject(rows, device):
        for command in dict.fromkeys(map(command_of, own)):
            yield from AGAIN[command]([row for row in own if command_of(row) == command], subject, setting)


def _evaluate_again(rows: Sequence[Row], subject: Subject, setting: Setting) -> Pairs:
    device, parts = setting.device, setting.parts
    probed = {measurement_of(row): row for row in rows if row.protocol != "rotation"}
    images = setting.load(subject.size, not probed)
    for row in rows:
        if row.protocol == "rotation":
            yield row, measure_rotation(subject, images.test, images.name, device, parts)
    by_number = {dataclasses.replace(m, strength=None): row for m, row in probed.items()}
    if not probed:
        return
    checkpoints = setting.checkpoints and setting.checkpoints / subject.name
    for new in measure_features(subject, images, list(probed), device, parts, checkpoints=checkpoints):
        yield by_number[dataclasses.replace(measurement_of(new), strength=None)], new


def _probe_layers_again(rows: Sequence[Row], subject: Subject, setting: Setting) -> Pairs:
    for key in dict.fromkeys((row.protocol, row.budget, row.seed) for row in rows):
        by_layer = {row.layer: row for row in rows if (row.protocol, row.budget, row.seed) == key}
        row = next(iter(by_layer.values()))
        recipe = _recipe(row)
        train, val = setting.open_splits(square_size(recipe, dataset_of(row.data)))
        for new in measure_layers(recipe, subject, list(by_layer), train, val, row.data, seed=key[2] or 0):
            yield by_layer[new.layer], new


def _finetune_again(rows: Sequence[Row], subject: Subject, setting: Setting) -> Pairs:
    images = setting.load(subject.size, False)
    for row in rows:
        model, seed = subject.name if subject.published else subject.architecture, row.seed or 0
        recipe = _recipe(row)
        # a training uses its backbone up
        fresh = transfer_subject(recipe, model, seed, random=not subject.published)
        labels = row.labels_per_class, row.draw or "first"
        yield row, measure_transfer(recipe, fresh, row.layer, images, *labels, seed, setting.device)


# by the command that measures a protocol
AGAIN: dict[str, Callable[[Sequence[Row], Subject, Setting], Pairs]] = {
    "evaluate": _evaluate_again,
    "probe-layers": _probe_layers_again,
    "finetune": _finetune_again,
}


def outliers_again(rows: Sequence[Row], source: Source, device: str = "cpu") -> Pairs:
    """Each row of images that do not belong and what is measured now; all rows of one network in one run.

    Raises:
        ValueError: CIFAR-10 or CIFAR-100 is not there, or a part of it.
    """
    for subject, own in _by_subject(rows, device):
        assert source.cifar100 is not None
        normal, outlying = outlier_data(source.folder, source.cifar100, source.photos, subject.size, source.download)
        layer = next((row.layer for row in own if row.layer), recommended_layer(subject))
        yield from _paired(own, measure_outliers(subject, normal, outlying, layer))


def orientation_again(rows: Sequence[Row], source: Source, device: str = "cpu") -> Pairs:
    """Each row of which way up photographs are and what is measured now, on whole photographs.

    Raises:
        ValueError: rows of weights without a temperature, or photographs that are not all there.
    """
    for subject, own in _by_subject(rows, device):
        files = photo_list(source.dataset, source.folder)
        name = DATASETS[source.dataset].name
        yield from _paired(own, measure_orientation(subject, files, name, calibration_of(subject)))


def transfer_again(rows: Sequence[Row], source: Source, device: str = "cpu") -> Pairs:
    """Each row of a transfer to PASCAL VOC and what is measured now; a training gives several rows.

    Args:
        rows: their budgets have recipes.
        source: ``folder`` is the VOCdevkit.
        device: where to work.

    Raises:
        ValueError: a row without a recipe, no proposals for Fast R-CNN, or what the command refuses.
    """
    for training in dict.fromkeys(map(transfer_training, rows)):
        own = [row for row in rows if transfer_training(row) == training]
        with tempfile.TemporaryDirectory() as output:
            module, args = transfer_arguments(own[0], source, Path(output), device)
            new = read_file(module.measure(args))
        yield from _paired(own, new)


def transfer_arguments(
    row: Row, source: Source, output: Path, device: str = "cpu"
) -> tuple[ModuleType, argparse.Namespace]:
    """The module and the parsed options that measure a row of a transfer into a folder."""
    _recipe(row)
    module = TRANSFERS[command_of(row)]
    model, _, tag = row.weights.partition(".")
    random = tag in ("random", f"random{RESCALED}")
    words = [model if random else row.weights, "--budget", row.budget, "--data", str(source.folder)]
    words += ["--seed", str(row.seed or 0), "--device", device, "--output", str(output)]
    words += ["--random"] * random + ["--no-rescale"] * (tag == "random")
    if module is classification:
        words += ["--layers", row.layer]
    if row.protocol.startswith("voc-fast-rcnn"):
        if source.proposals is None:
            raise ValueError(f"{row.number} needs the regions to look at: give --proposals FILE")
        words += ["--proposals", str(source.proposals)]
    return module, module.build_parser().parse_args(words)


def measurement_of(row: Row) -> Measurement:
    """What the library calls a number of a frozen layer."""
    return Measurement(row.protocol, row.budget, row.layer, row.seed, row.strength)


def transfer_training(row: Row) -> tuple[object, ...]:
    """One training of a transfer gives several average precisions."""
    kind = row.protocol.removesuffix("-11-point").removesuffix("-area").removesuffix("-steps")
    return row.weights, kind, row.budget, row.layer, row.data, row.seed


def _by_subject(rows: Sequence[Row], device: str) -> Iterator[tuple[Subject, list[Row]]]:
    """Each network of the rows, on the device, and its rows."""
    for weights in dict.fromkeys(row.weights for row in rows):
        yield subject_of_row(weights).on(device), [row for row in rows if row.weights == weights]


def _paired(rows: Sequence[Row], measured: Iterable[Row]) -> Pairs:
    asked = {row.key: row for row in rows}
    for new in measured:
        if row := asked.pop(new.key, None):
            yield row, new
    if asked:
        raise ValueError(f"{next(iter(asked.values())).number} is not among what was measured again")


def _recipe(row: Row) -> Any:
    recipe = PROTOCOLS[row.protocol].recipes[row.budget]
    if recipe is None:
        raise ValueError(f"{row.number} has no recipe: it cannot be measured again")
    return recipe
