"""Measure how well outliers are distinguished from normal images, by the rotation head and by k-NN.

    python -m training outliers rotnet_nin.cifar10 --data DIR --cifar100 DIR --photos DIR
    python -m training outliers rotnet_alexnet.photos --photos DIR

The normal images are the test images of CIFAR-10, or the validation images of MiniPlaces, which needs about 12 GB of
memory; k-NN compares with the training images, in a middle layer. The outliers of CIFAR-10 are the test images of
CIFAR-100 and, with --photos, the held-out photographs of Imagenette at 32 pixels, some of which show subjects of
CIFAR-10. MiniPlaces shows scenes; its outliers are the held-out photographs of Imagenette and of Caltech-101, most of
which show objects. Gaussian noise and uniform noise are added to both. Two numbers are reported for each: AUROC, and
the share of outliers that are accepted at the threshold that accepts 95 % of the normal images (FPR at 95 %).
One-class: for each class of the normal data, its training images are the normal ones and its test images are
distinguished from those of the other classes; the mean AUROC is reported. The network was trained on all classes,
whereas one-class methods are trained on a single class.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from rotation_ssl.evaluation.frozen import preparation
from rotation_ssl.features import extract_features
from rotation_ssl.labelled import LabelledImages, LabelledSplits
from rotation_ssl.models import recommended_layer
from rotation_ssl.outliers import RotationOutlierDetector, auroc, false_positive_rate
from rotation_ssl.progress import progress
from training.command import add_cifar10, create_parser
from training.datasets import DATASETS, check_whole, dataset_of, load_images, load_split
from training.evaluation import options
from training.evaluation.subject import Subject, load_subject, measured_value
from training.reporting.report import keep_rows, run_measuring
from training.reporting.required import main_data
from training.reporting.rows import Row

# the datasets that do not belong, by the normal one
OUTLYING = {"cifar10": ("cifar100", "imagenette"), "miniplaces": ("imagenette", "caltech101")}
NEIGHBOURS = 10
BATCH = 250


def measure_outliers(
    subject: Subject, normal: LabelledSplits, outlying: Mapping[str, torch.Tensor], layer: str
) -> Iterator[Row]:
    """The rows of both scores against every kind of outlier, and of one-class detection.

    Args:
        subject: the backbone, with 4 outputs, on its device.
        normal: training and test images of the normal data.
        outlying: by name (N, 3, H, H) uint8, images that do not belong; beside them noise of the normal images' number
            and size is made.
        layer: that k-NN compares in.
    """
    started = time.monotonic()
    sets = {**outlying, **noise(normal.test.images.shape)}
    rotation = RotationOutlierDetector(subject.backbone)
    knn = RotationOutlierDetector(subject.backbone, "knn", layer, NEIGHBOURS)
    train = _features(subject, normal.train.images, layer)
    knn.fit_features(train)
    test = _features(subject, normal.test.images, layer)
    found = {"rotation": _surprise(subject, rotation, normal.test.images), "knn": knn.predict_features(test)}
    for name, images in sets.items():
        theirs = {
            "rotation": _surprise(subject, rotation, images),
            "knn": knn.predict_features(_features(subject, images, layer)),
        }
        # a score gives two rows
        seconds = (time.monotonic() - started) / (2 * len(theirs))
        for score, values in theirs.items():
            where = layer if score == "knn" else ""
            of = f"against {len(normal.test):,} images of {normal.name}"
            for kind, value in (
                ("", auroc(found[score], values)),
                ("-fpr95", false_positive_rate(found[score], values)),
            ):
                protocol = f"outliers-{score}{kind}"
                yield measured_value(subject, value, name, of, seconds, protocol=protocol, layer=where)
        started = time.monotonic()
    value = one_class(subject.backbone, layer, (train, normal.train), (test, normal.test))
    settings = f"mean over {len(normal.test.classes)} classes, {NEIGHBOURS} neighbours"
    seconds = time.monotonic() - started
    yield measured_value(subject, value, normal.name, settings, seconds, protocol="one-class-knn", layer=layer)


def one_class(
    model: nn.Module,
    layer: str,
    train: tuple[torch.Tensor, LabelledImages],
    test: tuple[torch.Tensor, LabelledImages],
) -> float:
    """The mean AUROC over classes: features and labelled images of the two splits."""
    values = []
    for label in range(len(test[1].classes)):
        detector = RotationOutlierDetector(model, "knn", layer, NEIGHBOURS)
        scores = detector.fit_features(train[0][train[1].labels == label]).predict_features(test[0])
        own = test[1].labels == label
        values.append(auroc(scores[own], scores[~own]))
    return sum(values) / len(values)


def noise(shape: Sequence[int]) -> dict[str, torch.Tensor]:
    """Images of noise, uint8, by their name: Gaussian around grey with a deviation of a quarter, and uniform."""
    generator = torch.Generator().manual_seed(0)
    gaussian = (torch.randn(tuple(shape), generator=generator) * 64 + 127.5).round().clamp(0, 255)
    uniform = torch.randint(0, 256, tuple(shape), generator=generator)
    return {"Gaussian noise": gaussian.to(torch.uint8), "uniform noise": uniform.to(torch.uint8)}


def normal_dataset(weights: str) -> str:
    """The normal images in the card's numbers: what published weights are reported on; CIFAR-10 for others."""
    data = main_data(weights)
    return dataset_of(data) if data else "cifar10"


