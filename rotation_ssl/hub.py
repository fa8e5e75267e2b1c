"""Entry points of torch.hub: keyword-only, with documentation that names the weights and what they measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from torch import nn

from rotation_ssl import zoo
from rotation_ssl.backbones import alexnet, nin, resnets


def _load(name: str, pretrained: bool, weights: str | None, kwargs: dict[str, Any]) -> nn.Module:
    if not pretrained:
        if weights is not None:
            raise ValueError(f"weights={weights!r} needs pretrained=True; pretrained=False gives random weights")
        return timm.create_model(name, pretrained=False, **kwargs)
    if weights is None:
        return timm.create_model(name, pretrained=True, **kwargs)
    tags = [full.split(".", 1)[1] for full in timm.list_models(f"{name}.*", include_tags=True, pretrained=True)]
    if weights in tags:
        return timm.create_model(f"{name}.{weights}", pretrained=True, **kwargs)
    if not Path(weights).is_file():
        raise ValueError(
            f"weights={weights!r} is neither a tag of {name} (there are: {', '.join(tags) or 'none'}) nor a file"
        )
    overlay = {**kwargs.pop("pretrained_cfg_overlay", {}), "file": str(weights)}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def _document(entry_point: Callable[..., nn.Module], description: str, outputs: str) -> None:
    """Write the docstring that torch.hub.help shows, with the numbers of the manifest."""
    name = entry_point.__name__
    cfg = timm.get_pretrained_cfg(name)
    size = cfg.input_size[-1]
    mean, std = (", ".join(f"{value:.4f}" for value in values) for values in (cfg.mean, cfg.std))
    published = {key: entry for key, entry in zoo.manifest().items() if key.split(".", 1)[0] == name}
    measured = [f"    {key}: {_summary(entry)}" for key, entry in published.items()] or [
        "    none yet: use pretrained=False"
    ]
    entry_point.__doc__ = f"""{description}

Input: (N, 3, {size}, {size}) float, RGB in 0..1 normalised with mean ({mean}) and std ({std}).
Output: {outputs}

Args:
    pretrained: load weights; False gives random ones.
    weights: a tag of the weights below, or the path of a safetensors file; None is the default tag.
    num_classes: width of a fresh classifier; 0 for pooled features. None given: the 4 rotations.
    **kwargs: timm's further arguments: features_only=True, in_chans, global_pool, drop_rate, ...

Returns:
    torch.nn.Module, in train mode: call .eval() before you use it.

Raises:
    ValueError: no such weights, or a file that is damaged or does not fit.

Weights, with what this project measured on them:
{chr(10).join(measured)}
"""


def _summary(entry: dict[str, Any]) -> str:
    numbers = [f"{name} {100 * value:.2f} %" for name, value in entry.get("metrics", {}).items()]
    return f"{entry['data']}; {', '.join(numbers) or 'not measured'}"


def rotnet_nin(*, pretrained: bool = True, weights: str | None = None, **kwargs: Any) -> nn.Module:  # noqa: D103
    return _load("rotnet_nin", pretrained, weights, kwargs)


def rotnet_nin3(*, pretrained: bool = True, weights: str | None = None, **kwargs: Any) -> nn.Module:  # noqa: D103
    return _load("rotnet_nin3", pretrained, weights, kwargs)


def rotnet_nin5(*, pretrained: bool = True, weights: str | None = None, **kwargs: Any) -> nn.Module:  # noqa: D103
    return _load("rotnet_nin5", pretrained, weights, kwargs)


def rotnet_alexnet(*, pretrained: bool = True, weights: str | None = None, **kwargs: Any) -> nn.Module:  # noqa: D103
    return _load("rotnet_alexnet", pretrained, weights, kwargs)


def rotnet_resnet18(*, pretrained: bool = True, weights: str | None = None, **kwargs: Any) -> nn.Module:  # noqa: D103
    return _load("rotnet_resnet18", pretrained, weights, kwargs)


def rotnet_resnet50(*, pretrained: bool = True, weights: str | None = None, **kwargs: Any) -> nn.Module:  # noqa: D103
    return _load("rotnet_resnet50", pretrained, weights, kwargs)


_NIN_OUTPUT = "logits (N, 4), class k meaning turned k x 90 degrees counter-clockwise; features block1..block{}"
_document(rotnet_nin, nin.rotnet_nin.__doc__ or "", _NIN_OUTPUT.format(4))
_document(rotnet_nin3, nin.rotnet_nin3.__doc__ or "", _NIN_OUTPUT.format(3))
_document(rotnet_nin5, nin.rotnet_nin5.__doc__ or "", _NIN_OUTPUT.format(5))
_OTHER_OUTPUT = "logits (N, 4), class k meaning turned k x 90 degrees counter-clockwise; features {}"
_document(rotnet_alexnet, alexnet.rotnet_alexnet.__doc__ or "", _OTHER_OUTPUT.format("conv1..conv5"))
_document(rotnet_resnet18, resnets.rotnet_resnet18.__doc__ or "", _OTHER_OUTPUT.format("layer1..layer4"))
_document(rotnet_resnet50, resnets.rotnet_resnet50.__doc__ or "", _OTHER_OUTPUT.format("layer1..layer4"))
