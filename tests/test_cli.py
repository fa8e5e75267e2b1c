"""The command line: what it prints for people and for programs, its exit status, and what it refuses."""

import json
import shutil
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from conftest import DATA, ROOT, SAMPLES, published_manifest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rotation_ssl import cli, golden, sources, zoo
from rotation_ssl.features import extract_features
from rotation_ssl.images import normalize, read_images

NAME = "rotnet_nin.cifar10"
RELEASED = "rotnet_nin.gidaris_cifar10"
ARCHIVE = DATA / "CIFAR10_RotNet_NIN4blocks.tar.gz"


@pytest.fixture
def run(capsys):
    """Run the command: its exit status, and what it printed, read as JSON where that was asked for."""

    def call(*arguments):
        status = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        if status == 2:
            error = captured.err.splitlines()[-1]  # after a progress bar, where there is one
            assert error.startswith("error: ") and captured.err.count("error: ") == 1
            return status, error
        return status, json.loads(captured.out) if "--json" in arguments else captured.out

    return call


@pytest.fixture
def released(hub, set_manifest, tmp_path):
    """The release is a file of the tests."""
    entries = published_manifest()
    folder = tmp_path / "release"
    folder.mkdir()
    shutil.copyfile(ARCHIVE, folder / ARCHIVE.name)
    for name in (RELEASED, "rotnet_alexnet.gidaris_in1k"):
        entries[name]["url"] = (folder / ARCHIVE.name).as_uri()
    set_manifest(entries)
    return folder / ARCHIVE.name


def test_list(run, released):
    status, text = run("list")
    assert status == 0 and len(text.splitlines()) == len(published_manifest())
    accuracy = published_manifest()[NAME]["metrics"]["rotation accuracy"]
    assert f"rotation accuracy {100 * accuracy:.2f} %" in text and "in the package" in text and "not here" in text
    listed = run("list", "--json")[1]
    assert {entry["name"] for entry in listed} == set(published_manifest())
    assert [bool(entry["here"]) for entry in listed] == [entry["source"] == "bundled" for entry in listed]


def test_info(run, released):
    text = run("info", NAME)[1]
    entry = published_manifest()[NAME]
    for value in (entry["sha256"], entry["license"], entry["recipe"], entry["data"], "block2", "k-NN block1"):
        assert value in text
    assert run("info", NAME, "--json")[1] == {"name": NAME, **entry, "here": str(zoo.cached_file(NAME))}
    assert "seed: 0\n" in text
    assert "archive_sha256: not known" in run("info", RELEASED)[1]
    status, error = run("info", "rotnet_nin.nope")
    assert status == 2 and "rotnet_nin.nope" in error and NAME in error


def test_fetch_then_verify_offline(run, released, go_offline):
    with pytest.warns(UserWarning, match="no published hash"):
        status, result = run("fetch", RELEASED, "--json")
    assert status == 0 and sources.sha256_of(zoo.cached_file(RELEASED)) == result["sha256"]
    go_offline()
    assert run("fetch", RELEASED, "--json")[1] == result
    assert run("info", RELEASED, "--json")[1]["fetched"]["sha256"] == result["sha256"]
    status, told = run("verify", RELEASED)
    assert status == 0 and told.startswith(f"holds    {RELEASED}: sha256 as recorded")
    status, error = run("fetch", "rotnet_alexnet.gidaris_in1k")
    assert status == 2 and "not cached" in error and "rotation-ssl fetch rotnet_alexnet.gidaris_in1k" in error


