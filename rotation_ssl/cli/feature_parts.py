"""rotation-ssl features IMAGES -o FOLDER/: the form in parts, of any number of images."""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rotation_ssl.cli.options import add_precision_argument, positive
from rotation_ssl.embedding.files import is_folder as is_image_folder
from rotation_ssl.embedding.parts import DTYPES
from rotation_ssl.embedding.run import ENGINES, SHARD_SIZE, embed
from rotation_ssl.embedding.sources import is_shard_name
from rotation_ssl.images import count_files
from rotation_ssl.messages import counted, printable
from rotation_ssl.shards import url_scheme

# the options of this form alone
OPTIONS = ("engine", "shard_size", "workers", "precision", "dtype", "sha1", "resume", "address")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this form; those that are not given are None."""
    parts = parser.add_argument_group("features in parts (-o FOLDER/)")
    parts.add_argument("--engine", choices=ENGINES, help="this machine, or a Ray cluster [local]")
    parts.add_argument("--address", metavar="HOST:PORT", help="Ray cluster [a new one on this machine]")
    size = f"images in a part [{SHARD_SIZE}; for a tar: all]"
    parts.add_argument("--shard-size", type=positive, metavar="N", help=size)
    parts.add_argument(
        "--workers", type=_whole, metavar="N", help="data-loading workers [one for each CPU; none with --engine ray]"
    )
    add_precision_argument(parts, "auto")
    parts.add_argument("--dtype", choices=DTYPES, help="type of the stored features [float32]")
    parts.add_argument("--sha1", action="store_const", const=True, help="store the sha1 of the bytes of each image")
    parts.add_argument("--resume", action="store_const", const=True, help="continue an interrupted run in FOLDER")


def is_folder(output: str, formats: tuple[str, ...]) -> bool:
    """Whether an output is a folder of parts: it ends in a slash, or is or may become a folder without a suffix."""
    path = Path(output)
    if output.endswith("/") or (path.is_dir() and path.suffix.lower()[1:] not in formats):
        return True
    return not path.suffix and not path.exists()


def check_no_options(args: argparse.Namespace) -> None:
    """Refuse the options of this form in the other one.

    Raises:
        ValueError: one of them was given.
    """
    if given := [f"--{name.replace('_', '-')}" for name in _given(args)]:
        raise ValueError(f"{given[0]} is for features in parts: give a folder, -o {args.output}/, or leave it out")


def check_source(images: str) -> None:
    """Refuse the sources of this form in the other one, which reads folders.

    Raises:
        ValueError: tar or parquet files, or a URL.
    """
    if url_scheme(images) or (is_shard_name(images) and not is_image_folder(images)):
        raise ValueError(f"{images} is not a folder on disk; other sources need features in parts: give -o FOLDER/")


def run(args: argparse.Namespace) -> int:
    """Write the parts; returns the exit status, 1 where there are errors."""
    if args.strict or args.force:
        raise ValueError(f"--{'strict' if args.strict else 'force'} is for a single file, not for a folder of parts")
    summary = embed(
        args.images,
        args.output,
        args.model,
        layers=args.layers,
        pool=args.pool,
        grid=args.grid,
        batch_size=args.batch_size,
        device=args.device,
        format=args.format or "parquet",
        **_given(args),
    )
    result = {"folder": args.output, **dataclasses.asdict(summary)}
    print(json.dumps(result, indent=1) if args.json else _report(result))
    return 1 if summary.errors else 0


def _given(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}


def _report(result: Mapping[str, Any]) -> str:
    text = f"{result['folder']}: {counted(result['images'], 'image')} in {counted(result['parts'], 'part')}"
    errors = f"; {counted(result['errors'], 'error')}: {Path(result['folder'], 'errors.parquet')}"
    others = ", ".join(count_files(suffix, number) for suffix, number in result["not_read"].items())
    told = f"\nnot read: {printable(others, most=4096)}" if others else ""
    return text + (errors if result["errors"] else "") + told


def _whole(text: str) -> int:
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text}")
    return int(text)
