"""From a model's name to weights that are the measured bytes, or a clear error.

The manifest (``weights/manifest.json``) has one entry for every published ``model.tag``: where it comes from, its
sha256 and size, its licence and what it was made of. timm hashes nothing it loads, and with another number of classes
it takes a file of entirely wrong keys without an error; :func:`build_model` closes the first hole for published tags,
whichever way they are asked for, the second for all weights.
"""

import functools
import json
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    clean_state_dict,
    list_pretrained,
    resolve_pretrained_cfg,
)
from torch import nn

from rotation_ssl import sources

WEIGHTS_DIR = Path(__file__).parent / "weights"


@functools.cache
def manifest() -> dict[str, dict[str, Any]]:
    """The published weights: ``model.tag`` -> its entry in ``weights/manifest.json``. Not to be changed in place.

    Every entry has 'source' ('bundled', 'hub' or 'release'), 'file', 'sha256' and 'size' (of a release None until they
    are known), 'license', 'origin', 'recipe', 'data', 'input_size', 'mean', 'std', 'recommended_layer', 'metrics'; what
    is on the Hub also 'hub' ('repository', 'revision', 'version', 'file'), a release 'url' and 'archive_sha256', a
    network made with other arguments than the default ones 'model_args'.
    """
    entries: dict[str, dict[str, Any]] = json.loads((WEIGHTS_DIR / "manifest.json").read_text())
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

    Args:
        name: a name of the manifest.
        cache_dir: of downloads, in place of the Hub client's and of torch.hub's own.
        accept_new_hash: for weights of a release: see :func:`rotation_ssl.sources.release_file`.

    Raises:
        ValueError: no such name, or weights that are not the bytes that were published.
        OSError: they are not here and cannot be had; the error says what is missing and what to do.
    """
    if name not in manifest():
        raise ValueError(f"no published weights {name!r}; there are: {_published()}")
    entry = manifest()[name]
    if entry["source"] == "release":
        return sources.release_file(name, entry, cache_dir, accept_new_hash)
    if entry["source"] == "hub":
        return sources.hub_file(name, entry, cache_dir)
    file = WEIGHTS_DIR / entry["file"]
    verify(file, name)
    return file


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


def verify(file: Path, name: str) -> None:
    """Check a file against the size and sha256 that the manifest has for ``model.tag``.

    Raises:
        ValueError: the file is missing, of another size, or of other bytes.
    """
    entry = manifest()[name]
    if not file.is_file():
        raise ValueError(f"weights of {name} are missing: {file} does not exist; reinstall rotation-ssl")
    wrong = sources.difference(file, entry["sha256"], entry["size"])
    if wrong:
        raise ValueError(f"weights of {name} are damaged: {wrong} as the manifest says; reinstall rotation-ssl")


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
    source, overlay = _open_source(variant, cfg, kwargs.get("cache_dir")) if pretrained else ("", {})
    if overlay:
        classes = {key: overlay.pop(key) for key in ("num_classes",) if key in overlay}
        kwargs["pretrained_cfg_overlay"] = {**classes, **(kwargs.get("pretrained_cfg_overlay") or {}), **overlay}
    layers: tuple[str, ...] = ()
    if optional and pretrained:
        argument, layers = optional
        held = _held(overlay.get("file") or cfg.file, cfg.state_dict)
        if held is not None and argument not in kwargs and not any(key.startswith(layers) for key in held):
            kwargs[argument] = 0
    with ThreadPoolExecutor(1) as hashing:
        # while the network is built; no tensor reaches it before
        in_wheel = source in bundled() and overlay.get("file") == _location(bundled()[source])["file"]
        verified = hashing.submit(verify, Path(overlay["file"]), source).result if in_wheel else _nothing
        check = functools.partial(_check_state_dict, source=source, verified=verified, optional=layers)
        try:
            return build_model_with_cfg(model_cls, variant, pretrained, pretrained_filter_fn=check, **kwargs)
        except Exception as error:
            # what is wrong with the bytes says more than what they led to
            verified()
            if isinstance(error, SafetensorError):
                raise ValueError(f"{source} holds no whole safetensors file ({error}); fetch it anew") from error
            raise


def _nothing() -> None:
    """Nothing is left to verify."""


def _open_source(variant: str, cfg: PretrainedCfg, cache_dir: str | None) -> tuple[str, dict[str, Any]]:
    """Verify the weights: their name for errors, and what the configuration must say for timm to load that file.

    Those of the wheel are left to be verified.
    """
    if cfg.source == "hf-hub":
        return _open_hub_name(str(cfg.hf_hub_id), cache_dir)
    if cfg.source == "local-dir":
        return _open_folder(Path(str(cfg.file)))
    if cfg.state_dict:
        return "the state_dict given", {"num_classes": _classes(cfg.state_dict, cfg.classifier)}
    name = f"{variant}.{cfg.tag}"
    location = _location(manifest()[name]) if name in manifest() else {}
    if cfg.file and cfg.file != location.get("file"):
        return str(cfg.file), {"num_classes": _classes_of_file(Path(cfg.file), cfg.classifier)}
    if cfg.file:
        # in the wheel; build_model verifies it
        return name, {"file": cfg.file}
    if cfg.url and cfg.url == location.get("url"):
        return name, {"file": str(weights_file(name, cache_dir))}
    if cfg.hf_hub_id and cfg.hf_hub_id == location.get("hf_hub_id"):
        # of bundled weights too, where the user took the wheel's file away (file=None)
        return name, {"file": str(sources.hub_file(name, manifest()[name], cache_dir))}
    if not cfg.has_weights:
        raise ValueError(f"{variant} has no pretrained weights; use pretrained=False, or one of: {_published()}")
    return f"the weights of {variant}", {}


def _open_hub_name(hub_id: str, cache_dir: str | None) -> tuple[str, dict[str, Any]]:
    """``hf-hub:REPOSITORY[@REVISION]``: the published bytes, where repository and revision are ours."""
    repository, _, revision = hub_id.partition("@")
    for name, entry in manifest().items():
        hub = entry.get("hub", {})
        if hub.get("repository") != repository or revision not in ("", "main", hub["version"], hub["revision"]):
            continue
        if revision == hub["revision"]:
            return name, {"file": str(sources.hub_file(name, entry, cache_dir)), "source": ""}
        for force in (False, True):
            file = sources.download_from_hub(name, repository, revision or "main", hub["file"], cache_dir, force)
            if not sources.difference(file, entry["sha256"], entry["size"]):
                return name, {"file": str(file), "source": ""}
        raise ValueError(
            f"{revision or 'main'} of {repository} is not, or no longer, what this version of rotation_ssl published as"
            f" {name}: take hf-hub:{repository}@{hub['revision']}, or upgrade rotation-ssl"
        )
    return hub_id, {}


def _open_folder(folder: Path) -> tuple[str, dict[str, Any]]:
    """``local-dir:FOLDER``: compared with the sha256 of its config.json, where it has one."""
    described = json.loads((folder / "config.json").read_text())
    file = folder / "model.safetensors"
    if not isinstance(described, dict) or not {"sha256", "size"} <= set(described):
        return str(folder), {}
    if wrong := sources.difference(file, described["sha256"], described["size"]):
        raise ValueError(
            f"weights of {folder} are damaged: {wrong} as its config.json says; convert or fetch them anew"
        )
    return str(folder), {"file": str(file), "source": ""}


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


def _held(file: str | None, state_dict: Mapping[str, torch.Tensor] | None) -> list[str] | None:
    """The names of the tensors that weights hold; None where they are not at hand yet, or cannot be read."""
    if state_dict or file is None:
        return list(clean_state_dict(state_dict)) if state_dict else None
    try:
        with safe_open(file, "pt") as tensors:
            return list(clean_state_dict(dict.fromkeys(tensors.keys())))
    except (SafetensorError, OSError):
        # what is wrong with it is said where it is loaded
        return None


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
    state_dict: dict[str, torch.Tensor],
    model: nn.Module,
    source: str,
    verified: Callable[[], None],
    optional: tuple[str, ...] = (),
) -> dict[str, torch.Tensor]:
    """Refuse a state dict that lacks keys, has others, or holds tensors of another shape or not finite.

    ``verified`` raises where the file is not the published one. ``optional`` layers may be missing, or be there and not
    in the model: see :func:`build_model`.

    The first convolution may have other input channels, and the classifier other classes: timm adapts the one and
    leaves out the other.
    """
    verified()
    cfg: Any = model.pretrained_cfg
    head, stem = f"{cfg['classifier']}.", f"{cfg['first_conv']}.weight"
    fresh_head = model.num_classes != cfg["num_classes"]
    state_dict = _fit_optional(state_dict, model, source, optional, head)
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
    # published bytes were looked at before they were published
    own = {} if source in manifest() else {k: v for k, v in state_dict.items() if v.is_floating_point()}
    broken = [key for key, value in own.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"{source} holds values that are not finite in {_some(broken)}; nothing was loaded")
    return state_dict


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
