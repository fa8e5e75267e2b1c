"""Check that tensors are the weights of a model: timm would load a file of entirely wrong keys without an error."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from timm.models import clean_state_dict
from torch import nn

from rotation_ssl.convert import misfits
from rotation_ssl.messages import some


def read_tensors(content: bytes, source: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; a ValueError that names ``source`` where it is corrupt."""
    try:
        return load(content)
    except (SafetensorError, KeyError, ValueError) as error:
        # KeyError: a type of numbers that torch does not have
        raise ValueError(f"{source} is not a whole safetensors file ({error}); download or convert it again") from error


def unwrap(state_dict: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """Tensors without the prefixes of DistributedDataParallel and torch.compile, as timm reads them from a file."""
    if not state_dict or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ValueError(f"{source} must contain tensors, and nothing else; nothing was loaded")
    unwrapped: dict[str, torch.Tensor] = clean_state_dict(dict(state_dict))
    if len(unwrapped) < len(state_dict):
        twice = [
            key for key in state_dict if key not in unwrapped and clean_state_dict({key: 0}).keys() & state_dict.keys()
        ]
        raise ValueError(f"{source} has keys both with and without a prefix: {some(twice, 3)}; nothing was loaded")
    return unwrapped


def classes_of(tensors: Mapping[str, torch.Tensor], classifier: str) -> dict[str, int]:
    """The configuration's number of classes: rows of the classifier among tensors, 0 when it is not there."""
    weight = tensors.get(f"{classifier}.weight")
    if weight is None:
        return {"num_classes": 0}
    # without rows its shape is wrong, which is said where shapes are compared
    return {"num_classes": len(weight)} if weight.ndim else {}


def _fit_optional(
    state_dict: dict[str, torch.Tensor], model: nn.Module, source: str, optional: tuple[str, ...], head: str
) -> dict[str, torch.Tensor]:
    """The weights with the model's own optional layers and classifier where they lack them, without theirs where the
    model does not have them.
    """
    own = model.state_dict()
    wanted, held = ({key for key in tensors if key.startswith(optional)} for tensors in (own, state_dict))
    if bool(wanted) == bool(held):
        return state_dict
    names = " and ".join(prefix.strip(".").rpartition(".")[2] for prefix in optional)
    if wanted:
        warnings.warn(f"{source} has no {names}: they and the classifier are new, not trained", stacklevel=2)
    elif any(key.startswith(head) for key in own):
        warnings.warn(f"{names} of {source} are left out: the classifier is new, not trained", stacklevel=2)
    kept = {key: value for key, value in state_dict.items() if not key.startswith((*optional, head))}
    return kept | {key: value for key, value in own.items() if key in wanted or key.startswith(head)}


def check_state_dict(
    state_dict: dict[str, torch.Tensor], model: nn.Module, source: str, optional: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """Refuse a state dict that lacks keys, has others, or holds tensors of another shape or type or not finite.

    ``optional`` layers may be missing, or be there and not in the model: see :func:`rotation_ssl.zoo.build_model`.

    The first convolution may have the input channels that the configuration says, whatever the model's are, and the
    classifier other classes: timm adapts the one and leaves out the other.
    """
    cfg: Any = model.pretrained_cfg
    head, stem = f"{cfg['classifier']}.", f"{cfg['first_conv']}.weight"
    fresh_head = model.num_classes != cfg["num_classes"]
    state_dict = _fit_optional(state_dict, model, source, optional, head)
    given, expected = (
        {key: value for key, value in tensors.items() if not (fresh_head and key.startswith(head))}
        for tensors in (state_dict, model.state_dict())
    )
    channels = (cfg.get("input_size") or (3,))[0]
    if stem in given and given[stem].shape[1:2] == (channels,):
        out, _, *kernel = expected[stem].shape
        expected[stem] = expected[stem].new_empty((out, channels, *kernel), device="meta")
    if told := misfits(given, expected, most=3):
        raise ValueError(f"{source} does not fit {type(model).__name__}: it {told}; nothing was loaded")
    return state_dict
