"""rotation-ssl convert."""

import argparse
import json
from pathlib import Path
from typing import Any

import rotation_ssl
from rotation_ssl.cli.options import add_command
from rotation_ssl.convert import AUTHORS, convert, read_checkpoint, write_folder
from rotation_ssl.files import sha256_of


def add(commands: Any) -> None:
    """Add the command."""
    added = add_command(
        commands, "convert", run, "convert another project's checkpoint to a folder that timm loads (local-dir:FOLDER)"
    )
    added.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="checkpoint of the authors, VISSL or mmselfsup, or a ResNet of torchvision; may be in a .tar.gz",
    )
    added.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="output folder, new or empty")
    added.add_argument("--epoch", type=int, help="epoch of the checkpoint in an archive [the last]")
    added.add_argument("--tag", help="tag of the weights, as in model.tag [the project that the checkpoint is from]")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    converted = convert(read_checkpoint(args.file, args.epoch))
    tag = args.tag or {AUTHORS: "gidaris", "torchvision-style": "torchvision"}.get(
        converted.origin, converted.origin.lower()
    )
    provenance = {
        "file": args.file.name,
        "file_sha256": sha256_of(args.file),
        "converter": f"rotation_ssl {rotation_ssl.__version__}",
    }
    write_folder(converted, args.output, tag, provenance)
    result = {
        "folder": str(args.output),
        "model": converted.model,
        "num_classes": converted.num_classes,
        "origin": converted.origin,
        "left_out": list(converted.left_out),
    }
    if args.json:
        print(json.dumps(result, indent=1))
        return 0
    print(f"{converted.model} with {converted.num_classes} classes, of {converted.origin}: {args.output}")
    if converted.left_out:
        print(f"left out: {', '.join(converted.left_out)}")
    print(f"load it: timm.create_model('local-dir:{args.output}', pretrained=True), after `import rotation_ssl`")
    return 0
