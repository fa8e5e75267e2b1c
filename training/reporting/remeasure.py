"""Measure the numbers that rows name, for the first time or again, each by the command of its protocol."""

import argparse
import contextlib
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from rotation_ssl.evaluation.frozen import PARTS
from rotation_ssl.evaluation.measure import Measurement
from rotation_ssl.fit import Checkpoints
from rotation_ssl.labelled import LabelledSplits
from rotation_ssl.models import recommended_layer
from rotation_ssl.pretraining.options import WORKERS
from rotation_ssl.progress import progress
from training.datasets import DATASETS, check_whole, dataset_of, load_images
from training.evaluation.finetune import finetune_subject, measure_finetuned
from training.evaluation.labelled import Labelled, open_labelled, read_into_memory
from training.evaluation.layers import measure_layers, square_size
from training.evaluation.orientation import calibration_of, measure_orientation, photo_list
from training.evaluation.outliers import measure_outliers, outlier_data
from training.evaluation.probes import measure_features, measure_rotation
from training.evaluation.subject import Subject, subject_of_row
from training.protocols import PROTOCOLS
from training.reporting.rows import Row, read_file
from training.transfer import classification, detection, segmentation
from training.transfer.command import CHECKPOINT, RESCALED
from training.transfer.data import check_whole_lists

QUICK_PARTS = (0, 1)
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
class MeasureOptions:
    """Options of measuring rows.

    ``quick`` uses only the first fifth of the test images. Trainings by SGD, except those on cached features, are saved
    to ``checkpoints`` and resumed from there.
    """

    quick: bool = False
    device: str = "cpu"
    checkpoints: Checkpoints = field(default_factory=Checkpoints)

    @property
    def parts(self) -> tuple[int, ...]:
        """The tenths of the test images to measure on."""
        return QUICK_PARTS if self.quick else tuple(range(PARTS))


def measure_sources(
    rows: Sequence[Row], sources: Mapping[Any, Source | None], how: MeasureOptions = MeasureOptions()
) -> Pairs:
    """Each row that has a source, by its key, and what is measured now: source by source, with a progress bar."""
    for source in filter(None, dict.fromkeys(sources.values())):
        own = [row for row in rows if sources[row.key] == source]
        yield from progress(own[0].data, len(own), "number", measure_source(own, source, how))


def measure_source(rows: Sequence[Row], source: Source, how: MeasureOptions = MeasureOptions()) -> Pairs:
    """Each row and what is measured now, of rows that all are of one dataset.

    Raises:
        ValueError: rows of weights that are not in the manifest, rows without a recipe, a checkpoint of another
            training, data that are not there or not whole, or what a command refuses.
    """
    try:
        for command in dict.fromkeys(map(command_of, rows)):
            yield from REMEASURE[command]([row for row in rows if command_of(row) == command], source, how)
    finally:
        # the next source's images may need the memory
        _images.cache_clear()
        _splits.cache_clear()


@functools.lru_cache(maxsize=1)
def _images(source: Source, size: int, test_only: bool) -> LabelledSplits:
    """The dataset in memory, for every network of this input size."""
    images = load_images(source.dataset, source.folder, size, source.download, test_only=test_only)
    if source.whole:
        check_whole(source.dataset, len(images.train), len(images.test))
    return images


@functools.lru_cache(maxsize=1)
def _splits(source: Source, size: int) -> tuple[Labelled, Labelled]:
    """Training and validation images as probes of all layers take them, in memory if they fit."""
    train, val = (
        open_labelled(source.dataset, source.folder, split, size, source.download) for split in ("train", "val")
    )
    if source.whole:
        check_whole(source.dataset, len(train), len(val))
    return read_into_memory(train, WORKERS), read_into_memory(val, WORKERS)


def _remeasure_evaluate(rows: Sequence[Row], source: Source, how: MeasureOptions) -> Pairs:
    """The features of a network are extracted once for all of its rows."""
    for subject, own in _by_subject(rows, how.device):
        probed = {measurement_of(row): row for row in own if row.protocol != "rotation"}
        images = _images(source, subject.size, not probed)
        for row in own:
            if row.protocol == "rotation":
                yield row, measure_rotation(subject, images.test, images.name, how.device, how.parts)
        if not probed:
            continue
        by_number = {dataclasses.replace(m, strength=None): row for m, row in probed.items()}
        for new in measure_features(subject, images, list(probed), how.device, how.parts, checkpoints=how.checkpoints):
            yield by_number[dataclasses.replace(measurement_of(new), strength=None)], new
        how.checkpoints.remove()