def test_accepting_a_new_hash(run, released):
    with pytest.warns(UserWarning, match="no published hash"):
        run("fetch", RELEASED)
    released.write_bytes(released.read_bytes() + b"\0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run("fetch", RELEASED, "--accept-new-hash")[0] == 0
    assert run("info", RELEASED, "--json")[1]["fetched"]["archive_sha256"] == sources.sha256_of(released)


def test_verify_everything(run, released):
    status, results = run("verify", "--json")
    assert status == 0
    verdicts = {result["name"]: result["holds"] for result in results}
    assert verdicts == {name: entry["source"] == "bundled" or None for name, entry in published_manifest().items()}
    assert "golden outputs differ by" in results[0]["why"]


def test_verify_notices_other_bytes_and_other_outputs(run, monkeypatch, tmp_path, set_manifest):
    shutil.copytree(zoo.WEIGHTS_DIR, tmp_path / "weights")
    monkeypatch.setattr(zoo, "WEIGHTS_DIR", tmp_path / "weights")
    set_manifest(published_manifest())
    stored = load_file(golden.golden_file(NAME))
    save_file(stored | {"logits": stored["logits"] + 0.01}, golden.golden_file(NAME))
    status, told = run("verify", NAME)
    assert status == 1 and told.startswith("BROKEN") and "golden outputs differ by 1.0e-02" in told
    file = tmp_path / "weights" / f"{NAME}.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    status, told = run("verify", NAME)
    assert status == 1 and "has sha256" in told
    file.unlink()
    assert run("verify", NAME)[0] == 1


def test_verify_a_file(run, tmp_path, nin_state):
    file = shutil.copyfile(zoo.cached_file(NAME), tmp_path / "some.safetensors")
    status, told = run("verify", file)
    assert status == 0 and told.startswith(f"holds    {NAME}: sha256")
    save_file(nin_state, tmp_path / "mine.safetensors")
    assert run("verify", tmp_path / "mine.safetensors", "--json")[1][0]["holds"] is None
    torch.save({"network": nin_state, "epoch": 7}, tmp_path / "model_net_epoch7")
    assert "not published" in run("verify", tmp_path / "model_net_epoch7")[1]
    torch.save([1, 2], tmp_path / "numbers.pth")
    assert "holds no tensors" in run("verify", tmp_path / "numbers.pth")[1]
    nin_state["head.fc.bias"][0] = float("nan")
    save_file(nin_state, tmp_path / "mine.safetensors")
    assert "not finite in head.fc.bias" in run("verify", tmp_path / "mine.safetensors")[1]
    status, error = run("verify", "nowhere")
    assert status == 2 and "nowhere is neither published weights" in error


def test_convert_then_load_and_verify(run, tmp_path):
    status, result = run("convert", ARCHIVE, "-o", tmp_path / "theirs", "--json")
    assert status == 0 and (result["model"], result["num_classes"]) == ("rotnet_nin", 4)
    model = timm.create_model(f"local-dir:{tmp_path / 'theirs'}", pretrained=True)
    assert model.num_classes == 4 and model.pretrained_cfg["tag"] == "gidaris"
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["provenance"]["file_sha256"] == sources.sha256_of(ARCHIVE)
    assert config["pretrained_cfg"]["license"] == "mit", "the authors' own licence"
    assert run("verify", tmp_path / "theirs")[0] == 0
    file = tmp_path / "theirs" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert run("verify", tmp_path / "theirs")[0] == 1
    status, error = run("convert", ARCHIVE, "-o", tmp_path / "theirs")
    assert status == 2 and "is not an empty folder" in error
    assert "local-dir:" in run("convert", ARCHIVE, "-o", tmp_path / "again")[1]
    assert "has no checkpoint of epoch 7" in run("convert", ARCHIVE, "-o", tmp_path / "x", "--epoch", 7)[1]
    assert not (tmp_path / "x").exists()


def test_convert_says_nothing_that_nobody_said(run, tmp_path):
    """timm's defaults of an architecture are of other weights: their licence, origin and test size."""
    torch.save(timm.create_model("resnet34", num_classes=4).state_dict(), tmp_path / "some.pth")
    assert run("convert", tmp_path / "some.pth", "-o", tmp_path / "theirs", "--json")[1]["model"] == "resnet34"
    cfg = json.loads((tmp_path / "theirs" / "config.json").read_text())["pretrained_cfg"]
    assert {cfg.get(key) for key in ("license", "origin_url", "paper_ids", "test_input_size")} == {None}
    assert (cfg["tag"], cfg["crop_pct"]) == ("torchvision", 0.875)
    assert timm.create_model(f"local-dir:{tmp_path / 'theirs'}", pretrained=True).num_classes == 4


def test_features_of_a_folder(run, tmp_path):
    files = sorted((SAMPLES / "cifar10").rglob("*.png"))
    status, result = run("features", SAMPLES / "cifar10", "-o", tmp_path / "f.safetensors", "--batch-size", 7, "--json")
    assert status == 0 and result["shapes"] == {"block2": [len(files), 192]} and result["model"] == NAME
    with safe_open(tmp_path / "f.safetensors", "pt") as stored:
        assert json.loads(stored.metadata()["files"]) == [file.name for file in files]
        features = stored.get_tensor("block2")
    model = timm.create_model("rotnet_nin", pretrained=True)
    cfg = model.pretrained_cfg
    batch = normalize(read_images(files, 32), cfg["mean"], cfg["std"])
    torch.testing.assert_close(features, extract_features(model, batch, ["block2"])["block2"], rtol=1e-4, atol=1e-5)


def test_features_of_other_layers_and_pools(run, tmp_path):
    options = ("--layers", "block1", "block4", "--pool", "max", "--grid", 2, "--json")
    result = run("features", SAMPLES / "cifar10", "-o", tmp_path / "f.safetensors", *options)[1]
    assert {layer: shape[1] for layer, shape in result["shapes"].items()} == {"block1": 384, "block4": 768}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", "conv9"), "no layer conv9"),
        (("--model", "rotnet_nope"), "no model 'rotnet_nope'"),
        (("--model", "rotnet_nin5"), "rotnet_nin5 has no pretrained weights"),
        (("--device", "nowhere"), "device 'nowhere' cannot be used"),
    ],
)
def test_features_refuses(run, tmp_path, options, message):
    status, error = run("features", SAMPLES / "cifar10", "-o", tmp_path / "f.safetensors", *options)
    assert status == 2 and message in error and not (tmp_path / "f.safetensors").exists()


def test_features_names_the_broken_image_and_keeps_what_was_there(run, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "half.png").write_bytes((SAMPLES / "cifar10" / "cat_00000.png").read_bytes()[:100])
    (tmp_path / "f.safetensors").write_bytes(b"of yesterday")
    status, error = run("features", tmp_path / "images", "-o", tmp_path / "f.safetensors")
    assert status == 2 and "half.png does not decode" in error
    assert (tmp_path / "f.safetensors").read_bytes() == b"of yesterday"
    status, error = run("features", SAMPLES / "cifar10", "-o", tmp_path / "nowhere" / "f.safetensors")
    assert status == 2 and "nowhere is not a folder" in error
    (tmp_path / "images" / "half.png").unlink()
    assert "holds no images" in run("features", tmp_path / "images", "-o", tmp_path / "f.safetensors")[1]


def test_help_is_worth_reading(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for command in ("list", "info", "fetch", "verify", "convert", "features"):
        assert f"rotation-ssl {command}" in text
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, "--help"])
        assert "--json" in capsys.readouterr().out


def test_the_installed_command_runs():
    command = [sys.executable, "-m", "rotation_ssl.cli", "verify", NAME]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stdout.startswith("holds"), result.stderr
    assert 'rotation-ssl = "rotation_ssl.cli:main"' in (ROOT / "pyproject.toml").read_text()
