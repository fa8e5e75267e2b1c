"""The options of the commands that pretrain; this module works without the extra `train`."""

import argparse
import os
from pathlib import Path

from rotation_ssl.pretraining.recipe import PRECISIONS

WORKERS = min(8, os.cpu_count() or 1)


def add_options(parser: argparse.ArgumentParser, output: str, data: Path | None = None) -> None:
    """The options of both commands; ``output`` and ``data`` are the defaults, without one --data is required."""
    where = parser.add_argument_group("where things are")
    default = "" if data is None else " [%(default)s]"
    where.add_argument("--data", type=Path, required=data is None, default=data, help=f"folder of the images{default}")
    where.add_argument("--download", action="store_true", help="let torchvision download the images to --data")
    where.add_argument("--output", type=Path, help=f"folder for checkpoints, weights and curve [{output}]")
    where.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --output")
    where.add_argument("--checkpoint-seconds", type=float, default=180.0, help="time between checkpoints [%(default)s]")
    where.add_argument("--tracker", default="tensorboard", help="one of accelerate's, or none [%(default)s]")
    watched = parser.add_argument_group("what is monitored")
    watched.add_argument(
        "--monitor", type=Path, metavar="FOLDER", help="images by class: k-NN accuracy and RankMe of the middle layers"
    )
    watched.add_argument(
        "--monitor-every", type=int, default=500, metavar="N", help="steps between two measurements [%(default)s]"
    )
    how = parser.add_argument_group("how it is computed")
    how.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto: the GPU where there is one")
    how.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="split the images of a step into N parts [1]"
    )
    how.add_argument("--sync-batchnorm", action="store_true", help="batch norm over all processes' images (GPUs)")
    how.add_argument(
        "--stream", action="store_true", help="decode images as they are needed, even if they fit in memory"
    )
    how.add_argument("--workers", type=int, default=WORKERS, help="data-loading worker processes [%(default)s]")
    instead = parser.add_argument_group("instead of the recipe's")
    instead.add_argument("--model", help="any timm model")
    instead.add_argument("--size", type=int, help="image size in pixels, crops and padding in proportion")
    instead.add_argument("--images-per-step", type=int, help="upright images; each is rotated by all rotations")
    instead.add_argument("--steps", type=int, help="number of steps, stages in proportion")
    instead.add_argument("--precision", choices=PRECISIONS, help="auto: bf16 where it is fast, else fp32")
    instead.add_argument(
        "--holdout", type=int, help="number of training images, the last ones, that are held out to tune on"
    )
    instead.add_argument("--seed", type=int, help="random seed")
