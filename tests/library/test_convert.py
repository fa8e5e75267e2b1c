"""Other people's checkpoints, loaded into our networks and timm's, give what they gave where they were made.

The authors' layer by layer; VISSL's, mmselfsup's and torchvision's against torchvision's networks or plain functions.
"""

import json
import re

import pytest
import timm
import torch
import torchvision
from conftest import ARCHIVE, DATA, assert_state
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from rotation_ssl import zoo
from rotation_ssl.convert import AUTHORS, Converted, convert, convert_authors, read_checkpoint, write_folder

TOLERANCE = 1e-4


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
    checkpoint = read_checkpoint(ARCHIVE)
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
        weight, bias = (network.get(f"_feature_blocks.8.{fc}.{name}") for name in ("weight", "bias"))
        x = normalized(F.linear(x, weight, bias), f"_feature_blocks.8.{norm}")
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


def create(converted):
    model = timm.create_model(converted.model, num_classes=converted.num_classes, **converted.model_args).eval()
    model.load_state_dict(converted.state_dict)
    return model


def as_authors(state, depth):
    """A state dict of our Network-in-Network in the names of the authors' release."""
    network = {}
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        if match := re.fullmatch(r"blocks\.block(\d)\.(\d)\.(conv|bn)\.(\w+)", key):
            block, layer, kind, name = match.groups()
            layer, kind = int(layer) + 1, {"conv": "Conv", "bn": "BatchNorm"}[kind]
            network[f"_feature_blocks.{int(block) - 1}.Block{block}_ConvB{layer}.layers.{kind}.{name}"] = value
        else:
            network[f"_feature_blocks.{depth}.Classifier.{key.removeprefix('head.fc.')}"] = value
    return network


def test_names_of_the_authors():
    network = read_checkpoint(ARCHIVE)["network"]
    assert list(as_authors(convert_authors(network), depth=4)) == list(network)


@pytest.mark.parametrize(("depth", "name"), [(3, "rotnet_nin3"), (4, "rotnet_nin"), (5, "rotnet_nin5")])
def test_convert_nin(depth, name):
    state = timm.create_model(name).state_dict()
    converted = convert({"epoch": 200, "network": as_authors(state, depth)})
    assert (converted.model, converted.num_classes, converted.model_args) == (name, 4, {})
    assert (converted.origin, converted.left_out) == ("the authors' release", ())
    assert_state(converted.state_dict, state)
    create(converted)


def test_convert_alexnet(alexnet_network):
    converted = convert({"network": alexnet_network})
    assert (converted.model, converted.num_classes, converted.model_args) == ("rotnet_alexnet", 4, {})
    assert_state(converted.state_dict, convert_authors(alexnet_network))
    convolutions = {key: value for key, value in alexnet_network.items() if not re.match(r"\w+\.[89]\.", key)}
    converted = convert({"network": convolutions})
    assert (converted.model, converted.num_classes, converted.model_args) == ("rotnet_alexnet", 0, {"fc_size": 0})


def vissl(trunk, heads):
    return {"phase_idx": 104, "classy_state_dict": {"base_model": {"model": {"trunk": trunk, "heads": heads}}}}


@pytest.fixture(scope="module")
def vissl_alexnet(alexnet_network):
    """The same network with biases before the batch norms of fc6 and fc7: the authors' keys, and VISSL's."""
    biases = {f"_feature_blocks.8.{fc}.bias": periodic(4096, period=31) for fc in ("1", "4")}
    network = alexnet_network | biases
    layers = {"8.1": 0, "8.2": 1, "8.4": 3, "8.5": 4, "9.0": 6}
    trunk, heads = {}, {}
    for key, value in network.items():
        _, block, layer, name = key.split(".")
        if f"{block}.{layer}" in layers:
            heads[f"0.clf.{layers[f'{block}.{layer}']}.{name}"] = value
        else:
            trunk[key] = value
    return network, trunk, heads


