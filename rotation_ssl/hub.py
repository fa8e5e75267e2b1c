"""Entry points of torch.hub: ``torch.hub.load(REPOSITORY, "rotnet_nin", trust_repo=True)``.

They are keyword-only, and their docstrings are what ``torch.hub.help`` shows.
"""

from pathlib import Path
from typing import Any

import timm
from torch import nn


def rotnet_nin(*, pretrained: bool = True, weights: str | None = None, **kwargs: Any) -> nn.Module:
    """RotNet's Network-in-Network of 4 blocks, 1.4 M parameters; its best features are those of block2.

    Args:
        pretrained: load weights; False gives random ones.
        weights: a tag of the weights below, or the path of a safetensors file; None is the default tag.
        **kwargs: timm's further arguments: num_classes (a fresh classifier; 0 for pooled features), features_only=True,
            in_chans, global_pool, drop_rate, ...

    Returns:
        A network in train mode; call ``.eval()`` before you use it. Images (N, 3, 32, 32), RGB in 0..1 normalised
        with mean (0.4914, 0.4824, 0.4467) and std (0.2471, 0.2435, 0.2616), become logits (N, 4): class k is a
        rotation by k x 90 degrees counter-clockwise. Feature layers: block1 to block4.

    Raises:
        ValueError: no such weights, or a file that is corrupt or does not fit.

    Weights:
        cifar10 (default): CIFAR-10, 50,000 training images, labels not used; rotation accuracy 92.24 %.
        gidaris_cifar10: the authors' release, CIFAR-10; not measured.
    """
    return _load("rotnet_nin", pretrained, weights, kwargs)


def rotnet_nin3(*, pretrained: bool = True, weights: str | None = None, **kwargs: Any) -> nn.Module:
    """RotNet's Network-in-Network of 3 blocks.

    Args:
        pretrained: load weights; False gives random ones.
        weights: a tag of the weights below, or the path of a safetensors file; None is the default tag.
        **kwargs: timm's further arguments: num_classes (a fresh classifier; 0 for pooled features), features_only=True,
            in_chans, global_pool, drop_rate, ...

    Returns:
        A network in train mode; call ``.eval()`` before you use it. Images (N, 3, 32, 32), RGB in 0..1 normalised
        with mean (0.4914, 0.4824, 0.4467) and std (0.2471, 0.2435, 0.2616), become logits (N, 4): class k is a
        rotation by k x 90 degrees counter-clockwise. Feature layers: block1 to block3.

    Raises:
        ValueError: no such weights, or a file that is corrupt or does not fit.

    Weights:
        None are published: use ``pretrained=False``, or a file.
    """
    return _load("rotnet_nin3", pretrained, weights, kwargs)


def rotnet_nin5(*, pretrained: bool = True, weights: str | None = None, **kwargs: Any) -> nn.Module:
    """RotNet's Network-in-Network of 5 blocks.

    Args:
        pretrained: load weights; False gives random ones.
        weights: a tag of the weights below, or the path of a safetensors file; None is the default tag.
        **kwargs: timm's further arguments: num_classes (a fresh classifier; 0 for pooled features), features_only=True,
            in_chans, global_pool, drop_rate, ...

    Returns:
        A network in train mode; call ``.eval()`` before you use it. Images (N, 3, 32, 32), RGB in 0..1 normalised
        with mean (0.4914, 0.4824, 0.4467) and std (0.2471, 0.2435, 0.2616), become logits (N, 4): class k is a
        rotation by k x 90 degrees counter-clockwise. Feature layers: block1 to block5.

    Raises:
        ValueError: no such weights, or a file that is corrupt or does not fit.

    Weights:
        None are published: use ``pretrained=False``, or a file.
    """
    return _load("rotnet_nin5", pretrained, weights, kwargs)


