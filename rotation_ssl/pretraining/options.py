"""The options of the commands that pretrain; nothing here needs the extra `train`."""

import argparse
from pathlib import Path

from rotation_ssl.machine import cpus
from rotation_ssl.pretraining.recipe import PRECISIONS

WORKERS = min(8, cpus())


def add_options(
    parser: argparse.ArgumentParser,
    output: str,
    data: Path | None = None,
    defaults: str = "the defaults are those of the recipe",
) -> None:
    """Add the options of both commands; ``output`` and ``data`` are defaults, without ``data`` --data is required."""
    where = parser.add_argument_group("input and output")
    default = "" if data is None else " [%(default)s]"
    folder = f"folder of the images, or tar shards: '{{000..999}}.tar'{default}"
    where.add_argument("--data", type=Path, required=data is None, default=data, help=folder)
    where.add_argument("--download", action="store_true", help="let torchvision download the dataset into --data")
    where.add_argument("--output", type=Path, help=f"folder for checkpoints, weights and curve [{output}]")
    where.add_argument("--resume", action="store_true", help="continue from the last checkpoint in the output folder")
    where.add_argument("--checkpoint-seconds", type=float, default=180.0, help="time between checkpoints [%(default)s]")
    where.add_argument("--tracker", default="tensorboard", help="Accelerate tracker, or none [%(default)s]")
    watched = parser.add_argument_group("monitoring")
    watched.add_argument(
        "--monitor",
        type=Path,
        metavar="FOLDER",
        help="labelled images, one folder per class: measure k-NN accuracy and RankMe of the middle layers",
    )
    watched.add_argument(
        "--monitor-every", type=int, default=500, metavar="N", help="measure every N steps [%(default)s]"
    )
    how = parser.add_argument_group("computation")
    how.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto: a GPU if there is one [auto]")
    how.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="accumulate gradients over N parts of a step [1]"
    )
    how.add_argument("--sync-batchnorm", action="store_true", help="share batch norm statistics between GPUs")
    how.add_argument(
        "--stream", action="store_true", help="decode images as they are needed, even if they fit into memory"
    )
    how.add_argument("--workers", type=int, default=WORKERS, help="data-loading worker processes [%(default)s]")
    instead = parser.add_argument_group("what to train", defaults)
    instead.add_argument("--model", help="name of any timm model")
    instead.add_argument(
        "--pretrained", action=argparse.BooleanOptionalAction, help="begin with the model's pretrained weights"
    )
    instead.add_argument("--size", type=int, help="image size in pixels; crops and padding change in proportion")
    instead.add_argument("--images-per-step", type=int, help="images per step; each one is used in every rotation")
    instead.add_argument("--steps", type=int, help="number of steps; schedule and crop stages are scaled to it")
    instead.add_argument("--precision", choices=PRECISIONS, help="auto: bf16 if the hardware supports it, else fp32")
    instead.add_argument("--holdout", type=int, help="hold out the last N training images for evaluation", metavar="N")
    instead.add_argument("--seed", type=int, help="random seed")
