"""List, fetch, verify and convert weights, compute features of a folder of images, evaluate and pretrain.

    rotation-ssl list                          all published weights, and which are on this machine
    rotation-ssl info rotnet_nin.cifar10       what is known about one
    rotation-ssl fetch TAG                     download it into the cache: later loads need no network
    rotation-ssl verify [TAG | FILE]           hash the weights and compare golden outputs
    rotation-ssl convert FILE -o FOLDER        other people's checkpoints, for timm's local-dir:
    rotation-ssl features IMAGES -o FILE       features of a layer for every image of a folder
    rotation-ssl evaluate MODEL --data FOLDER  k-NN and probes of every layer, on labelled images
    rotation-ssl pretrain --data IMAGES        a backbone of your own, by predicting rotations

TAG is a name like rotnet_nin.cifar10; rotnet_nin alone means its default tag. With --json a command prints what a
program would read. Exit status: 0 for success, 1 when weights do not verify or images were skipped, 2 for bad input and
for what could not be loaded, 130 when interrupted.
"""

import argparse
import sys
from collections.abc import Sequence

import rotation_ssl
from rotation_ssl.cli import convert, evaluate, features, fetch, info, list, pretrain, verify
from rotation_ssl.cli.options import Parser

COMMANDS = (list, info, fetch, verify, convert, features, evaluate, pretrain)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = _parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except (ValueError, OSError, ImportError) as error:
        # those of some libraries are several lines
        print(f"error: {' '.join(line.strip() for line in str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="rotation-ssl", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"rotation_ssl {rotation_ssl.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
