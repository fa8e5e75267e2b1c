"""Training runs of a second, and how they are interrupted: for the tests of the training loop."""

import dataclasses
import itertools
import json
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import ROOT, SAMPLES
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


KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path[:0] = [{tests!r}, {root!r}]
    from tiny_runs import SHORT, interrupt
    from rotation_ssl.pretraining.images import open_images
    from rotation_ssl.pretraining.loop import pretrain

    class Patch:
        setattr = staticmethod(setattr)

    # as out of memory: with a worker that still lives, which has inherited what the process had open
    interrupt(Patch, 5, lambda: os.kill(os.getpid(), signal.SIGKILL))
    pretrain(SHORT, open_images("folder", Path({data!r}), 16), Path({output!r}), checkpoint_seconds=0.0, workers=1)
"""


def run_killed(data, output):
    """A run in a process of its own that is killed in its fifth step, after the checkpoint of the fourth."""
    code = textwrap.dedent(KILLED).format(tests=str(ROOT / "tests"), root=str(ROOT), data=str(data), output=str(output))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def assert_two_trained_as_one(folder):
    """The run of two processes, folder/two, is that of one, folder/one, but for rounding."""
    runs = [json.loads((folder / name / "run.json").read_text()) for name in ("one", "two")]
    assert [run["processes"] for run in runs] == [1, 2]
    one, two = ([point["loss"] for point in run["curve"]] for run in runs)
    assert len(one) == 12 and one == pytest.approx(two, rel=1e-4)
    alone, together = weights(folder / "one"), weights(folder / "two")
    for name, tensor in alone.items():
        torch.testing.assert_close(tensor, together[name], rtol=1e-3, atol=1e-5)
