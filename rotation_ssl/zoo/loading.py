"""From a model's name to its verified weights, or a clear error.

timm hashes nothing that it loads, and with another number of classes it accepts a file of entirely wrong keys.
:func:`build_model` hashes published weights, however they are loaded, and checks the keys of all weights. A file is
read once: the tensors come from the bytes that were hashed, even if the file changes in the meantime.
"""

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

import torch
from timm.models import PretrainedCfg, build_model_with_cfg, list_models, list_pretrained, resolve_pretrained_cfg
from torch import nn

from rotation_ssl.messages import first_line
from rotation_ssl.zoo import published, sources
from rotation_ssl.zoo.checks import check_state_dict, classes_of, read_tensors, unwrap
from rotation_ssl.zoo.published import location, manifest

# for a user's own weights: what the manifest says about the default tag does not apply to them
NOT_PUBLISHED = {"tag": None}


def weights_file(name: str, cache_dir: str | Path | None = None, accept_new_hash: bool = False) -> Path:
    """The verified local file of ``model.tag``: in the wheel, in a cache, or downloaded now.

    Loading the file reads it again, unverified; :func:`read_weights` returns the verified bytes.

    Args:
        name: a name of the manifest.
        cache_dir: folder for downloads; None: the caches of huggingface_hub and torch.hub.
        accept_new_hash: download the weights of a release again, and record the archive's new hash.

    Raises:
        ValueError: no such name, weights that are not the bytes that were published, or a new hash of weights whose
            hash is published.
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
        raise ValueError(f"no published weights {name!r}; {_available(name.split('.', 1)[0])}")
    entry = manifest()[name]
    if accept_new_hash and entry["source"] != "release":
        raise ValueError(f"the hash of {name} is published with this version: there is no new one to accept")
    if entry["source"] == "release":
        return sources.read_release(name, entry, cache_dir, accept_new_hash)
    if entry["source"] == "hub":
        return sources.read_hub(name, entry, cache_dir)
    file = published.WEIGHTS_DIR / entry["file"]
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
        folder = sources.release_cache(cache_dir)
        file = folder / f"{name}.safetensors" if sources.read_record(name, cache_dir) else None
    else:
        file = published.WEIGHTS_DIR / entry["file"]
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
        optional: a model argument and the keys of the layers that exist only if it is not 0, for example
            ``("fc_size", ("head.fc6.", "head.fc7."))``. It defaults to 0 for weights without these layers. If you set
            it and the weights lack them, the layers and the classifier are initialised randomly; if you set it to 0
            and the weights have them, the classifier is. Both give a warning.
        **kwargs: timm's and the model's further arguments.

    Raises:
        ValueError: an unknown tag, no weights, or weights that are missing, damaged or do not fit the model.
    """
    cfg = _resolve_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    source, state_dict, overlay = _open_source(variant, cfg, kwargs.get("cache_dir")) if pretrained else ("", None, {})
    layers: tuple[str, ...] = ()
    implied: dict[str, Any] = {}
    if optional and pretrained:
        argument, layers = optional
        if state_dict and argument not in kwargs and not any(key.startswith(layers) for key in state_dict):
            implied[argument] = 0
    if state_dict is not None:
        # timm takes it from here, wherever the configuration says that the weights are
        overlay = overlay | (kwargs.get("pretrained_cfg_overlay") or {}) | {"state_dict": state_dict, "source": ""}
        kwargs["pretrained_cfg_overlay"] = overlay
    check = functools.partial(check_state_dict, source=source, optional=layers)
    model = build_model_with_cfg(model_cls, variant, pretrained, pretrained_filter_fn=check, **implied, **kwargs)
    # as if it had been given: timm writes the arguments into config.json, from which others build the model again
    model._model_args = implied
    # the configuration says what the model is: it would keep a second copy of the weights, as would the one within a
    # wrapper for features
    for module in model.modules():
        if isinstance(cfg := getattr(module, "pretrained_cfg", None), dict):
            cfg.pop("state_dict", None)
    return model


