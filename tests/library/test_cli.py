"""The command line: what it prints for people and for programs, its exit status, and what it refuses."""

import csv
import errno
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import timm
import torch
from conftest import ARCHIVE, ROOT, SAMPLES, corrupt, published_manifest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rotation_ssl
from rotation_ssl import cli, zoo
from rotation_ssl.cli import features
from rotation_ssl.features import extract_features
from rotation_ssl.files import sha256_of
from rotation_ssl.images import normalize, read_images
from rotation_ssl.zoo import golden

NAME = "rotnet_nin.cifar10"
RELEASED = "rotnet_nin.gidaris_cifar10"


@pytest.fixture
def run(capsys):
    """Run the command: its exit status, and what it printed, read as JSON where that was asked for."""

    def call(*arguments):
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as refused:  # of arguments
            status = refused.code
        captured = capsys.readouterr()
        if status == 2:
            error = captured.err.splitlines()[-1]  # after a progress bar, where there is one
            assert error.startswith("error: ") and captured.err.count("error: ") == 1
            return status, error
        return status, json.loads(captured.out) if "--json" in arguments else captured.out

    return call


@pytest.fixture
def released(hub, release, set_manifest):
    """The release is a file of the tests, on loopback."""
    entries = published_manifest()
    for name in (RELEASED, "rotnet_alexnet.gidaris_in1k"):
        entries[name]["url"] = f"{release.url}/{ARCHIVE.name}"
    set_manifest(entries)
    return release.folder / ARCHIVE.name


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
    assert "rotnet_alexnet" not in error, "only those of the network"
    assert "rotnet_alexnet.photos" in run("info", "nothing")[1]


def test_a_models_name_means_its_default_tag(run, released, tmp_path, monkeypatch):
    assert run("info", "rotnet_nin", "--json")[1]["name"] == NAME
    assert run("info", "rotnet_alexnet", "--json")[1]["name"] == "rotnet_alexnet.photos"
    assert run("fetch", "rotnet_nin", "--json")[1] == run("fetch", NAME, "--json")[1]
    assert run("verify", "rotnet_nin", "--json") == run("verify", NAME, "--json")
    status, error = run("info", "rotnet_resnet18")
    assert status == 2 and "no published weights 'rotnet_resnet18'" in error
    # a folder of that name is what is meant
    monkeypatch.chdir(tmp_path)
    run("convert", ARCHIVE, "-o", "rotnet_nin")
    assert run("verify", "rotnet_nin", "--json")[1][0]["file"] == "rotnet_nin/model.safetensors"


def test_fetch_then_verify_offline(run, released, go_offline):
    with pytest.warns(UserWarning, match="no published hash"):
        status, result = run("fetch", RELEASED, "--json")
    assert status == 0 and sha256_of(zoo.cached_file(RELEASED)) == result["sha256"]
    go_offline()
    assert run("fetch", RELEASED, "--json")[1] == result
    assert run("info", RELEASED, "--json")[1]["fetched"]["sha256"] == result["sha256"]
    status, told = run("verify", RELEASED)
    assert status == 0 and told.startswith(f"holds    {RELEASED}: sha256 as recorded")
    status, told = run("verify", "rotnet_alexnet.gidaris_in1k")
    assert status == 1 and told.startswith("unknown  rotnet_alexnet.gidaris_in1k: not here")
    status, error = run("fetch", "rotnet_alexnet.gidaris_in1k")
    assert status == 2 and "not cached" in error and "rotation-ssl fetch rotnet_alexnet.gidaris_in1k" in error