def rotnet_alexnet(*, pretrained: bool = True, weights: str | None = None, **kwargs: Any) -> nn.Module:
    """RotNet's AlexNet, 57 M parameters with fc6 and fc7, 2.5 M in the convolutions (``fc_size=0``).

    ``fc_size`` defaults to 0 for weights without fc6 and fc7; if you set it, these layers and the classifier are
    initialised randomly.

    Args:
        pretrained: load weights; False gives random ones.
        weights: a tag of the weights below, or the path of a safetensors file; None is the default tag.
        **kwargs: timm's further arguments: num_classes (a fresh classifier; 0 for pooled features), features_only=True,
            in_chans, global_pool, drop_rate, ...

    Returns:
        A network in train mode; call ``.eval()`` before you use it. Images (N, 3, 128, 128), RGB in 0..1 normalised
        with mean (0.4850, 0.4560, 0.4060) and std (0.2290, 0.2240, 0.2250), become logits (N, 4): class k is a
        rotation by k x 90 degrees counter-clockwise. Feature layers: conv1 to conv5.

    Raises:
        ValueError: no such weights, or a file that is corrupt or does not fit.

    Weights:
        photos (default): 114,334 photographs, labels not used; rotation accuracy 68.42 to 86.87 % on 5 datasets.
        orientation: photos, then trained further to turn photographs; rotation accuracy 77.94 to 84.83 % on 3 datasets.
        gidaris_in1k: the authors' release, ImageNet-1k, for images of 224 pixels; not measured.
    """
    return _load("rotnet_alexnet", pretrained, weights, kwargs)


def rotnet_resnet18(*, pretrained: bool = True, weights: str | None = None, **kwargs: Any) -> nn.Module:
    """ResNet-18 with RotNet's head of four rotations, 11.2 M parameters.

    Args:
        pretrained: load weights; False gives random ones.
        weights: a tag of the weights below, or the path of a safetensors file; None is the default tag.
        **kwargs: timm's further arguments: num_classes (a fresh classifier; 0 for pooled features), features_only=True,
            in_chans, global_pool, drop_rate, ...

    Returns:
        A network in train mode; call ``.eval()`` before you use it. Images (N, 3, 224, 224), RGB in 0..1 normalised
        with mean (0.4850, 0.4560, 0.4060) and std (0.2290, 0.2240, 0.2250), become logits (N, 4): class k is a
        rotation by k x 90 degrees counter-clockwise. Feature layers: layer1 to layer4.

    Raises:
        ValueError: no such weights, or a file that is corrupt or does not fit.

    Weights:
        None are published: use ``pretrained=False``, or a file.
    """
    return _load("rotnet_resnet18", pretrained, weights, kwargs)


def rotnet_resnet50(*, pretrained: bool = True, weights: str | None = None, **kwargs: Any) -> nn.Module:
    """ResNet-50 with RotNet's head of four rotations, 23.5 M parameters.

    Args:
        pretrained: load weights; False gives random ones.
        weights: a tag of the weights below, or the path of a safetensors file; None is the default tag.
        **kwargs: timm's further arguments: num_classes (a fresh classifier; 0 for pooled features), features_only=True,
            in_chans, global_pool, drop_rate, ...

    Returns:
        A network in train mode; call ``.eval()`` before you use it. Images (N, 3, 224, 224), RGB in 0..1 normalised
        with mean (0.4850, 0.4560, 0.4060) and std (0.2290, 0.2240, 0.2250), become logits (N, 4): class k is a
        rotation by k x 90 degrees counter-clockwise. Feature layers: layer1 to layer4.

    Raises:
        ValueError: no such weights, or a file that is corrupt or does not fit.

    Weights:
        None are published: use ``pretrained=False``, or a file.
    """
    return _load("rotnet_resnet50", pretrained, weights, kwargs)


def _load(name: str, pretrained: bool, weights: str | None, kwargs: dict[str, Any]) -> nn.Module:
    if weights is None:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    if not pretrained:
        raise ValueError(f"weights={weights!r} needs pretrained=True; pretrained=False gives random weights")
    tags = [full.split(".", 1)[1] for full in timm.list_models(f"{name}.*", include_tags=True, pretrained=True)]
    if weights in tags:
        return timm.create_model(f"{name}.{weights}", pretrained=True, **kwargs)
    if not Path(weights).is_file():
        raise ValueError(
            f"weights={weights!r} is neither a tag of {name} (there are: {', '.join(tags) or 'none'}) nor a file"
        )
    overlay = {**kwargs.pop("pretrained_cfg_overlay", {}), "file": str(weights)}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
