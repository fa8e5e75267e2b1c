"""rotation-ssl list."""

import argparse
import json
from collections.abc import Mapping
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
        print(f"{entry['name']:30s} {here:15s} {size:>9s}  {accuracy_text(entry):47s}  {entry['data']}")
    return 0


def accuracy_text(entry: Mapping[str, Any]) -> str:
    """The rotation accuracy of published weights; where it was measured on several datasets, from the least on."""
    found = sorted(100 * value for name, value in entry["metrics"].items() if name.startswith("rotation accuracy"))
    if not found:
        return "not measured"
    several = f" to {found[-1]:.2f} % on {len(found)} datasets" if len(found) > 1 else " %"
    return f"rotation accuracy {found[0]:.2f}{several}"