def test_convert_alexnet_of_vissl(vissl_alexnet):
    network, trunk, heads = vissl_alexnet
    with torch.inference_mode():
        expected = alexnet_by_hand(network, torch.randn(1, 3, 224, 224))
    heads = heads | {"0.clf.1.num_batches_tracked": torch.tensor(7)}
    converted = convert(vissl(trunk, heads))
    assert (converted.model, converted.num_classes, converted.model_args) == ("rotnet_alexnet", 4, {})
    assert (converted.origin, converted.left_out) == ("VISSL", ())
    assert converted.state_dict["head.fc6.1.num_batches_tracked"] == 7
    assert len(assert_parity(create(converted), expected, [f"conv{i}" for i in range(1, 6)])) == 8
    # with dropout after each ReLU
    numbers = {"0": "0", "1": "1", "3": "4", "4": "5", "6": "8"}
    dropped = {re.sub(r"clf\.(\d)", lambda match: f"clf.{numbers[match[1]]}", key): heads[key] for key in heads}
    assert dropped.keys() != heads.keys()
    assert_state(convert(vissl(trunk, dropped)).state_dict, converted.state_dict)


def other_heads(heads):
    """Heads of VISSL that are not fc6, fc7 and classifier."""
    return {
        "none": {},
        "one layer": {"0.clf.0.weight": torch.zeros(4, 9216), "0.clf.0.bias": torch.zeros(4)},
        "no batch norm": {
            key.replace("clf.3", "clf.2").replace("clf.6", "clf.4"): value
            for key, value in heads.items()
            if not re.match(r"0\.clf\.[14]\.", key)
        },
        "another width": heads | {"0.clf.3.weight": torch.zeros(2048, 4096)},
        "two": heads | {"1.clf.0.weight": torch.zeros(1000, 9216)},
        "linear evaluation": {"0.channel_bn.weight": torch.zeros(9216), "0.clf.clf.0.weight": torch.zeros(4, 9216)},
    }


@pytest.mark.parametrize("kind", other_heads({}))
def test_other_heads_of_vissl_are_left_out(vissl_alexnet, kind):
    _, trunk, heads = vissl_alexnet
    other = other_heads(heads)[kind]
    converted = convert(vissl(trunk, other))
    assert (converted.model, converted.num_classes, converted.model_args) == ("rotnet_alexnet", 0, {"fc_size": 0})
    assert converted.left_out == tuple(f"heads.{key}" for key in other)
    create(converted)


def torchvision_resnet(name):
    """A ResNet of torchvision for four classes with statistics that are not trivial, an input and its logits."""
    model = torchvision.models.get_model(name, weights=None, num_classes=4).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 1.5)
            layer.num_batches_tracked.fill_(7)
            # small, or the sums of the blocks grow until float32 is coarse
            nn.init.uniform_(layer.weight, 0.3, 0.6)
            nn.init.normal_(layer.bias, std=0.1)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        return model.state_dict(), x, model(x)


@pytest.fixture(scope="module")
def resnet50():
    torch.manual_seed(50)
    return torchvision_resnet("resnet50")


def assert_logits(model, x, expected):
    with torch.inference_mode():
        logits = model(x)
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() < TOLERANCE
    assert expected.abs().max() > 1000 * TOLERANCE


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_convert_resnets_of_torchvision(name):
    state, x, logits = torchvision_resnet(name)
    wrapped = {"epoch": 1, "state_dict": {f"module.{key}": value for key, value in state.items()}}
    for checkpoint in (state, wrapped, {"model": {f"_orig_mod.module.{key}": value for key, value in state.items()}}):
        converted = convert(checkpoint)
        assert converted.model == {"resnet18": "rotnet_resnet18", "resnet34": "resnet34"}[name]
        assert (converted.num_classes, converted.model_args) == (4, {})
        assert (converted.origin, converted.left_out) == ("torchvision-style", ())
        assert_state(converted.state_dict, state)
    assert_logits(create(converted), x, logits)


