"""Weights that are corrupt, renamed or of another network are refused, whichever way they come."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT, WITHOUT_WEIGHTS, assert_state, corrupt
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf

from rotation_ssl import zoo
from rotation_ssl.convert import Converted, write_folder
from rotation_ssl.models import recommended_layer
from rotation_ssl.orientation import calibration
from rotation_ssl.zoo.golden import golden_difference, golden_file

BUNDLED = "rotnet_nin.cifar10"
CONV, STATISTIC = "blocks.block2.0.conv.weight", "blocks.block3.1.bn.running_var"


def from_file(file, **kwargs):
    return timm.create_model("rotnet_nin", pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **kwargs)


def saved(state, file):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    return file


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1000])


def test_every_bundled_entry_of_the_manifest_is_a_verified_file():
    for name, entry in zoo.bundled().items():
        assert zoo.weights_file(name) == zoo.WEIGHTS_DIR / entry["file"]
        assert re.fullmatch("[0-9a-f]{64}", entry["sha256"])
        assert re.fullmatch("[0-9a-f]{40}", entry["commit"]), "weights come from a committed state"
        assert {"license", "recipe", "data", "seed"} <= set(entry)


def test_every_published_tag_is_registered_and_the_other_way_round():
    assert timm.list_pretrained("rotnet_*") == sorted(zoo.manifest())


def test_bundled_weights_load_offline_and_are_the_files(offline):
    model = timm.create_model("rotnet_nin", pretrained=True)
    state = load_file(zoo.WEIGHTS_DIR / zoo.manifest()[BUNDLED]["file"])
    assert_state(model, state)


@pytest.mark.parametrize("kwargs", [{"num_classes": 10}, {"num_classes": 0}, {"features_only": True}, {"in_chans": 1}])
def test_adapted_models_carry_the_bundled_backbone(offline, kwargs):
    model = timm.create_model("rotnet_nin", pretrained=True, **kwargs)
    state = load_file(zoo.WEIGHTS_DIR / zoo.manifest()[BUNDLED]["file"])
    loaded = {name.replace("blocks_block", "blocks.block"): tensor for name, tensor in model.state_dict().items()}
    backbone = [n for n in state if n.startswith("blocks.") and not ("in_chans" in kwargs and "block1.0.conv" in n)]
    assert backbone and all(torch.equal(loaded[name], state[name]) for name in backbone)
    if "in_chans" in kwargs:
        summed = state["blocks.block1.0.conv.weight"].sum(1, keepdim=True)
        torch.testing.assert_close(loaded["blocks.block1.0.conv.weight"], summed)


def test_golden_outputs_of_the_bundled_weights():
    golden = load_file(golden_file(BUNDLED))
    model = timm.create_model(BUNDLED, pretrained=True).eval()
    with torch.inference_mode():
        final, maps = model.forward_intermediates(golden["input"])
        torch.testing.assert_close(model.forward_head(final), golden["logits"], rtol=1e-3, atol=1e-3)
    for i, features in enumerate(maps, 1):
        torch.testing.assert_close(features.mean((2, 3)), golden[f"block{i}"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (corrupt, r"rotnet_nin\.cifar10 are corrupt: .* has sha256"),
        (truncate, r"are corrupt: .* bytes, not [\d,]+ as the manifest says"),
        (Path.unlink, r"are missing: .* does not exist"),
    ],
    ids=["one bit", "truncated", "missing"],
)
def test_a_damaged_wheel_is_noticed(weights_dir, damage, message):
    file = weights_dir / zoo.manifest()[BUNDLED]["file"]
    damage(file)
    with pytest.raises(ValueError, match=message):
        from_file(file)


def test_unknown_tag_lists_the_known():
    with pytest.raises(ValueError, match=r"no weights tagged 'nope'.*rotnet_nin\.cifar10"):
        timm.create_model("rotnet_nin.nope", pretrained=True)


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_models_without_weights_say_so(name):
    with pytest.raises(
        ValueError, match=rf"{name} has no pretrained weights: use pretrained=False; there are none of {name} yet"
    ):
        timm.create_model(name, pretrained=True)


def test_own_file_round_trip(nin_state, tmp_path):
    model = from_file(saved(nin_state, tmp_path / "mine.safetensors"))
    assert_state(model, nin_state)


def test_own_file_decides_the_classes(tmp_path):
    ten = timm.create_model("rotnet_nin", num_classes=10)
    file = saved(ten.state_dict(), tmp_path / "ten.safetensors")
    model = from_file(file)
    assert model.num_classes == 10 and torch.equal(model.head.fc.weight, ten.head.fc.weight)
    assert torch.equal(from_file(file, num_classes=10).head.fc.weight, ten.head.fc.weight)
    assert from_file(file, num_classes=3).head.fc.weight.shape == (3, 192)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_own_file_of_a_wrapped_model(nin_state, tmp_path, prefix):
    file = saved({f"{prefix}{name}": tensor for name, tensor in nin_state.items()}, tmp_path / "wrapped.safetensors")
    model = from_file(file)
    assert_state(model, nin_state)


def test_weights_in_memory_keep_their_head():
    ten = timm.create_model("rotnet_nin", num_classes=10).state_dict()
    overlay = {"state_dict": ten}
    model = timm.create_model("rotnet_nin", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10)
    assert torch.equal(model.head.fc.weight, ten["head.fc.weight"])
    with pytest.raises(ValueError, match="the state_dict given does not fit"):
        overlay = {"state_dict": {"wrong": torch.zeros(1)}}
        timm.create_model("rotnet_nin", pretrained=True, pretrained_cfg_overlay=overlay)


def test_own_file_without_head(nin_state, tmp_path):
    file = saved({n: t for n, t in nin_state.items() if not n.startswith("head.")}, tmp_path / "backbone.safetensors")
    assert from_file(file).num_classes == 0
    assert from_file(file, num_classes=5).num_classes == 5


def alexnet_state(fc_size):
    return timm.create_model("rotnet_alexnet", fc_size=fc_size).state_dict()


def alexnet_from(file, **kwargs):
    return timm.create_model("rotnet_alexnet", pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **kwargs)


def convolutions(state):
    return {name: tensor for name, tensor in state.items() if name.startswith("features.")}


def assert_convolutions(model, state):
    assert_state(convolutions(model.state_dict()), convolutions(state))


def test_the_default_alexnet_is_its_bundled_convolutions(offline):
    state = load_file(zoo.weights_file("rotnet_alexnet.photos"))
    assert sum(tensor.numel() for tensor in state.values()) < 2_500_000
    published = timm.create_model("rotnet_alexnet", pretrained=True)
    assert published.head.fc_size == 0 and published.pretrained_cfg["tag"] == "photos"
    assert_state(published, state)
    tuned = timm.create_model("rotnet_alexnet", pretrained=True, num_classes=20)
    assert tuned.get_classifier().weight.shape == (20, 256)
    assert_convolutions(tuned, state)
    with pytest.warns(UserWarning, match="fc6"):
        grown = timm.create_model("rotnet_alexnet", pretrained=True, num_classes=20, fc_size=32)
    assert grown.head.fc_size == 32
    assert_convolutions(grown, state)


def test_weights_without_fc_layers_give_a_network_without_them(tmp_path):
    state = alexnet_state(0)
    file = saved(state, tmp_path / "convolutions.safetensors")
    for overlay in ({"file": str(file)}, {"state_dict": state}):
        model = timm.create_model("rotnet_alexnet", pretrained=True, pretrained_cfg_overlay=overlay)
        assert_state(model, state)
        assert model.head_hidden_size == 256
        assert "tag" not in model.pretrained_cfg, "what the manifest says of photos is not said of them"
        assert calibration(model) == (128, 1.0, None)
    model = alexnet_from(file, num_classes=20)
    assert model.get_classifier().weight.shape == (20, 256)
    assert_convolutions(model, state)
    maps = alexnet_from(file, features_only=True)(torch.zeros(1, 3, 64, 64))
    assert len(maps) == 5


@pytest.mark.parametrize("classes", [4, 20, 0])
def test_fc_layers_that_the_weights_lack_are_new_and_said_so(tmp_path, classes):
    state = alexnet_state(0)
    file = saved(state, tmp_path / "convolutions.safetensors")
    with pytest.warns(UserWarning) as caught:
        torch.manual_seed(1)
        model = alexnet_from(file, fc_size=32, num_classes=classes)
    (warning,) = caught
    assert "convolutions.safetensors has no fc6 and fc7: they and the classifier are new" in str(warning.message)
    torch.manual_seed(1)
    fresh = timm.create_model("rotnet_alexnet", fc_size=32, num_classes=classes).state_dict()
    assert_convolutions(model, state)
    for name, tensor in model.state_dict().items():
        assert name.startswith("features.") or torch.equal(tensor, fresh[name]), name


@pytest.mark.parametrize("classes", [4, 20])
def test_fc_layers_can_be_left_out(tmp_path, classes):
    state = alexnet_state(32)
    file = saved(state, tmp_path / "whole.safetensors")
    with pytest.warns(UserWarning, match=r"fc6 and fc7 of .*whole.safetensors are left out: the classifier is new"):
        model = alexnet_from(file, fc_size=0, num_classes=classes)
    assert model.get_classifier().weight.shape == (classes, 256)
    assert_convolutions(model, state)
    assert alexnet_from(file, fc_size=0, num_classes=0).num_classes == 0, "nothing new: nothing to warn of"
    assert_state(alexnet_from(file, fc_size=32), state)


def test_one_of_the_fc_layers_alone_is_refused(tmp_path):
    state = {name: tensor for name, tensor in alexnet_state(32).items() if not name.startswith("head.fc7.")}
    with pytest.raises(ValueError, match=r"it lacks head\.fc7"):
        alexnet_from(saved(state, tmp_path / "half.safetensors"), fc_size=32)


@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 10}, {"features_only": True}])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {f"backbone.{key}": value for key, value in state.items()},
            r"lacks blocks.*has unknown backbone\.",
        ),
        (
            lambda state: {key: value for key, value in state.items() if key != STATISTIC},
            f"lacks {STATISTIC};",
        ),
        (lambda state: timm.create_model("rotnet_nin5").state_dict(), r"has unknown blocks\.block5"),
        (lambda state: state | {CONV: torch.zeros(192, 96, 3, 3)}, rf"{CONV} \(192, 96, 3, 3\) for \(192, 96, 5, 5\)"),
        (lambda state: state | {STATISTIC: torch.full((192,), float("nan"))}, f"not finite in {STATISTIC}"),
        (lambda state: state | {STATISTIC: torch.full((192,), float("inf"))}, f"not finite in {STATISTIC}"),
    ],
    ids=["renamed", "one missing", "another network", "another shape", "nan", "inf"],
)
def test_files_that_do_not_fit_are_refused_even_where_timm_is_lenient(nin_state, tmp_path, change, message, kwargs):
    with pytest.raises(ValueError, match=rf"mine\.safetensors does not fit RotNetNIN: .*{message}"):
        from_file(saved(change(nin_state), tmp_path / "mine.safetensors"), **kwargs)


@pytest.mark.parametrize("how", ["file", "state_dict"])
@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("head.fc.weight", lambda t: t.double() + 1e300, "not finite in head.fc.weight"),
        ("head.fc.weight", lambda t: t.to(torch.int8), r"types of head.fc.weight torch.int8 for torch.float32"),
        ("head.fc.bias", lambda t: t.bool(), r"types of head.fc.bias torch.bool for torch.float32"),
        ("head.fc.bias", lambda t: t.to(torch.complex64), r"types of head.fc.bias torch.complex64 for torch.float32"),
        ("head.fc.bias", lambda t: t.to(torch.float8_e4m3fn), r"types of head.fc.bias torch.float8_e4m3fn for"),
        ("blocks.block1.0.bn.num_batches_tracked", lambda t: t.float(), r"num_batches_tracked torch.float32 for"),
        ("head.fc.weight", lambda t: t.sum(), r"shapes of head.fc.weight \(\) for \(4, 192\)"),
        ("blocks.block1.0.conv.weight", lambda t: t[:, :0], r"\(192, 0, 5, 5\) for \(192, 3, 5, 5\)"),
        ("blocks.block1.0.conv.weight", lambda t: t[:, :1], r"\(192, 1, 5, 5\) for \(192, 3, 5, 5\)"),
        ("blocks.block1.0.conv.weight", lambda t: torch.cat([t, t, t[:, :1]], 1), r"\(192, 7, 5, 5\) for"),
        ("blocks.block1.0.conv.weight", lambda t: t.sum(), r"blocks.block1.0.conv.weight \(\) for"),
    ],
)
def test_tensors_that_would_not_be_what_they_were_are_refused(nin_state, tmp_path, how, key, change, message):
    nin_state[key] = change(nin_state[key]).contiguous()
    overlay = (
        {"state_dict": nin_state}
        if how == "state_dict"
        else {"file": str(saved(nin_state, tmp_path / "m.safetensors"))}
    )
    with pytest.raises(ValueError, match=message):
        timm.create_model("rotnet_nin", pretrained=True, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_are_taken(nin_state, tmp_path, dtype):
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in nin_state.items()}
    model = from_file(saved(state, tmp_path / "mine.safetensors"))
    own = model.state_dict()
    assert_state(own, {name: tensor.to(own[name].dtype) for name, tensor in state.items()})


@pytest.mark.parametrize("channels", [1, 7])
def test_weights_of_other_channels_come_back_as_they_were(tmp_path, channels):
    state = timm.create_model("rotnet_nin", in_chans=channels).state_dict()
    model = from_file(saved(state, tmp_path / "mine.safetensors"), in_chans=channels)
    assert_state(model, state)


def test_the_same_key_with_and_without_a_prefix_is_refused(nin_state, tmp_path):
    nin_state["module.head.fc.bias"] = torch.ones(4)
    with pytest.raises(ValueError, match=r"keys both with and without a prefix: module\.head\.fc\.bias"):
        from_file(saved(nin_state, tmp_path / "mine.safetensors"))


@pytest.mark.parametrize("given", [{}, {"epoch": 3}])
def test_a_state_dict_that_holds_no_tensors_is_refused(given):
    with pytest.raises(ValueError, match="the state_dict given must contain tensors, and nothing else"):
        timm.create_model("rotnet_nin", pretrained=True, pretrained_cfg_overlay={"state_dict": given})


def test_the_configuration_keeps_no_second_copy_of_the_weights(nin_state):
    overlay = {"state_dict": nin_state}
    for options in ({}, {"features_only": True}, {"features_only": True, "feature_cls": "getter"}):
        model = timm.create_model("rotnet_nin", pretrained=True, pretrained_cfg_overlay=overlay, **options)
        cfgs = [module.pretrained_cfg for module in model.modules() if hasattr(module, "pretrained_cfg")]
        assert cfgs and not any(cfg.get("state_dict") for cfg in cfgs)
        json.dumps(cfgs)


def test_a_folder_with_a_published_name_is_checked_as_any_other(nin_state, tmp_path, monkeypatch):
    nin_state["head.fc.bias"][0] = float("nan")
    write_folder(Converted("rotnet_nin", 4, nin_state, "somebody"), tmp_path / BUNDLED, "mine", {})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"not finite in head\.fc\.bias"):
        timm.create_model(f"local-dir:{BUNDLED}", pretrained=True)


def test_weights_of_ones_own_under_a_published_tag_have_no_published_calibration(tmp_path):
    """A threshold that was fitted for other weights would rotate pictures that it is not sure of."""
    state = {name: tensor.contiguous() for name, tensor in timm.create_model("rotnet_alexnet").state_dict().items()}
    write_folder(Converted("rotnet_alexnet", 4, state, "somebody"), tmp_path / "mine", "photos", {})
    mine = timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True)
    assert mine.pretrained_cfg["tag"] == "photos" and not zoo.published_entry(mine)
    assert calibration(mine) == (224, 1.0, None)
    published = timm.create_model("rotnet_alexnet.photos", pretrained=True)
    assert zoo.published_entry(published) == zoo.manifest()["rotnet_alexnet.photos"]
    assert calibration(published).threshold is not None


def test_the_manifest_recommends_a_layer_before_the_paper(set_manifest):
    entries = zoo.manifest()
    set_manifest({**entries, BUNDLED: {**entries[BUNDLED], "recommended_layer": "block3"}})
    assert recommended_layer(timm.create_model(BUNDLED, pretrained=True), BUNDLED) == "block3"


def test_a_published_hash_is_not_replaced():
    with pytest.raises(ValueError, match=r"hash of rotnet_nin\.cifar10 is published .* no new one to accept"):
        zoo.weights_file(BUNDLED, accept_new_hash=True)


@pytest.fixture
def manifest_file(weights_dir):
    zoo.manifest.cache_clear()
    yield weights_dir / "manifest.json"
    zoo.manifest.cache_clear()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "Expecting property name"),
        (b"\xff", "can't decode byte"),
        (b"[" * 100_000, "recursion"),
        (b"[]", "items"),
        (b'{"a.b": {"source": "ftp"}}', "'ftp'"),
        (b'{"a.b": {"source": "bundled", "file": "x"}}', "a.b lacks sha256, size, license"),
    ],
)
def test_a_damaged_manifest_is_named(manifest_file, content, message):
    manifest_file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"manifest\.json is not a manifest of weights \(.*{message}.*reinstall"):
        zoo.manifest()
    manifest_file.unlink()
    with pytest.raises(ValueError, match=r"manifest\.json is not a manifest of weights \(.*No such file"):
        zoo.manifest()


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:1000], lambda content: content.replace(b"block2", b"block9"), lambda content: b""],
)
def test_damaged_golden_outputs_are_named(weights_dir, damage):
    file = weights_dir / f"{BUNDLED}.golden.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"the golden outputs of {BUNDLED} are corrupt: .*reinstall"):
        golden_difference(BUNDLED)


def test_truncated_own_file_is_refused(nin_state, tmp_path):
    file = saved(nin_state, tmp_path / "mine.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        from_file(file)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_a_pickle_is_refused_unopened(tmp_path):
    for name, message in (
        ("mine.pth", "not a .safetensors file"),
        ("mine.safetensors", "not a whole safetensors file"),
    ):
        torch.save({"state_dict": Trap()}, tmp_path / name)
        with pytest.raises(ValueError, match=message):
            from_file(tmp_path / name)


def test_missing_own_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.safetensors does not exist"):
        from_file(tmp_path / "nowhere.safetensors")


def test_local_folder(nin_state, tmp_path):
    saved(nin_state, tmp_path / "model.safetensors")
    config = {"architecture": "rotnet_nin", "pretrained_cfg": {"num_classes": 4, "classifier": "head.fc"}}
    config["pretrained_cfg"] |= {"first_conv": "blocks.block1.0.conv", "input_size": [3, 32, 32]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert_state(model, nin_state)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    nin_state["extra.weight"] = torch.zeros(1)
    saved(nin_state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has unknown extra\.weight"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys, hatchling.build; print(hatchling.build.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"rotation_ssl"}
    for expected in ("weights/manifest.json", f"weights/{BUNDLED}.safetensors", "py.typed", "samples/LICENSES.md"):
        assert f"rotation_ssl/{expected}" in names


def test_the_wheel_loads_its_weights_without_network(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise SystemExit('the network was used')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import timm, rotation_ssl\n"
        "timm.create_model('rotnet_nin', pretrained=True)\n"
        "print(rotation_ssl.__file__)\n"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert str(tmp_path) in result.stdout


def test_layers_that_weights_lack_are_lacking_in_what_timm_writes(tmp_path):
    """Folders and repositories without model.safetensors are loaded by timm, which builds what config.json says."""
    model = timm.create_model("rotnet_alexnet", pretrained=True, num_classes=20).eval()
    save_for_hf(model, tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == []
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert_state(again, model.state_dict())
