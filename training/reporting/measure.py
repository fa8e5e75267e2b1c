"""Measure what the card has of published weights and has no row of yet, number by number.

    python -m training measure rotnet_nin.cifar10 --data DIR
    python -m training measure rotnet_nin.cifar10 --data DIR --list
    python -m training measure rotnet_alexnet.tinyimagenet --tinyimagenet DIR
    python -m training measure rotnet_nin.cifar10 --data DIR --only "few labels, convolutional probe"

Rows are written to training/results/ as they are measured, those of random weights beside those of the published ones;
a command that was stopped goes on where it was. Rows of other bytes than the published ones are measured anew. The code
must be committed, for a row names its commit. --list says what is missing and measures nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import timm

from rotation_ssl import zoo
from rotation_ssl.features import layer_modules
from rotation_ssl.machine import TURN_OFF, keep_large_blocks
from rotation_ssl.messages import counted
from rotation_ssl.progress import progress
from training.datasets import NAMES, check_whole, load_images
from training.reporting.check import measure_again
from training.reporting.report import keep_row
from training.reporting.rows import REPORTED, RESULTS_DIR, Row, check_device, missing_rows, read_rows, require_committed


def missing(weights: str, results: Path) -> list[Row]:
    """The numbers that published weights, and random ones beside them, have no row of, or one of other bytes.

    Raises:
        ValueError: weights that are not bundled, or whose network is not reported on.
    """
    if weights not in zoo.bundled() or weights.split(".", 1)[0] not in REPORTED:
        raise ValueError(f"{weights} is not among the weights whose numbers are reported: {', '.join(zoo.bundled())}")
    sha256 = zoo.bundled()[weights]["sha256"]
    rows = [row for row in read_rows(results) if row.weights != weights or row.sha256 == sha256]
    layers = list(layer_modules(timm.create_model(weights.split(".", 1)[0], device="meta")))
    return missing_rows(rows, weights, layers)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training measure",
        description=__doc__,
        epilog=TURN_OFF,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("weights", metavar="MODEL.TAG", help="bundled weights")
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"), help="where CIFAR-10 is [%(default)s]")
    parser.add_argument("--tinyimagenet", type=Path, metavar="DIR", help="where tiny-imagenet-200 is")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch CIFAR-10 into --data")
    parser.add_argument("--only", nargs="+", metavar="PROTOCOL", help="numbers of these protocols, as --list has them")
    parser.add_argument("--list", action="store_true", help="say what is missing, and measure nothing")
    parser.add_argument("--results", type=Path, default=RESULTS_DIR, help="folder of the rows [training/results]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps [%(default)s]")
    args = parser.parse_args(arguments)
    keep_large_blocks()
    try:
        check_device(args.device)
        wanted = missing(args.weights, args.results)
        unknown = set(args.only or []) - {numbers.protocol for numbers in REPORTED[args.weights.split(".")[0]].numbers}
        if unknown:
            raise ValueError(f"no protocol {', '.join(sorted(unknown))} of {args.weights} is reported: see --list")
        wanted = [row for row in wanted if not args.only or row.protocol in args.only]
        if args.list or not wanted:
            verb = "is" if len(wanted) == 1 else "are"
            print(*(row.number for row in wanted), f"{counted(len(wanted), 'number')} {verb} missing", sep="\n")
            return 0
        require_committed("the card")
        (dataset,) = [dataset for dataset, name in NAMES.items() if name == wanted[0].data]
        folder = {"cifar10": args.data, "tinyimagenet": args.tinyimagenet}[dataset]
        if folder is None:
            raise ValueError(f"{args.weights} is measured on {wanted[0].data}: give --{dataset} DIR")
        images = load_images(dataset, folder, 0, args.download)
        check_whole(dataset, len(images.train), len(images.test))
        pairs = measure_again(wanted, images, device=args.device)
        for _, row in progress("numbers", len(wanted), "number", pairs):
            keep_row(row, args.results / f"{row.weights}.jsonl")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    print("now: python -m training publish figures, and render")
    return 0
