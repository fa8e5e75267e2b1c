"""The contract of timm's own tests/test_models.py, on every registered model of ours; `make timm-tests` runs those."""

import copy

import pytest
import timm
import torch
from conftest import MODELS
from timm.models._manipulate import group_parameters

# names are forever: parameters, and channels of the feature layers
KNOWN = {
    "rotnet_alexnet": (57_030_724, [64, 192, 384, 256, 256]),
    "rotnet_nin": (1_411_140, [96, 192, 192, 192]),
    "rotnet_nin3": (1_004_484, [96, 192, 192]),
    "rotnet_nin5": (1_817_796, [96, 192, 192, 192, 192]),
    # torchvision's 11,689,512 and 25,557,032 with 1,000 classes, less 996 rows of the classifier
    "rotnet_resnet18": (11_689_512 - 996 * 513, [64, 64, 128, 256, 512]),
    "rotnet_resnet50": (25_557_032 - 996 * 2049, [64, 256, 512, 1024, 2048]),
}
SIZE = 96

every_model = pytest.mark.parametrize("name", MODELS)


def create(name, **options):
    """A model; AlexNet with fc layers of 32 in place of 4096, for speed."""
    return timm.create_model(name, **({"fc_size": 32} if name == "rotnet_alexnet" else {}), **options)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {name: create(name).eval() for name in MODELS}


def images(name, count=2):
    return torch.randn(count, 3, *([32, 32] if "nin" in name else [SIZE, SIZE]))


def test_registered_models_are_exactly_these():
    assert timm.list_models("rotnet_*") == list(KNOWN)


@every_model
def test_parameters(name):
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == KNOWN[name][0]


def test_alexnet_without_fc_layers_is_its_convolutions():
    model = timm.create_model("rotnet_alexnet", fc_size=0)
    assert sum(p.numel() for p in model.features.parameters()) == 2_472_000
    assert model.head_hidden_size == model.num_features == 256
    assert model(torch.randn(2, 3, SIZE, SIZE)).shape == (2, 4)


def test_feature_shapes_of_the_paper(models):
    maps = models["rotnet_nin"].forward_intermediates(torch.randn(1, 3, 32, 32), intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(96, 16, 16), (192, 8, 8), (192, 8, 8), (192, 8, 8)]
    final, maps = models["rotnet_alexnet"].forward_intermediates(torch.randn(1, 3, 224, 224))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (64, 55, 55),
        (192, 27, 27),
        (384, 13, 13),
        (256, 13, 13),
        (256, 13, 13),
    ]
    assert final.shape == (1, 256, 6, 6)


@every_model
def test_forward_is_its_parts(models, name):
    model, x = models[name], images(name)
    features = model.forward_features(x)
    assert features.shape[1] == model.num_features
    torch.testing.assert_close(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.get_classifier()(model.forward_head(features, pre_logits=True)), model(x))


@every_model
def test_every_parameter_has_a_gradient(name):
    model = create(name, num_classes=7).train()
    model(images(name)).square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    assert all(p.grad.isfinite().all() for p in model.parameters())


@every_model
def test_reset_classifier(name):
    model, x = create(name, dtype=torch.float64).eval(), images(name).double()
    features, width = model.forward_features(x), model.head_hidden_size
    model.reset_classifier(11)
    assert model(x).shape == (2, 11) and model.num_classes == 11 and model.head_hidden_size == width
    assert model.get_classifier().weight.dtype == torch.float64 and not model.get_classifier().training
    model.reset_classifier(0)
    assert model(x).shape == (2, width)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    assert model.head_hidden_size == model.num_features


@every_model
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", [None, ""])
def test_reset_classifier_keeps_the_mode(name, training, pool):
    model = timm.create_model(name, device="meta").train(training)
    model.reset_classifier(5, pool)
    assert {module.training for module in model.modules()} == {training}


@every_model
def test_reset_classifier_keeps_the_other_layers(name):
    model, x = create(name).eval(), images(name)
    before = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(3)
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), before)


@every_model
def test_without_classifier_by_constructor(models, name):
    x = images(name)
    headless = create(name, num_classes=0).eval()
    assert headless(x).shape == (2, models[name].head_hidden_size)
    mapped = create(name, num_classes=0, global_pool="").eval()
    assert mapped(x).shape == models[name].forward_features(x).shape


