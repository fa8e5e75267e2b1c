"""Load and verify RotNet weights, extract features, evaluate and pretrain image backbones.

    rotation-ssl list                          list published weights
    rotation-ssl info rotnet_nin.cifar10       show the details of published weights
    rotation-ssl fetch NAME                    download weights, verify and cache them
    rotation-ssl verify [NAME | FILE]          verify the weights on this machine
    rotation-ssl convert FILE -o FOLDER        convert another project's checkpoint
    rotation-ssl features IMAGES -o FILE       extract features from a folder of images
    rotation-ssl features IMAGES -o FOLDER/    extract features from millions of images, in parts
    rotation-ssl neighbours FOLDER IMAGE       find the nearest neighbours of IMAGE among the features in FOLDER/
    rotation-ssl orient PATHS                  find out which way up photographs are, and turn them
    rotation-ssl outliers IMAGES -o FILE       rank images by how little they resemble normal ones
    rotation-ssl evaluate MODEL --data FOLDER --output DIR
                                               evaluate every layer with k-NN and probes on labelled images
    rotation-ssl pretrain --data IMAGES        pretrain a backbone on your own images

NAME is the name of published weights, such as rotnet_nin.cifar10; rotnet_nin selects its default tag. Exit status: 0
for success, 1 if weights fail verification or images were skipped, 2 for invalid input or weights that could not be
loaded, 130 if interrupted, 141 if the program that reads the output, such as head, has closed it.
"""

import argparse
import errno
import os
import sys
from collections.abc import Sequence

import rotation_ssl
from rotation_ssl.cli import (
    convert,
    evaluate,
    features,
    fetch,
    info,
    list,
    neighbours,
    orient,
    outliers,
    pretrain,
    verify,
)
from rotation_ssl.cli.options import Parser
from rotation_ssl.messages import first_line, is_out_of_memory

COMMANDS = (list, info, fetch, verify, convert, features, neighbours, orient, outliers, evaluate, pretrain)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    if hasattr(sys.stdout, "reconfigure"):
        # the name of a file may have characters that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    args = _parser().parse_args(arguments)
    try:
        status = int(args.run(args))
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except (ValueError, OSError, ImportError) as error:
        # that of a file or a connection names what cannot be read
        if isinstance(error, BrokenPipeError) and error.strerror == os.strerror(errno.EPIPE) and sys.stdout:
            # whoever read our output, such as head, has enough of it; Python would flush the rest when it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        # those of some libraries are several lines
        print(f"error: {' '.join(line.strip() for line in str(error).splitlines())}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = [option for option in ("batch_size", "size") if hasattr(args, option)]
        smaller = f"; give a smaller --{advice[0].replace('_', '-')}" if advice else ""
        print(f"error: not enough memory ({first_line(error)}){smaller}", file=sys.stderr)
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