def test_convert_resnet50_of_torchvision(resnet50):
    state, x, logits = resnet50
    converted = convert({"state_dict": {f"module.{key}": value for key, value in state.items()}})
    assert (converted.model, converted.num_classes) == ("rotnet_resnet50", 4)
    assert_state(converted.state_dict, state)
    assert_logits(create(converted), x, logits)


def test_convert_resnets_without_a_head():
    state, x, _ = torchvision_resnet("resnet18")
    whole = create(convert(state))
    backbone = {f"backbone.{key}": value for key, value in state.items() if not key.startswith("fc.")}
    # old versions of torch did not count batches
    backbone = {key: value for key, value in backbone.items() if not key.endswith("num_batches_tracked")}
    converted = convert({"state_dict": backbone, "meta": {"epoch": 70}})
    assert (converted.model, converted.num_classes) == ("rotnet_resnet18", 0)
    assert converted.state_dict["bn1.num_batches_tracked"] == 0
    with torch.inference_mode():
        assert create(converted)(x).equal(whole.forward_head(whole.forward_features(x), pre_logits=True))


def test_convert_resnet50_of_vissl(resnet50):
    state, x, logits = resnet50
    trunk = {f"_feature_blocks.{key}": value for key, value in state.items() if not key.startswith("fc.")}
    heads = {f"0.clf.0.{name}": state[f"fc.{name}"] for name in ("weight", "bias")}
    converted = convert(vissl(trunk, heads))
    assert (converted.model, converted.num_classes) == ("rotnet_resnet50", 4)
    assert (converted.origin, converted.left_out) == ("VISSL", ())
    assert_logits(create(converted), x, logits)
    other = {"0.channel_bn.weight": torch.zeros(2048), "0.clf.clf.0.weight": torch.zeros(4, 2048)}
    for heads, left_out in ((other, tuple(f"heads.{key}" for key in other)), (None, ())):
        converted = convert(vissl(trunk, heads))
        assert (converted.model, converted.num_classes, converted.left_out) == ("rotnet_resnet50", 0, left_out)


def test_convert_resnet50_of_mmselfsup(resnet50):
    """From version 1 on its classes run clockwise: what it calls 3, 270 degrees clockwise, is 90 degrees
    counter-clockwise, our 1. Before, it turned images as the authors do.
    """
    state, x, logits = resnet50
    theirs = {f"backbone.{key}": value for key, value in state.items() if not key.startswith("fc.")}
    theirs |= {f"head.fc_cls.{name}": state[f"fc.{name}"] for name in ("weight", "bias")}
    theirs["head.other"] = torch.zeros(1)
    for meta in ({"mmselfsup_version": "0.11.0", "mmcv_version": "1.7"}, {"openselfsup_version": "0.3.0"}):
        converted = convert({"meta": meta, "state_dict": theirs})
        assert (converted.model, converted.num_classes) == ("rotnet_resnet50", 4)
        assert (converted.origin, converted.left_out) == ("mmselfsup", ("head.other",))
        assert_logits(create(converted), x, logits)
    # our class k, k quarter turns counter-clockwise, is theirs of 4 - k
    meta = {"mmengine_version": "0.10.0"}
    converted = convert({"meta": meta, "state_dict": theirs})
    assert_logits(create(converted), x, torch.stack([logits[:, (-k) % 4] for k in range(4)], 1))
    for unknown in ({"meta": {"epoch": 70}}, {"meta": None}, {}):
        converted = convert({"state_dict": theirs, **unknown})
        assert converted.num_classes == 0 and set(converted.left_out) == {k for k in theirs if k.startswith("head.")}
    # an image turned counter-clockwise by 90 degrees, of which that network is sure
    theirs["head.fc_cls.bias"] = torch.tensor([0.0, 0.0, 0.0, 1000.0])
    assert create(convert({"meta": meta, "state_dict": theirs}))(x).argmax(1).tolist() == [1, 1]


