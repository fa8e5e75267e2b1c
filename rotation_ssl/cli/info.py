"""rotation-ssl info."""

import argparse
import json
from typing import Any

from rotation_ssl import zoo
from rotation_ssl.cli.options import add_command, published_name
from rotation_ssl.zoo import sources


def add(commands: Any) -> None:
    """Add the command."""
    added = add_command(
        commands,
        "info",
        run,
        "show the details of published weights: source, sha256, licence, recipe, data, input, results",
    )
    added.add_argument("tag", metavar="NAME", help="for example rotnet_nin.cifar10, or rotnet_nin for its default tag")


def describe(name: str) -> dict[str, Any]:
    """An entry of the manifest with 'name', and 'here': the file on this machine, None when it is not there.

    Of weights of a release 'fetched' is what was recorded at the download.
    """
    here = zoo.cached_file(name)
    described = {"name": name, **zoo.manifest()[name], "here": str(here) if here else None}
    if described["source"] == "release":
        described["fetched"] = sources.read_record(name)
    return described


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    entry = describe(published_name(args.tag))
    if args.json:
        print(json.dumps(entry, indent=1))
        return 0
    for key, value in entry.items():
        if isinstance(value, dict):
            print(f"{key}:", *(f"{k}: {v}" for k, v in value.items()), sep="\n    ")
        else:
            unknown = "not on this machine" if key == "here" else "not known"
            print(f"{key}: {unknown if value is None else value}")
    return 0
