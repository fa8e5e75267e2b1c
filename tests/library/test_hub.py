"""torch.hub's doors: list, help and load, on a copy of the repository as torch.hub would have downloaded it."""

import ast
import inspect
import re
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from conftest import MODELS, ROOT, WITHOUT_WEIGHTS, assert_state
from safetensors.torch import save_file

from rotation_ssl import hub, zoo
from rotation_ssl.cli.list import accuracy_text
from rotation_ssl.features import layer_modules


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """torch.hub's cache with the repository, which the tests only read."""
    cache = tmp_path_factory.mktemp("cache")
    folder = cache / "OWNER_rotation_ssl_main"
    folder.mkdir()
    shutil.copyfile(ROOT / "hubconf.py", folder / "hubconf.py")
    shutil.copytree(ROOT / "rotation_ssl", folder / "rotation_ssl", ignore=shutil.ignore_patterns("__pycache__"))
    return cache


@pytest.fixture
def downloaded(cache, monkeypatch, offline):
    """The repository in torch.hub's cache, under the name OWNER/rotation_ssl:main."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(cache))
    return "OWNER/rotation_ssl:main"


def load(name, **kwargs):
    return torch.hub.load(str(ROOT), name, source="local", **kwargs)


def test_list_shows_exactly_the_registered_models(downloaded):
    assert torch.hub.list(downloaded, trust_repo=True, verbose=False) == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_help_is_the_docstring_and_says_what_the_manifest_says(downloaded, name):
    text = torch.hub.help(downloaded, name, trust_repo=True)
    source = ast.parse((ROOT / "rotation_ssl" / "hub.py").read_text())
    (written,) = [f for f in source.body if isinstance(f, ast.FunctionDef) and f.name == name]
    assert inspect.cleandoc(text) == ast.get_docstring(written), "an editor shows the same"
    cfg = timm.get_pretrained_cfg(name)
    size, words = cfg.input_size[-1], " ".join(text.split())
    assert f"(N, 3, {size}, {size})" in words and "counter-clockwise" in words
    for kind, values in (("mean", cfg.mean), ("std", cfg.std)):
        assert f"{kind} ({', '.join(f'{value:.4f}' for value in values)})" in words
    layers = list(layer_modules(timm.create_model(name, device="meta")))
    assert f"Feature layers: {layers[-4 if 'resnet' in name else 0]} to {layers[-1]}." in words
    own = {full.split(".")[1]: entry for full, entry in zoo.manifest().items() if full.split(".")[0] == name}
    told = dict(re.findall(r"^ +(\w+)(?: \(default\))?: (.*)$", text.split("Weights:")[1], re.MULTILINE))
    assert told.keys() == own.keys() and ("None are published" in text) == (not own)
    assert re.findall(r"(\w+) \(default\):", text) == ([cfg.tag] if own else [])
    for tag, entry in own.items():
        assert told[tag].endswith(f"{accuracy_text(entry)}.")


def test_load_from_the_cache_takes_the_downloaded_package(downloaded, cache, tmp_path):
    code = (
        "import socket, sys, torch\n"
        "def refuse(*args, **kwargs): raise SystemExit('the network was used')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "sys.path = [p for p in sys.path if p != sys.argv[2]]\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "torch.hub.set_dir(sys.argv[1])\n"
        f"model = torch.hub.load({downloaded!r}, 'rotnet_nin', trust_repo=True, verbose=False)\n"
        "import rotation_ssl\n"
        "print(model.num_classes, rotation_ssl.__file__)\n"
    )
    command = [sys.executable, "-c", code, str(cache), str(ROOT)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["4", str(cache / "OWNER_rotation_ssl_main" / "rotation_ssl" / "__init__.py")]


def test_default_tag_and_named_tag_are_timms(offline):
    expected = timm.create_model("rotnet_nin", pretrained=True).state_dict()
    for model in (load("rotnet_nin"), load("rotnet_nin", weights="cifar10")):
        assert_state(model, expected)
    alexnet = load("rotnet_alexnet")
    expected = timm.create_model("rotnet_alexnet.photos", pretrained=True).state_dict()
    assert_state(alexnet, expected)


def test_random_weights_and_arguments(offline):
    model = load("rotnet_alexnet", pretrained=False, num_classes=20, fc_size=0)
    assert model.num_classes == 20 and model.head.fc_size == 0
    assert load("rotnet_nin", num_classes=0, in_chans=1).head_hidden_size == 192
    assert len(load("rotnet_nin", features_only=True)(torch.zeros(1, 3, 32, 32))) == 4


def test_weights_from_a_file(nin_state, tmp_path):
    save_file(nin_state, tmp_path / "mine.safetensors")
    model = load("rotnet_nin", weights=str(tmp_path / "mine.safetensors"), num_classes=10)
    assert torch.equal(model.blocks.block2[0].conv.weight, nin_state["blocks.block2.0.conv.weight"])
    assert model.num_classes == 10


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_no_weights_yet(name):
    with pytest.raises(ValueError, match="pretrained=False"):
        load(name)


def test_unknown_weights_are_named():
    with pytest.raises(
        ValueError, match=r"'nope' is neither a tag of rotnet_nin \(there are: cifar10, gidaris_.*\) nor a file"
    ):
        load("rotnet_nin", weights="nope")
    with pytest.raises(ValueError, match="needs pretrained=True"):
        load("rotnet_nin", weights="cifar10", pretrained=False)


@pytest.mark.parametrize("name", MODELS)
def test_entry_points_are_keyword_only(name):
    parameters = inspect.signature(getattr(hub, name)).parameters.values()
    assert {p.kind for p in parameters} == {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}
    assert inspect.signature(getattr(hub, name)).parameters["pretrained"].default is True
