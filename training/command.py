"""The frame of the lab's commands: their parser, the options that many have, and how they end."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rotation_ssl.cli.options import Parser
from rotation_ssl.machine import MALLOPT_HELP, keep_large_blocks
from rotation_ssl.messages import killed_worker_errors
from rotation_ssl.pretraining.recipe import Recipe
from rotation_ssl.progress import progress

CIFAR10_DIR = Path("data/cifar10")  # where --data is not given


def create_parser(command: str, description: str | None, recipes: Iterable[str] = ()) -> argparse.ArgumentParser:
    """The parser of ``python -m training COMMAND``, with a line of help for each recipe that it takes, if any."""
    lines = "".join(f"  {line}\n" for line in recipes)
    return Parser(
        prog=f"python -m training {command}",
        description=description,
        epilog=f"recipes:\n{lines}\n{MALLOPT_HELP}" if lines else MALLOPT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_cifar10(parser: argparse.ArgumentParser) -> None:
    """Add the options of where CIFAR-10 is."""
    parser.add_argument("--data", type=Path, default=CIFAR10_DIR, help="folder of CIFAR-10 [%(default)s]")
    parser.add_argument("--download", action="store_true", help="let torchvision download CIFAR-10 into --data")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option of where a study trains and measures."""
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu",
        help="device; CUDA_VISIBLE_DEVICES selects the GPU [%(default)s]",
    )  # fmt: skip


def run_each(recipes: Sequence[Recipe], kind: str, work: Callable[[Recipe], None]) -> int:
    """Do the work of a study, recipe by recipe, with a progress bar; one that fails is named and the others go on.

    Args:
        recipes: of the study.
        kind: what they are called, in the singular.
        work: on one of them. A ValueError is a result of the study, such as a learning rate that was too high.

    Returns:
        The exit status: 1 if any failed.
    """
    failed = 0
    for recipe in progress(f"{kind}s", len(recipes), kind, recipes):
        try:
            work(recipe)
        except ValueError as error:
            print(f"{recipe.name} has no numbers: {error}", file=sys.stderr)
            failed += 1
    return 1 if failed else 0


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
        # PyTorch raises wherever the main process is when it notices, which is seldom where it waits for images
        with killed_worker_errors():
            return work() or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
