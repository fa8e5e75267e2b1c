"""rotation-ssl verify."""

import argparse
import json
from pathlib import Path
from typing import Any

from rotation_ssl import zoo
from rotation_ssl.cli.options import add_command, published_name
from rotation_ssl.convert import read_checkpoint
from rotation_ssl.convert.reading import MAX_BYTES, tensors_of
from rotation_ssl.files import sha256_of
from rotation_ssl.zoo import sources
from rotation_ssl.zoo.golden import GOLDEN_TOLERANCE, golden_difference, golden_file
from rotation_ssl.zoo.loading import read_config


def add(commands: Any) -> None:
    """Add the command."""
    added = add_command(commands, "verify", run, "verify the sha256 and the golden outputs of weights on this machine")
    added.add_argument(
        "what", nargs="?", metavar="NAME|FILE", help="name, file or folder [all weights on this machine]"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if args.what is None:
        results = [verify_tag(name) for name in zoo.manifest()]
    elif args.what not in zoo.manifest() and Path(args.what).exists():
        results = [verify_file(Path(args.what))]
    else:
        results = [verify_tag(_name(args.what))]
    if args.json:
        print(json.dumps(results, indent=1))
    else:
        verdicts = {True: "holds", False: "BROKEN", None: "unknown"}
        for result in results:
            print(f"{verdicts[result['holds']]:8s} {result['name'] or result['file']}: {result['why']}")
    # of all weights those that are not here are skipped; what was asked for by its name was to be verified
    failed = (False,) if args.what is None else (False, None)
    return 1 if any(result["holds"] in failed for result in results) else 0


def verify_tag(name: str) -> dict[str, Any]:
    """Check the hash and the golden outputs of published weights: 'name', 'file', 'holds', 'why'.

    Weights that are not here are not downloaded: 'holds' is None.
    """
    file = zoo.cached_file(name)
    if file is None and zoo.manifest()[name]["source"] != "bundled":
        return {"name": name, "file": None, "holds": None, "why": f"not here; rotation-ssl fetch {name}"}
    holds, why = _verify_published(name, file)
    return {"name": name, "file": file and str(file), "holds": holds, "why": why}


def verify_file(path: Path) -> dict[str, Any]:
    """Which published weights a file or folder contains; 'holds' is None for weights that are not published.

    Raises:
        ValueError: it cannot be read as weights, or contains values that are not finite.
    """
    folder_config = path / "config.json"
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} does not exist")
    digest = sha256_of(file)
    for name in zoo.manifest():
        known, told = _known_bytes(name)
        if known.get("sha256") == digest:
            return {"name": name, "file": str(file), "holds": True, "why": f"sha256 {digest}, {told}"}
    config = read_config(path) if path.is_dir() and folder_config.is_file() else {}
    expected = config.get("sha256") if isinstance(config, dict) else None
    if expected and expected != digest:
        return {"name": None, "file": str(file), "holds": False, "why": f"sha256 {digest}, config.json has {expected}"}
    # the package writes weights of any size; what config.json says allows no file to unpack to more than it is
    max_bytes = max(MAX_BYTES, file.stat().st_size) if expected else MAX_BYTES
    tensors = dict(tensors_of(read_checkpoint(file, max_bytes=max_bytes)))
    if not tensors:
        raise ValueError(f"{file} contains no tensors")
    broken = [key for key, value in tensors.items() if value.is_floating_point() and not value.float().isfinite().all()]
    if broken:
        raise ValueError(f"{file} contains values that are not finite in {', '.join(broken[:3])}")
    why = f"sha256 {digest}, as its config.json says; not published" if expected else f"sha256 {digest}; not published"
    return {"name": None, "file": str(file), "holds": True if expected else None, "why": why}


def _name(what: str) -> str:
    try:
        return published_name(what)
    except ValueError as error:
        raise ValueError(f"no file {what}, and {error}") from error


def _verify_published(name: str, file: Path | None) -> tuple[bool, str]:
    """Whether the bytes and the outputs of published weights hold, and what is wrong or how far good ones are known."""
    if file is None:
        return False, f"{zoo.manifest()[name]['file']} is missing from the package; reinstall rotation-ssl"
    known, told = _known_bytes(name)
    try:
        sources.read_verified(file, known["sha256"], known["size"])
        if not golden_file(name).is_file():
            return True, f"sha256 {told}; no golden outputs to compare"
        furthest = golden_difference(name)
    except ValueError as error:
        return False, str(error)
    allowed = f"golden outputs differ by {furthest:.1e}, allowed are {GOLDEN_TOLERANCE:g}"
    return furthest < GOLDEN_TOLERANCE, f"sha256 {told}; {allowed}"


def _known_bytes(name: str) -> tuple[dict[str, Any], str]:
    """'sha256' and 'size' of published weights, of a release once it was downloaded, and who says so."""
    entry = zoo.manifest()[name]
    if entry["source"] == "release":
        return sources.read_record(name) or {}, "as recorded at the download"
    return entry, "as published"
