"""Measure a backbone: rotation accuracy, and k-NN, linear, non-linear and convolutional probes of its frozen layers.

    python -m training evaluate rotnet_nin.cifar10 --data DIR
    python -m training evaluate resnet18 --random --data DIR --size 32 --only knn linear
    python -m training evaluate resnet50 --dataset folder --data MY_IMAGES

DIR holds CIFAR-10; MY_IMAGES holds train/<class>/* and test/<class>/* (or val/). MODEL is any model of timm or of this
package, with its published weights, with --random weights, or with those of a file (--weights FILE). One frozen pass
over the images feeds the probes of all layers. The numbers are printed as they come and written to --output as
rows.jsonl (written after every number), report.md, report.json and report.png.

A probe's settings are recipes (rotation_ssl/evaluation/protocols.py); the linear probe's strength is chosen on the last
tenth of the training images. Nothing is chosen by test images: with --holdout N the last N training images are measured
in place of the test images, which are not read then, to choose by.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from rotation_ssl.evaluation import measure as frozen_measure
from rotation_ssl.evaluation.frozen import PARTS, Frozen, map_grids
from rotation_ssl.evaluation.measure import LINEAR_GRID, Measurement, Number, plan
from rotation_ssl.evaluation.protocols import PROTOCOLS
from rotation_ssl.features import layer_modules
from rotation_ssl.labelled import Images, LabelledImages
from rotation_ssl.machine import TURN_OFF
from rotation_ssl.precision import add_precision_argument, resolve_precision, warn_if_emulated
from rotation_ssl.progress import progress
from training.datasets import DATASETS, FOLDER, check_whole, load_images
from training.evaluation.subject import Subject, load_subject, measured_row, record_file
from training.reporting.report import check_rows, keep_row, run_measuring, write_report
from training.reporting.rows import Row


def measure_rotation(
    subject: Subject, test: LabelledImages, data: str, device: str = "cpu", parts: Sequence[int] = range(PARTS)
) -> Row:
    """The row of :func:`rotation_ssl.evaluation.measure.measure_rotation`, on images called ``data``."""
    number = frozen_measure.measure_rotation(Frozen(subject.backbone, subject.size, device), test, parts)
    return _row(subject, number, data)


def measure_features(
    subject: Subject,
    images: Images,
    measurements: Sequence[Measurement],
    device: str = "cpu",
    test_parts: Sequence[int] = range(PARTS),
    features: str | None = None,
    probes: str | None = None,
) -> Iterator[Row]:
    """The rows of :func:`rotation_ssl.evaluation.measure.measure_features`, each as soon as it is there.

    Args:
        subject: the backbone, on the device.
        images: training and test images.
        measurements: what to measure.
        device: where to train probes.
        test_parts: tenths of the test images to measure on.
        features: precision that the features are computed in, which the rows say then; None: fp32.
        probes: precision of the trained probes; None: their recipes'. The rows say what 'auto' was.

    Raises:
        ValueError: as there.
    """
    if features is not None:
        features = resolve_precision(features, device)
    backbone = Frozen(subject.backbone, subject.size, device, features)
    for number in frozen_measure.measure_features(backbone, images, measurements, test_parts, probes):
        yield _row(subject, number, images.name)


def _row(subject: Subject, number: Number, data: str) -> Row:
    measurement = dataclasses.asdict(number.measurement)
    return measured_row(subject, number.counts, number.n, data, number.settings, number.seconds, **measurement)


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
    parser.add_argument("--budget", choices=("cached", "paper"), default="cached", help="of trained probes [cached]")
    sets = (*DATASETS, FOLDER)
    parser.add_argument(
        "--dataset", choices=sets, default="cifar10", metavar="SET", help=f"{', '.join(sets)} [cifar10]"
    )
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
        own = args.dataset not in DATASETS or args.holdout or args.size or args.precision
        file = record_file(subject, bool(own)) if args.record else output / "rows.jsonl"
        measurements = plan(layers, wanted, args.budget, range(args.seeds))
        images = load_images(
            args.dataset, args.data, subject.size, args.download, args.holdout, test_only=not measurements
        )
        if args.size:
            images = dataclasses.replace(images, name=f"{images.name} at {args.size} pixels")
        if measurements:
            map_grids(Frozen(subject.backbone, subject.size, args.device), images.test.images[:1], layers, LINEAR_GRID)
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
