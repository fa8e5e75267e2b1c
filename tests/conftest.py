"""Fixtures shared by the tests: sample images as a small CIFAR-10, whole datasets where they are, a Hub on loopback.

The client of the Hub reads its environment when imported: the address of the loopback Hub and an empty home come first,
so no test can reach the real one.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import resource
import shutil
import socket
import tempfile
import warnings
from pathlib import Path

from loopback_hub import Hub
from loopback_release import Release

HUB = Hub()
HUB_HOME = tempfile.TemporaryDirectory(prefix="hub-home-")
HUB_ENVIRONMENT = {
    "HF_ENDPOINT": HUB.url,
    "HF_HOME": HUB_HOME.name,
    "HF_TOKEN": "hf_loopback",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "0",
    # a proxy does not lead to the loopback
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}
os.environ.update(HUB_ENVIRONMENT)
# the tests say where it is set
os.environ.pop("ROTATION_SSL_MALLOPT", None)

import huggingface_hub
import pytest
import timm
import torch
from hypothesis import settings
from safetensors.torch import save

import rotation_ssl  # noqa: F401  registers the models with timm
from rotation_ssl import zoo
from rotation_ssl.backbones import alexnet, nin
from rotation_ssl.evaluation.protocols import PROTOCOLS
from rotation_ssl.fit import Checkpoints
from rotation_ssl.images import read_image
from rotation_ssl.zoo import published

# a busy machine is not a failure
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
ARCHIVE = DATA / "CIFAR10_RotNet_NIN4blocks.tar.gz"  # of the authors' release
SAMPLES = ROOT / "rotation_ssl" / "samples"
MODELS = timm.list_models("rotnet_*")
EXPORTED: dict[str, bytes] = {}  # ONNX files by the sha256 of their weights
WITHOUT_WEIGHTS = [model for model in MODELS if not timm.get_pretrained_cfg(model).has_weights]


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


@pytest.fixture
def images(small_cifar10):
    """The training and the test images of the small CIFAR-10, in memory."""
    from training.datasets import load_images

    return load_images("cifar10", small_cifar10, 32)


@pytest.fixture
def small_tinyimagenet(small_cifar10, tmp_path):
    """The sample images in the layout of tiny-imagenet-200, two of each class's four in val."""
    root = tmp_path / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for label, folder in enumerate(sorted((small_cifar10 / "train").iterdir())):
        wnid = f"n{label:08d}"
        (root / "train" / wnid / "images").mkdir(parents=True)
        for number, file in enumerate(sorted(folder.iterdir())):
            image = read_image(file).resize((64, 64))
            if number < 2:
                image.save(root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG")
            else:
                image.save(root / "val" / "images" / f"val_{2 * label + number - 2}.JPEG")
                lines.append(f"val_{2 * label + number - 2}.JPEG\t{wnid}\t0\t0\t63\t63\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


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


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The loopback Hub, empty, and empty caches of the Hub's client and of torch.hub."""
    HUB.repositories, HUB.large, HUB.requests, HUB.uploads = {}, {}, [], []
    HUB.answers, HUB.corrupt, HUB.cut, HUB.short, HUB.reason = [], set(), set(), set(), None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch-hub"))
    return HUB


@pytest.fixture
def public_address(monkeypatch):
    """The project as it is once it has a public address, for the cards to point to."""
    from training.reporting.hub import card, upload

    for module in (card, upload):
        monkeypatch.setattr(module, "REPOSITORY", "ORG/rotation_ssl")


@pytest.fixture
def export_once(monkeypatch):
    """Publications reuse the first ONNX export of a network, which takes seconds."""
    from training.reporting.hub import files

    def exported(network, *arguments):
        key = hashlib.sha256(save(network.state_dict())).hexdigest()
        if key not in EXPORTED:
            EXPORTED[key] = export(network, *arguments)
        return EXPORTED[key]

    export = files.onnx_file
    monkeypatch.setattr(files, "onnx_file", exported)


@pytest.fixture
def weights_dir(monkeypatch, tmp_path):
    """A copy of the package's weights, in their place, that a test may change."""
    folder = shutil.copytree(zoo.WEIGHTS_DIR, tmp_path / "weights")
    for module in (zoo, published):
        monkeypatch.setattr(module, "WEIGHTS_DIR", folder)
    return folder


@pytest.fixture
def release(tmp_path):
    """A release on loopback that has the authors' archive of the tests."""
    folder = tmp_path / "release"
    folder.mkdir()
    shutil.copyfile(ARCHIVE, folder / ARCHIVE.name)
    with Release(folder) as server:
        yield server


@pytest.fixture
def set_manifest(monkeypatch):
    """A function that gives the package another manifest, registered with timm as at import."""

    def change(entries):
        # whoever has imported it has the same dict
        manifest = zoo.manifest()
        entries = dict(entries)
        manifest.clear()
        manifest.update(entries)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Overwriting rotnet_")
            for module in (alexnet, nin):
                importlib.reload(module)

    names = {module: dict(vars(module)) for module in (alexnet, nin)}
    manifest = dict(zoo.manifest())
    yield change
    monkeypatch.undo()  # the weights are where they were when timm is told of them
    change(manifest)
    for module, before in names.items():
        # the classes that others imported, not those of the reload
        vars(module).update(before)


@pytest.fixture
def copied(monkeypatch, tmp_path, weights_dir):
    """The files that publishing writes, in a folder of the test's own."""
    from training.reporting import bundle, pages, publish
    from training.reporting.rows import RESULTS_DIR, read_rows
    from training.studies import networks

    shutil.copytree(publish.FIGURES_DIR, tmp_path / "docs" / "figures")
    shutil.copytree(SAMPLES, tmp_path / "samples")
    shutil.copytree(RESULTS_DIR, tmp_path / "results")
    for page in pages.pages():
        shutil.copyfile(page, tmp_path / page.relative_to(ROOT))
    for module in (bundle, publish):
        monkeypatch.setattr(module, "FIGURES_DIR", tmp_path / "docs" / "figures")
    shutil.copy(networks.PAGE, tmp_path)
    monkeypatch.setattr(networks, "PAGE", tmp_path / networks.PAGE.name)
    monkeypatch.setattr(bundle, "RESULTS_DIR", tmp_path / "results")
    monkeypatch.setattr(pages, "RESULTS_DIR", tmp_path / "results")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    monkeypatch.setattr(publish, "read_rows", lambda: read_rows(tmp_path / "results"))
    return tmp_path


@pytest.fixture
def go_offline(monkeypatch):
    """A function that makes the Hub's client refuse requests, as HF_HUB_OFFLINE=1 does."""
    return lambda: monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def shorten_probes(monkeypatch, protocols=PROTOCOLS, ids=("nonlinear", "conv"), **changes):
    """Change the recipes of protocols at each budget."""
    for protocol in map(protocols.get, ids):
        recipes = {budget: recipe and dataclasses.replace(recipe, **changes)
                   for budget, recipe in protocol.recipes.items()}  # fmt: skip
        monkeypatch.setitem(protocols, protocol.id, dataclasses.replace(protocol, recipes=recipes))


def spy_on_first_step(monkeypatch, module):
    """Let a training loop of a module take its first loss alone; returns its optimizers, and how it crops."""
    optimizers, crops, crop = [], [], module.crop_and_flip
    monkeypatch.setattr(module, "crop_and_flip", lambda *args: crops.append(args[1:5]) or crop(*args))

    def one_loss(network, batches, loss_of, optimizer, **options):
        optimizers.append(optimizer)
        loss_of(next(iter(batches)))

    monkeypatch.setattr(module, "fit", one_loss)
    return optimizers, crops


@contextlib.contextmanager
def limited(kind, number):
    """A limit of this process, such as resource.RLIMIT_FSIZE, for a while."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def opened_checkpoints(monkeypatch, folder, last, measure, trainings):
    """The checkpoint file that each of the trainings opens, which ends where it calls the function named ``last``."""

    class Opened(Exception):
        pass

    def stop(*args):
        raise Opened

    monkeypatch.setattr(last, stop)
    checkpoints = Checkpoints(folder)
    for training in trainings:
        with pytest.raises(Opened):
            measure(*training, checkpoints=checkpoints)
    return checkpoints.opened


def assert_state(model, expected):
    """The tensors of a model, or of a state dict, are these."""
    state = model if isinstance(model, dict) else model.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name, tensor in state.items() if not torch.equal(tensor, expected[name])] == []


def corrupt(file):
    """Change one bit of the last byte."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)


def published_manifest():
    return json.loads((zoo.WEIGHTS_DIR / "manifest.json").read_text())
