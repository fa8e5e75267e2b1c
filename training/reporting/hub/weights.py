"""What is published on the Hub: weights of the manifest, or those of a folder that ``rotation-ssl convert`` wrote."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import nn

from rotation_ssl import zoo
from rotation_ssl.features import layer_modules

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Upload:
    """Weights to be published as ``model.tag``: the manifest's entry of them, and the file's content."""

    name: str
    entry: dict[str, Any]
    content: bytes


def upload_of(name: str) -> Upload:
    """Weights of the manifest, from the package or their cache."""
    if not zoo.manifest().get(name, {}).get("sha256"):
        raise ValueError(f"{name} cannot be published: there are {', '.join(zoo.bundled())}, and folders of `convert`")
    return Upload(name, zoo.manifest()[name], zoo.read_weights(name))


def upload_of_folder(folder: Path, license_name: str, data: str, layer: str) -> Upload:
    """Weights of a folder that ``rotation-ssl convert`` wrote, with the manifest's entry that they are to get.

    Args:
        folder: with config.json and model.safetensors.
        license_name: of the weights, as the Hub names licences.
        data: what they were trained on.
        layer: recommended for features.
    """
    model = _model_of_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    architecture, tag = config["architecture"], config["pretrained_cfg"].get("tag")
    if config["num_classes"] != 4 or config.get("model_args", {}).get("fc_size", 4096) != 4096:
        raise ValueError(
            f"{folder} lacks the head of the four rotations, or fc6 and fc7: its name would load a network that has"
            " them; hand it on as a folder, for local-dir:"
        )
    if architecture not in timm.list_models("rotnet_*") or not tag:
        known = ", ".join(timm.list_models("rotnet_*"))
        raise ValueError(f"{folder} holds {architecture} (tag {tag}): published are {known}, with a tag")
    if not (license_name and data and layer):
        raise ValueError(f"publishing {folder} needs --license, --trained-on and --layer: the folder does not say them")
    if layer not in layer_modules(model):
        raise ValueError(f"{architecture} has no layer {layer}; it has {', '.join(layer_modules(model))}")
    content = (folder / WEIGHTS).read_bytes()
    published = zoo.manifest().get(f"{architecture}.{tag}")
    if published and published["sha256"] == hashlib.sha256(content).hexdigest():
        return Upload(f"{architecture}.{tag}", published, content)
    if published:
        raise ValueError(f"{architecture}.{tag} is published already, with other bytes: convert with another --tag")
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    provenance = config.get("provenance", {})
    name = f"{architecture}.{tag}"
    entry = {
        "source": "hub",
        "file": f"{name}.safetensors",
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
        "license": license_name,
        "origin": f"converted from {provenance.get('origin', 'a checkpoint')}"
        + (f", sha256 {provenance['file_sha256']}" if "file_sha256" in provenance else ""),
        "recipe": "not this project's",
        "data": data,
        "recommended_layer": layer,
        **{key: list(cfg[key]) for key in ("input_size", "mean", "std")},
        "metrics": {},
    }
    return Upload(name, entry, content)


def _model_of_folder(folder: Path) -> nn.Module:
    if not (folder / "config.json").is_file() or not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} holds no config.json and {WEIGHTS}: rotation-ssl convert writes such folders")
    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} cannot be loaded ({error}): convert it anew") from error