def _remeasure_probe_layers(rows: Sequence[Row], source: Source, how: MeasureOptions) -> Pairs:
    for subject, own in _by_subject(rows, how.device):
        for key in dict.fromkeys((row.protocol, row.budget, row.seed) for row in own):
            by_layer = {row.layer: row for row in own if (row.protocol, row.budget, row.seed) == key}
            row = next(iter(by_layer.values()))
            recipe = _recipe(row)
            train, val = _splits(source, square_size(recipe, dataset_of(row.data)))
            for new in measure_layers(
                recipe, subject, list(by_layer), train, val, row.data, seed=row.seed or 0,
                workers=WORKERS, checkpoints=how.checkpoints,
            ):  # fmt: skip
                yield by_layer[new.layer], new
            how.checkpoints.remove()


def _remeasure_finetune(rows: Sequence[Row], source: Source, how: MeasureOptions) -> Pairs:
    for subject, own in _by_subject(rows, how.device):
        images = _images(source, subject.size, False)
        for row in own:
            model, seed = subject.name if subject.published else subject.architecture, row.seed or 0
            recipe = _recipe(row)
            # a training uses its backbone up
            fresh = finetune_subject(recipe, model, seed, random=not subject.published)
            labels = row.labels_per_class, row.draw or "first"
            yield row, measure_finetuned(recipe, fresh, row.layer, images, *labels, seed, how.device, how.checkpoints)
            how.checkpoints.remove()


def _remeasure_outliers(rows: Sequence[Row], source: Source, how: MeasureOptions) -> Pairs:
    """All rows of one network in one run."""
    for subject, own in _by_subject(rows, how.device):
        folders = source.folder, source.cifar100, source.photos
        data = outlier_data(source.dataset, *folders, subject.size, source.download)
        layer = next((row.layer for row in own if row.layer), None) or recommended_layer(
            subject.backbone, subject.name, "--layer"
        )
        yield from _paired(own, measure_outliers(subject, *data, layer))


def _remeasure_orientation(rows: Sequence[Row], source: Source, how: MeasureOptions) -> Pairs:
    """On whole photographs."""
    files, name = photo_list(source.dataset, source.folder), DATASETS[source.dataset].name
    for subject, own in _by_subject(rows, how.device):
        yield from _paired(own, measure_orientation(subject, files, name, calibration_of(subject)))


def _remeasure_transfer(rows: Sequence[Row], source: Source, how: MeasureOptions) -> Pairs:
    """By the commands of PASCAL VOC: the source's folder is the VOCdevkit, and a training gives several rows.

    A part is refused for every source: these rows have no n that would tell it from the whole.
    """
    lists = "Segmentation" if command_of(rows[0]) == "segment" else "Main"
    for splits in {_recipe(row).splits for row in rows}:
        check_whole_lists(source.folder, splits, lists)
    for training in dict.fromkeys(map(transfer_training, rows)):
        own = [row for row in rows if transfer_training(row) == training]
        with _output_of(training, how) as output:
            module, args = transfer_arguments(own[0], source, output, how.device)
            found = output / "rows.jsonl"
            # a command that was stopped before it could record them
            finished = found.exists() and not (output / CHECKPOINT).exists()
            yield from _paired(own, read_file(found if finished else module.measure(args)))


@contextlib.contextmanager
def _output_of(training: tuple[object, ...], how: MeasureOptions) -> Iterator[Path]:
    """A folder for a training, removed when its rows are written; what was interrupted stays, if it can be resumed."""
    if how.checkpoints.folder is None:
        with tempfile.TemporaryDirectory() as output:
            yield Path(output)
    else:
        yield (kept := how.checkpoints.folder / "-".join(map(str, training)))
        shutil.rmtree(kept)


# by the command that measures a protocol
REMEASURE: dict[str, Callable[[Sequence[Row], Source, MeasureOptions], Pairs]] = {
    "evaluate": _remeasure_evaluate,
    "probe-layers": _remeasure_probe_layers,
    "finetune": _remeasure_finetune,
    "outliers": _remeasure_outliers,
    "orientation": _remeasure_orientation,
    **dict.fromkeys(TRANSFERS, _remeasure_transfer),
}


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


def one_of_each_training(rows: Iterable[Row]) -> list[Row]:
    """One row, with its seconds, for each training and each measurement without one."""
    # a transfer gives several average precisions
    return list({transfer_training(row) if command_of(row) in TRANSFERS else row.key: row for row in rows}.values())


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
