"""From a model's name to weights that are the measured bytes, or a clear error.

The manifest (``weights/manifest.json``) has one entry for every published ``model.tag``: file, sha256, size, licence
and where it came from. timm hashes nothing it loads, and with another number of classes it takes a file of entirely
wrong keys without an error; :func:`build_model` closes the first hole for published tags, the second for all weights.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    clean_state_dict,
    list_pretrained,
    resolve_pretrained_cfg,
)
from torch import nn

WEIGHTS_DIR = Path(__file__).parent / "weights"


@functools.cache
def manifest() -> dict[str, dict[str, Any]]:
    """The published weights: ``model.tag`` -> its entry in ``weights/manifest.json``. Not to be changed in place."""
    entries: dict[str, dict[str, Any]] = json.loads((WEIGHTS_DIR / "manifest.json").read_text())
    return entries


def bundled_file(name: str) -> str | None:
    """Path of the file that the wheel carries for ``model.tag``, neither opened nor checked; None when there is none.

    None, not an error: a tag is registered before its first weights are bundled by the command that needs this package.
    """
    return str(WEIGHTS_DIR / manifest()[name]["file"]) if name in manifest() else None


def verify(file: Path, name: str) -> None:
    """Check a file against the size and sha256 that the manifest has for ``model.tag``.

    Raises:
        ValueError: the file is missing, of another size, or of other bytes.
    """
    entry = manifest()[name]
    if not file.is_file():
        raise ValueError(f"weights of {name} are missing: {file} does not exist; reinstall rotation-ssl")
    size = file.stat().st_size
    if size != entry["size"]:
        raise ValueError(
            f"weights of {name} are damaged: {file} has {size:,} bytes, the manifest says {entry['size']:,}; "
            "reinstall rotation-ssl"
        )
    with file.open("rb") as stream:
        digest = (
            hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(stream)
        )
    if digest != entry["sha256"]:
        raise ValueError(
            f"weights of {name} are damaged: {file} has sha256 {digest}, the manifest says {entry['sha256']}; "
            "reinstall rotation-ssl"
        )


def build_model(model_cls: type[nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """timm's ``build_model_with_cfg``, with the weights checked before any of them reaches the model.

    Args:
        model_cls: class of the model.
        variant: its registered name.
        pretrained: load the weights of the configuration: those of a published tag, or the user's own file given as
            ``pretrained_cfg_overlay=dict(file=...)``, whose classifier then decides the default ``num_classes``.
        **kwargs: timm's and the model's further arguments.

    Raises:
        ValueError: an unknown tag, no weights, or weights that are missing, damaged or do not fit the model.
    """
    cfg = _resolve_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    source, classes = _open_source(variant, cfg) if pretrained else ("", None)
    if classes is not None:
        kwargs["pretrained_cfg_overlay"] = {"num_classes": classes, **(kwargs.get("pretrained_cfg_overlay") or {})}
    check = functools.partial(_check_state_dict, source=source)
    try:
        return build_model_with_cfg(model_cls, variant, pretrained, pretrained_filter_fn=check, **kwargs)
    except SafetensorError as error:
        raise ValueError(f"{source} holds no whole safetensors file ({error}); fetch it anew") from error


def _open_source(variant: str, cfg: PretrainedCfg) -> tuple[str, int | None]:
    """Check where the weights come from: its name for errors, and the classes of weights that are the user's own."""
    if cfg.source in ("hf-hub", "local-dir"):
        return str(cfg.hf_hub_id if cfg.source == "hf-hub" else cfg.file), None
    if cfg.state_dict:
        return "the state_dict given", _classes(cfg.state_dict, cfg.classifier)
    if cfg.file:
        name = f"{variant}.{cfg.tag}"
        if cfg.file != bundled_file(name):
            return str(cfg.file), _classes_of_file(Path(cfg.file), cfg.classifier)
        verify(Path(cfg.file), name)
        return name, None
    if not cfg.has_weights:
        raise ValueError(f"{variant} has no pretrained weights; use pretrained=False, or one of: {_published()}")
    return f"the weights of {variant}", None


def _resolve_cfg(variant: str, cfg: Any, overlay: dict[str, Any] | None) -> PretrainedCfg:
    try:
        return resolve_pretrained_cfg(variant, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay)
    except RuntimeError as error:
        raise ValueError(f"{variant} has no weights tagged {cfg!r}; there are: {_published()}") from error


def _published() -> str:
    return ", ".join(list_pretrained("rotnet_*")) or "none"


def _classes(tensors: Mapping[str, torch.Tensor], classifier: str) -> int:
    """Rows of the classifier among tensors, 0 when it is not there."""
    weight = tensors.get(f"{classifier}.weight")
    return 0 if weight is None else len(weight)


def _classes_of_file(file: Path, classifier: str) -> int:
    """Rows of the classifier in a user's safetensors file, 0 when it has none."""
    if not file.is_file():
        raise ValueError(f"weights file {file} does not exist")
    if file.suffix != ".safetensors":
        raise ValueError(f"weights file {file} is not a .safetensors file: convert it with safetensors.torch.save_file")
    try:
        # without the prefixes of DistributedDataParallel and torch.compile, as timm reads it
        return _classes(clean_state_dict(load_file(file)), classifier)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"weights file {file} is not a whole safetensors file ({error}); convert or fetch it anew"
        ) from error


def _check_state_dict(state_dict: dict[str, torch.Tensor], model: nn.Module, source: str) -> dict[str, torch.Tensor]:
    """Refuse a state dict that lacks keys, has others, or holds tensors of another shape or not finite.

    The first convolution may have other input channels, and the classifier other classes: timm adapts the one and
    leaves out the other.
    """
    cfg: Any = model.pretrained_cfg
    head, stem = f"{cfg['classifier']}.", f"{cfg['first_conv']}.weight"
    fresh_head = model.num_classes != cfg["num_classes"]
    expected = {k: v.shape for k, v in model.state_dict().items() if not (fresh_head and k.startswith(head))}
    missing = [key for key in expected if key not in state_dict]
    unknown = [key for key in state_dict if key not in expected and not (fresh_head and key.startswith(head))]
    if missing or unknown:
        raise ValueError(
            f"{source} does not fit {type(model).__name__}: it lacks {_some(missing)} and has {_some(unknown)} "
            "that the model does not; nothing was loaded"
        )
    wrong = [
        f"{key} {tuple(state_dict[key].shape)} for {tuple(shape)}"
        for key, shape in expected.items()
        if state_dict[key].shape != shape
        and not (key == stem and state_dict[key].shape[0] == shape[0] and state_dict[key].shape[2:] == shape[2:])
    ]
    if wrong:
        raise ValueError(f"{source} does not fit {type(model).__name__}: shapes {_some(wrong)}; nothing was loaded")
    broken = [key for key, value in state_dict.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ValueError(f"{source} holds values that are not finite in {_some(broken)}; nothing was loaded")
    return state_dict


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _sha256(stream: Any) -> str:
    # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
