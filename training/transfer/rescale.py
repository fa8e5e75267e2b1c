"""What happens to a pretrained network before it is transferred to PASCAL VOC, as in the paper.

Batch norm is folded into the layers before it, and the layers are scaled so that they learn at one pace (Kraehenbuehl,
Doersch, Donahue, Darrell 2016, Data-dependent Initializations of Convolutional Neural Networks,
https://arxiv.org/abs/1511.06856). Neither changes what the network computes, but for the scale of its output; both
return a changed copy and leave what they are given alone. Layers that are fresh may be centred before, which does
change what they compute.
"""

import copy
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from timm.layers import BatchNormAct2d, ConvNormAct
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

Layer = nn.Conv2d | nn.Linear
Found = TypeVar("Found")
SLIGHT = 1e-8  # what is smaller beside a layer's activations never speaks


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """A copy of the network, in eval mode, whose batch norms are parts of the layers before them.

    Takes a convolution or linear layer and its batch norm where they follow each other for sure: in timm's ConvNormAct,
    side by side in a Sequential, and as convN and bnN of a ResNet. A layer without bias gets one. Outputs are those of
    the network in eval mode.

    Raises:
        ValueError: a batch norm that is left over.
    """
    folded = copy.deepcopy(model).eval()
    for module in list(folded.modules()):
        if isinstance(module, ConvNormAct) and isinstance(module.bn, BatchNormAct2d):
            module.conv = _fused(module.conv, module.bn)
            module.bn = nn.Sequential(module.bn.drop, module.bn.act)
        elif isinstance(module, nn.Sequential):
            for index in range(len(module) - 1):
                module[index], module[index + 1] = _folded(module[index], module[index + 1])
        elif isinstance(module, (BasicBlock, Bottleneck, ResNet)):
            for number in (1, 2, 3):
                layer, norm = (getattr(module, f"{kind}{number}", None) for kind in ("conv", "bn"))
                if layer is not None and norm is not None:
                    layer, norm = _folded(layer, norm)
                    setattr(module, f"conv{number}", layer)
                    setattr(module, f"bn{number}", norm)
    left = [name for name, module in folded.named_modules() if isinstance(module, _BatchNorm)]
    if left:
        raise ValueError(f"batch norm {', '.join(left[:3])} follows no layer that it could be folded into")
    return folded


