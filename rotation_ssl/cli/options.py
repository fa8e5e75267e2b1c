"""What the commands share: how they are added and refuse arguments, and what a name of weights means."""

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import timm

from rotation_ssl import zoo
from rotation_ssl.embedding.files import check_local


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments, as the commands do with everything else."""

    def error(self, message: str) -> NoReturn:
        """Print it, and exit with status 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
    details: str = "",
    as_json: bool = True,
) -> argparse.ArgumentParser:
    """A command: ``text`` is its line among the others, with ``details`` the top of its own help."""
    added: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.{details}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if as_json:
        added.add_argument("--json", action="store_true", help="print JSON")
    added.set_defaults(run=run)
    return added


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option of where the network runs."""
    parser.add_argument("--device", default="cpu", help="device: cpu, cuda, cuda:1, mps [%(default)s]")


def add_precision_argument(parser: argparse._ActionsContainer, default: str = "the recipe's") -> None:
    """The option --precision, the same in every command that has it."""
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        help=f"auto: bf16 if the hardware supports it, else fp32 [{default}]",
    )


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def check_output(file: Path, images: Iterable[Path], force: bool) -> None:
    """Refuse a file that cannot be written or that nobody wants to lose, before the work.

    Raises:
        ValueError: it is a URL, is one of the images, exists and is not a regular file, exists without ``force``, or
            is in no folder or one that is not writable.
    """
    check_local(file, "file")
    if file.exists() and any(image.exists() and file.samefile(image) for image in images):
        raise ValueError(f"{file} is one of the images; give another name")
    if (file.exists() or file.is_symlink()) and not file.is_file():
        raise ValueError(f"{file} exists and is not a regular file; give another name")
    if not file.parent.is_dir():
        raise ValueError(f"{file} cannot be written: {file.parent} is not a folder")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{file} cannot be written: the folder {file.parent} is not writable")
    if file.exists() and not force:
        raise ValueError(f"{file} exists; give another name, or --force to replace it")


def published_name(name: str) -> str:
    """``model.tag`` of published weights; the name of a model alone means its default tag, as in timm.

    Raises:
        ValueError: no such weights; the error lists those of the model, where it has any.
    """
    model = name.split(".", 1)[0]
    default = f"{model}.{timm.get_pretrained_cfg(model).tag}" if name == model and timm.is_model(model) else name
    for known in (name, default):
        if known in zoo.manifest():
            return known
    own = [known for known in zoo.manifest() if known.split(".", 1)[0] == model]
    of_model = f"of {model} " if own else ""
    raise ValueError(f"no published weights {name!r}; {of_model}there are: {', '.join(own or sorted(zoo.manifest()))}")
