"""rotation-ssl pretrain."""

import argparse
from typing import Any

from rotation_ssl.cli.options import add_command
from rotation_ssl.machine import MALLOPT_HELP
from rotation_ssl.pretraining import engine
from rotation_ssl.pretraining.options import add_options
from rotation_ssl.pretraining.recipe import FOLDER

DETAILS = f"""

The images in the --data folder (in its train/ subfolder, if there is one), or in tar shards, are rotated by 0, 90, 180
and 270 degrees, and the backbone is trained to predict the rotation. If the resized images fit into half of the free
memory they are decoded once; otherwise --workers processes decode them as they are needed. Broken images are skipped
and listed. The output folder gets a checkpoint every few minutes and, at the end, a model that
timm.create_model("local-dir:OUTPUT", pretrained=True) loads, with run.json, metrics.jsonl and curve.png. Ctrl-C saves a
checkpoint and stops; --resume continues from it and, on a CPU, gives the same weights as an uninterrupted run. This
command requires the `train` extra.

{MALLOPT_HELP}
"""


def add(commands: Any) -> None:
    """Add the command."""
    text = "pretrain a backbone on your own images"
    added = add_command(commands, "pretrain", run, text, DETAILS, as_json=False)
    defaults = (
        f"the defaults are {FOLDER.model}, {FOLDER.image_size} pixels, {FOLDER.images_per_step} images per step, "
        f"{FOLDER.steps:,} steps and seed {FOLDER.seed}"
    )
    add_options(added, f"runs/{FOLDER.name}", defaults=defaults)
    added.add_argument(
        "--dataset",
        default=FOLDER.data,
        help="folder, or the name of a dataset that timm opens (torch/..., hfds/...) [%(default)s]",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    command = engine()
    recipe = command.changed(FOLDER, data=args.dataset)
    root, download, workers = args.data, args.download, args.workers
    return int(
        command.execute(args, recipe, lambda r: command.open_images(r.data, root, r.image_size, download, workers))
    )