def rescale(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """A copy of the network whose layers are of one scale, as Kraehenbuehl et al. measure it.

    First within layers (their section 3.1): every channel of a layer's output gets the magnitude 1, the root of its
    mean square over images and positions, and the next layer takes it back. (They set the means by the biases, and then
    deviations to 1; a pretrained network's biases must stay, and a channel that hardly varies would become very large.)
    Then between layers (section 3.2): every layer gets the same relative gradient ``E |dl/dW|^2 / |W|^2``, for a loss
    of random weights on the outputs, by one factor for each layer. Where layers are joined by ReLU and pooling, which
    pass a factor on, the factors that they find by iteration are known in one step: C_k being the square root of that
    quantity, a factor r_k makes it C_k / r_k^2, so r_k is the square root of C_k over the geometric mean of all; their
    product is 1.

    Args:
        model: a chain of convolutions and linear layers joined by ReLU and pooling, without batch norm.
        images: (N, C, H, W), as the network takes them; some dozens of the training images are plenty.

    Returns:
        The copy, in eval mode; its outputs are the network's times one positive number.

    Raises:
        ValueError: batch norm, fewer than two layers, a network that is no such chain, a layer that is silent on all of
            these images, or values that are not finite.
    """
    left = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if left:
        raise ValueError(f"rescaling needs a network without batch norm, this one has {left[0]}: fold it first")
    rescaled = copy.deepcopy(model).eval()
    with torch.no_grad():
        before = rescaled(images)
        layers = _chain(rescaled, images)
        if len(layers) < 2:
            raise ValueError(f"rescaling needs two layers or more, this network has {len(layers)}")
        _equalise_channels(rescaled, layers, images)
        passed = torch.ones((), device=images.device)
    rates = relative_gradients(rescaled, images)
    if not (rates.isfinite() & (rates > 0)).all():
        raise ValueError("a layer of this network gets no gradient from these images: give other images, or weights")
    with torch.no_grad():
        for layer, factor in zip(layers, (rates.log() - rates.log().mean()).mul(0.5).exp(), strict=True):
            passed = passed * factor
            layer.weight.mul_(factor)
            if layer.bias is not None:
                layer.bias.mul_(passed)
        _check_same_but_for_scale(before, rescaled(images))
    return rescaled


def centre(model: nn.Module, images: torch.Tensor, fresh: Collection[nn.Module] | None = None) -> None:
    """Set biases so that every channel of a layer's output has the mean 0 over images and positions, in place.

    The other half of the within-layer initialisation of Kraehenbuehl et al.: it changes what the network computes, so
    it is for layers that nothing was learned in. Layers without bias stay as they are.

    Args:
        model: a chain of layers, as for :func:`rescale`.
        images: (N, C, H, W), as the network takes them.
        fresh: the layers; None for all.
    """
    for layer in _chain(model, images):
        if layer.bias is not None and (fresh is None or layer in fresh):
            means = dict(_run(model, images, lambda output: output.mean(1)))
            layer.bias.detach().sub_(means[layer])


def channel_magnitudes(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Roots of the mean square over images and positions of each layer's output channels, in the order they run.

    Returns:
        For each convolution or linear layer (C_out,).
    """
    return [found for _, found in _run(model, images, lambda output: output.square().mean(1).sqrt())]


def relative_gradients(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Of each layer, in the order they run, the expected norm of its weights' gradient over that of the weights.

    The loss is the outputs times random numbers, other ones for each image (as in section 3.2 of Kraehenbuehl et al.),
    drawn from a fixed seed.
    """
    layers = _chain(model, images)
    generator = torch.Generator().manual_seed(0)
    squares = torch.zeros(len(layers), device=images.device)
    weights = [layer.weight for layer in layers]
    wanted = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    # the gradients of images with random numbers of their own add up as squares do: batches serve as well as images
    for batch in images.split(8):
        outputs = model(batch)
        loss = (outputs * torch.randn(outputs.shape, generator=generator).to(outputs)).sum()
        for index, gradient in enumerate(torch.autograd.grad(loss, weights)):
            squares[index] += gradient.square().sum()
    for weight, needed in zip(weights, wanted, strict=True):
        weight.requires_grad_(needed)
    return torch.stack(
        [
            (square / len(images)).sqrt() / weight.detach().norm()
            for square, weight in zip(squares, weights, strict=True)
        ]
    )


def _equalise_channels(model: nn.Module, layers: list[Layer], images: torch.Tensor) -> None:
    previous = torch.ones(1, device=images.device)
    for layer, magnitudes in zip(layers, channel_magnitudes(model, images), strict=True):
        typical = magnitudes.square().mean().sqrt()
        if not typical.isfinite() or typical == 0:
            raise ValueError("a layer of this network is silent on all of these images: give other images, or weights")
        scales = torch.where(magnitudes > SLIGHT * typical, magnitudes, typical)
        if layer is layers[-1]:
            # one number for all outputs: they are compared with each other
            scales = typical.expand_as(scales)
        inputs = layer.weight.shape[1]
        # a linear layer after a map has several inputs of each channel, side by side
        taken_back = previous.repeat_interleave(inputs // len(previous)).view(1, inputs, *[1] * (layer.weight.ndim - 2))
        layer.weight.mul_(taken_back / scales.view(-1, *[1] * (layer.weight.ndim - 1)))
        if layer.bias is not None:
            layer.bias.div_(scales)
        previous = scales


def _chain(model: nn.Module, images: torch.Tensor) -> list[Layer]:
    """Convolutions and linear layers in the order they run, each once.

    Raises:
        ValueError: one runs twice, is grouped, or does not take as many channels as the one before gives.
    """
    order = [layer for layer, _ in _run(model, images[:1], len)]
    for position, layer in enumerate(order):
        gives = order[position - 1].weight.shape[0] if position else layer.weight.shape[1]
        grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1
        if grouped or layer.weight.shape[1] % gives or order.count(layer) > 1:
            raise _no_chain()
    return order


@torch.no_grad()
def _run(model: nn.Module, images: torch.Tensor, of: Callable[[torch.Tensor], Found]) -> list[tuple[Layer, Found]]:
    """Each layer in the order they run, and what ``of`` makes of its output by channel: (C, N * positions)."""
    found: list[tuple[Layer, Found]] = []

    def note(layer: Any, _: Any, output: torch.Tensor) -> None:
        found.append((layer, of(output.transpose(0, 1).flatten(1))))

    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _folded(layer: nn.Module, norm: nn.Module) -> tuple[nn.Module, nn.Module]:
    if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
        rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        return _fused(layer, norm), rest
    if isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
        return _fused(layer, norm), nn.Identity()
    return layer, norm


def _fused(layer: Layer, norm: Any) -> Layer:
    """One layer of the two; torch leaves a bias that the layer did not have out of the training."""
    fused: Any = fuse_conv_bn_eval(layer, norm) if isinstance(layer, nn.Conv2d) else fuse_linear_bn_eval(layer, norm)
    fused.bias.requires_grad_(fused.weight.requires_grad)
    return fused


def _check_same_but_for_scale(before: torch.Tensor, after: torch.Tensor) -> None:
    scale = (before * after).sum() / before.square().sum()
    if not scale > 0 or (after - scale * before).norm() > 1e-3 * after.norm():
        raise _no_chain()


def _no_chain() -> ValueError:
    return ValueError(
        "rescaling would change this network: its layers are no chain joined by ReLU and pooling; transfer it unscaled"
    )