def test_accepting_a_new_hash(run, released):
    with pytest.warns(UserWarning, match="no published hash"):
        run("fetch", RELEASED)
    released.write_bytes(released.read_bytes() + b"\0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run("fetch", RELEASED, "--accept-new-hash")[0] == 0
    assert run("info", RELEASED, "--json")[1]["fetched"]["archive_sha256"] == sha256_of(released)


def test_verify_everything(run, released):
    status, results = run("verify", "--json")
    assert status == 0
    verdicts = {result["name"]: result["holds"] for result in results}
    assert verdicts == {name: entry["source"] == "bundled" or None for name, entry in published_manifest().items()}
    assert "golden outputs differ by" in results[0]["why"]


def test_verify_notices_other_bytes_and_other_outputs(run, weights_dir, set_manifest):
    set_manifest(published_manifest())
    stored = load_file(golden.golden_file(NAME))
    save_file(stored | {"logits": stored["logits"] + 0.01}, golden.golden_file(NAME))
    status, told = run("verify", NAME)
    assert status == 1 and told.startswith("BROKEN") and "golden outputs differ by 1.0e-02" in told
    golden.golden_file(NAME).write_bytes(b"corrupt")
    status, results = run("verify", "--json")
    assert status == 1 and len(results) == len(zoo.manifest()), "one that does not hold hides no other"
    (why,) = [result["why"] for result in results if result["name"] == NAME]
    assert why.startswith(f"the golden outputs of {NAME} are corrupt")
    file = weights_dir / f"{NAME}.safetensors"
    corrupt(file)
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
    assert "contains no tensors" in run("verify", tmp_path / "numbers.pth")[1]
    itself = [torch.ones(1)]
    itself.append(itself)
    torch.save(itself, tmp_path / "itself.pth")
    assert "not published" in run("verify", tmp_path / "itself.pth")[1]
    nin_state["head.fc.bias"][0] = float("nan")
    save_file(nin_state, tmp_path / "mine.safetensors")
    assert "not finite in head.fc.bias" in run("verify", tmp_path / "mine.safetensors")[1]
    nin_state["head.fc.bias"] = torch.zeros(4).to(torch.float8_e4m3fn)
    save_file(nin_state, tmp_path / "mine.safetensors")
    assert run("verify", tmp_path / "mine.safetensors", "--json")[1][0]["holds"] is None
    status, error = run("verify", "nowhere")
    assert status == 2 and "no file nowhere, and no published weights 'nowhere'" in error


def test_verify_bounds_the_size_of_foreign_files_alone(run, tmp_path, monkeypatch):
    run("convert", ARCHIVE, "-o", tmp_path / "own")
    file = tmp_path / "own" / "model.safetensors"
    size = file.stat().st_size
    monkeypatch.setattr("rotation_ssl.cli.verify.MAX_BYTES", size - 1)
    status, told = run("verify", tmp_path / "own")
    assert status == 0 and "as its config.json says" in told
    status, error = run("verify", file)
    assert status == 2 and f"has {size:,} bytes, more than the {size - 1:,} allowed" in error
    # a small file may unpack to any size, whatever config.json says of it
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", bytes(10 * size))
    config = tmp_path / "own" / "config.json"
    config.write_text(json.dumps({"sha256": sha256_of(file)}))
    status, error = run("verify", tmp_path / "own")
    assert status == 2 and f"unpacks to {10 * size:,} bytes" in error


def test_convert_then_load_and_verify(run, tmp_path):
    status, result = run("convert", ARCHIVE, "-o", tmp_path / "theirs", "--json")
    assert status == 0 and (result["model"], result["num_classes"]) == ("rotnet_nin", 4)
    model = timm.create_model(f"local-dir:{tmp_path / 'theirs'}", pretrained=True)
    assert model.num_classes == 4 and model.pretrained_cfg["tag"] == "gidaris"
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["provenance"]["file_sha256"] == sha256_of(ARCHIVE)
    assert config["pretrained_cfg"]["license"] == "mit", "the authors' own licence"
    assert run("verify", tmp_path / "theirs")[0] == 0
    corrupt(tmp_path / "theirs" / "model.safetensors")
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
    photos = "rotnet_alexnet.photos"
    assert status == 0 and result["shapes"] == {"conv4": [len(files), 256]} and result["model"] == photos
    with safe_open(tmp_path / "f.safetensors", "pt") as stored:
        assert json.loads(stored.metadata()["files"]) == [file.name for file in files]
        features = stored.get_tensor("conv4")
    model = timm.create_model(photos, pretrained=True)
    cfg = model.pretrained_cfg
    batch = normalize(read_images(files, 128), cfg["mean"], cfg["std"])
    torch.testing.assert_close(features, extract_features(model, batch, ["conv4"])["conv4"], rtol=1e-4, atol=1e-5)


def test_features_of_other_layers_and_pools(run, tmp_path):
    options = ("--model", "rotnet_nin", "--layers", "block1", "block4", "--pool", "max", "--grid", 2, "--json")
    result = run("features", SAMPLES / "cifar10", "-o", tmp_path / "f.safetensors", *options)[1]
    assert {layer: shape[1] for layer, shape in result["shapes"].items()} == {"block1": 384, "block4": 768}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", "conv9"), "no layer conv9"),
        (("--model", "rotnet_nope"), "no model 'rotnet_nope'"),
        (("--model", ""), "no model ''"),
        (("--model",), "argument --model: expected one argument"),
        (("--model", "local-dir:/nowhere"), "nowhere has no config.json: it is neither a finished run"),
        (("--model", "rotnet_nin5"), "rotnet_nin5 has no pretrained weights"),
        (("--device", "nowhere"), "device 'nowhere' cannot be used"),
        (("--device", "meta"), "device 'meta' cannot be used (Cannot copy out of meta tensor; no data!)"),
        (("--pool", "flatten", "--grid", "3"), "grid is for pool='avg' and pool='max', not for pool='flatten'"),
        (("--grid", "-3"), "argument --grid: must be a whole number of at least 1, got -3"),
        (("--batch-size", "0"), "argument --batch-size: must be a whole number of at least 1, got 0"),
        (("--batch-size", "many"), "argument --batch-size: must be a whole number of at least 1, got many"),
        (("--format", "npz"), "f.safetensors does not end in .npz, as --format says"),
    ],
)
def test_features_refuses(run, tmp_path, options, message):
    status, error = run("features", SAMPLES / "cifar10", "-o", tmp_path / "f.safetensors", *options)
    assert status == 2 and message in error and not (tmp_path / "f.safetensors").exists()


