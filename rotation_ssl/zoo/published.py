"""The manifest: which weights are published, where they are, and what timm is told of them.

The manifest (``weights/manifest.json``) has one entry for every published ``model.tag``: where it comes from, its
sha256 and size, its licence and what it was made of.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WEIGHTS_DIR = Path(__file__).parent.parent / "weights"
_FIELDS = ("file", "sha256", "size", "license", "data", "input_size", "mean", "std", "recommended_layer", "metrics")


@functools.cache
def manifest() -> dict[str, dict[str, Any]]:
    """The published weights: ``model.tag`` -> its entry in ``weights/manifest.json``. Not to be changed in place.

    Every entry has 'source' ('bundled', 'hub' or 'release'), 'file', 'sha256' and 'size' (of a release None until they
    are known), 'license', 'origin', 'recipe', 'data', 'input_size', 'mean', 'std', 'recommended_layer', 'metrics'; what
    is on the Hub also 'hub' ('repository', 'revision', 'version', 'file'), a release 'url' and 'archive_sha256', a
    network made with other arguments than the default ones 'model_args', weights trained further 'begun_with' ('name',
    'sha256', 'rotated_images'), weights that are not stored in fp32 'dtype'.

    Raises:
        ValueError: the file is missing, not JSON, or lacks something.
    """
    file = WEIGHTS_DIR / "manifest.json"
    try:
        entries: dict[str, dict[str, Any]] = json.loads(file.read_bytes())
        for name, entry in entries.items():
            own = {"bundled": (), "hub": ("hub",), "release": ("url",)}[entry["source"]]
            lacking = [field for field in (*_FIELDS, *own) if field not in entry]
            if lacking:
                raise ValueError(f"{name} lacks {', '.join(lacking)}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is not a manifest of weights ({error}): reinstall rotation-ssl") from error
    return entries


def bundled() -> dict[str, dict[str, Any]]:
    """The entries of the weights that the wheel carries: this project's own, whose numbers are reported and checked."""
    return {name: entry for name, entry in manifest().items() if entry["source"] == "bundled"}


def published_entry(model: Any) -> Mapping[str, Any]:
    """The manifest's entry of the weights that a timm model was created for; empty for other weights.

    A model that was loaded from a file or folder of the user's own, or from somebody's repository on the Hub, has other
    weights, even under a published tag.
    """
    cfg = getattr(model, "pretrained_cfg", {})
    entry = manifest().get(f"{cfg.get('architecture')}.{cfg.get('tag')}", {})
    if not entry or cfg.get("source") == "hf-hub":  # verified weights, wherever they came from, have no source any more
        return {}
    return entry if cfg.get("file") in (None, "", location(entry).get("file")) else {}


def published_cfgs(model: str) -> dict[str, dict[str, Any]]:
    """The part of timm's configuration of each tag of a model that comes from the manifest.

    The default tag is the first bundled one, because it loads without a network. A model without bundled weights gets
    'model.*' as its last entry, which timm takes for a default without weights. Only published tags are entered,
    because timm lists every tag as one that can be loaded.
    """
    own = {name: entry for name, entry in manifest().items() if name.split(".", 1)[0] == model}
    bundled = [name for name, entry in own.items() if entry["source"] == "bundled"]
    cfgs: dict[str, dict[str, Any]] = {}
    for name in (*bundled, *(name for name in own if name not in bundled)):
        entry = own[name]
        images = {key: tuple(entry[key]) for key in ("input_size", "mean", "std")}
        cfgs[name] = {**location(entry), **images, "license": entry["license"]}
    return cfgs if bundled else {**cfgs, f"{model}.*": {}}


def location(entry: Mapping[str, Any]) -> dict[str, Any]:
    """timm's keys for where an entry's weights are; neither opened nor checked."""
    where: dict[str, Any] = {}
    if entry["source"] == "bundled":
        where["file"] = str(WEIGHTS_DIR / entry["file"])
    if entry["source"] == "release":
        where["url"] = entry["url"]
    if "hub" in entry:
        where["hf_hub_id"] = f"{entry['hub']['repository']}@{entry['hub']['revision']}"
        where["hf_hub_filename"] = entry["hub"]["file"]
    return where
