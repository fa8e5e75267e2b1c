"""What is measured: a backbone and its weights, with the name and hash that identify them in result rows."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from timm.data import resolve_model_data_config
from torch import nn

import rotation_ssl  # noqa: F401  registers the models with timm
from rotation_ssl import zoo
from rotation_ssl.convert import misfits
from rotation_ssl.machine import device_name, library_versions
from rotation_ssl.messages import first_line
from rotation_ssl.zoo.checks import read_tensors
from training.reporting.rows import Row, current_commit


@dataclasses.dataclass(frozen=True)
class Subject:
    """A backbone in eval mode, its name in rows, the sha256 of its weights, and its image size in pixels.

    ``random`` says that it has random weights.
    """

    name: str
    architecture: str
    backbone: nn.Module
    sha256: str
    size: int
    random: bool = False

    def on(self, device: str) -> "Subject":
        """The subject, its backbone moved to a device, in the memory order that convolutions are fastest in."""
        self.backbone.to(device).to(memory_format=torch.channels_last)
        return self

    @property
    def identity(self) -> str:
        """What tells the subject from every other, in one line."""
        cfg = resolve_model_data_config(self.backbone)
        return f"{self.name} of {self.size} pixels, mean {cfg['mean']}, std {cfg['std']}, sha256 {self.sha256}"

    @property
    def published(self) -> bool:
        """Whether the name is one of the manifest's."""
        return self.name in zoo.bundled()


def load_subject(
    model: str, *, random: bool = False, seed: int = 0, weights: Path | None = None, size: int | None = None
) -> Subject:
    """Any timm model: published weights of this package, timm's own, a file's, or random ones.

    Args:
        model: ``model.tag`` or ``model`` for its default tag; the part before the dot names the network.
        random: use random weights, with the layers and the input size of the published weights of that name (the
            bundled ones if there is no tag). The name is ``model.random`` (``model.random1`` for seed 1, and so on), or
            ``model.tag-random`` if the published weights are not bundled.
        seed: of the random weights.
        weights: a safetensors file; the name is ``model@`` and the first 12 digits of its sha256. Mean and std are
            those of the config.json next to it, or those of the model's tag.
        size: image size in pixels; None: that of the config.json next to the weights, or the model's own.
    """
    architecture = model.split(".", 1)[0]
    if not timm.is_model(architecture):
        known = ", ".join(timm.list_models("rotnet_*"))
        raise ValueError(f"no model {architecture!r}; there are {known}, and all of timm's (timm.list_models())")
    if random and weights:
        raise ValueError("--random and --weights exclude each other: give one of them")
    torch.manual_seed(seed)
    try:
        if random:
            backbone = timm.create_model(model, **_published_args(model))
        elif weights:
            backbone = _with_file(model, weights)
        else:
            backbone = timm.create_model(model, pretrained=True)
    except RuntimeError as error:
        reason = first_line(error)
        raise ValueError(
            f"{model} could not be loaded ({reason}): give other weights, or --random where the command has it"
        ) from error
    digest = hashlib.sha256(weights.read_bytes() if weights else _tensor_bytes(backbone)).hexdigest()
    name = f"{model if weights else architecture}@{digest[:12]}"
    if random:
        # the name model.random is for the network of the bundled weights
        beside = model in zoo.manifest() and model not in zoo.bundled()
        name = f"{model}-random{seed or ''}" if beside else f"{architecture}.random{seed or ''}"
    elif not weights and (tagged := f"{architecture}.{backbone.pretrained_cfg.get('tag')}") in zoo.bundled():
        name, digest = tagged, zoo.bundled()[tagged]["sha256"]
    described = _described(weights, size) if weights else {}
    backbone.pretrained_cfg = {**backbone.pretrained_cfg, **described}
    size = size or described.get("input_size", resolve_model_data_config(backbone)["input_size"])[-1]
    try:
        with torch.inference_mode():
            backbone.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = first_line(error)
        raise ValueError(
            f"{architecture} does not take images of {size} pixels ({reason}): give another size"
        ) from error
    return Subject(name, architecture, backbone, digest, size, random)


def subject_of_row(weights: str) -> Subject:
    """The subject of a reported row: published weights, or ``model.random``."""
    architecture, _, tag = weights.partition(".")
    if weights in zoo.bundled():
        return load_subject(weights)
    if tag.startswith("random") and tag[6:].isdigit() | (tag == "random"):
        return load_subject(architecture, random=True, seed=int(tag[6:] or 0))
    raise ValueError(f"{weights} has no entry in the manifest: its numbers cannot be reported or checked")


def measured_row(
    subject: Subject, counts: Sequence[int], n: int, data: str, settings: str, seconds: float, **fields: Any
) -> Row:
    """The row of a measured number: correct predictions by parts of ``n``, and the seconds that it took."""
    counted = {"correct": sum(counts), "n": n, "counts": tuple(counts)}
    return measured_value(subject, sum(counts) / n, data, settings, seconds, **counted, **fields)


def measured_value(subject: Subject, value: float, data: str, settings: str, seconds: float, **fields: Any) -> Row:
    """The row of a measured number that is not a count of correct predictions, or whose counts are in ``fields``."""
    return Row(
        weights=subject.name,
        value=value,
        source="measured",
        data=data,
        settings=settings,
        sha256=subject.sha256,
        commit=current_commit(),
        versions=library_versions(),
        device=device_name(next(subject.backbone.parameters()).device),
        threads=torch.get_num_threads(),
        seconds=round(seconds, 1),
        **fields,
    )


def _tensor_bytes(backbone: nn.Module) -> bytes:
    # copied: tensors of modules that have two names share memory, which safetensors refuses
    return save({k: v.clone(memory_format=torch.contiguous_format) for k, v in backbone.state_dict().items()})


def _published_args(model: str) -> dict[str, Any]:
    """The arguments that the weights published as ``model.tag``, or the bundled ones of ``model``, were built with, so
    that random weights can be compared with them.
    """
    if model in zoo.manifest():
        return dict(zoo.manifest()[model].get("model_args", {}))
    entries = (entry for name, entry in zoo.bundled().items() if name.split(".", 1)[0] == model)
    return dict(next(entries, {}).get("model_args", {}))


def _described(weights: Path, size: int | None) -> dict[str, Any]:
    """What the config.json next to weights of a run or a conversion says of their input; nothing without one.

    ``size`` is the image size that was asked for: without one config.json has to give it.
    """
    described = weights.with_name("config.json")
    if weights.name != "model.safetensors" or not described.is_file():
        return {}
    try:
        config = json.loads(described.read_text())["pretrained_cfg"]
        size = int(size or config["input_size"][-1])
        return {"input_size": (3, size, size)} | {key: tuple(config[key]) for key in ("mean", "std") if key in config}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        if size:
            return {}
        raise ValueError(f"{described} does not give the input_size of its weights: give --size") from error


def _with_file(model: str, file: Path) -> nn.Module:
    if not file.is_file():
        raise ValueError(f"weights file {file} does not exist")
    architecture = model.split(".", 1)[0]
    # those of this package are checked as they are loaded
    if architecture in timm.list_models("rotnet_*"):
        return timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    # with its tag, which may have a mean, std and size of its own
    backbone = timm.create_model(model, num_classes=0)
    classifier = backbone.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    expected = backbone.state_dict()
    state = read_tensors(file.read_bytes(), f"weights file {file}")
    state = {key: value for key, value in state.items() if key in expected or not key.startswith(heads)}
    if told := misfits(state, expected, most=3):
        raise ValueError(f"{file} does not fit {architecture}: it {told}")
    backbone.load_state_dict(state)
    return backbone