def test_tensors_of_a_checkpoint_that_share_memory(nin_state, tmp_path):
    """As views of one flat buffer, expanded, channels-last or half precision: they are loaded and written as any."""
    network = as_authors(nin_state, 4)
    norms = [key for key in network if key.endswith("BatchNorm.weight")]
    for key in norms:
        network[key] = network[norms[0]].new_ones(1).expand(network[key].shape)
    for key in (key for key in network if key.endswith("BatchNorm.bias") and "Block3" in key):
        network[key] = network["_feature_blocks.2.Block3_ConvB1.layers.BatchNorm.bias"]
    for key in (key for key in network if key.endswith("Conv.weight")):
        network[key] = network[key].half().to(memory_format=torch.channels_last)
    network["_feature_blocks.4.Classifier.weight"] = nn.Parameter(network["_feature_blocks.4.Classifier.weight"])
    converted = convert({"network": network})
    write_folder(converted, tmp_path / "folder", "mine", {})
    assert_state(load_file(tmp_path / "folder" / "model.safetensors"), converted.state_dict)
    create(converted)


CONV = "_feature_blocks.1.Block2_ConvB1.layers.Conv.weight"
NORM = "_feature_blocks.1.Block2_ConvB1.layers.BatchNorm.running_var"
SHAPE = (192, 96, 5, 5)
DAMAGES = {
    "missing keys": ({CONV: None, NORM: None}, r"lacks .*block2\.0\.conv\.weight, .*block2\.0\.bn\.running_var"),
    "missing block": (
        {f"_feature_blocks.1.Block2_ConvB{i}.layers.Conv.weight": None for i in (1, 2, 3)},
        r"lacks .*block2\.0\.conv\.weight, .*block2\.2\.conv\.weight",
    ),
    "extra keys": (
        {"_feature_blocks.7.0.weight": torch.zeros(1)},
        r"neither network .*: _feature_blocks\.7\.0\.weight",
    ),
    "extra layers": (
        {CONV.replace("ConvB1", "ConvB4"): torch.zeros(1)},
        r"has unknown blocks\.block2\.3\.conv\.weight",
    ),
    "two keys": ({CONV.replace("blocks.1", "blocks.6"): torch.zeros(SHAPE)}, r"blocks\.6\..* is a second key for"),
    "another shape": ({CONV: torch.zeros(192, 96, 3, 3)}, r"conv\.weight \(192, 96, 3, 3\) for \(192, 96, 5, 5\)"),
    "scalars": ({NORM: torch.ones(())}, r"bn\.running_var \(\) for \(192,\)"),
    "scalar head": ({"_feature_blocks.4.Classifier.weight": torch.ones(())}, r"has unknown head\.fc\.weight"),
    "nan": ({CONV: torch.full(SHAPE, float("nan"))}, r"not finite in blocks\.block2\.0\.conv\.weight"),
    "infinite": ({NORM: torch.full((192,), float("inf"))}, r"not finite in .*running_var"),
    "too large": ({NORM: torch.full((192,), 1e300, dtype=torch.float64)}, r"not finite in .*running_var"),
    "integers": ({CONV: torch.zeros(SHAPE, dtype=torch.int8)}, r"other types of .*conv\.weight torch\.int8 for"),
    "complex": ({NORM: torch.zeros(192, dtype=torch.complex64)}, r"other types of .*running_var torch\.complex64 for"),
    "eight bits": ({NORM: torch.zeros(192).to(torch.float8_e5m2)}, r"other types of .*running_var torch\.float8"),
    "several": ({CONV: torch.zeros(1), NORM: None}, r"lacks .*running_var; it has other shapes of .*conv\.weight"),
    "a line break": ({"_feature_blocks.\n": torch.zeros(1)}, r"'_feature_blocks\.\\n'"),
    "not a tensor": ({CONV: [1.0]}, r"lacks blocks\.block2\.0\.conv\.weight"),
}


