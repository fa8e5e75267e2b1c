"""Every published weight is one named recipe: a complete, frozen value. Change one with ``dataclasses.replace``."""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A part of the run with its own crop: ``steps`` optimiser steps on square crops of ``crop`` pixels."""

    steps: int
    crop: int


@dataclass(frozen=True)
class Sgd:
    """SGD with Nesterov momentum on all parameters, as in the paper."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4


@dataclass(frozen=True)
class Muon:
    """Muon on the convolution filters, Nesterov SGD on the rest.

    The plain update: orthogonalised momentum times ``lr``, no scaling by shape. Before each step every filter bank is
    scaled to the norm sqrt(out channels), so that ``lr`` is about a relative step whatever the layer; batch norm after
    each convolution makes the function independent of that scale.
    """

    lr: float
    momentum: float = 0.6
    rest: Sgd = Sgd()


@dataclass(frozen=True)
class LinearSchedule:
    """Learning rate from 0 up to its peak during the first ``warmup`` of the steps, then linearly down to 0."""

    warmup: float


@dataclass(frozen=True)
class StepSchedule:
    """Learning rate multiplied by ``factor`` at each of the ``milestones``, fractions of the steps."""

    milestones: tuple[float, ...]
    factor: float


@dataclass(frozen=True)
class Recipe:
    """How a weight was pretrained: all that decides its bytes but machine, thread count and library versions.

    ``images_per_step`` upright images make a batch of ``images_per_step * len(rotations)`` turned ones. Crops are taken
    at random positions of the image padded by ``padding`` pixels on all sides; then half of them are mirrored; then
    all are turned. An epoch is a permutation of the training images, its incomplete last batch dropped. ``holdout``
    keeps that many of the training images, the last ones, out of training: tune on them, never on the test set.
    ``precision`` is 'fp32', or 'bf16' for autocast: faster where the processor multiplies bfloat16 itself
    (``avx512_bf16`` or ``amx_bf16`` in /proc/cpuinfo, or a GPU), several times slower where it does not.
    """

    name: str
    model: str
    data: str
    stages: tuple[Stage, ...]
    optimizer: Sgd | Muon
    schedule: LinearSchedule | StepSchedule
    images_per_step: int = 128
    rotations: tuple[int, ...] = (0, 1, 2, 3)
    padding: int = 4
    padding_mode: str = "reflect"
    flip: bool = True
    precision: str = "fp32"
    holdout: int = 0
    seed: int = 0
    note: str = ""

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return sum(stage.steps for stage in self.stages)

    @property
    def rotated_images(self) -> int:
        """Rotated images seen in the whole run."""
        return self.steps * self.images_per_step * len(self.rotations)

    def crop_at(self, step: int) -> int:
        """Crop size of step ``step``, counted from 0."""
        for stage in self.stages:
            if step < stage.steps:
                return stage.crop
            step -= stage.steps
        return self.stages[-1].crop


CIFAR10_STEPS_PER_EPOCH = 50_000 // 128

NIN_CIFAR10_CPU = Recipe(
    name="nin-cifar10-cpu",
    model="rotnet_nin",
    data="cifar10",
    stages=(Stage(steps=1350, crop=24), Stage(steps=600, crop=32)),
    optimizer=Muon(lr=0.1),
    schedule=LinearSchedule(warmup=0.1),
    images_per_step=64,
    note="about 75 minutes on 2 cores",
)

NIN_CIFAR10_PAPER = Recipe(
    name="nin-cifar10-paper",
    model="rotnet_nin",
    data="cifar10",
    stages=(Stage(steps=100 * CIFAR10_STEPS_PER_EPOCH, crop=32),),
    optimizer=Sgd(),
    schedule=StepSchedule(milestones=(0.3, 0.6, 0.8), factor=0.2),
    padding_mode="constant",
    note="section 4.1 of the paper: 100 epochs, the learning rate divided by 5 at epochs 30, 60 and 80; for a GPU",
)

NIN_CIFAR10_AUTHORS = dataclasses.replace(
    NIN_CIFAR10_PAPER,
    name="nin-cifar10-authors",
    stages=(Stage(steps=200 * CIFAR10_STEPS_PER_EPOCH, crop=32),),
    note="config/CIFAR10_RotNet_NIN4blocks.py of the authors' code: 200 epochs, divided by 5 at 60, 120 and 160; "
    "for a GPU",
)

RECIPES = {recipe.name: recipe for recipe in (NIN_CIFAR10_CPU, NIN_CIFAR10_PAPER, NIN_CIFAR10_AUTHORS)}
