"""Parity with the authors' definitions: their checkpoints, loaded into our networks, give every layer's output."""

import io
import tarfile

import pytest
import timm
import torch
from conftest import DATA
from safetensors.torch import load_file
from torch.nn import functional as F

from rotation_ssl.convert import convert_authors

TOLERANCE = 1e-4


def read_checkpoint(archive):
    with tarfile.open(archive) as tar:
        (member,) = [m for m in tar if m.isfile()]
        content = io.BytesIO(tar.extractfile(member).read())
    return torch.load(content, map_location="cpu", weights_only=True)


def load(name, network):
    model = timm.create_model(name).eval()
    model.load_state_dict(convert_authors(network))
    return model


def assert_parity(model, expected, names):
    with torch.inference_mode():
        final, maps = model.forward_intermediates(expected["input"])
        outputs = dict(zip(names, maps, strict=True))
        outputs["pool5"] = final
        outputs["fc_block"] = model.forward_head(final, pre_logits=True)
        outputs["classifier"] = model(expected["input"])
    compared = [name for name in expected if name != "input"]
    for name in compared:
        assert outputs[name].shape == expected[name].shape
        assert (outputs[name] - expected[name]).abs().max() < TOLERANCE, name
    return compared


def test_nin_of_the_authors():
    checkpoint = read_checkpoint(DATA / "CIFAR10_RotNet_NIN4blocks.tar.gz")
    model = load("rotnet_nin", checkpoint["network"])
    expected = load_file(DATA / "nin_expected.safetensors")
    compared = assert_parity(model, expected, ["conv1", "conv2", "conv3", "conv4"])
    assert sorted(compared) == ["classifier", "conv1", "conv2", "conv3", "conv4"]


def test_alexnet_of_the_authors(reference):
    checkpoint = read_checkpoint(reference / "ImageNet_RotNet_AlexNet.tar.gz")
    model = load("rotnet_alexnet", checkpoint["network"])
    expected = {
        name.removeprefix("alexnet."): tensor
        for name, tensor in load_file(reference / "expected.safetensors").items()
        if name.startswith("alexnet.")
    }
    compared = assert_parity(model, expected, [f"conv{i}" for i in range(1, 6)])
    assert sorted(compared) == ["classifier", *(f"conv{i}" for i in range(1, 6)), "fc_block", "pool5"]


def periodic(*shape, scale=1.0, offset=0.0, period=997):
    """A tensor of a repeating pattern in -scale..scale: no large random file, no two equal layers."""
    count = torch.Size(shape).numel()
    pattern = torch.randn(period, generator=torch.Generator().manual_seed(count)).clamp(-2, 2)
    return (pattern.repeat(count // period + 1)[:count] * scale + offset).view(shape)


@pytest.fixture(scope="module")
def alexnet_network():
    """A checkpoint of the authors' AlexNet, as their release has it, with periodic weights."""
    network = {}
    convolutions = {"0": (64, 3, 11), "2": (192, 64, 5), "4": (384, 192, 3), "5": (256, 384, 3), "6": (256, 256, 3)}
    for block, (out, inputs, kernel) in convolutions.items():
        fan_in = inputs * kernel**2
        network[f"_feature_blocks.{block}.0.weight"] = periodic(out, inputs, kernel, kernel, scale=(2 / fan_in) ** 0.5)
        network[f"_feature_blocks.{block}.0.bias"] = periodic(out, scale=0.1, period=61)
        network |= batch_norm(f"_feature_blocks.{block}.1", out)
    for fc, norm, inputs in (("1", "2", 9216), ("4", "5", 4096)):
        network[f"_feature_blocks.8.{fc}.weight"] = periodic(4096, inputs, scale=(2 / inputs) ** 0.5)
        network |= batch_norm(f"_feature_blocks.8.{norm}", 4096)
    network["_feature_blocks.9.0.weight"] = periodic(4, 4096, scale=0.02)
    network["_feature_blocks.9.0.bias"] = periodic(4, period=4)
    return network


def batch_norm(prefix, width):
    return {
        f"{prefix}.weight": periodic(width, scale=0.1, offset=1.0, period=53),
        f"{prefix}.bias": periodic(width, scale=0.1, period=47),
        f"{prefix}.running_mean": periodic(width, scale=0.1, period=43),
        f"{prefix}.running_var": periodic(width, scale=0.2, offset=1.0, period=41),
    }


def alexnet_by_hand(network, x):
    """The network of the paper straight from the authors' keys, with functions alone."""

    def normalized(x, prefix):
        names = ("running_mean", "running_var", "weight", "bias")
        return F.relu(F.batch_norm(x, *(network[f"{prefix}.{name}"] for name in names)))

    outputs = {"input": x}
    for i, block in enumerate(("0", "2", "4", "5", "6"), 1):
        weight, bias = (network[f"_feature_blocks.{block}.0.{name}"] for name in ("weight", "bias"))
        x = F.conv2d(x, weight, bias, stride=4 if i == 1 else 1, padding=2 if i <= 2 else 1)
        x = outputs[f"conv{i}"] = normalized(x, f"_feature_blocks.{block}.1")
        if i in (1, 2, 5):
            x = F.max_pool2d(x, 3, stride=2)
    outputs["pool5"] = x
    x = x.flatten(1)
    for fc, norm in (("1", "2"), ("4", "5")):
        x = normalized(x @ network[f"_feature_blocks.8.{fc}.weight"].T, f"_feature_blocks.8.{norm}")
    outputs["fc_block"] = x
    outputs["classifier"] = x @ network["_feature_blocks.9.0.weight"].T + network["_feature_blocks.9.0.bias"]
    return outputs


def test_alexnet_of_the_authors_form(alexnet_network):
    with torch.inference_mode():
        expected = alexnet_by_hand(alexnet_network, torch.randn(1, 3, 224, 224))
    model = load("rotnet_alexnet", alexnet_network)
    assert len(assert_parity(model, expected, [f"conv{i}" for i in range(1, 6)])) == 8


@pytest.mark.parametrize("key", ["features.0.weight", "_feature_blocks.7.0.weight", "module._feature_blocks.9.0.bias"])
def test_foreign_keys_are_named(key):
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        convert_authors({key: torch.zeros(1)})