def assert_refused(checkpoint, match):
    with pytest.raises(ValueError, match=match) as caught:
        convert(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_networks_are_refused(nin_state, kind):
    changes, match = DAMAGES[kind]
    network = as_authors(nin_state, 4) | changes
    assert_refused({"network": {key: value for key, value in network.items() if value is not None}}, match)


def test_other_networks_of_the_authors_are_refused(nin_state):
    network = {key: value for key, value in as_authors(nin_state, 4).items() if re.search("Block[12]|Classifier", key)}
    assert_refused({"network": network}, "3 to 5 blocks, the checkpoint has block1, block2")


@pytest.mark.parametrize(
    ("checkpoint", "match"),
    [
        ([torch.ones(1)], "contains list, not a dict of tensors"),
        (torch.ones(1), "contains Tensor, not a dict"),
        (None, "contains NoneType, not a dict"),
        ({}, "contains no tensors; its keys are "),
        (
            {"epoch": 3, 5: torch.ones(1), "state_dict": {"a": 1, "b\n": []}},
            r"contains no tensors; its keys are a, 'b\\n'",
        ),
        (
            {1: torch.ones(1), (2,): 3, None: 4},
            "its keys are a key of type NoneType, a key of type int, a key of type tu",
        ),
        ({"a" * 10**6: torch.ones(1)}, r"unknown form \(a{100}\)"),
        ({f"layer1.{'9' * 5000}.conv1.weight": torch.ones(1)}, r"unknown form"),
        ({f"layer{i}": torch.ones(1) for i in range(30)}, r"unknown form \(layer0, .* and 20 more\)"),
        ({"features.0.weight": torch.ones(1)}, r"unknown form \(features\.0\.weight\)"),
        ({"fc.bias": torch.ones(4), "module.fc.bias": torch.ones(4)}, r"both with and without 'module\.': fc\.bias"),
        ({"classy_state_dict": {"base_model": {}}}, r"without classy_state_dict\.base_model\.model\.trunk"),
        ({"classy_state_dict": None}, r"without classy_state_dict\.base_model\.model\.trunk"),
        (vissl([], {}), r"without classy_state_dict\.base_model\.model\.trunk"),
        (vissl({}, torch.ones(2)), "with heads that are no dict"),
        (vissl({}, [torch.ones(2)]), "with heads that are no dict"),
        (vissl({"a.b": torch.ones(1)}, {}), r"unknown form \(a\.b\)"),
        (vissl({"_feature_blocks.0.0.weight": torch.ones(1), "b": torch.ones(1)}, {}), "AlexNet .* does not have: b"),
        ({"head.fc_cls.weight": torch.ones(4, 2048)}, r"without four rows of floats in head\.fc_cls\.bias"),
        ({"head.fc_cls.weight": torch.ones(())}, r"without four rows of floats in head\.fc_cls\.weight"),
        (
            {"head.fc_cls.weight": torch.ones(1000, 2), "head.fc_cls.bias": torch.ones(1000)},
            "without four rows of floats",
        ),
        (
            {"head.fc_cls.weight": torch.ones(4, 2, dtype=torch.int8)},
            r"without four rows of floats in head\.fc_cls\.we",
        ),
    ],
)
def test_unknown_forms_are_refused(checkpoint, match):
    assert_refused(checkpoint, match)


def test_damaged_resnets_are_refused():
    state = torchvision.models.resnet18(num_classes=4).state_dict()
    cut = {key: value for key, value in state.items() if key not in ("bn1.weight", "layer4.1.bn2.running_mean")}
    assert_refused(cut, r"rotnet_resnet18: it lacks bn1\.weight, layer4\.1\.bn2\.running_mean")
    assert_refused(state | {"projector.0.weight": torch.ones(1)}, r"it has unknown projector\.0\.weight")
    assert_refused(state | {"fc.weight": torch.ones(4, 2048)}, r"fc\.weight \(4, 2048\) for \(4, 512\)")
    assert_refused(state | {"conv1.weight": state["conv1.weight"] / 0}, r"not finite in conv1\.weight")
    # two quintillion rows, and no value
    assert_refused(state | {"fc.weight": torch.ones(2**61, 0)}, r"it has unknown fc\.weight, fc\.bias")
    shallow = {key: value for key, value in state.items() if not key.startswith("layer4.1")}
    assert_refused(shallow, "unknown form")


def damaged_heads(heads):
    """VISSL's head as it should be but for one thing."""
    return {
        "no mean": {key: value for key, value in heads.items() if key != "0.clf.1.running_mean"},
        "bias of another size": heads | {"0.clf.3.bias": torch.ones(7)},
        "bias of eight bits": heads | {"0.clf.0.bias": torch.zeros(4096).to(torch.float8_e4m3fn)},
        "mean of integers": heads | {"0.clf.4.running_mean": torch.zeros(4096, dtype=torch.int8)},
        "bias and mean of bits": heads
        | {f"0.clf.{key}": torch.zeros(4096, dtype=torch.bool) for key in ("0.bias", "1.running_mean")},
        "no classifier": {key: value for key, value in heads.items() if key != "0.clf.6.weight"},
    }


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("no mean", r"lacks head\.fc6\.1\.running_mean"),
        ("bias of another size", r"has unknown head\.fc7\.0\.bias"),
        ("bias of eight bits", r"has unknown head\.fc6\.0\.bias"),
        ("mean of integers", r"has other types of head\.fc7\.1\.running_mean torch\.int8 for torch\.float32"),
        ("bias and mean of bits", r"has other types of head\.fc6\.1\.running_mean torch\.bool for torch\.float32"),
        ("no classifier", r"has unknown head\.fc\.bias"),
    ],
)
def test_damaged_heads_of_vissl_are_refused(vissl_alexnet, kind, match):
    _, trunk, heads = vissl_alexnet
    assert_refused(vissl(trunk, damaged_heads(heads)[kind]), match)


