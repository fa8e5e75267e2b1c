"""From a model's name to weights that are the measured bytes, or a clear error.

The manifest (``weights/manifest.json``) has one entry for every published ``model.tag``: where it comes from, its
sha256 and size, its licence and what it was made of. timm hashes nothing it loads, and with another number of classes
it takes a file of entirely wrong keys without an error; :func:`build_model` closes the first hole for published tags,
whichever way they are asked for, the second for all weights. A file is read once: the bytes that are hashed are the
bytes that the tensors come from, whatever happens to the file meanwhile.
"""

import contextlib
import functools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    clean_state_dict,
    list_models,
    list_pretrained,
    resolve_pretrained_cfg,
)
from torch import nn

from rotation_ssl import sources
from rotation_ssl.convert import FLOATS
from rotation_ssl.messages import some

WEIGHTS_DIR = Path(__file__).parent / "weights"
_FIELDS = ("file", "sha256", "size", "license", "data", "input_size", "mean", "std", "recommended_layer", "metrics")


@functools.cache
def manifest() -> dict[str, dict[str, Any]]:
    """The published weights: ``model.tag`` -> its entry in ``weights/manifest.json``. Not to be changed in place.

    Every entry has 'source' ('bundled', 'hub' or 'release'), 'file', 'sha256' and 'size' (of a release None until they
    are known), 'license', 'origin', 'recipe', 'data', 'input_size', 'mean', 'std', 'recommended_layer', 'metrics'; what
    is on the Hub also 'hub' ('repository', 'revision', 'version', 'file'), a release 'url' and 'archive_sha256', a
    network made with other arguments than the default ones 'model_args'.

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


def published_cfgs(model: str) -> dict[str, dict[str, Any]]:
    """What timm's configuration of each tag of a model takes from the manifest.

    The default is the first of the bundled, or none ('model.*', timm's mark of a default, which it heeds when it comes
    last) where none are, for a default needs no network. No tag is there before its weights are: timm would name it as
    one that can be loaded.
    """
    own = {name: entry for name, entry in manifest().items() if name.split(".", 1)[0] == model}
    bundled = [name for name, entry in own.items() if entry["source"] == "bundled"]
    cfgs: dict[str, dict[str, Any]] = {}
    for name in (*bundled, *(name for name in own if name not in bundled)):
        entry = own[name]
        images = {key: tuple(entry[key]) for key in ("input_size", "mean", "std")}
        cfgs[name] = {**_location(entry), **images, "license": entry["license"]}
    return cfgs if bundled else {**cfgs, f"{model}.*": {}}


def weights_file(name: str, cache_dir: str | Path | None = None, accept_new_hash: bool = False) -> Path:
    """The verified local file of ``model.tag``: in the wheel, in a cache, or downloaded now.

    Whoever loads it reads it again: :func:`read_weights` gives the bytes that were verified.

    Args:
        name: a name of the manifest.
        cache_dir: of downloads, in place of the Hub client's and of torch.hub's own.
        accept_new_hash: for weights of a release: see :func:`rotation_ssl.sources.read_release`.

    Raises:
        ValueError: no such name, or weights that are not the bytes that were published.
        OSError: they are not here and could not be downloaded; the error says what is missing and what to do.
    """
    return _read_published(name, cache_dir, accept_new_hash)[0]


def read_weights(name: str, cache_dir: str | Path | None = None) -> bytes:
    """The content of the safetensors file of ``model.tag``, verified; arguments and errors of :func:`weights_file`."""
    return _read_published(name, cache_dir)[1]


def _read_published(
    name: str, cache_dir: str | Path | None = None, accept_new_hash: bool = False
) -> tuple[Path, bytes]:
    if name not in manifest():
        raise ValueError(f"no published weights {name!r}; {_published(name.split('.', 1)[0])}")
    entry = manifest()[name]
    if entry["source"] == "release":
        return sources.read_release(name, entry, cache_dir, accept_new_hash)
    if entry["source"] == "hub":
        return sources.read_hub(name, entry, cache_dir)
    file = WEIGHTS_DIR / entry["file"]
    if not file.is_file():
        raise ValueError(f"weights of {name} are missing: {file} does not exist; reinstall rotation-ssl")
    try:
        return file, sources.read_verified(file, entry["sha256"], entry["size"])
    except sources.Mismatch as error:
        raise ValueError(
            f"weights of {name} are corrupt: {error} as the manifest says; reinstall rotation-ssl"
        ) from error


def cached_file(name: str, cache_dir: str | Path | None = None) -> Path | None:
    """Where the weights of ``model.tag`` are on this machine, not verified; None when they are not."""
    entry = manifest()[name]
    if entry["source"] == "hub":
        hub = entry["hub"]
        return sources.cached_hub_file(hub["repository"], hub["revision"], hub["file"], cache_dir)
    if entry["source"] == "release":
        folder = Path(cache_dir) if cache_dir else sources.release_cache()
        file = folder / f"{name}.safetensors" if sources.read_record(name, cache_dir) else None
    else:
        file = WEIGHTS_DIR / entry["file"]
    return file if file and file.is_file() else None


def build_model(
    model_cls: type[nn.Module],
    variant: str,
    pretrained: bool,
    optional: tuple[str, tuple[str, ...]] | None = None,
    **kwargs: Any,
) -> Any:
    """timm's ``build_model_with_cfg``, with the weights checked before any of them reaches the model.

    Args:
        model_cls: class of the model.
        variant: its registered name.
        pretrained: load the weights of the configuration: those of a published tag, or the user's own file given as
            ``pretrained_cfg_overlay=dict(file=...)``, whose classifier then decides the default ``num_classes``.
        optional: an argument of the model, and the layers that are not there where it is 0, which weights may lack: its
            default is then 0, and whoever asks for those layers gets new ones and a new classifier, with a warning.
            Whoever asks for 0 of weights that have them gets the other layers and a new classifier, with a warning.
        **kwargs: timm's and the model's further arguments.

    Raises:
        ValueError: an unknown tag, no weights, or weights that are missing, damaged or do not fit the model.
    """
    cfg = _resolve_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    source, state_dict, overlay = _open_source(variant, cfg, kwargs.get("cache_dir")) if pretrained else ("", None, {})
    layers: tuple[str, ...] = ()
    if optional and pretrained:
        argument, layers = optional
        if state_dict and argument not in kwargs and not any(key.startswith(layers) for key in state_dict):
            kwargs[argument] = 0
    if state_dict is not None:
        # timm takes it from here, wherever the configuration says that the weights are
        overlay = overlay | (kwargs.get("pretrained_cfg_overlay") or {}) | {"state_dict": state_dict, "source": ""}
        kwargs["pretrained_cfg_overlay"] = overlay
    check = functools.partial(_check_state_dict, source=source, optional=layers)
    model = build_model_with_cfg(model_cls, variant, pretrained, pretrained_filter_fn=check, **kwargs)
    # the configuration says what the model is: it would keep a second copy of the weights, as would the one within a
    # wrapper for features
    for module in model.modules():
        if isinstance(cfg := getattr(module, "pretrained_cfg", None), dict):
            cfg.pop("state_dict", None)
    return model


def _open_source(
    variant: str, cfg: PretrainedCfg, cache_dir: str | None
) -> tuple[str, dict[str, torch.Tensor] | None, dict[str, Any]]:
    """Where the weights are from, for errors; their tensors, verified; and what they say about the configuration.

    The tensors are None where timm is to load them: those of other people's repositories and addresses.
    """
    if cfg.source == "hf-hub":
        return _open_hub_name(str(cfg.hf_hub_id), cache_dir)
    if cfg.source == "local-dir":
        return str(cfg.file), _read_folder(Path(str(cfg.file))), {}
    if cfg.state_dict is not None:
        source = "the state_dict given"
        state_dict = _unwrap(cfg.state_dict, source)
        return source, state_dict, _classes(state_dict, cfg.classifier)
    name = f"{variant}.{cfg.tag}"
    location = _location(manifest()[name]) if name in manifest() else {}
    if cfg.file and cfg.file != location.get("file"):
        state_dict = _read_file(Path(cfg.file))
        return str(cfg.file), state_dict, _classes(state_dict, cfg.classifier)
    if cfg.file or (cfg.url and cfg.url == location.get("url")):
        return name, _parse(read_weights(name, cache_dir), name), {}
    if cfg.hf_hub_id and cfg.hf_hub_id == location.get("hf_hub_id"):
        # of bundled weights too, where the user took the wheel's file away (file=None)
        return name, _parse(sources.read_hub(name, manifest()[name], cache_dir)[1], name), {}
    if not cfg.has_weights:
        raise ValueError(f"{variant} has no pretrained weights: use pretrained=False; {_published(variant)}")
    return f"the weights of {variant}", None, {}


def _open_hub_name(hub_id: str, cache_dir: str | None) -> tuple[str, dict[str, torch.Tensor] | None, dict[str, Any]]:
    """``hf-hub:REPOSITORY[@REVISION]``: the published bytes, where repository and revision are ours."""
    repository, _, revision = hub_id.partition("@")
    for name, entry in manifest().items():
        hub = entry.get("hub", {})
        if hub.get("repository") != repository or revision not in ("", "main", hub["version"], hub["revision"]):
            continue
        if revision == hub["revision"]:
            return name, _parse(sources.read_hub(name, entry, cache_dir)[1], name), {}
        for force in (False, True):
            file = sources.download_from_hub(name, repository, revision or "main", hub["file"], cache_dir, force)
            with contextlib.suppress(sources.Mismatch):
                return name, _parse(sources.read_verified(file, entry["sha256"], entry["size"]), name), {}
        raise ValueError(
            f"{revision or 'main'} of {repository} is not, or no longer, what this version of rotation_ssl published as"
            f" {name}: take hf-hub:{repository}@{hub['revision']}, or upgrade rotation-ssl"
        )
    return hub_id, None, {}


def _read_folder(folder: Path) -> dict[str, torch.Tensor] | None:
    """``local-dir:FOLDER``: compared with the sha256 of its config.json, where it has one."""
    described = json.loads((folder / "config.json").read_text())
    file = folder / "model.safetensors"
    if not isinstance(described, dict) or not {"sha256", "size"} <= set(described):
        # of the kinds of files that timm takes, the one that is read here
        return _read_file(file) if file.is_file() else None
    if not isinstance(described["size"], int):
        raise ValueError(f"{folder / 'config.json'} says that the weights have {described['size']!r} bytes: no number")
    try:
        content = sources.read_verified(file, str(described["sha256"]), described["size"])
    except sources.Mismatch as error:
        raise ValueError(
            f"weights of {folder} are corrupt: {error} as its config.json says; convert or download them again"
        ) from error
    return _unwrap(_parse(content, str(folder)), str(folder))


def _location(entry: Mapping[str, Any]) -> dict[str, Any]:
    """timm's keys for where an entry's weights are; neither opened nor checked."""
    location: dict[str, Any] = {}
    if entry["source"] == "bundled":
        location["file"] = str(WEIGHTS_DIR / entry["file"])
    if entry["source"] == "release":
        location["url"] = entry["url"]
    if "hub" in entry:
        location["hf_hub_id"] = f"{entry['hub']['repository']}@{entry['hub']['revision']}"
        location["hf_hub_filename"] = entry["hub"]["file"]
    return location


def _resolve_cfg(variant: str, cfg: Any, overlay: dict[str, Any] | None) -> PretrainedCfg:
    try:
        return resolve_pretrained_cfg(variant, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay)
    except RuntimeError as error:
        raise ValueError(f"{variant} has no weights tagged {cfg!r}; {_published(variant)}") from error


def _published(variant: str) -> str:
    """Which weights of a network there are, for errors; of all networks where it is none of ours."""
    own = list_pretrained(f"{variant}.*") or (
        list_pretrained("rotnet_*") if variant not in list_models("rotnet_*") else []
    )
    return f"there are: {', '.join(own)}" if own else f"there are none of {variant} yet"


def _read_file(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a user's safetensors file."""
    if not file.is_file():
        raise ValueError(f"weights file {file} does not exist")
    if file.suffix != ".safetensors":
        raise ValueError(f"weights file {file} is not a .safetensors file: convert it with safetensors.torch.save_file")
    return _unwrap(_parse(file.read_bytes(), f"weights file {file}"), str(file))


