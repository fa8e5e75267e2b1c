"""Fixtures shared by the tests: sample images as a small CIFAR-10, whole data sets where they are, no network."""

import os
import shutil
import socket
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import settings

import rotation_ssl  # noqa: F401  registers the models with timm

# a busy machine is not a failure
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
SAMPLES = ROOT / "rotation_ssl" / "samples"
MODELS = ("rotnet_alexnet", "rotnet_nin", "rotnet_nin3", "rotnet_nin5")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def offline(monkeypatch):
    """Any attempt to open a connection fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was used: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def small_cifar10(tmp_path):
    """A folder like the lossless CIFAR-10: the 40 sample images as its training set and as its test set."""
    return write_small_cifar10(tmp_path / "cifar10")


@pytest.fixture(scope="module")
def small_module(tmp_path_factory):
    """The same for a whole module, whose tests only read it."""
    return write_small_cifar10(tmp_path_factory.mktemp("small") / "cifar10")


def write_small_cifar10(data):
    for file in sorted((SAMPLES / "cifar10").glob("*.png")):
        name, index = file.stem.split("_")
        for split in ("train", "test"):
            folder = data / split / name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / f"{index}.png")
    return data


@pytest.fixture
def whole_cifar10():
    """The whole CIFAR-10 as a folder, where ROTATION_SSL_DATA has it."""
    folder = Path(os.environ.get("ROTATION_SSL_DATA", "")) / "cifar10"
    if "ROTATION_SSL_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("needs the whole CIFAR-10: set ROTATION_SSL_DATA to a folder that holds cifar10/")
    return folder


@pytest.fixture
def reference():
    """The folder of both reference checkpoints and their outputs, where ROTATION_SSL_REFERENCE has it."""
    folder = Path(os.environ.get("ROTATION_SSL_REFERENCE", ""))
    if "ROTATION_SSL_REFERENCE" not in os.environ or not folder.is_dir():
        pytest.skip("needs the reference checkpoints: set ROTATION_SSL_REFERENCE to their folder")
    return folder


@pytest.fixture
def nin_state():
    """State dict of a random rotnet_nin."""
    return timm.create_model("rotnet_nin").state_dict()