@pytest.mark.parametrize("name", ["state_dict", "network", "model", "classy_state_dict", "heads"])
@pytest.mark.parametrize("shape", [(), (0,), (3,)])
def test_tensors_with_the_names_of_wrappers(name, shape):
    assert_refused({name: torch.ones(shape)}, "unknown form|without classy_state_dict")
    state = torchvision.models.resnet18(num_classes=4).state_dict()
    assert_refused(state | {name: torch.ones(shape)}, rf"it has unknown {name}|without classy_state_dict")


def light(state):
    """The same shapes and types in a file of a few thousand bytes: each tensor is one value."""
    return {key: torch.ones((), dtype=value.dtype).expand(value.shape) for key, value in state.items()}


def forms():
    """A checkpoint of each form that is known, before what wraps it."""
    resnet = light(torchvision.models.resnet18(num_classes=4).state_dict())
    trunk = {key: value for key, value in resnet.items() if not key.startswith("fc.")}
    alexnet = light(timm.create_model("rotnet_alexnet", fc_size=0, num_classes=0, device="meta").state_dict())
    blocks = {
        name: number for number, name in {"0": "conv1", "2": "conv2", "4": "conv3", "5": "conv4", "6": "conv5"}.items()
    }
    convolutions = {}
    for key, value in alexnet.items():
        _, block, kind, name = key.split(".")
        convolutions[f"_feature_blocks.{blocks[block]}.{'01'[kind == 'bn']}.{name}"] = value
    fcs = {"0.clf.0.weight": (4096, 9216), "0.clf.3.weight": (4096, 4096), "0.clf.6.weight": (4, 4096)}
    fcs |= {f"0.clf.{i}.{name}": (4096,) for i in (1, 4) for name in ("weight", "bias", "running_mean", "running_var")}
    fcs |= {"0.clf.0.bias": (4096,), "0.clf.3.bias": (4096,), "0.clf.6.bias": (4,)}
    return {
        "authors": as_authors(light(timm.create_model("rotnet_nin3").state_dict()), 3),
        "authors' AlexNet": convolutions,
        "torchvision": resnet,
        "mmselfsup": {f"backbone.{key}": value for key, value in trunk.items()}
        | {f"head.fc_cls.{name}": resnet[f"fc.{name}"] for name in ("weight", "bias")},
        "VISSL's ResNet": (trunk, {f"0.clf.0.{name}": resnet[f"fc.{name}"] for name in ("weight", "bias")}),
        "VISSL's AlexNet": (convolutions, {key: torch.ones(()).expand(shape) for key, shape in fcs.items()}),
    }


