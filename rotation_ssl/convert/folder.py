"""Weights as a folder that timm and transformers load by its path."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save
from timm.models._hub import save_config_for_hf
from torch import nn

from rotation_ssl.backbones.about import network_facts
from rotation_ssl.convert.mapping import AUTHORS, Converted
from rotation_ssl.files import replace_bytes, replace_file
from rotation_ssl.rotations import ROTATION_NAMES

# timm's metadata of an architecture's default weights, removed from the config.json of other weights
UNKNOWN_METADATA: dict[str, Any] = dict.fromkeys(
    ("license", "origin_url", "paper_name", "paper_ids", "description", "notes")
)


def write_folder(converted: Converted, folder: Path, tag: str, provenance: Mapping[str, Any]) -> None:
    """Write weights as the folder that ``timm.create_model('local-dir:FOLDER', pretrained=True)`` takes.

    transformers takes it, too: ``TimmWrapperForImageClassification.from_pretrained(FOLDER)``.

    It holds model.safetensors and config.json, timm's with three more entries: 'sha256' and 'size' of the weights,
    which every load of a ``rotnet_*`` model compares, and 'provenance'.

    Args:
        converted: the weights.
        folder: new, or empty.
        tag: of the weights, as in ``model.tag``.
        provenance: where they come from, as JSON.

    Raises:
        ValueError: a folder that has something in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: give another")
    content = save(converted.state_dict, metadata={"format": "pt"})
    model = timm.create_model(converted.model, num_classes=converted.num_classes, device="meta", **converted.model_args)
    cfg: dict[str, Any] = {"tag": tag}
    # whatever the architecture's default weights are for
    if size := network_facts(converted.model).authors_size:
        cfg["input_size"] = (3, size, size)
    if converted.origin != AUTHORS:
        cfg |= {**UNKNOWN_METADATA, "crop_pct": 0.875, "test_crop_pct": None, "test_input_size": None}
    folder.mkdir(parents=True, exist_ok=True)
    # without config.json the folder is none that timm takes: it comes last, and whole
    replace_bytes(folder / "model.safetensors", content)
    labels = ROTATION_NAMES if converted.origin == AUTHORS else ()
    write_config(model, content, folder / "config.json", cfg, {"origin": converted.origin, **provenance}, labels)


def write_config(
    model: nn.Module,
    content: bytes,
    file: Path,
    cfg: Mapping[str, Any],
    provenance: Mapping[str, Any],
    label_names: Sequence[str] = (),
) -> None:
    """Write the config.json that describes a file of weights: see :func:`write_folder`.

    Args:
        model: the one to describe; its arguments become part of the description.
        content: of the weights' file.
        file: where to write it, completely or not at all.
        cfg: what differs from the pretrained_cfg of the architecture's default weights.
        provenance: where the weights come from, as JSON.
        label_names: of the classes, which transformers shows; none if empty.
    """
    described = {
        "pretrained_cfg": dict(cfg),
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
        "provenance": dict(provenance),
        "label_names": list(label_names),
    }

    def write(path: Path) -> None:
        save_config_for_hf(model, str(path), model_config=described)
        config = json.loads(path.read_text())
        # both read it at the top level; transformers also passes model_args, which would give it twice
        config.get("model_args", {}).pop("num_classes", None)
        path.write_text(json.dumps(config, indent=2))

    replace_file(file, write)
