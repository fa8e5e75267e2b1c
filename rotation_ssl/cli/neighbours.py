"""rotation-ssl neighbours."""

import argparse
import json
from pathlib import Path
from typing import Any

from rotation_ssl.cli.options import add_command, add_device, positive
from rotation_ssl.embedding.neighbours import embed_images, nearest
from rotation_ssl.embedding.parts import read_manifest
from rotation_ssl.messages import printable

DETAILS = """

FOLDER contains features that `rotation-ssl features IMAGES -o FOLDER/` wrote. The features of IMAGE are extracted with
the model and settings of its manifest. The search is exact, uses cosine similarity, and reads the features in chunks.
"""


def add(commands: Any) -> None:
    """Add the command."""
    added = add_command(commands, "neighbours", run, "find the nearest neighbours of an image", DETAILS)
    added.add_argument("folder", type=Path, metavar="FOLDER", help="folder of features")
    added.add_argument("query", type=Path, metavar="IMAGE", help="image file")
    added.add_argument("-k", type=positive, default=10, metavar="K", help="number of neighbours [%(default)s]")
    added.add_argument("--layer", help="layer to compare [the first one in FOLDER]")
    add_device(added)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    layers = read_manifest(args.folder).layers
    layer = args.layer or next(iter(layers))
    if layer not in layers:
        raise ValueError(f"{args.folder} has no layer {layer}; it has {', '.join(layers)}")
    queries = embed_images(args.folder, [args.query], args.device)[layer]
    similarities, paths = nearest(args.folder, queries, args.k, layer)
    found = [
        {"similarity": value, "path": path} for value, path in zip(similarities[0].tolist(), paths[0], strict=True)
    ]
    if args.json:
        print(json.dumps({"query": str(args.query), "layer": layer, "neighbours": found}, indent=1))
    else:
        print("\n".join(f"{one['similarity']:.4f}  {printable(one['path'])}" for one in found))
    return 0
