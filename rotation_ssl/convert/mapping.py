"""Other projects' checkpoints, recognised by their keys -> weights of this package's and timm's models.

Known are the authors' release (https://github.com/gidariss/FeatureLearningRotNet: Network-in-Network of 3 to 5 blocks
and AlexNet), VISSL (https://github.com/facebookresearch/vissl: AlexNet, and ResNets in torchvision's names), mmselfsup
(https://github.com/open-mmlab/mmselfsup, rotation_pred) and ResNets in torchvision's names from elsewhere.

Class k of a head means rotated by k x 90 degrees counter-clockwise, except in mmselfsup from version 1 on, which
rotates clockwise: its classes 1 and 3 are swapped. OpenSelfSup is mmselfsup's name up to version 0.4.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import timm
import torch

from rotation_ssl.messages import some

AUTHORS = "the authors' release"
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")
_ALEXNET_CONVS = {"0": "conv1", "2": "conv2", "4": "conv3", "5": "conv4", "6": "conv5"}
_ALEXNET_FCS = {"1": "fc6.0", "2": "fc6.1", "4": "fc7.0", "5": "fc7.1"}
_NIN_CONV = re.compile(r"_feature_blocks\.\d+\.Block(\d)_ConvB(\d)\.layers\.(Conv|BatchNorm)\.(\w+)")
_NIN_HEAD = re.compile(r"_feature_blocks\.\d+\.Classifier\.(weight|bias)")
_ALEXNET_CONV = re.compile(r"_feature_blocks\.([02456])\.([01])\.(\w+)")
_ALEXNET_FC = re.compile(r"_feature_blocks\.8\.([1245])\.(\w+)")
_ALEXNET_HEAD = re.compile(r"_feature_blocks\.9\.0\.(weight|bias)")
# VISSL's MLP head: Linear, batch norm, ReLU (and perhaps dropout), twice, then Linear; numbers of those with weights
_VISSL_FC = re.compile(r"0\.clf\.(\d{1,3})\.(\w+)")
_VISSL_FCS = ((0, 1, 3, 4, 6), (0, 1, 4, 5, 8))
_FCS = ("head.fc6.0", "head.fc6.1", "head.fc7.0", "head.fc7.1", "head.fc")
FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_BLOCK = re.compile(r"layer([1-4])\.(\d{1,3})\.conv\d\.weight")
# blocks of layer1..layer4, and whether they are bottlenecks
_RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "rotnet_resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "rotnet_resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}


@dataclass(frozen=True)
class Converted:
    """Weights that fit a timm model.

    ``model`` is its name, ``num_classes`` the width of the head (0: the checkpoint has none that fits), ``model_args``
    are further arguments of ``timm.create_model``; ``origin`` names the project, ``left_out`` the unused keys.
    The tensors of ``state_dict`` are contiguous and share no memory, as safetensors wants them.
    """

    model: str
    num_classes: int
    state_dict: dict[str, torch.Tensor]
    origin: str
    model_args: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def convert(checkpoint: Any) -> Converted:
    """Convert the checkpoint of a known project to weights of a timm model.

    Args:
        checkpoint: nested dicts with tensors, as :func:`rotation_ssl.convert.read_checkpoint` returns them.

    Raises:
        ValueError: none of the known forms, keys, shapes or types that do not fit the network that it seems to be (the
            error lists them), or values that are not finite.
    """
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"the checkpoint contains {type(checkpoint).__name__}, not a dict of tensors")
    if "classy_state_dict" in checkpoint:
        found = _from_vissl(checkpoint)
    else:
        tensors = _tensors(checkpoint)
        if any(key.startswith("_feature_blocks.") for key in tensors):
            found = _from_authors(tensors)
        elif any(key.startswith("head.fc_cls.") for key in tensors):
            found = _from_mmselfsup(tensors, checkpoint.get("meta"))
        else:
            found = _from_resnet(tensors, "torchvision-style")
    _check(found)
    own = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in found.state_dict.items()}
    return replace(found, state_dict=own)


def convert_authors(network: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of the authors' Network-in-Network (3 to 5 blocks) or AlexNet -> that of ours.

    Args:
        network: ``checkpoint['network']``, keys ``_feature_blocks.*``.

    Returns:
        Keys of :class:`rotation_ssl.backbones.nin.RotNetNIN` or
        :class:`rotation_ssl.backbones.alexnet.RotNetAlexNet`; ``num_batches_tracked`` of each batch norm is 0.

    Raises:
        ValueError: a key that belongs to neither network, or two for the same tensor; the error names it.
    """
    converted: dict[str, torch.Tensor] = {}
    for key, value in network.items():
        name = _authors_key(key)
        if name is None:
            raise ValueError(f"{key} is a key of neither network of the authors' release; give checkpoint['network']")
        if name in converted:
            raise ValueError(f"{key} is a second key for {name}")
        converted[name] = value
    return _with_counters(converted)