def test_a_folder_of_weights_needs_its_prefix(run, tmp_path, monkeypatch):
    (tmp_path / "out" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    status, error = run("features", SAMPLES / "cifar10", "-o", "f.npz", "--model", "out/mine")
    assert status == 2 and error.startswith("error: no model 'out/mine'; there are rotnet_alexnet, ")
    assert error.endswith(", and timm's; did you mean local-dir:out/mine?")
    assert "did you mean" not in run("features", SAMPLES / "cifar10", "-o", "f.npz", "--model", "out/gone")[1]


@pytest.mark.parametrize(
    ("config", "cut"), [(None, 1000), ("[]", 0), ('{"num_classes": 4}', 0), ('{"architecture": 3}', 0)]
)
def test_features_with_a_damaged_folder_of_weights(run, tmp_path, config, cut):
    folder = tmp_path / "mine"
    folder.mkdir()
    save_file(timm.create_model("test_resnet").state_dict(), folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) - cut])
    (folder / "config.json").write_text(config or '{"architecture": "test_resnet", "num_classes": 1000}')
    options = ("--model", f"local-dir:{folder}", "--layers", "layer2")
    status, error = run("features", SAMPLES / "cifar10", "-o", tmp_path / "f.npz", *options)
    assert status == 2 and error.startswith(f"error: local-dir:{folder} could not be loaded (")
    assert "\n" not in error


