"""A new backbone is one file, and its weights one entry of the manifest: everything else follows."""

import hashlib
import importlib

import pytest
import timm
import torch
from conftest import SAMPLES, assert_state
from safetensors.torch import load_file, save, save_file

from rotation_ssl import cli, zoo
from rotation_ssl.backbones.about import network_facts
from rotation_ssl.features import extract_features, layer_modules
from rotation_ssl.zoo.golden import golden_file, golden_outputs

NAME = "toynet.mine"


@pytest.fixture
def weights(weights_dir, set_manifest):
    """Weights as published, and the one table that says so; the file of the backbone is imported afterwards."""
    torch.manual_seed(0)
    shapes = {"conv1": (4, 3, 3, 3), "conv2": (8, 4, 3, 3), "fc": (4, 8)}
    state = {f"{layer}.weight": torch.randn(shape) / 4 for layer, shape in shapes.items()}
    state |= {f"{layer}.bias": torch.randn(shape[0]) for layer, shape in shapes.items()}
    content = save(state)
    (weights_dir / f"{NAME}.safetensors").write_bytes(content)
    entry = zoo.manifest()["rotnet_nin.cifar10"] | {
        "file": f"{NAME}.safetensors",
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
        "recommended_layer": "conv2",
    }
    set_manifest({**zoo.manifest(), NAME: entry})
    importlib.import_module("toynet")
    return state


def test_one_file_and_one_entry_are_a_model(weights, capsys, tmp_path):
    assert timm.list_models("toynet*") == ["toynet"] and timm.list_pretrained("toynet*") == [NAME]
    assert network_facts(NAME).recommended_layer == "conv2"
    model = timm.create_model(NAME, pretrained=True).eval()
    assert_state(model, weights)
    assert timm.create_model("toynet", pretrained=True).pretrained_cfg["tag"] == "mine"
    assert timm.create_model("toynet", pretrained=True, num_classes=10).fc.out_features == 10

    assert list(layer_modules(model)) == ["conv1", "conv2"]
    features = extract_features(model, torch.rand(2, 3, 32, 32))
    assert {layer: tuple(tensor.shape) for layer, tensor in features.items()} == {"conv1": (2, 4), "conv2": (2, 8)}

    golden_file(NAME).write_bytes(save(golden_outputs(model)))
    assert cli.main(["verify", NAME]) == 0 and "golden outputs differ by" in capsys.readouterr().out
    output = tmp_path / "features.safetensors"
    assert cli.main(["features", str(SAMPLES / "cifar10"), "-o", str(output), "--model", NAME]) == 0
    assert load_file(output)["conv2"].shape == (40, 8)

    save_file({name: tensor * 2 for name, tensor in weights.items()}, zoo.weights_file(NAME))
    assert cli.main(["verify", NAME]) == 1 and "has sha256" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"weights of {NAME} are corrupt"):
        timm.create_model(NAME, pretrained=True)
