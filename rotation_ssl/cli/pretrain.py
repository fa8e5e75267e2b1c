"""rotation-ssl pretrain."""

import argparse
from pathlib import Path
from typing import Any

from rotation_ssl.cli.options import add_command
from rotation_ssl.pretraining import engine
from rotation_ssl.pretraining.options import add_options
from rotation_ssl.pretraining.recipe import FOLDER

DETAILS = """

The images below --data, in any folders, are rotated by 0, 90, 180 and 270 degrees, and the backbone learns by which.
Images that fit into memory are read once, others are decoded by --workers as they come; broken images are skipped,
counted and listed. The output folder gets a checkpoint every few minutes, and at the end what
timm.create_model("local-dir:OUTPUT", pretrained=True) takes, with run.json, metrics.jsonl and curve.png. Ctrl-C saves a
checkpoint and stops; --resume goes on from it, to the same weights as without the stop. It needs the extra: pip install
'rotation-ssl[train]'. On Linux glibc is told to keep large blocks, which is faster; ROTATION_SSL_MALLOPT=0 turns that
off.
"""


def add(commands: Any) -> None:
    """Add the command."""
    text = "pretrain a backbone on images of your own"
    added = add_command(commands, "pretrain", run, text, DETAILS, as_json=False)
    add_options(added, f"runs/{FOLDER.name}")
    added.add_argument("--dataset", default=FOLDER.data, help="folder, or a name of timm's (torch/..., hfds/...)")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    command = engine()
    recipe = command.changed(FOLDER, data=args.dataset)
    root: Path = args.data
    return int(command.execute(args, recipe, lambda r: command.open_images(r.data, root, r.image_size, args.download)))