@every_model
@pytest.mark.parametrize("feature_cls", [None, "getter", "fx", "hook"])
def test_features_only(name, feature_cls):
    model = create(name, features_only=True, **({"feature_cls": feature_cls} if feature_cls else {})).eval()
    outputs = model(images(name))
    assert [o.shape[1] for o in outputs] == model.feature_info.channels() == KNOWN[name][1]
    size = images(name).shape[-1]
    for output, reduction in zip(outputs, model.feature_info.reduction(), strict=True):
        assert size / (2 * reduction) < output.shape[-1] <= -(-size // reduction) + 1


@every_model
def test_intermediates_agree(models, name):
    model, x = models[name], images(name)
    last = len(model.feature_info) - 1
    final, every = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    for i in range(last + 1):
        (early,) = model.forward_intermediates(x, indices=[i], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(early, every[i])
    with pytest.raises((ValueError, AssertionError), match="NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")


@every_model
def test_pruning(models, name):
    x = images(name)
    every = models[name].forward_intermediates(x, intermediates_only=True)
    last = len(every) - 1
    whole = copy.deepcopy(models[name])
    whole.prune_intermediate_layers([last], prune_head=False)
    torch.testing.assert_close(whole(x), models[name](x))
    for i in range(last + 1):
        pruned = copy.deepcopy(models[name])
        indices = pruned.prune_intermediate_layers([i])
        (kept,) = pruned.forward_intermediates(x, indices=indices, intermediates_only=True)
        torch.testing.assert_close(kept, every[i])
        if i < last:
            torch.testing.assert_close(pruned(x), every[i])
        pruned.train()
        pruned(x).sum().backward()
        assert not [n for n, p in pruned.named_parameters() if p.grad is None]


@every_model
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_torchscript(name):
    x = images(name)
    with timm.layers.set_scriptable(True):
        model = create(name, scriptable=True).eval()
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@every_model
def test_meta_device_and_bf16(name):
    meta = timm.create_model(name, device="meta", dtype=torch.bfloat16)
    assert {(t.device.type, t.dtype) for t in meta.parameters()} == {("meta", torch.bfloat16)}
    model = create(name).eval().bfloat16()
    assert model(images(name).bfloat16()).dtype == torch.bfloat16


@every_model
def test_parameter_groups(models, name):
    for coarse in (False, True):
        groups = group_parameters(models[name], models[name].group_matcher(coarse=coarse), reverse=True)
        assert len(set(groups.values())) > 1
    names = dict(models[name].named_parameters())
    cfg = models[name].pretrained_cfg
    assert f"{cfg['first_conv']}.weight" in names and f"{cfg['classifier']}.weight" in names
    assert cfg["pool_size"] == tuple(models[name].forward_features(torch.zeros(1, *cfg["input_size"])).shape[-2:])


@every_model
def test_other_channels(name):
    assert create(name, in_chans=1).eval()(images(name)[:, :1]).shape == (2, 4)


@every_model
def test_unknown_arguments_are_refused(name):
    with pytest.raises(TypeError, match="not_an_argument"):
        timm.create_model(name, not_an_argument=1)


@pytest.mark.parametrize("name", [m for m in MODELS if "nin" in m])
def test_gradient_checkpointing_changes_no_gradient_and_computes_blocks_again(name):
    model, x = timm.create_model(name), images(name)
    gradients, passes = [], []
    model.blocks.block1[1].register_forward_hook(lambda *_: passes.append(enable))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(0)
        model(x).square().sum().backward()
        gradients.append(model.blocks.block1[0].conv.weight.grad.clone())
    torch.testing.assert_close(*gradients)
    assert passes == [False, True, True]


def test_alexnet_names_the_smallest_images():
    model = timm.create_model("rotnet_alexnet", fc_size=0).eval()
    assert model.forward_features(torch.zeros(1, 3, 63, 64)).shape == (1, 256, 1, 1)
    with pytest.raises(ValueError, match="images of 62 x 80 pixels are too small for AlexNet: 63 is the least"):
        model(torch.zeros(1, 3, 62, 80))
    # the convolutions need less
    assert len(model.forward_intermediates(torch.zeros(1, 3, 32, 32), indices=[0, 1], stop_early=True)[1]) == 2
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_alexnet_refuses_gradient_checkpointing_and_odd_poolings():
    model = timm.create_model("rotnet_alexnet", device="meta")
    with pytest.raises(ValueError, match="not supported"):
        model.set_grad_checkpointing()
    with pytest.raises(ValueError, match="catavgmax"):
        model.reset_classifier(4, "catavgmax")


def test_nin_depth_is_checked():
    with pytest.raises(ValueError, match="3, 4 or 5"):
        timm.models.model_entrypoint("rotnet_nin").__globals__["RotNetNIN"](depth=2)


def test_nin_initialisation_is_the_authors():
    model = timm.create_model("rotnet_nin")
    for block, (kernel, out) in {"block1": (5, 192), "block2": (5, 192), "block3": (3, 192)}.items():
        weight = getattr(model.blocks, block)[0].conv.weight
        assert weight.std().item() == pytest.approx((2 / (kernel**2 * out)) ** 0.5, rel=0.05)
    assert model.head.fc.bias.abs().max() == 0