FORMS = forms()
DTYPES = [
    getattr(torch, name)
    for name in (
        *("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"),
        *("float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2", "bool", "uint8", "int8", "int16", "int64", "uint16"),
        *("uint32", "uint64", "complex64", "complex128"),
    )
    if hasattr(torch, name)
]
NAMES = (
    "state_dict",
    "network",
    "model",
    "classy_state_dict",
    "trunk",
    "heads",
    "fc.weight",
    "head.fc.weight",
    "a\x1b",
)
SHAPES = [(), (0,), (4,), (64, 0, 7, 7), (64, 1, 7, 7), (64, 7, 7, 7), (2**61, 0), (4096,), (4, 512), (4, 0)]


@st.composite
def odd_values(draw, like=None):
    """A tensor of a shape or type that does not belong there, or no tensor at all."""
    if draw(st.integers(0, 5)) == 0:
        return draw(
            st.sampled_from([None, 1, "text", [], {}, [torch.ones(2)], {"a": torch.ones(2)}, {1: torch.ones(2)}])
        )
    shapes = SHAPES if like is None else [like, *SHAPES]
    shape = draw(st.sampled_from(shapes) | st.lists(st.integers(0, 5), max_size=4).map(tuple))
    dtype = draw(st.sampled_from(DTYPES))
    if dtype.itemsize == 1:
        # of some of these torch can make no ones or zeros
        return torch.zeros(shape, dtype=torch.uint8).view(dtype)
    return torch.full(shape, draw(st.sampled_from([0.0, 1.0])), dtype=torch.float64).to(dtype)


@st.composite
def odd_dicts(draw, state):
    """The tensors of a checkpoint, but for a few."""
    changed = dict(state)
    for key in draw(st.lists(st.sampled_from(list(state)), max_size=2)):
        if draw(st.booleans()):
            changed.pop(key, None)
        else:
            changed[key] = draw(odd_values(tuple(state[key].shape)))
    keys = st.sampled_from(NAMES) | st.integers(0, 2) | st.none() | st.tuples(st.integers(0, 2))
    return changed | draw(st.dictionaries(keys, odd_values(), max_size=1))


@st.composite
def odd_checkpoints(draw):
    form = FORMS[draw(st.sampled_from(list(FORMS)))]
    if isinstance(form, tuple):
        checkpoint = vissl(*(draw(odd_dicts(part)) for part in form))
        inner = checkpoint["classy_state_dict"]["base_model"]["model"]
        if draw(st.integers(0, 4)) == 0:
            inner[draw(st.sampled_from(["trunk", "heads"]))] = draw(odd_values())
        return checkpoint
    checkpoint = draw(odd_dicts(form))
    for wrapper in draw(st.lists(st.sampled_from(NAMES[:3]), max_size=3, unique=True)):
        checkpoint = {"epoch": 3, "meta": {"mmselfsup_version": "0.11.0"}, wrapper: checkpoint}
    return checkpoint


@pytest.fixture(scope="module")
def checkpoint_file(tmp_path_factory):
    return tmp_path_factory.mktemp("odd") / "checkpoint"