def _open_source(
    variant: str, cfg: PretrainedCfg, cache_dir: str | None
) -> tuple[str, dict[str, torch.Tensor] | None, dict[str, Any]]:
    """The source of the weights, for errors; their verified tensors; and what they change in timm's configuration.

    The tensors are None if timm is to load them, from other people's repositories and addresses.
    """
    if cfg.source == "hf-hub":
        return _open_hub_name(str(cfg.hf_hub_id), cache_dir)
    if cfg.source == "local-dir":
        return str(cfg.file), _read_folder(Path(str(cfg.file))), {}
    # tensors that the user gave
    if cfg.state_dict is not None:
        source = "the state_dict given"
        state_dict = unwrap(cfg.state_dict, source)
        return source, state_dict, {**classes_of(state_dict, cfg.classifier), **NOT_PUBLISHED}
    name = f"{variant}.{cfg.tag}"
    where = location(manifest()[name]) if name in manifest() else {}
    # a file of the user's own
    if cfg.file and cfg.file != where.get("file"):
        state_dict = _read_file(Path(cfg.file))
        return str(cfg.file), state_dict, {**classes_of(state_dict, cfg.classifier), **NOT_PUBLISHED}
    # bundled weights, or those of the authors' release
    if cfg.file or (cfg.url and cfg.url == where.get("url")):
        return name, read_tensors(read_weights(name, cache_dir), name), {}
    if cfg.hf_hub_id and cfg.hf_hub_id == where.get("hf_hub_id"):
        # weights on the Hub; bundled ones too, if the user passed file=None
        return name, read_tensors(sources.read_hub(name, manifest()[name], cache_dir)[1], name), {}
    if not cfg.has_weights:
        raise ValueError(f"{variant} has no pretrained weights: use pretrained=False; {_available(variant)}")
    return f"the weights of {variant}", None, {}


def _open_hub_name(hub_id: str, cache_dir: str | None) -> tuple[str, dict[str, torch.Tensor] | None, dict[str, Any]]:
    """``hf-hub:REPOSITORY[@REVISION]``: the published bytes, where repository and revision are ours."""
    repository, _, revision = hub_id.partition("@")
    for name, entry in manifest().items():
        hub = entry.get("hub", {})
        if hub.get("repository") != repository or revision not in ("", "main", hub["version"], hub["revision"]):
            continue
        if revision == hub["revision"]:
            return name, read_tensors(sources.read_hub(name, entry, cache_dir)[1], name), {}
        for force in (False, True):
            file = sources.download_from_hub(name, repository, revision or "main", hub["file"], cache_dir, force)
            with contextlib.suppress(sources.Mismatch):
                return name, read_tensors(sources.read_verified(file, entry["sha256"], entry["size"]), name), {}
        raise ValueError(
            f"{revision or 'main'} of {repository} is not, or no longer, what this version of rotation_ssl published as"
            f" {name}: take hf-hub:{repository}@{hub['revision']}, or upgrade rotation-ssl"
        )
    return hub_id, None, {}


def read_config(folder: Path) -> Any:
    """What the config.json of a folder of weights says.

    Raises:
        ValueError: it is not JSON; the error names it.
    """
    file = folder / "config.json"
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({first_line(error)}): copy or download it again") from error


def _read_folder(folder: Path) -> dict[str, torch.Tensor] | None:
    """``local-dir:FOLDER``: compared with the sha256 of its config.json, where it has one."""
    described = read_config(folder)
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
    return unwrap(read_tensors(content, str(folder)), str(folder))


def _read_file(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a user's safetensors file."""
    if not file.is_file():
        raise ValueError(f"weights file {file} does not exist")
    if file.suffix != ".safetensors":
        raise ValueError(f"weights file {file} is not a .safetensors file: convert it with safetensors.torch.save_file")
    return unwrap(read_tensors(file.read_bytes(), f"weights file {file}"), str(file))


def _resolve_cfg(variant: str, cfg: Any, overlay: dict[str, Any] | None) -> PretrainedCfg:
    try:
        return resolve_pretrained_cfg(variant, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay)
    except RuntimeError as error:
        raise ValueError(f"{variant} has no weights tagged {cfg!r}; {_available(variant)}") from error


def _available(variant: str) -> str:
    """Which weights of a network there are, for errors; of all networks where it is none of ours."""
    own = list_pretrained(f"{variant}.*") or (
        list_pretrained("rotnet_*") if variant not in list_models("rotnet_*") else []
    )
    return f"there are: {', '.join(own)}" if own else f"there are none of {variant} yet"