def _tensors(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint, without the names that training code wraps around it."""
    for name in ("network", "state_dict", "model"):
        if isinstance(checkpoint.get(name), Mapping):
            checkpoint = checkpoint[name]
    state = _named(checkpoint)
    if not state:
        # only keys of text are shown: others, nested tuples for example, may have no text
        keys = sorted(key if isinstance(key, str) else f"a key of type {type(key).__name__}" for key in checkpoint)
        raise ValueError(f"the checkpoint contains no tensors; its keys are {some(keys)}")
    while prefix := next((p for p in _PREFIXES if any(key.startswith(p) for key in state)), None):
        stripped = {key.removeprefix(prefix): value for key, value in state.items()}
        if len(stripped) < len(state):
            twice = [key for key in state if f"{prefix}{key}" in state]
            raise ValueError(f"the checkpoint has keys both with and without {prefix!r}: {some(twice)}")
        state = stripped
    return state


def _named(entries: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in entries.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}


def _from_authors(network: dict[str, torch.Tensor]) -> Converted:
    unknown = [key for key in network if _authors_key(key) is None]
    if unknown:
        raise ValueError(f"keys of neither network of the authors' release: {some(unknown)}")
    state = convert_authors(network)
    if "features.conv1.conv.weight" in state:
        return _alexnet(state, AUTHORS)
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    if len(blocks) not in (3, 4, 5):
        raise ValueError(f"a Network-in-Network has 3 to 5 blocks, the checkpoint has {some(sorted(blocks))}")
    model = "rotnet_nin" if len(blocks) == 4 else f"rotnet_nin{len(blocks)}"
    return Converted(model, _classes(state, "head.fc"), state, AUTHORS)


def _from_vissl(checkpoint: Mapping[str, Any]) -> Converted:
    try:
        model = checkpoint["classy_state_dict"]["base_model"]["model"]
        heads = model.get("heads")
        trunk, heads = _named(model["trunk"]), _named({} if heads is None else heads)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            "a checkpoint of VISSL without classy_state_dict.base_model.model.trunk, or with heads that are no dict"
        ) from error
    trunk = {key.removeprefix("base_model."): value for key, value in trunk.items()}
    if any(_ALEXNET_CONV.fullmatch(key) for key in trunk):
        unknown = [key for key in trunk if not _ALEXNET_CONV.fullmatch(key)]
        if unknown:
            raise ValueError(f"keys that VISSL's AlexNet of RotNet does not have: {some(unknown)}")
        fcs = _vissl_fcs(heads)
        left_out = () if fcs else tuple(f"heads.{key}" for key in heads)
        return _alexnet(_with_counters({**convert_authors(trunk), **fcs}), "VISSL", left_out)
    state = {key.removeprefix("_feature_blocks."): value for key, value in trunk.items()}
    left_out = tuple(f"heads.{key}" for key in heads)
    if heads.keys() == {"0.clf.0.weight", "0.clf.0.bias"}:
        state |= {"fc.weight": heads["0.clf.0.weight"], "fc.bias": heads["0.clf.0.bias"]}
        left_out = ()
    return _from_resnet(state, "VISSL", left_out)


def _vissl_fcs(heads: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """fc6, fc7 and classifier of VISSL's MLP head, {} when it is another.

    Its linear layers before a batch norm have a bias, ours have none: it moves into the running mean.
    """
    parts = {key: match for key in heads if (match := _VISSL_FC.fullmatch(key))}
    layers = tuple(sorted({int(match[1]) for match in parts.values()}))
    if len(parts) < len(heads) or layers not in _VISSL_FCS:
        return {}
    names = dict(zip(layers, _FCS, strict=True))
    state = {f"{names[int(match[1])]}.{match[2]}": heads[key] for key, match in parts.items()}
    for name, shape in (("head.fc6", (4096, 9216)), ("head.fc7", (4096, 4096))):
        weight, bias, mean = (state.get(f"{name}.{key}") for key in ("0.weight", "0.bias", "1.running_mean"))
        if weight is None or weight.shape != shape:
            return {}
        # other types stay where they are, and are refused by name
        if bias is not None and mean is not None and bias.shape == mean.shape and {bias.dtype, mean.dtype} <= FLOATS:
            state[f"{name}.1.running_mean"] = mean - state.pop(f"{name}.0.bias")
    return state


def _from_mmselfsup(tensors: dict[str, torch.Tensor], meta: Any) -> Converted:
    """``meta`` is the checkpoint's: mmengine, which version 1 trains with, and the versions before name themselves
    there. Without either nobody knows which way the head's classes run, and it is left out.
    """
    state = {key: value for key, value in tensors.items() if not key.startswith("head.")}
    made_by = set(meta) if isinstance(meta, Mapping) else set()
    known = bool(made_by & {"mmengine_version", "mmselfsup_version", "openselfsup_version"})
    for key in ("weight", "bias"):
        value = tensors.get(f"head.fc_cls.{key}")
        if value is None or value.shape[:1] != (4,) or value.dtype not in FLOATS:
            raise ValueError(f"a head of mmselfsup without four rows of floats in head.fc_cls.{key}")
        if known:
            state[f"fc.{key}"] = value[[0, 3, 2, 1]] if "mmengine_version" in made_by else value
    heads = (key for key in tensors if key.startswith("head."))
    left_out = tuple(key for key in heads if not (known and key.startswith("head.fc_cls.")))
    return _from_resnet(state, "mmselfsup", left_out)


def _from_resnet(state: dict[str, torch.Tensor], origin: str, left_out: tuple[str, ...] = ()) -> Converted:
    depths = [0, 0, 0, 0]
    for key in state:
        if match := _BLOCK.fullmatch(key):
            depths[int(match[1]) - 1] = max(depths[int(match[1]) - 1], int(match[2]) + 1)
    bottleneck = "layer1.0.conv3.weight" in state
    model = _RESNETS.get((tuple(depths), bottleneck))
    if model is None or "conv1.weight" not in state:
        raise ValueError(
            f"a checkpoint of an unknown form ({some(sorted(state))}): known are the authors' release,"
            " VISSL, mmselfsup's rotation_pred, and ResNets in torchvision's names"
        )
    return Converted(model, _classes(state, "fc"), _with_counters(state), origin, left_out=left_out)


def _alexnet(state: dict[str, torch.Tensor], origin: str, left_out: tuple[str, ...] = ()) -> Converted:
    args = {} if "head.fc6.0.weight" in state else {"fc_size": 0}
    return Converted("rotnet_alexnet", _classes(state, "head.fc"), state, origin, args, left_out)


def _with_counters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Checkpoints of torch 0.2 lack ``num_batches_tracked``: 0 after each batch norm's mean, others as they are."""
    complete: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        complete[key] = value
        if key.endswith(".running_mean"):
            counter = f"{key.removesuffix('running_mean')}num_batches_tracked"
            complete.setdefault(counter, state.get(counter, torch.zeros((), dtype=torch.int64)))
    return complete


def _classes(state: Mapping[str, torch.Tensor], classifier: str) -> int:
    weight = state.get(f"{classifier}.weight")
    # without values it may claim any number of rows
    return 0 if weight is None or weight.ndim == 0 or weight.numel() == 0 else len(weight)


def misfits(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], most: int = 10) -> str:
    """Why tensors are not a model's state dict, as the end of an error after the word 'it'; '' if they are.

    They must have its keys and shapes, any float type for a float and the same type for others, and finite values.
    ``expected`` may be on the meta device; of each list of keys ``most`` are named.
    """
    both = [(key, value, expected[key]) for key, value in tensors.items() if key in expected]
    problems = {
        "lacks": [key for key in expected if key not in tensors],
        "has unknown": [key for key in tensors if key not in expected],
        "has other shapes of": [
            f"{key} {tuple(value.shape)} for {tuple(wanted.shape)}"
            for key, value, wanted in both
            if value.shape != wanted.shape
        ],
        "has other types of": [
            f"{key} {value.dtype} for {wanted.dtype}"
            for key, value, wanted in both
            if value.dtype not in (FLOATS if wanted.is_floating_point() else {wanted.dtype})
        ],
        "has values that are not finite in": [
            # in the model's type, which cannot represent a larger double
            key
            for key, value, wanted in both
            if value.dtype in FLOATS and value.shape == wanted.shape and not value.to(wanted.dtype).isfinite().all()
        ],
    }
    return "; it ".join(f"{what} {some(keys, most)}" for what, keys in problems.items() if keys)


def _check(found: Converted) -> None:
    model = timm.create_model(found.model, num_classes=found.num_classes, device="meta", **found.model_args)
    if told := misfits(found.state_dict, model.state_dict()):
        raise ValueError(f"the checkpoint, of {found.origin}, does not fit {found.model}: it {told}")


def _authors_key(key: str) -> str | None:
    if match := _NIN_CONV.fullmatch(key):
        block, layer, kind, name = match.groups()
        return f"blocks.block{block}.{int(layer) - 1}.{'conv' if kind == 'Conv' else 'bn'}.{name}"
    if match := _ALEXNET_CONV.fullmatch(key):
        block, kind, name = match.groups()
        return f"features.{_ALEXNET_CONVS[block]}.{'conv' if kind == '0' else 'bn'}.{name}"
    if match := _ALEXNET_FC.fullmatch(key):
        return f"head.{_ALEXNET_FCS[match[1]]}.{match[2]}"
    if match := _NIN_HEAD.fullmatch(key) or _ALEXNET_HEAD.fullmatch(key):
        return f"head.fc.{match[1]}"
    return None
