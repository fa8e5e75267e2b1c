"""rotation-ssl fetch."""

import argparse
import json
from typing import Any

from rotation_ssl import zoo
from rotation_ssl.cli.options import add_command, published_name
from rotation_ssl.files import sha256_of


def add(commands: Any) -> None:
    """Add the command."""
    added = add_command(commands, "fetch", run, "download weights, verify and cache them: later loads need no network")
    added.add_argument("tag", metavar="NAME", help="for example rotnet_nin.gidaris_cifar10")
    added.add_argument(
        "--accept-new-hash",
        action="store_true",
        help="for weights without a published hash: download again and record the hash",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    name = published_name(args.tag)
    file = zoo.weights_file(name, accept_new_hash=args.accept_new_hash)
    result = {"name": name, "file": str(file), "sha256": sha256_of(file), "size": file.stat().st_size}
    print(json.dumps(result, indent=1) if args.json else f"{name}: {file}\nsha256 {result['sha256']}")
    return 0
