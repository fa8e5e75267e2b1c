"""What the card must report of each of the published weights, and what of it has no row yet."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm

from rotation_ssl.features import layer_modules
from training.protocols import COVERAGES, PROTOCOLS, orientation_settings
from training.reporting.rows import Row

PUBLISHED, RANDOM, RESCALED = "", "random", "random-rescaled"


@dataclass(frozen=True)
class Required:
    """The numbers of one protocol that the card has of some weights: of each layer, seed and number of labels.

    ``data`` is the name that the data have in the rows. ``layers`` is empty for all layers, and (``''``,) where the
    protocol has none. ``of`` says of which weights: the published ones, and random ones of the network by their tags. A
    card is written when all of them exist.
    """

    data: str
    protocol: str
    budget: str = ""
    layers: tuple[str, ...] = ()
    seeds: tuple[int | None, ...] = (None,)
    labels: tuple[int | None, ...] = (None,)
    of: tuple[str, ...] = (PUBLISHED, RANDOM)


THREE = (0, 1, 2)
FEW = (20, 100, 400, 1000, 5000)  # labels of each class, as in figure 5 of the paper; 5,000 are all of CIFAR-10
CIFAR10 = "CIFAR-10 test"
NIN_ON_CIFAR10 = (
    Required(CIFAR10, "rotation", layers=("",)),
    Required(CIFAR10, "knn"),
    Required(CIFAR10, "linear", "cached"),
    Required(CIFAR10, "nonlinear", "cached", seeds=THREE),
    Required(CIFAR10, "conv", "cached", ("block2",), THREE),
    Required(CIFAR10, "finetune-conv", "cpu", ("block2",), (0,), of=(PUBLISHED,)),
    Required(CIFAR10, "finetune-nonlinear", "cpu", ("block2",), (0,), of=(PUBLISHED,)),
    Required(CIFAR10, "few-labels", "cpu", ("block2",), (0,), FEW, of=(PUBLISHED,)),
    Required(CIFAR10, "supervised", "cpu", ("block2",), (0,), FEW, of=(RANDOM,)),
)
MINIPLACES, VOC2007, EXIF = "MiniPlaces val", "VOC2007 test", "EXIF orientation examples test"


def _outliers(normal: str, layer: str, *outlying: str) -> tuple[Required, ...]:
    """What is measured with one dataset as normal and others, and noise, as outliers."""
    return (
        Required(normal, "one-class-knn", layers=(layer,), of=(PUBLISHED,)),
        *(
            Required(data, f"outliers-{score}{kind}", layers=layers, of=(PUBLISHED,))
            for data in (*outlying, "Gaussian noise", "uniform noise")
            for score, layers in (("rotation", ("",)), ("knn", (layer,)))
            for kind in ("", "-fpr95")
        ),
    )


NIN_ON_OUTLIERS = _outliers(CIFAR10, "block2", "CIFAR-100 test", "Imagenette val")
ALEXNET_ON_OUTLIERS = _outliers(MINIPLACES, "conv4", "Imagenette val", "Caltech-101 test")
ALEXNET_LAYERS = tuple(
    Required(data, "linear-sgd", "cpu", seeds=(0,)) for data in (MINIPLACES, "Imagenette and Imagewoof val")
)
ALEXNET_ON_HELD_OUT_PHOTOS = tuple(
    Required(data, "rotation", layers=("",), of=(PUBLISHED,))
    for data in (MINIPLACES, "Imagenette val", "Imagewoof val", "Caltech-101 test", VOC2007)
)
# not on Imagewoof and Caltech-101, whose held-out photographs its recipe was chosen by
ORIENTATION_ON_HELD_OUT_PHOTOS = tuple(
    required for required in ALEXNET_ON_HELD_OUT_PHOTOS if required.data in (MINIPLACES, "Imagenette val", VOC2007)
)
ORIENTATION = tuple(
    Required(data, protocol, layers=("",), of=(PUBLISHED,))
    for data in ("Imagenette val", VOC2007, EXIF)
    for protocol in (
        "orientation",
        *(f"orientation-{what}-{p}" for p in ("99", "99.5") for what in ("decided", "wrong")),
        # there are too few of the others to be ranked
        *(f"orientation-top-{share}" for share in COVERAGES if data != EXIF),
    )
)
ALEXNET_ON_VOC = tuple(
    Required(VOC2007, protocol, "cpu", (layers,), seeds, of=(PUBLISHED, RESCALED))
    for protocol, layers, seeds in (
        ("voc-classification-11-point", "all", THREE),
        ("voc-classification-area", "all", THREE),
        ("voc-classification-11-point", "fc6-8", (0,)),
        ("voc-classification-area", "fc6-8", (0,)),
        ("voc-fast-rcnn-11-point", "all", (0,)),
        ("voc-fast-rcnn-area", "all", (0,)),
        ("voc-segmentation", "all", (0,)),
    )
)
# by model.tag; what each is measured on first is what its figures and the manifest's metrics are of
REQUIRED = {
    "rotnet_nin.cifar10": NIN_ON_CIFAR10 + NIN_ON_OUTLIERS,
    "rotnet_alexnet.photos": (
        ALEXNET_LAYERS + ALEXNET_ON_HELD_OUT_PHOTOS + ALEXNET_ON_OUTLIERS + ORIENTATION + ALEXNET_ON_VOC
    ),
    "rotnet_alexnet.orientation": ORIENTATION_ON_HELD_OUT_PHOTOS + ORIENTATION,
}


def main_data(weights: str) -> str:
    """The name of the data that published weights are first of all measured on; '' of others."""
    return REQUIRED[weights][0].data if weights in REQUIRED else ""


@functools.cache
def network_layers(weights: str) -> tuple[str, ...]:
    """The layers of a published name's network, from input to output."""
    return tuple(layer_modules(timm.create_model(weights.split(".", 1)[0], device="meta")))