@pytest.fixture
def images(tmp_path):
    """Two good images, a broken one between them, one that leads nowhere, and what is no image."""
    folder = tmp_path / "images"
    (folder / "in").mkdir(parents=True)
    shutil.copyfile(SAMPLES / "cifar10" / "cat_00000.png", folder / "a.png")
    shutil.copyfile(SAMPLES / "cifar10" / "dog_00012.png", folder / "in" / "c, d.png")
    (folder / "b.png").write_bytes((SAMPLES / "cifar10" / "cat_00000.png").read_bytes()[:100])
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    for name in ("1.gif", "2.gif", "notes.txt"):
        (folder / name).touch()
    os.mkfifo(folder / "pipe.png")
    return folder


GOOD = ["a.png", "in/c, d.png"]


def test_broken_images_are_skipped_and_named(run, images, tmp_path):
    status, text = run("features", images, "-o", tmp_path / "f.safetensors", "--batch-size", 1)
    assert status == 1
    result, not_read, broken = text.splitlines()
    assert "conv4 (2, 256) of 2 images" in result
    assert not_read == "not read: 2 .gif files, 1 .png file (not regular), 1 .txt file"
    assert broken == "skipped 2 broken images: b.png, gone.jpg"
    with safe_open(tmp_path / "f.safetensors", "pt") as stored:
        assert json.loads(stored.metadata()["files"]) == GOOD
        features = stored.get_tensor("conv4")
    for file in ("b.png", "gone.jpg"):
        (images / file).unlink()
    status, result = run("features", images, "-o", tmp_path / "g.safetensors", "--json")
    assert status == 0 and result["broken"] == {}
    assert result["not_read"] == {".gif": 2, ".txt": 1, ".png": 1}
    torch.testing.assert_close(load_file(tmp_path / "g.safetensors")["conv4"], features)


def test_names_do_not_command_the_terminal(run, images, tmp_path):
    (images / "b.png").rename(images / "\x1b[2J.png")
    (images / "gone.jpg").rename(images / os.fsdecode(b"\xff.jpg"))
    status, text = run("features", images, "-o", tmp_path / "f.csv")
    assert status == 1 and "\x1b" not in text and "skipped 2 broken images: '\\x1b[2J.png', '\\udcff.jpg'" in text


def test_names_that_are_no_text_are_written_as_text(run, images, tmp_path):
    (images / "in" / "c, d.png").rename(images / "in" / os.fsdecode(b"c, \xe9\xc3\xa9.png"))
    assert run("features", images, "-o", tmp_path / "f.csv")[0] == 1
    with (tmp_path / "f.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["file"] for row in rows] == ["a.png", "in/c, \\xe9\u00e9.png"] and float(rows[1]["conv4_255"]) >= 0


def test_strict_takes_no_broken_image(run, images, tmp_path):
    status, error = run("features", images, "-o", tmp_path / "f.safetensors", "--strict")
    assert status == 2 and "b.png does not decode" in error and not (tmp_path / "f.safetensors").exists()
    for file in GOOD:
        (images / file).unlink()
    status, error = run("features", images, "-o", tmp_path / "f.safetensors")
    assert status == 2 and "none of the 2 images can be read" in error and "b.png does not decode" in error
    assert not (tmp_path / "f.safetensors").exists()


def test_formats_hold_the_same(run, images, tmp_path):
    options = ("--model", "rotnet_nin", "--layers", "block1", "block4", "--grid", 2)
    for suffix in ("safetensors", "npz", "csv"):
        assert run("features", images, "-o", tmp_path / f"f.{suffix}", "--format", suffix, *options)[0] == 1
        assert run("features", images, "-o", tmp_path / f"g.{suffix}", *options)[0] == 1
        assert (tmp_path / f"f.{suffix}").stat().st_size == (tmp_path / f"g.{suffix}").stat().st_size
    expected = {layer: tensor.numpy() for layer, tensor in load_file(tmp_path / "f.safetensors").items()}
    with np.load(tmp_path / "f.npz") as stored:
        assert stored["files"].tolist() == GOOD and set(stored) == {"files", "block1", "block4"}
        assert all(np.array_equal(stored[layer], array) for layer, array in expected.items())
    with (tmp_path / "f.csv").open(newline="") as stream:
        columns, *rows = csv.reader(stream)
    assert columns == ["file", *(f"block1_{i}" for i in range(384)), *(f"block4_{i}" for i in range(768))]
    assert [row[0] for row in rows] == GOOD
    values = np.array([row[1:] for row in rows]).astype(np.float32)
    assert np.array_equal(values, np.concatenate([expected["block1"], expected["block4"]], axis=1)), "digit for digit"


def test_outputs_that_nobody_wants_to_lose(run, images, tmp_path, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: pytest.fail("checked before the work"))
    (tmp_path / "kept.csv").write_text("of yesterday")
    (tmp_path / "image.csv").symlink_to(images / "a.png")
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "closed")
    refusals = {
        "image.csv": "is one of the images",
        "images/a.png": "is one of the images",
        "folder.csv": "exists and is not a regular file",
        "pipe.csv": "exists and is not a regular file",
        "no.suffix": "ends in none of .safetensors, .npz, .csv",
        "nowhere/f.csv": "nowhere is not a folder",
        "closed/f.csv": "closed is not writable",
    }
    for name, message in refusals.items():
        for force in ((), ("--force",)):
            status, error = run("features", images, "-o", tmp_path / name, *force)
            assert status == 2 and message in error
    status, error = run("features", images, "-o", tmp_path / "kept.csv")
    assert status == 2 and "kept.csv exists; give another name, or --force" in error
    assert (tmp_path / "kept.csv").read_text() == "of yesterday"
    assert "is not a regular file" in run("features", images, "-o", "/dev/null")[1]


