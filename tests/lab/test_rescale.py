"""Folding leaves outputs as they are; rescaling leaves them as they are but for one factor, and equalises layers."""

import copy

import pytest
import timm
import torch
from conftest import SAMPLES
from torch import nn

from rotation_ssl.images import normalize, read_images
from training.transfer.rescale import centre, channel_magnitudes, fold_batch_norms, relative_gradients, rescale

FOLDABLE = ("rotnet_alexnet", "rotnet_nin", "rotnet_resnet18", "rotnet_resnet50")


def with_statistics(model):
    """The model with batch norms that have seen something, and layers of odd scales."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.3, 3),
                (module.weight.data, 0.2, 2),
                (module.bias.data, -0.5, 0.5),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model.eval()


def images(size):
    files = sorted((SAMPLES / "cifar10").glob("*.png"))[::4]
    return normalize(read_images(files, size), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def alexnet(**options):
    return with_statistics(timm.create_model("rotnet_alexnet", **{"fc_size": 32, "num_classes": 20} | options))


@pytest.mark.parametrize("name", FOLDABLE)
def test_folding_leaves_outputs_as_they_are(name):
    model = alexnet() if name == "rotnet_alexnet" else with_statistics(timm.create_model(name))
    batch = images(64)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    folded = fold_batch_norms(model)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folded.modules())
    with torch.no_grad():
        expected, found = model(batch), folded(batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert all(parameter.requires_grad for parameter in folded.parameters()), "new biases are trained as the others are"
    frozen = fold_batch_norms(copy.deepcopy(model).requires_grad_(False))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    # nothing happened to the model itself
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not folded.training


def test_what_cannot_be_folded_is_said():
    with pytest.raises(ValueError, match="batch norm 0 follows no layer"):
        fold_batch_norms(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)))


def test_rescaling_leaves_outputs_as_they_are_but_for_one_factor():
    model = fold_batch_norms(alexnet())
    rescaled = rescale(model, images(96))
    # on images that it was not given, too
    with torch.no_grad():
        before, after = model(images(128)), rescaled(images(128))
    scale = float((after / before).median())
    torch.testing.assert_close(after, scale * before, rtol=1e-3, atol=1e-3 * float(after.abs().max()))
    assert scale > 0


def test_rescaling_equalises():
    model = fold_batch_norms(alexnet())
    # layers of very different scales, as a pretext task may leave them
    for layer, factor in zip((model.features.conv1.conv, model.features.conv4.conv), (30, 0.02), strict=True):
        layer.weight.data.mul_(factor)
    batch = images(96)
    rates = relative_gradients(model, batch)
    assert rates.max() / rates.min() > 100
    rescaled = rescale(model, batch)
    rates = relative_gradients(rescaled, batch)
    assert len(rates) == 8 and rates.max() / rates.min() < 1.01, "between layers"
    *hidden, last = channel_magnitudes(rescaled, batch)
    for magnitudes in hidden:
        speaking = magnitudes[magnitudes > 1e-3 * magnitudes.median()]
        assert speaking.max() / speaking.min() < 1.01 and len(speaking) > 0.9 * len(magnitudes), "within a layer"
    spread = channel_magnitudes(model, batch)
    assert last.max() / last.min() == pytest.approx(float(spread[-1].max() / spread[-1].min()), rel=1e-3)


def test_rescaling_again_changes_nothing():
    batch = images(96)
    once = rescale(fold_batch_norms(alexnet()), batch)
    twice = rescale(once, batch)
    for name, tensor in twice.state_dict().items():
        expected = once.state_dict()[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_centring_moves_the_means_of_fresh_layers():
    model, batch = fold_batch_norms(alexnet()), images(96)
    means = []
    for layer in (model.features.conv3.conv, model.head.fc7[0], model.head.fc):
        layer.register_forward_hook(
            lambda _, __, output: means.append(output.detach().transpose(0, 1).flatten(1).mean(1))
        )
    before = [layer.clone() for layer in model.parameters()]
    centre(model, batch, {model.head.fc7[0], model.head.fc})
    moved = [
        name for (name, layer), old in zip(model.named_parameters(), before, strict=True) if not torch.equal(layer, old)
    ]
    assert moved == ["head.fc7.0.bias", "head.fc.bias"]
    means.clear()
    model(batch)
    assert means[0].abs().max() > 0.1 and max(float(mean.abs().max()) for mean in means[1:]) < 1e-4
    centre(model, batch)
    means.clear()
    model(batch)
    assert max(float(mean.abs().max()) for mean in means) < 1e-4


def test_rescaling_without_fc_layers():
    model = fold_batch_norms(alexnet(fc_size=0))
    rates = relative_gradients(rescale(model, images(96)), images(96))
    assert len(rates) == 6 and rates.max() / rates.min() < 1.01


def test_what_cannot_be_rescaled_is_said():
    batch = images(64)
    with pytest.raises(ValueError, match=r"this one has features\.conv1\.bn: fold it first"):
        rescale(alexnet(), batch)
    with pytest.raises(ValueError, match="no chain"):
        rescale(fold_batch_norms(timm.create_model("rotnet_resnet18")), batch)
    with pytest.raises(ValueError, match="two layers or more"):
        rescale(nn.Conv2d(3, 4, 3), batch)
    silent = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    nn.init.zeros_(silent[0].weight)
    nn.init.zeros_(silent[0].bias)
    with pytest.raises(ValueError, match="silent on all of these images"):
        rescale(silent, batch)
    squared = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 3))
    before = copy.deepcopy(squared.state_dict())
    with pytest.raises(ValueError, match="no chain"):
        rescale(squared, batch)
    assert all(torch.equal(before[key], tensor) for key, tensor in squared.state_dict().items())
