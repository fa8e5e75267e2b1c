"""Training runs of a second, and how they are interrupted: for the tests of the training loop."""

import dataclasses
import itertools

import torch
from conftest import SAMPLES
from safetensors.torch import load_file

from rotation_ssl.images import read_images
from rotation_ssl.pretraining import loop as command
from rotation_ssl.pretraining.loop import pretext_loss
from rotation_ssl.pretraining.recipe import Stage
from training.recipes import NIN_CIFAR10_CPU

# timm's smallest ResNet: the loop takes any timm model, and thirty steps take a second
TINY = dataclasses.replace(
    NIN_CIFAR10_CPU,
    model="test_resnet",
    stages=(Stage(20, 8), Stage(10, 12)),
    images_per_step=4,
    padding=2,
    image_size=16,
    precision="fp32",
)
SHORT = dataclasses.replace(TINY, stages=(Stage(6, 8),))


def sample_images():
    """The 40 sample images, (40, 3, 16, 16) uint8."""
    return read_images(sorted((SAMPLES / "cifar10").glob("*.png")), 16)


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def interrupt(monkeypatch, step, action):
    """Do something in the middle of a step, counted from 1; what it returns, if anything, is the step's loss."""
    steps = itertools.count(1)

    def interrupted(*args):
        loss = pretext_loss(*args)
        if next(steps) == step:
            result = action()
            return loss if result is None else loss * result
        return loss

    monkeypatch.setattr(command, "pretext_loss", interrupted)