def test_force_replaces_a_file(run, images, tmp_path):
    (tmp_path / "kept.csv").write_text("of yesterday")
    assert run("features", images, "-o", tmp_path / "kept.csv", "--force")[0] == 1
    assert (tmp_path / "kept.csv").read_text().startswith("file,conv4_0,")


def test_folders_that_are_none(run, tmp_path):
    (tmp_path / "images").mkdir()
    assert "holds no images" in run("features", tmp_path / "images", "-o", tmp_path / "f.safetensors")[1]
    status, error = run("features", SAMPLES / "cifar10" / "cat_00000.png", "-o", tmp_path / "f.safetensors")
    assert status == 2 and "cat_00000.png is not a folder; give the folder that holds the images" in error


def test_converted_weights_have_the_layer_of_their_architecture(run, images, tmp_path):
    run("convert", ARCHIVE, "-o", tmp_path / "theirs")
    output = ("-o", tmp_path / "f.safetensors", "--json")
    result = run("features", images, *output, "--model", f"local-dir:{tmp_path / 'theirs'}")[1]
    assert list(result["shapes"]) == [published_manifest()[RELEASED]["recommended_layer"]]
    assert result["model"] == f"local-dir:{tmp_path / 'theirs'}"
    torch.save(timm.create_model("resnet34", num_classes=4).state_dict(), tmp_path / "some.pth")
    run("convert", tmp_path / "some.pth", "-o", tmp_path / "others")
    status, error = run("features", images, *output, "--force", "--model", f"local-dir:{tmp_path / 'others'}")
    assert status == 2 and "no recommended layer: choose --layers from act1, layer1, layer2, layer3, layer4" in error


