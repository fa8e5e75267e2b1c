"""The files of a Hub repository: weights, configuration, golden outputs, ONNX, the training's record and the card."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load, save

from rotation_ssl.backbones.about import network_facts
from rotation_ssl.convert import write_config
from rotation_ssl.rotations import ROTATION_NAMES
from rotation_ssl.zoo.golden import golden_file, golden_outputs
from training.export import onnx_file
from training.reporting.bundle import add_metadata
from training.reporting.hub.card import card_text
from training.reporting.hub.weights import WEIGHTS, Upload
from training.reporting.pages import FIGURES_DIR
from training.reporting.rows import RESULTS_DIR, Row

GOLDEN, ONNX = "golden.safetensors", "onnx/model.onnx"


def hub_files(upload: Upload, repository: str, version: str, rows: Sequence[Row]) -> dict[str, bytes]:
    """What the Hub repository of some weights holds: file name -> content. The same weights and rows give the same."""
    name, entry, state = upload.name, upload.entry, load(upload.content)
    config, model = _config(name, entry, upload.content, state)
    files = {
        WEIGHTS: upload.content,
        "config.json": config,
        GOLDEN: golden_file(name).read_bytes() if golden_file(name).exists() else save(golden_outputs(model)),
        ONNX: onnx_file(model, torch.zeros(2, *entry["input_size"]), "images", ["logits"]),
    }
    classifier = f"{model.pretrained_cfg['classifier']}."
    backbone = {key: value for key, value in state.items() if not key.startswith(classifier)}
    if len(backbone) < len(state):
        files["backbone.safetensors"] = add_metadata(save(backbone), name, entry)
    for path, file in (
        ("training.json", RESULTS_DIR / f"{name}.run.json"),
        ("curve.png", FIGURES_DIR / f"{name}.curve.png"),
    ):
        if file.exists():
            files[path] = file.read_bytes()
    files["README.md"] = card_text(name, entry, model, files, repository, version, rows).encode()
    return files


def _config(name: str, entry: dict[str, Any], content: bytes, state: dict[str, torch.Tensor]) -> tuple[bytes, Any]:
    """config.json as timm's hf-hub: takes it, without the package's registry, and the model."""
    architecture, tag = name.split(".", 1)
    overlay = {"state_dict": state, **{key: tuple(entry[key]) for key in ("input_size", "mean", "std")}}
    model = timm.create_model(
        architecture, pretrained=True, pretrained_cfg_overlay=overlay, **entry.get("model_args", {})
    ).eval()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        cfg, provenance = {"tag": tag, "license": entry["license"]}, {key: entry[key] for key in ("origin", "recipe")}
        write_config(model, content, file, cfg, provenance, ROTATION_NAMES)
        config = json.loads(file.read_text())
        # timm alone loads the networks that it has under a name of its own
        config["architecture"] = network_facts(architecture).timm_name or architecture
        if "dtype" in entry:
            config["dtype"] = "float32"  # transformers would compute in the type of the file
        return json.dumps(config, indent=2).encode(), model
