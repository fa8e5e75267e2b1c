"""Load a model by its name; its recommended layer, its published name and a hash of its weights."""

import hashlib
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import nn

from rotation_ssl import zoo
from rotation_ssl.backbones.about import network_facts
from rotation_ssl.features import layer_modules
from rotation_ssl.machine import check_device
from rotation_ssl.messages import connection_errors, first_line
from rotation_ssl.zoo.loading import read_config

DEFAULT_MODEL = "rotnet_alexnet.photos"  # the commands mostly get photographs
ORIENTATION_MODEL = "rotnet_alexnet.orientation"  # of `rotation-ssl orient` and the page


def load_model(name: str, device: str) -> Any:
    """A network with weights, on a device.

    Raises:
        ValueError: no such model, weights or device.
        OSError: the weights could not be downloaded.
    """
    check_device(device)
    if not timm.is_model(name.split(".", 1)[0]) and ":" not in name:
        meant = f"; did you mean local-dir:{name}?" if name and Path(name).is_dir() else ""
        raise ValueError(f"no model {name!r}; there are {', '.join(timm.list_models('rotnet_*'))}, and timm's{meant}")
    folder = Path(name.removeprefix("local-dir:"))
    if name.startswith("local-dir:") and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is neither a finished run nor a converted checkpoint")
    if name.startswith("local-dir:"):
        read_config(folder)  # timm's error names no file
    try:
        with connection_errors(f"{name} could not be loaded"):
            return timm.create_model(name, pretrained=True).to(device)
    except (RuntimeError, SafetensorError, LookupError, TypeError, AttributeError) as error:
        # the weights of a folder, or what its config.json says, are damaged
        raise ValueError(f"{name} could not be loaded ({first_line(error)})") from error


def recommended_layer(model: Any, name: str, option: str = "--layers") -> str:
    """The layer that the manifest recommends for the weights, or the paper for the network.

    ``option`` is what an error tells to give.

    Raises:
        ValueError: neither recommends one.
    """
    facts = network_facts(str(model.pretrained_cfg.get("architecture")))
    if layer := zoo.published_entry(model).get("recommended_layer") or facts.recommended_layer:
        return str(layer)
    raise ValueError(f"{name} has no recommended layer: choose {option} from {', '.join(layer_modules(model))}")


def model_name(model: Any, name: str) -> str:
    """``model.tag`` of published weights; another name as it is."""
    published = f"{name.split('.', 1)[0]}.{model.pretrained_cfg.get('tag')}"
    return published if published in zoo.manifest() else name


def weights_digest(model: nn.Module) -> str:
    """sha256 over the model's tensors in the order of their names: each name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
