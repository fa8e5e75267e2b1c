"""The protocols that measure a frozen backbone, in one table for options, numbers, reports and figures.

To add a probe, write a function that builds it and add an entry to :data:`PROTOCOLS`. Recipes are frozen dataclasses;
change one with ``dataclasses.replace``.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rotation_ssl.probes import convolutional_probe, nonlinear_probe


@dataclass(frozen=True)
class ProbeRecipe:
    """How a probe is trained on the frozen features of a layer: SGD with Nesterov momentum, batches of images.

    The backbone runs once on ``views`` fixed versions of every training image, whose maps are average-pooled to at most
    ``grid`` x ``grid`` cells. The first view is the image itself. The others are random crops of the image padded by
    ``padding`` pixels, half of them mirrored. Each epoch uses a random view of each image. With ``views=0`` every epoch
    draws new crops, runs the backbone again and uses the whole map (``grid`` is None). At the epochs ``milestones`` the
    learning rate is multiplied by ``factor``. ``precision`` is 'fp32', 'bf16' for autocast of the probe (and with new
    crops of the backbone), or 'auto': bf16 if the device supports it, else fp32.
    """

    epochs: int
    milestones: tuple[int, ...]
    views: int
    grid: int | None
    lr: float = 0.1
    factor: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 128
    padding: int = 4
    padding_mode: str = "reflect"
    precision: str = "fp32"


@dataclass(frozen=True)
class Protocol:
    """One way to measure a backbone.

    ``id`` is its name in options and numbers, ``title`` in text, ``color`` its color in figures. ``recipes`` has a
    recipe for each budget, which is what a number may cost: 'cached' (probes trained on the features of a few views),
    'cpu' (a fixed number of images), or last 'paper' (new crops every epoch, the authors' epochs); '' if nothing is
    trained. The recipe is None if there is nothing to set. ``build`` creates the probe that SGD trains, from features
    of one or more images (N, ...) and the number of classes K: a module that gives logits (N, K). ``command`` is the
    command that measures it.
    """

    id: str
    title: str
    color: str = ""
    recipes: Mapping[str, Any] = field(default_factory=lambda: {"": None})
    build: Callable[[torch.Tensor, int], nn.Module] | None = None
    command: str = "evaluate"

    def titled(self, budget: str) -> str:
        """The title with a budget, as text shows it: 'non-linear probe (cached)'."""
        return f"{self.title} ({budget})" if budget else self.title


def _nonlinear(features: torch.Tensor, classes: int) -> nn.Module:
    return nonlinear_probe(features[0].numel(), classes)


def _convolutional(features: torch.Tensor, classes: int) -> nn.Module:
    return convolutional_probe(features.shape[1], classes).to(memory_format=torch.channels_last)


NONLINEAR_PAPER = ProbeRecipe(
    epochs=100, milestones=(20, 40, 45), views=0, grid=None, padding_mode="constant", precision="auto"
)
CONVOLUTIONAL_PAPER = dataclasses.replace(NONLINEAR_PAPER, milestones=(35, 70, 85))
# Chosen on the last 5,000 training images, with probes of block2 trained on the first 20,000: 4 x 4 cells (81.4 %) are
# as good as 8 x 8 (81.0 %) at a third of the time, and four views (82.1 %) better than three (81.4 %).
NONLINEAR_CACHED = ProbeRecipe(epochs=20, milestones=(8, 14, 18), views=4, grid=4)
CONVOLUTIONAL_CACHED = ProbeRecipe(epochs=10, milestones=(4, 7, 9), views=2, grid=8, precision="auto")

# the color-blind safe colors of Okabe and Ito
#: Protocols by their id.
PROTOCOLS = {
    protocol.id: protocol
    for protocol in (
        Protocol("rotation", "rotation accuracy"),
        Protocol("knn", "k-NN", "#0072B2"),
        Protocol("linear", "linear probe, L-BFGS", "#E69F00", {"cached": None}),
        Protocol(
            "nonlinear", "non-linear probe", "#009E73", {"cached": NONLINEAR_CACHED, "paper": NONLINEAR_PAPER},
            _nonlinear,
        ),
        Protocol(
            "conv", "convolutional probe", "#CC79A7", {"cached": CONVOLUTIONAL_CACHED, "paper": CONVOLUTIONAL_PAPER},
            _convolutional,
        ),
    )
}  # fmt: skip


def find_protocol(name: str, budget: str | None = None, protocols: Mapping[str, Protocol] = PROTOCOLS) -> Protocol:
    """The protocol of an id; with a budget, one that has it.

    Raises:
        ValueError: no such protocol, or no such budget of it; the error lists those that exist.
    """
    if name not in protocols:
        raise ValueError(f"no protocol {name!r}; there are {', '.join(protocols)}")
    if budget is not None and budget not in protocols[name].recipes:
        known = ", ".join(map(repr, protocols[name].recipes))
        raise ValueError(f"protocol {name} has no budget {budget!r}; it has {known}")
    return protocols[name]