def missing_rows(rows: Sequence[Row], weights: str) -> list[Row]:
    """The numbers of :data:`REQUIRED` that published weights, or random ones beside them, have no row of.

    Returns:
        Rows of those numbers, without a value.
    """
    have = {row.key for row in rows}
    wanted = [
        Row(name, r.protocol, layer, float("nan"), "measured", r.data, r.budget,
            labels_per_class=labels, draw="" if labels is None else "first", seed=seed)
        for r in REQUIRED[weights]
        for name in (f"{weights.split('.', 1)[0]}.{tag}" if tag else weights for tag in r.of)
        for layer in r.layers or network_layers(weights)
        for labels in r.labels
        for seed in r.seeds
    ]  # fmt: skip
    return [row for row in wanted if row.key not in have]


def outdated(row: Row, entry: Mapping[str, Any]) -> str:
    """What a row of published weights is of that their entry in the manifest no longer has, '' for nothing."""
    if row.sha256 != entry["sha256"]:
        return f"other bytes (sha256 {row.sha256[:12]})"
    if PROTOCOLS[row.protocol].command == "orientation":
        fitted = entry.get("orientation", {"size": 0, "temperature": 0.0})
        if row.settings != orientation_settings(fitted["size"], fitted["temperature"]):
            return f"another size or temperature ({row.settings})"
    return ""


def complaints(rows: Sequence[Row], entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What keeps rows from being reported, one line each; none is good.

    Args:
        rows: all rows; quoted ones are skipped.
        entries: the manifest's, by ``model.tag``.
    """
    found = []
    for row in rows:
        if not row.measured:
            continue
        if row.weights not in entries and not row.weights.endswith((".random", ".random-rescaled")):
            found.append(f"{row.number} is of weights that have no entry in the manifest: publish them first")
        elif row.weights in entries and (what := outdated(row, entries[row.weights])):
            found.append(
                f"{row.number} is of {what} than the manifest's: measure it again with "
                f"`python -m training measure {row.weights}`"
            )
        elif not re.fullmatch("[0-9a-f]{40}", row.commit):
            found.append(f"{row.number} was measured by code that is not committed ({row.commit}): measure it again")
    for name, entry in entries.items():
        if entry["source"] == "bundled" and name not in REQUIRED:
            found.append(f"{name} is not in REQUIRED: say in training/reporting/required.py what is measured of it")
        elif entry["source"] == "bundled":
            found += [f"{row.number} has no row: measure it" for row in missing_rows(rows, name)]
    return found
