import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotation_ssl.features import attention_map, extract_features, layer_modules


@pytest.fixture
def backbone():
    return timm.create_model("rotnet_nin")


def test_layer_names():
    assert list(layer_modules(timm.create_model("rotnet_nin5"))) == [f"block{i}" for i in range(1, 6)]
    alexnet = timm.create_model("rotnet_alexnet", device="meta")
    assert layer_modules(alexnet) == {f"conv{i}": f"features.conv{i}" for i in range(1, 6)}


def test_any_timm_model():
    model = timm.create_model("resnet18")
    features = extract_features(model, torch.randn(2, 3, 64, 64), ["layer2", "layer4.1.conv1"])
    assert features["layer2"].shape == (2, 128) and features["layer4.1.conv1"].shape == (2, 512)


def test_one_pass_gives_the_intermediates(backbone):
    images = torch.randn(5, 3, 32, 32)
    expected = backbone.eval().forward_intermediates(images, intermediates_only=True)
    layers = ["block1", "block2", "block3", "block4"]
    maps = extract_features(backbone, images, layers, pool=None, batch_size=2)
    pooled = extract_features(backbone, images, layers, grid=4, batch_size=2)
    average = extract_features(backbone, images, layers, batch_size=2)
    for layer, tensor in zip(layers, expected, strict=True):
        torch.testing.assert_close(maps[layer], tensor.detach())
        cells = torch.nn.functional.avg_pool2d(tensor.detach(), tensor.shape[-1] // 4)
        torch.testing.assert_close(pooled[layer], cells.flatten(1))
        torch.testing.assert_close(average[layer], tensor.detach().mean((2, 3)))


def test_all_layers_are_taken_by_default(backbone):
    images = torch.randn(2, 3, 32, 32)
    features = extract_features(backbone, images)
    assert list(features) == ["block1", "block2", "block3", "block4"]
    assert torch.equal(features["block3"], extract_features(backbone, images, ["block3"])["block3"])


def test_pooling_by_hand():
    """An identity backbone on a 4 x 4 image of 0..15."""
    layer = torch.nn.Identity()
    model = torch.nn.Sequential(layer)
    model.feature_info = [{"module": "0"}]
    image = torch.arange(16.0).view(1, 1, 4, 4)

    def pooled(**kwargs):
        return extract_features(model, image, ["0"], **kwargs)["0"]

    assert pooled().tolist() == [[7.5]]
    assert pooled(grid=2).tolist() == [[2.5, 4.5, 10.5, 12.5]]
    assert pooled(pool="max", grid=2).tolist() == [[5.0, 7.0, 13.0, 15.0]]
    assert pooled(pool="flatten").tolist() == [list(range(16))]
    assert torch.equal(pooled(pool=None), image)
    assert pooled(grid={"0": 9}).tolist() == [list(range(16))], "a map smaller than the grid keeps its size"
    assert pooled(prepare=lambda batch: batch + 1).tolist() == [[8.5]]
    assert pooled(dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="pool must be one of 'avg', 'max', 'flatten', None, got 'sum'"):
        pooled(pool="sum")


@pytest.mark.parametrize(
    ("name", "layer", "shape"),
    [
        ("vit_tiny_patch16_224", "blocks.1", (2, 192, 4, 4)),
        ("swin_tiny_patch4_window7_224", "layers.1", (2, 192, 8, 8)),
        ("resnet18", "global_pool", (2, 512)),
    ],
)
def test_tokens_and_channels_last_outputs_are_maps(name, layer, shape):
    sizes = {} if name == "resnet18" else {"img_size": 64}
    model = timm.create_model(name, **sizes)
    images = torch.randn(2, 3, 64, 64)
    assert extract_features(model, images, [layer], pool=None)[layer].shape == shape
    pooled = extract_features(model, images, [layer])[layer]
    assert pooled.shape == shape[:2]
    if name.startswith("vit"):
        index = list(layer_modules(model)).index(layer)
        expected = model.forward_intermediates(images, [index], intermediates_only=True)[0]
        torch.testing.assert_close(pooled, expected.mean((2, 3)).detach())


@pytest.fixture(scope="module")
def shared():
    """A small model that many threads use, images that tell their rows apart, and the rows of one thread."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(inplace=True))
    model.feature_info = [{"module": name} for name in "012"]
    model.train()
    images = torch.arange(24.0).view(24, 1, 1, 1) + torch.rand(24, 3, 6, 6)
    return model, images, extract_features(model, images, ["0", "1", "2"])


@settings(max_examples=25)
@given(st.lists(st.integers(1, 23), max_size=7, unique=True), st.integers(1, 8))
def test_any_split_over_threads_gives_the_rows_of_one_thread(shared, cuts, batch_size):
    model, images, expected = shared
    parts = torch.tensor_split(images, sorted(cuts))
    with ThreadPoolExecutor(8) as threads:
        jobs = [threads.submit(extract_features, model, p, ["0", "1", "2"], batch_size=batch_size) for p in parts]
        found = [job.result() for job in jobs]
    for layer, rows in expected.items():
        torch.testing.assert_close(torch.cat([part[layer] for part in found]), rows)


def test_the_mode_that_others_see_never_changes(backbone):
    seen = []

    def look(batch):
        seen.append({module.training for module in backbone.modules()})
        return batch

    extract_features(backbone.train(), torch.randn(4, 3, 32, 32), ["block1"], prepare=look, batch_size=2)
    assert seen == [{True}, {True}]


def test_hooks_of_the_user_are_kept_and_run(backbone):
    calls = []
    backbone.blocks.block1.register_forward_hook(lambda *_: calls.append("user"))
    extract_features(backbone, torch.randn(1, 3, 32, 32), ["block1"])
    assert calls == ["user"] and len(backbone.blocks.block1._forward_hooks) == 1


def test_the_pass_stops_after_the_last_layer_asked_for(backbone):
    class Trap(torch.nn.Module):
        def forward(self, x):
            raise AssertionError("the rest of the network was run")

    backbone.blocks.block3 = Trap()
    features = extract_features(backbone, torch.randn(1, 3, 32, 32), ["block2", "block1"])
    assert list(features) == ["block2", "block1"]


def test_a_hook_that_is_a_method_is_called_with_its_own_object(backbone):
    class Recorder:
        calls, output = 0, None

        def hook(self, module, inputs, output):
            self.calls, self.output = self.calls + 1, output

    recorder = Recorder()
    backbone.blocks.block1.register_forward_hook(recorder.hook)
    images = torch.randn(1, 3, 32, 32)
    backbone(images)
    extract_features(backbone, images, ["block2"])
    assert recorder.calls == 2


def test_tensors_that_a_module_computed_and_keeps_are_no_obstacle():
    class Cached(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.cache = torch.nn.Parameter(torch.ones(1)), {}

        def forward(self, x):
            return x * self.cache.setdefault("twice", 2 * self.weight)

    model = torch.nn.Sequential(Cached())
    model.feature_info = [{"module": "0"}]
    images = torch.randn(2, 1, 1, 1)
    output = model(images)
    assert torch.equal(extract_features(model, images)["0"], output.detach().flatten(1))


@pytest.mark.parametrize("old", [True, False])
def test_weight_norm_is_no_obstacle(old):
    from torch.nn.utils import parametrizations, weight_norm

    with pytest.warns(FutureWarning) if old else contextlib.nullcontext():
        conv = (weight_norm if old else parametrizations.weight_norm)(torch.nn.Conv2d(1, 2, 1))
    model = torch.nn.Sequential(conv)
    model.feature_info = [{"module": "0"}]
    images = torch.randn(2, 1, 1, 1)
    assert torch.equal(extract_features(model, images, ["0"])["0"], model(images).detach().flatten(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": 0}, "grid must be a positive number of cells a side, got 0"),
        ({"grid": {"block1": -3}}, "grid must be a positive number of cells a side, got -3"),
        ({"grid": {"block2": 1}}, "grid has no entry for block1"),
        ({"batch_size": -1}, "batch_size must be a positive number of images, got -1"),
        ({"batch_size": 0}, "batch_size must be a positive number of images, got 0"),
        ({"dtype": torch.int8}, "dtype must be a floating-point type, got torch.int8"),
        ({"prepare": lambda batch: batch[:1]}, "prepare gave 1 images for 3: it must give one for each"),
    ],
)
def test_options_out_of_range_are_named(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        extract_features(backbone, torch.randn(3, 3, 32, 32), ["block1"], **options)


def test_a_layer_that_mixes_images_is_named():
    class Windows(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1).view(2 * len(x), -1)

    model = torch.nn.Sequential(Windows())
    model.feature_info = [{"module": "0"}]
    with pytest.raises(ValueError, match="layer 0 gives 6 rows for 3 images"):
        extract_features(model, torch.randn(3, 1, 4, 4), ["0"])


def test_bfloat16_is_near(backbone):
    images = torch.randn(4, 3, 32, 32)
    exact = extract_features(backbone, images, ["block2"])["block2"]
    near = extract_features(backbone, images, ["block2"], autocast=torch.bfloat16)["block2"]
    assert 0 < (near - exact).abs().max() < 0.1 * exact.abs().max()


def test_features_can_be_trained_on(backbone):
    features = extract_features(backbone, torch.randn(4, 3, 32, 32), ["block2"])["block2"]
    assert not features.is_inference() and not features.requires_grad
    torch.nn.Linear(192, 2)(features).sum().backward()


def test_what_is_no_map_or_does_not_run_is_an_error():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64)
    images = torch.randn(2, 3, 64, 64)
    with pytest.raises(ValueError, match=r"layer blocks\.0\.attn\.attn_drop does not run"):
        extract_features(model, images, ["blocks.0.attn.attn_drop"])
    model.num_prefix_tokens = 0
    with pytest.raises(ValueError, match=r"layer blocks.1 gives \(2, 17, 192\), not a map or a vector"):
        extract_features(model, images, ["blocks.1"])


def test_the_axis_of_channels_is_told_by_their_number():
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=64)
    images = torch.randn(1, 3, 64, 64)
    assert extract_features(swin, images, ["layers.0"], pool=None)["layers.0"].shape == (1, 96, 16, 16)
    model = torch.nn.Sequential(torch.nn.Identity())
    model.feature_info = [{"module": "0", "num_chs": 3}]
    last = torch.randn(2, 5, 6, 3)
    assert torch.equal(extract_features(model, last, ["0"], pool=None)["0"], last.permute(0, 3, 1, 2))
    first = torch.randn(2, 3, 5, 6)
    assert torch.equal(extract_features(model, first, ["0"], pool=None)["0"], first)


def test_maps_are_copies_that_later_layers_cannot_change():
    model, images = timm.create_model("resnet18").eval(), torch.randn(1, 3, 64, 64)
    before = model.bn1(model.conv1(images)).detach()
    taken = extract_features(model, images, ["bn1"], pool=None)["bn1"]
    torch.testing.assert_close(taken, before)
    assert taken.min() < 0


def test_frozen_layers_of_a_training_model_stay_frozen(backbone):
    backbone.train()
    backbone.blocks.block1.eval()
    extract_features(backbone, torch.randn(1, 3, 32, 32), ["block2"])
    assert backbone.training and backbone.blocks.block2[0].training
    assert not any(module.training for module in backbone.blocks.block1.modules())


@pytest.mark.parametrize("training", [True, False])
def test_backbone_is_frozen_and_its_mode_kept(backbone, training):
    backbone.train(training)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    extract_features(backbone, torch.randn(4, 3, 32, 32), ["block2"])
    assert backbone.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert not any(module._forward_hooks for module in backbone.modules())


def test_unknown_layer_lists_the_known(backbone):
    with pytest.raises(ValueError, match="no layer block7 in this backbone; it has block1, block2, block3, block4"):
        extract_features(backbone, torch.zeros(1, 3, 32, 32), ["block2", "block7"])
    with pytest.raises(ValueError, match="no layer asked for"):
        extract_features(backbone, torch.zeros(1, 3, 32, 32), [])


def test_layers_are_a_list_and_of_a_model_that_is_not_compiled(backbone):
    with pytest.raises(ValueError, match=r"got the text 'block2': give \['block2'\]"):
        extract_features(backbone, torch.zeros(1, 3, 32, 32), "block2")
    with pytest.raises(ValueError, match=r"give the model that torch\.compile was given"):
        extract_features(torch.compile(backbone), torch.zeros(1, 3, 32, 32))


def test_no_images_and_no_map(backbone):
    with pytest.raises(ValueError, match="no images"):
        extract_features(backbone, torch.zeros(0, 3, 32, 32), ["block2"])
    for model in (torch.nn.Linear(1, 1), timm.create_model("rotnet_nin", features_only=True)):
        with pytest.raises(ValueError, match="features_only"):
            layer_modules(model)


def test_attention_map_by_hand():
    features = torch.tensor([[[[1.0, -2.0]], [[0.0, 2.0]]]])  # (1, 2, 1, 2)
    assert attention_map(features, 1, (1, 2)).tolist() == [[[0.25, 1.0]]]
    assert attention_map(features, 2, (1, 2)).tolist() == [[[0.125, 1.0]]]
    assert attention_map(torch.zeros(1, 2, 3, 3), 1, (6, 6)).abs().max() == 0
    with pytest.raises(ValueError, match="attention maps"):
        attention_map(torch.zeros(2, 3), 1, (4, 4))
