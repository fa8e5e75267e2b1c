"""rotation-ssl list."""

import argparse
import json
from typing import Any

from rotation_ssl import zoo
from rotation_ssl.cli.info import describe
from rotation_ssl.cli.options import add_command


def add(commands: Any) -> None:
    """Add the command."""
    add_command(commands, "list", run, "list published weights, and which of them are on this machine")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    described = [describe(name) for name in zoo.manifest()]
    if args.json:
        print(json.dumps(described, indent=1))
        return 0
    for entry in described:
        here = ("in the package" if entry["source"] == "bundled" else "cached") if entry["here"] else "not here"
        size = f"{entry['size'] / 1e6:.1f} MB" if entry["size"] else ""
        accuracy = entry["metrics"].get("rotation accuracy")
        measured = f"rotation accuracy {100 * accuracy:.2f} %" if accuracy else "not measured"
        print(f"{entry['name']:30s} {here:15s} {size:>9s}  {measured:26s}  {entry['data']}")
    return 0
