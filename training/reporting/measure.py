"""Measure the numbers of the model card that have no row yet.

    python -m training measure rotnet_nin.cifar10 --data DIR
    python -m training measure rotnet_nin.cifar10 --data DIR --list
    python -m training measure rotnet_alexnet.photos --photos DIR --voc DIR --proposals FILE
    python -m training measure rotnet_nin.cifar10 --data DIR --only few-labels

Rows of the published weights and of random ones are written to training/results/ as they are measured. To continue
after a stop, run the same command again: trainings by SGD resume from --output, except those on cached features. Rows
of weights that have been replaced are measured again, and those of an orientation that was fitted again, if its size
or temperature changed. The code must be committed, because a row names its commit. --list prints what is missing and
measures nothing.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rotation_ssl import zoo
from rotation_ssl.cli.options import add_device
from rotation_ssl.fit import Checkpoints
from rotation_ssl.machine import check_device
from rotation_ssl.messages import counted
from training.command import create_parser, run
from training.reporting.options import add_data_arguments, add_only, advice, asked_for, source_of
from training.reporting.remeasure import MeasureOptions, measure_sources
from training.reporting.report import keep_row
from training.reporting.required import REQUIRED, missing_rows, outdated
from training.reporting.rows import RESULTS_DIR, Row, read_rows, require_committed


def missing(weights: str, results: Path) -> list[Row]:
    """The numbers that published weights, and random ones of their network, have no row of, or an outdated one."""
    if weights not in zoo.bundled() or weights not in REQUIRED:
        raise ValueError(f"{weights} is not among the weights whose numbers are reported: {', '.join(REQUIRED)}")
    entry = zoo.bundled()[weights]
    rows = [row for row in read_rows(results) if row.weights != weights or not outdated(row, entry)]
    return missing_rows(rows, weights)


def _work(args: argparse.Namespace) -> None:
    check_device(args.device)
    wanted = missing(args.weights, args.results)
    wanted = [row for row in wanted if asked_for(row, args)]
    if args.list or not wanted:
        verb = "is" if len(wanted) == 1 else "are"
        print(*(row.number for row in wanted), f"{counted(len(wanted), 'number')} {verb} missing", sep="\n")
        return
    require_committed("the card")
    sources = {row.key: source_of(row, args, whole=True) for row in wanted}
    for row in wanted:
        if not sources[row.key]:
            raise ValueError(f"{args.weights} is measured on {row.data}: {advice(row, args)}")
    for _, row in measure_sources(
        wanted, sources, MeasureOptions(device=args.device, checkpoints=Checkpoints(args.output))
    ):
        keep_row(row, args.results / f"{row.weights}.jsonl")
    print("next: python -m training publish figures, then python -m training publish render")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = create_parser("measure", __doc__)
    parser.add_argument("weights", metavar="MODEL.TAG", help="name of bundled weights")
    add_data_arguments(parser)
    add_only(parser)
    parser.add_argument("--list", action="store_true", help="print what is missing, and measure nothing")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/measure"), metavar="DIR",
        help="folder that long trainings are saved in until their rows are written [%(default)s]",
    )  # fmt: skip
    parser.add_argument("--results", type=Path, default=RESULTS_DIR, help="folder of the rows [training/results]")
    add_device(parser)
    args = parser.parse_args(arguments)
    return run(lambda: _work(args))
