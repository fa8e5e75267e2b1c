"""The frame of the lab's commands: their parser, the options that many have, and how they end."""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from rotation_ssl.cli.options import Parser
from rotation_ssl.machine import TURN_OFF, keep_large_blocks

CIFAR10_DIR = Path("data/cifar10")  # where --data is not given


def create_parser(command: str, description: str | None, recipes: Iterable[str] = ()) -> argparse.ArgumentParser:
    """The parser of ``python -m training COMMAND``, with a line of help for each recipe that it takes, if any."""
    lines = "".join(f"  {line}\n" for line in recipes)
    return Parser(
        prog=f"python -m training {command}",
        description=description,
        epilog=f"recipes:\n{lines}\n{TURN_OFF}" if lines else TURN_OFF,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_cifar10(parser: argparse.ArgumentParser) -> None:
    """Add the options of where CIFAR-10 is."""
    parser.add_argument("--data", type=Path, default=CIFAR10_DIR, help="folder of CIFAR-10 [%(default)s]")
    parser.add_argument("--download", action="store_true", help="let torchvision download CIFAR-10 into --data")


def run(work: Callable[[], int | None], stopped: str = "stopped; run the same command again to continue") -> int:
    """Do a command's work, with glibc's large blocks kept: an error and an interruption are one line each.

    Args:
        work: returns the exit status, None for 0.
        stopped: what to print after an interruption.

    Returns:
        The exit status: 2 after an error, 130 after an interruption.
    """
    keep_large_blocks()
    try:
        return work() or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