def test_an_interrupt_is_one_line(monkeypatch, images, tmp_path, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(features, "read_images", interrupt)
    assert cli.main(["features", str(images), "-o", str(tmp_path / "f.csv")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert [file.name for file in tmp_path.iterdir()] == ["images"]


def test_too_little_memory_is_one_line(monkeypatch, capsys):
    for command, arguments, advice in (
        (cli.list, ["list"], ")\n"),
        (features, ["features", "images", "-o", "f.csv"], "); give a smaller --batch-size\n"),
        (cli.evaluate, ["evaluate", "resnet18", "--data", "d", "--output", "o"], "); give a smaller --size\n"),
    ):
        monkeypatch.setattr(command, "run", lambda args: torch.empty(2**60, dtype=torch.uint8))
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: not enough memory (") and error.count("\n") == 1 and error.endswith(advice)
    monkeypatch.setattr(cli.list, "run", lambda args: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        cli.main(["list"])


def test_a_lost_connection_is_one_line(monkeypatch, images, tmp_path, capsys):
    """The client of the Hub lets errors of its HTTP library through."""
    lost = type("ReadError", (Exception,), {"__module__": "httpx2._exceptions"})

    def lose(*args, **options):
        raise lost("connection reset by peer")

    monkeypatch.setattr(timm, "create_model", lose)
    pretrain = ["pretrain", "--data", str(images), "--output", str(tmp_path / "run"), "--model", "resnet18"]
    for arguments in (["features", str(images), "-o", str(tmp_path / "f.csv"), "--model", "resnet18"], pretrain):
        assert cli.main([*arguments, "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and "(connection reset by peer)" in error


def test_help_is_worth_reading(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert len(cli.COMMANDS) == 11
    for command in cli.COMMANDS:
        name = command.__name__.rpartition(".")[2]
        assert re.search(rf"^    rotation-ssl {name} ", text, re.MULTILINE)
        with pytest.raises(SystemExit, match="0"):
            cli.main([name, "--help"])
        told = capsys.readouterr().out
        assert told.startswith(f"usage: rotation-ssl {name} ")
        # the result of the others is what they write
        printed = name not in ("outliers", "evaluate", "pretrain")
        assert bool(re.search(r"^  --json ", told, re.MULTILINE)) == printed


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"rotation_ssl {rotation_ssl.__version__}\n"


def test_converted_weights_have_the_tag_that_is_given(run, tmp_path):
    assert run("convert", ARCHIVE, "-o", tmp_path / "theirs", "--tag", "mine")[0] == 0
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["pretrained_cfg"]["tag"] == "mine"


def test_the_installed_command_runs():
    command = [sys.executable, "-m", "rotation_ssl.cli", "verify", NAME]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stdout.startswith("holds"), result.stderr


def test_the_entry_point_is_the_command():
    points = importlib.metadata.entry_points(group="console_scripts", name="rotation-ssl")
    assert points["rotation-ssl"].load() is cli.main


def start(*arguments, **options):
    command = [sys.executable, "-m", "rotation_ssl.cli", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_names_that_the_terminal_cannot_show_stop_nothing(tmp_path):
    for name in ("a", "\u65e5", "z"):
        shutil.copy(SAMPLES / "cifar10" / "airplane_00003.png", tmp_path / f"{name}.png")
    started = start("orient", str(tmp_path), env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    out, error = started.communicate()
    assert (started.returncode, error) == (0, "")
    assert [name in out for name in ("/a.png", r"/\u65e5.png", "/z.png", "3 pictures:")] == [True] * 4


def test_a_reader_that_has_enough_ends_the_command_quietly():
    with start("info", NAME) as started:
        started.stdout.close()
        assert (started.stderr.read(), started.wait()) == ("", 141)


def test_a_broken_pipe_of_a_file_is_an_error(run, monkeypatch):
    broken = BrokenPipeError(errno.EPIPE, "image x cannot be read, try again: Broken pipe")
    monkeypatch.setattr(cli.info, "published_name", lambda name: (_ for _ in ()).throw(broken))
    assert run("info", NAME) == (2, f"error: [Errno {errno.EPIPE}] image x cannot be read, try again: Broken pipe")


def test_a_damaged_config_is_named(run, tmp_path):
    (tmp_path / "config.json").write_text("{")
    shutil.copy(zoo.weights_file(NAME), tmp_path / "model.safetensors")
    status, error = run("features", SAMPLES, "-o", tmp_path / "f.csv", "--model", f"local-dir:{tmp_path}")
    assert status == 2 and error.startswith(f"error: {tmp_path / 'config.json'} is not valid JSON (Expecting")
