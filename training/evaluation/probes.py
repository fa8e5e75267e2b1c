"""Measure a backbone: rotation accuracy, and k-NN, linear, non-linear and convolutional probes of its frozen layers.

    python -m training evaluate rotnet_nin.cifar10 --data DIR
    python -m training evaluate resnet18 --random --data DIR --size 32 --only knn linear
    python -m training evaluate resnet50 --dataset folder --data MY_IMAGES

DIR contains CIFAR-10. MY_IMAGES contains train/<class>/* and test/<class>/* (or val/). MODEL is any model of timm or of
this package, with its published weights, --random weights, or the weights of a file (--weights FILE). The features of
all layers come from one pass over the images. Results are printed as they come and written to --output: rows.jsonl
(after every number), report.md, report.json and report.png.

--budget paper trains the probes of all layers together on new crops every epoch, for the authors' 100 epochs. Its state
is kept in --output between epochs: to resume after a stop, run the same command again.

The settings of the probes are recipes (rotation_ssl/evaluation/protocols.py). The linear probe's L2 penalty is
chosen on the last tenth of the training images. Nothing is chosen on test images. To tune on other images, --holdout N
tests on the last N training images and does not read the test images.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from rotation_ssl.evaluation import measure as frozen_measure
from rotation_ssl.evaluation.frozen import PARTS, Frozen, map_grids
from rotation_ssl.evaluation.measure import LINEAR_GRID, Measurement, Number, plan
from rotation_ssl.evaluation.protocols import PROTOCOLS
from rotation_ssl.features import layer_modules
from rotation_ssl.fit import Checkpoints
from rotation_ssl.labelled import LabelledImages, LabelledSplits
from rotation_ssl.precision import resolve_precision, warn_if_emulated
from rotation_ssl.progress import progress
from training.command import create_parser
from training.datasets import DATASETS
from training.evaluation import options
from training.evaluation.subject import Subject, measured_row
from training.reporting.report import keep_rows, run_measuring
from training.reporting.rows import Row

DEFAULT = ("rotation", "knn", "linear", "nonlinear")


def measure_rotation(
    subject: Subject, test: LabelledImages, data: str, device: str = "cpu", parts: Sequence[int] = range(PARTS)
) -> Row:
    """The row of :func:`rotation_ssl.evaluation.measure.measure_rotation`, on images called ``data``."""
    number = frozen_measure.measure_rotation(Frozen(subject.backbone, subject.size, device), test, parts)
    return _row(subject, number, data)


def measure_features(
    subject: Subject,
    images: LabelledSplits,
    measurements: Sequence[Measurement],
    device: str = "cpu",
    test_parts: Sequence[int] = range(PARTS),
    features: str | None = None,
    probes: str | None = None,
    checkpoints: Checkpoints | None = None,
) -> Iterator[Row]:
    """The rows of :func:`rotation_ssl.evaluation.measure.measure_features`, each as soon as it is measured.

    Args:
        subject: the backbone, on the device.
        test_parts: tenths of the test images to measure on.
        features: precision of the features, which the rows then say; None: fp32.
        probes: precision of the trained probes; None: as in their recipes. The rows say what 'auto' became.
        checkpoints: where trainings on new crops are saved, and resumed from; None: nothing is saved.
    """
    if features is not None:
        features = resolve_precision(features, device)
    backbone = Frozen(subject.backbone, subject.size, device, features)
    for number in frozen_measure.measure_features(backbone, images, measurements, test_parts, probes, checkpoints):
        yield _row(subject, number, images.name)


def _row(subject: Subject, number: Number, data: str) -> Row:
    measurement = dataclasses.asdict(number.measurement)
    return measured_row(subject, number.counts, number.n, data, number.settings, number.seconds, **measurement)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = create_parser("evaluate", __doc__)
    options.add_model(parser)
    parser.add_argument(
        "--only", nargs="+", choices=PROTOCOLS, metavar="PROTOCOL",
        help=f"{', '.join(PROTOCOLS)} [rotation, if the network has 4 outputs, knn, linear, nonlinear]",
    )  # fmt: skip
    parser.add_argument("--layers", nargs="+", metavar="LAYER", help="layers to probe [all]")
    parser.add_argument(
        "--budget", choices=("cached", "paper"), default="cached", help="training budget of the probes [%(default)s]"
    )
    options.add_data(parser)
    options.add_run(parser, "runs/evaluate", "features in fp32, probes as in their recipes")
    args = parser.parse_args(arguments)
    return run_measuring(lambda: _measure(args), args.device)


def _measure(args: argparse.Namespace) -> Path:
    """Measure what the options ask for; returns the file of the rows."""
    warn_if_emulated(args.precision, args.device)
    if args.layers and args.only == ["rotation"]:
        raise ValueError("--layers is for k-NN and probes, not for rotation accuracy: leave it out")
    subject = options.subject_of(args)
    layers = args.layers or list(layer_modules(subject.backbone))
    wanted = set(args.only or DEFAULT)
    if not args.only and subject.backbone.num_classes != 4:
        wanted.remove("rotation")
    measurements = plan(layers, wanted, args.budget, options.seeds(args))
    own = args.dataset not in DATASETS or args.holdout or args.size or args.precision
    file = options.rows_file(args, subject, own)
    images = options.images_of(args, subject.size, test_only=not measurements)
    checkpoints = Checkpoints(options.output_of(args, subject))
    if measurements:
        # a wrong layer is an error now, not after the rotation accuracy
        map_grids(Frozen(subject.backbone, subject.size, args.device), images.test.images[:1], layers, LINEAR_GRID)

    def rows() -> Iterator[Row]:
        if "rotation" in wanted:
            yield measure_rotation(subject, images.test, images.name, args.device)
        if measurements:
            numbers = measure_features(
                subject, images, measurements, args.device, features=args.precision, probes=args.precision,
                checkpoints=checkpoints,
            )  # fmt: skip
            yield from progress("numbers", len(measurements), "number", numbers)

    return keep_rows(rows(), file, checkpoints)