def _parse(content: bytes, source: str) -> dict[str, torch.Tensor]:
    try:
        return load(content)
    except (SafetensorError, KeyError, ValueError) as error:
        # KeyError: a type of numbers that torch does not have
        raise ValueError(f"{source} is not a whole safetensors file ({error}); download or convert it again") from error


def _unwrap(state_dict: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """Tensors without the prefixes of DistributedDataParallel and torch.compile, as timm reads them from a file."""
    if not state_dict or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ValueError(f"{source} must hold tensors, and nothing else; nothing was loaded")
    unwrapped: dict[str, torch.Tensor] = clean_state_dict(dict(state_dict))
    if len(unwrapped) < len(state_dict):
        twice = [
            key for key in state_dict if key not in unwrapped and clean_state_dict({key: 0}).keys() & state_dict.keys()
        ]
        raise ValueError(f"{source} has keys both with and without a prefix: {some(twice, 3)}; nothing was loaded")
    return unwrapped


def _classes(tensors: Mapping[str, torch.Tensor], classifier: str) -> dict[str, int]:
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


def _check_state_dict(
    state_dict: dict[str, torch.Tensor], model: nn.Module, source: str, optional: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """Refuse a state dict that lacks keys, has others, or holds tensors of another shape or type or not finite.

    ``optional`` layers may be missing, or be there and not in the model: see :func:`build_model`.

    The first convolution may have the input channels that the configuration says, whatever the model's are, and the
    classifier other classes: timm adapts the one and leaves out the other.
    """
    cfg: Any = model.pretrained_cfg
    head, stem = f"{cfg['classifier']}.", f"{cfg['first_conv']}.weight"
    fresh_head = model.num_classes != cfg["num_classes"]
    state_dict = _fit_optional(state_dict, model, source, optional, head)
    expected = {k: v for k, v in model.state_dict().items() if not (fresh_head and k.startswith(head))}
    missing = [key for key in expected if key not in state_dict]
    unknown = [key for key in state_dict if key not in expected and not (fresh_head and key.startswith(head))]
    if missing or unknown:
        raise ValueError(
            f"{source} does not fit {type(model).__name__}: it lacks {some(missing, 3)} and has {some(unknown, 3)} "
            "that the model does not; nothing was loaded"
        )
    channels = (cfg.get("input_size") or (3,))[0]
    adapted = {key: value.shape for key, value in expected.items()}
    if state_dict[stem].shape[1:2] == (channels,):
        adapted[stem] = torch.Size((expected[stem].shape[0], channels, *expected[stem].shape[2:]))
    wrong = [
        f"{key} {tuple(state_dict[key].shape)} for {tuple(expected[key].shape)}"
        for key, shape in adapted.items()
        if state_dict[key].shape != shape
    ]
    if wrong:
        raise ValueError(f"{source} does not fit {type(model).__name__}: shapes {some(wrong, 3)}; nothing was loaded")
    types = [
        f"{key} {state_dict[key].dtype} for {own.dtype}"
        for key, own in expected.items()
        if state_dict[key].dtype not in (FLOATS if own.is_floating_point() else {own.dtype})
    ]
    if types:
        raise ValueError(f"{source} does not fit {type(model).__name__}: types {some(types, 3)}; nothing was loaded")
    # in the model's type: a larger double is none there
    broken = [key for key, value in expected.items() if not state_dict[key].to(value.dtype).isfinite().all()]
    if broken:
        raise ValueError(f"{source} holds values that are not finite in {some(broken, 3)}; nothing was loaded")
    return state_dict
