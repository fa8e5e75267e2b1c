"""The manifest's file as the lab writes it: the zoo reads it once, as it was when the process began."""

import json
from collections.abc import Mapping
from typing import Any

from rotation_ssl import zoo
from rotation_ssl.files import replace_bytes


def read_manifest() -> dict[str, Any]:
    """The manifest as its file is now: the zoo's own may be of before this command wrote to it."""
    return json.loads((zoo.WEIGHTS_DIR / "manifest.json").read_text())


def enter_manifest(name: str, entry: dict[str, Any]) -> None:
    """Write an entry of the manifest, a new one or in place of that of the same name."""
    replace_bytes(zoo.WEIGHTS_DIR / "manifest.json", manifest_text({**read_manifest(), name: entry}).encode())


def manifest_text(entries: dict[str, Any]) -> str:
    """The manifest's file."""
    return json.dumps(entries, indent=2) + "\n"


def rotated_images(entry: Mapping[str, Any]) -> int:
    """The rotated images that weights have seen, with those of the weights that their training began with."""
    return int(entry["rotated_images"] + entry.get("begun_with", {}).get("rotated_images", 0))


def seen_in_training(entry: Mapping[str, Any]) -> str:
    """The rotated images of a training in words, and of the one before it."""
    own = f"{entry['rotated_images']:,} rotated images"
    begun = entry.get("begun_with")
    return f"{own}, beginning with `{begun['name']}` ({begun['rotated_images']:,})" if begun else own