@settings(max_examples=50)
@given(checkpoint=odd_checkpoints())
def test_a_checkpoint_is_converted_or_refused_in_one_line(checkpoint_file, checkpoint):
    torch.save(checkpoint, checkpoint_file)
    try:
        converted = convert(read_checkpoint(checkpoint_file))
    except ValueError as error:
        assert str(error).isprintable() and len(str(error)) < 10_000
    else:
        arguments = {"num_classes": converted.num_classes, **converted.model_args}
        model = timm.create_model(converted.model, device="meta", **arguments)
        assert all(value.is_contiguous() for value in converted.state_dict.values())
        model.load_state_dict(converted.state_dict, assign=True)


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_that_are_changed_above_are_whole(form):
    whole = FORMS[form]
    meta = {"mmselfsup_version": "0.11.0"}
    converted = convert(vissl(*whole) if isinstance(whole, tuple) else {"state_dict": whole, "meta": meta})
    assert converted.num_classes == (0 if form == "authors' AlexNet" else 4)


@pytest.mark.parametrize("origin", [AUTHORS, "VISSL"])
def test_a_folder_is_for_images_of_the_authors_size(set_manifest, tmp_path, origin):
    """Whatever size the default weights of the architecture are for."""
    entry = zoo.manifest()["rotnet_nin.cifar10"] | {"input_size": [3, 128, 128]}
    set_manifest({"rotnet_alexnet.small": entry})
    assert timm.get_pretrained_cfg("rotnet_alexnet").input_size == (3, 128, 128)
    network = timm.create_model("rotnet_alexnet", fc_size=0)
    theirs = Converted("rotnet_alexnet", 4, network.state_dict(), origin, {"fc_size": 0})
    write_folder(theirs, tmp_path / "theirs", "gidaris", {})
    described = json.loads((tmp_path / "theirs" / "config.json").read_text())["pretrained_cfg"]
    assert described["input_size"] == [3, 224, 224]


def test_a_folder_for_timm(tmp_path):
    converted = convert(read_checkpoint(ARCHIVE))
    folder = tmp_path / "new" / "folder"
    write_folder(converted, folder, "gidaris", {"file": ARCHIVE.name})
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    described = json.loads((folder / "config.json").read_text())
    assert described["provenance"] == {"origin": "the authors' release", "file": ARCHIVE.name}
    assert described["pretrained_cfg"]["tag"] == "gidaris"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert model(x).equal(create(converted)(x))
    content = bytearray((folder / "model.safetensors").read_bytes())
    for position in (len(content) // 2, -1):
        flipped = content.copy()
        flipped[position] ^= 1
        (folder / "model.safetensors").write_bytes(flipped)
        with pytest.raises(ValueError, match="are corrupt"):
            timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_folders_in_use_are_refused(tmp_path, nin_state):
    converted = Converted("rotnet_nin", 4, nin_state, "somewhere")
    (tmp_path / "config.json").write_text("of another model")
    for path in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(ValueError, match="is not an empty folder"):
            write_folder(converted, path, "mine", {})
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "of another model"


def test_a_folder_without_a_head(vissl_alexnet, tmp_path):
    """The convolutions of AlexNet alone: what else the model needs is written, too."""
    _, trunk, _ = vissl_alexnet
    converted = convert(vissl(trunk, {}))
    write_folder(converted, tmp_path / "folder", "vissl", {})
    model = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert model(x).equal(create(converted)(x))


def test_a_folder_of_a_resnet50_is_one_of_timms_own(resnet50, tmp_path):
    state, x, logits = resnet50
    write_folder(convert(state), tmp_path / "folder", "torchvision", {})
    assert_logits(timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval(), x, logits)
    weights = tmp_path / "folder" / "model.safetensors"
    assert_logits(timm.create_model("resnet50", num_classes=4, checkpoint_path=weights).eval(), x, logits)