def outlier_data(
    dataset: str, folder: Path, cifar100: Path | None, photos: Path | None, size: int, download: bool = False
) -> tuple[LabelledSplits, dict[str, torch.Tensor]]:
    """The normal images, a whole dataset of :data:`OUTLYING`, and by name those of the folders given that do not
    belong.
    """
    normal = load_images(dataset, folder, size, download)
    check_whole(dataset, len(normal.train), len(normal.test))
    found = {}
    for name in OUTLYING[dataset]:
        root = cifar100 if name == "cifar100" else photos
        if root is not None:
            outlying = load_split(name, root, "test", DATASETS[dataset].size or size)
            check_whole(name, 0, len(outlying))
            found[DATASETS[name].name] = outlying.images
    return normal, found


def _features(subject: Subject, images: torch.Tensor, layer: str) -> torch.Tensor:
    with progress("features", len(images)) as bar:
        prepare = preparation(subject.backbone, subject.size, bar)
        return extract_features(subject.backbone, images, [layer], prepare=prepare, batch_size=BATCH)[layer]


def _surprise(subject: Subject, detector: RotationOutlierDetector, images: torch.Tensor) -> torch.Tensor:
    with progress("rotation scores", len(images)) as bar:
        prepare = preparation(subject.backbone, subject.size, bar)
        device = next(subject.backbone.parameters()).device
        return torch.cat([detector.predict(prepare(part.to(device))) for part in images.split(BATCH)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = create_parser("outliers", __doc__)
    parser.add_argument("model", metavar="MODEL.TAG", help="weights with four outputs")
    parser.add_argument("--normal", choices=OUTLYING, help="the normal images [as in the card, or cifar10]")
    add_cifar10(parser)
    parser.add_argument("--cifar100", type=Path, metavar="DIR", help="folder of CIFAR-100, for cifar10")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="folder of imagenette2-320, miniplaces, caltech101")
    parser.add_argument("--layer", help="layer that k-NN compares in [the recommended one]")
    options.add_output(parser, "runs/outliers")
    args = parser.parse_args(arguments)
    return run_measuring(lambda: _work(args), args.device)


def _work(args: argparse.Namespace) -> Path:
    subject = load_subject(args.model).on(args.device)
    reported = normal_dataset(subject.name)
    normal = args.normal or reported
    file = options.rows_file(args, subject, args.layer or normal != reported)
    needed = "cifar100" if normal == "cifar10" else "photos"
    if getattr(args, needed) is None:
        raise ValueError(f"the outliers of {normal} are missing: give --{needed} DIR")
    folder = args.data if normal == "cifar10" else args.photos
    data = outlier_data(normal, folder, args.cifar100, args.photos, subject.size, args.download)
    layer = args.layer or recommended_layer(subject.backbone, subject.name, "--layer")
    return keep_rows(measure_outliers(subject, *data, layer), file)
