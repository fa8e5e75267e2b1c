"""Pretraining as people meet it: `rotation_ssl.pretrain`, `rotation-ssl pretrain`, and what one watches meanwhile."""

import dataclasses
import inspect
import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT, SAMPLES
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import SHORT, TINY, interrupt, same, sample_images, weights

import rotation_ssl
from rotation_ssl import cli
from rotation_ssl.features import rankme
from rotation_ssl.images import read_images
from rotation_ssl.pretraining import command, monitor
from rotation_ssl.pretraining.command import run
from rotation_ssl.pretraining.loop import pretrain
from rotation_ssl.pretraining.monitor import Monitor
from rotation_ssl.pretraining.recipe import FOLDER, AdamW, Stage

# in fp32: oneDNN's gradients of 3 x 3 filters on maps of one pixel are not reliable in bf16
SMALL = ["--model", "test_resnet", "--size", "16", "--steps", "6", "--images-per-step", "4", "--precision", "fp32"]
SMALL += ["--device", "cpu", "--tracker", "none"]
PHOTOS = SAMPLES / "photos"


@pytest.fixture(scope="module")
def by_class(tmp_path_factory):
    """The CIFAR-10 samples in a folder a class."""
    root = tmp_path_factory.mktemp("by_class")
    for i, file in enumerate(sorted((SAMPLES / "cifar10").glob("*.png"))):
        folder = root / f"class{i % 2}"
        folder.mkdir(exist_ok=True)
        (folder / file.name).write_bytes(file.read_bytes())
    return root


def test_a_folder_becomes_a_backbone(tmp_path, capsys, monkeypatch):
    arguments = ["pretrain", "--data", str(PHOTOS), "--output", str(tmp_path / "mine"), *SMALL]
    assert cli.main(arguments) == 0
    assert "wrote" in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True)
    assert model.num_classes == 4 and model.pretrained_cfg["input_size"] == (3, 16, 16)
    run = json.loads((tmp_path / "mine" / "run.json").read_text())
    assert run["recipe"]["name"] == "folder" and run["commit"] == ""
    monkeypatch.setattr(command, "open_images", None)  # refused before the images are read
    assert cli.main(arguments) == 2
    assert "already contains a run" in capsys.readouterr().err
    assert cli.main([*arguments[:3], "--output", str(tmp_path / "other"), "--resume", *SMALL]) == 2
    assert "nothing to resume" in capsys.readouterr().err


def test_the_function_is_the_command(tmp_path):
    options = dict(steps=6, image_size=16, images_per_step=4, precision="fp32", device="cpu", tracker=None)
    file = rotation_ssl.pretrain(PHOTOS, tmp_path / "function", "test_resnet", **options)
    assert file == tmp_path / "function" / "model.safetensors"
    assert cli.main(["pretrain", "--data", str(PHOTOS), "--output", str(tmp_path / "command"), *SMALL]) == 0
    assert same(weights(tmp_path / "function"), weights(tmp_path / "command"))
    with pytest.raises(TypeError, match="learning_rate"):
        rotation_ssl.pretrain(PHOTOS, tmp_path / "new", "test_resnet", learning_rate=1.0)
    with pytest.raises(ValueError, match="does not exist"):
        rotation_ssl.pretrain(tmp_path / "nowhere", tmp_path / "new", "test_resnet", **options)
    assert not (tmp_path / "new").exists()


def test_every_option_of_the_command_arrives(tmp_path, monkeypatch, capsys):
    expected = {
        "resume": True, "device": "cpu", "workers": 3, "stream": True, "accumulate": 2, "sync_batchnorm": True,
        "checkpoint_seconds": 7.0, "tracker": "wandb", "monitor": tmp_path, "monitor_every": 9,
    }  # fmt: skip
    defaults = inspect.signature(run).parameters
    assert all(defaults[name].default != value for name, value in expected.items())
    fields = {"model": "resnet50", "images_per_step": 12, "steps": 77, "precision": "bf16", "holdout": 5, "seed": 3}
    fields["pretrained"] = True
    asked, opened = [], []

    def recorded(recipe, open_set, output, **options):
        open_set(recipe)
        asked.append((recipe, output, options))
        return tmp_path / "step-000001"

    monkeypatch.setattr(command, "run", recorded)
    monkeypatch.setattr(command, "open_images", lambda *arguments: opened.append(arguments))
    arguments = [
        "pretrain",
        "--data",
        "images",
        "--output",
        "out",
        "--size",
        "48",
        "--dataset",
        "torch/x",
        "--download",
    ]
    for name, value in (expected | fields).items():
        arguments += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    assert cli.main(arguments) == 130
    recipe = command.changed(FOLDER, image_size=48, data="torch/x", **fields)
    assert all(getattr(recipe, name) == value != getattr(FOLDER, name) for name, value in fields.items())
    assert asked == [(recipe, Path("out"), {**expected, "commit": ""})]
    assert opened == [("torch/x", Path("images"), 48, True, 3)]
    assert "stopped; continue with --resume --output out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--help"])
    told = capsys.readouterr().out.split("options:")[1]
    assert set(re.findall(r"^  (--[a-z0-9-]+)", told, re.MULTILINE)) <= set(arguments)


def test_images_in_memory_and_a_recipe_of_ones_own(tmp_path):
    file = rotation_ssl.pretrain(sample_images(), tmp_path, recipe=SHORT, device="cpu", tracker=None, images_per_step=8)
    run = json.loads((file.parent / "run.json").read_text())
    assert run["rotated_images"] == 6 * 8 * 4 and run["recipe"]["model"] == "test_resnet"


@pytest.mark.parametrize(
    ("images", "device", "why"),
    [
        (torch.rand(12, 3, 24, 24), "cpu", r"must be \(N, 3, H, H\) uint8, got \(12, 3, 24, 24\) torch.float32"),
        (torch.zeros(12, 3, 32, 24, dtype=torch.uint8), "cpu", r"uint8, got \(12, 3, 32, 24\)"),
        (torch.zeros(12, 3, 24, 24, dtype=torch.uint8), "cuda:1", "device must be 'auto' or 'cpu', got 'cuda:1'"),
    ],
)
def test_images_and_devices_that_would_be_taken_for_others(tmp_path, images, device, why):
    with pytest.raises(ValueError, match=why):
        rotation_ssl.pretrain(images, tmp_path / "new", recipe=SHORT, device=device, tracker=None, images_per_step=8)
    assert not (tmp_path / "new").exists()


def test_what_does_not_fit_is_told_before_the_images_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "open_images", None)
    for options, why in (
        ({"size": 64}, r"no option size; there are .*image_size.*monitor_every"),
        ({"model": "resnet_of_nobody"}, "model 'resnet_of_nobody' cannot be made"),
        ({"monitor": tmp_path / "nowhere", "model": "test_resnet"}, "nowhere"),
    ):
        with pytest.raises((ValueError, TypeError), match=why):
            rotation_ssl.pretrain(tmp_path, tmp_path / "new", device="cpu", tracker=None, **options)
        assert not (tmp_path / "new").exists()


def test_without_the_extra_a_line_says_what_to_install(tmp_path):
    code = (
        "import sys\n"
        "sys.modules['accelerate'] = None\n"
        "from rotation_ssl import cli\n"
        f"sys.exit(cli.main(['pretrain', '--data', {str(PHOTOS)!r}, '--output', {str(tmp_path / 'mine')!r}]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: pretraining needs accelerate: pip install 'rotation-ssl[train]'\n"


# --- metrics.jsonl


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_curve_a_line_a_point(tmp_path):
    pretrain(TINY, sample_images(), tmp_path)
    assert lines(tmp_path) == json.loads((tmp_path / "run.json").read_text())["curve"]


@pytest.mark.parametrize("cut", [0, 7], ids=["whole", "cut off by a kill"])
def test_a_resumed_run_has_each_point_once(tmp_path, monkeypatch, cut):
    interrupt(monkeypatch, 14, lambda: signal.raise_signal(signal.SIGTERM))
    pretrain(TINY, sample_images(), tmp_path, monitor=lambda network: {"seen": 1}, monitor_every=5)
    monkeypatch.undo()
    file = tmp_path / "metrics.jsonl"
    # a line of a step after the checkpoint, which is trained again
    text = file.read_text() + json.dumps({"step": 15, "loss": 0.0}) + "\n"
    file.write_text(text[: len(text) - cut])
    pretrain(TINY, sample_images(), tmp_path, resume=True)
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == list(range(1, 31))
    assert [line["step"] for line in lines(tmp_path) if "seen" in line] == [5, 10]


# --- what one watches


def test_the_monitor_changes_nothing_and_writes_its_numbers(by_class, tmp_path, capsys):
    for name, every in (("watched", 3), ("alone", 0)):
        pretrain(SHORT, sample_images(), tmp_path / name, monitor=Monitor(by_class, 16), monitor_every=every)
    assert same(weights(tmp_path / "watched"), weights(tmp_path / "alone"))
    seen = [line for line in lines(tmp_path / "watched") if "rankme" in line]
    assert [line["step"] for line in seen] == [3, 6] and not any("rankme" in line for line in lines(tmp_path / "alone"))
    layers = list(seen[0]["knn_accuracy"])
    assert layers and layers == list(seen[0]["rankme"])
    assert all(0 <= value <= 1 for value in seen[0]["knn_accuracy"].values())
    assert capsys.readouterr().out.count("k-NN accuracy: ") == 2


def test_a_network_that_the_monitor_cannot_read_is_refused_before_it_is_trained(by_class, tmp_path, monkeypatch):
    """A layer of HRNet gives a list of maps."""
    monkeypatch.setattr(command, "pretrain", None)
    recipe = dataclasses.replace(TINY, model="hrnet_w18_small", stages=(Stage(2, 64),), image_size=64)
    with pytest.raises(ValueError, match="layer stage3 gives list, not a map or a vector"):
        run(recipe, lambda _: sample_images(), tmp_path, device="cpu", tracker=None, monitor=by_class)


def test_the_monitor_finds_what_is_easy_to_find(tmp_path):
    from PIL import Image

    for name, grey in (("dark", 20), ("light", 230)):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.new("RGB", (16, 16), (grey + i,) * 3).save(tmp_path / name / f"{i}.png")
    network = timm.create_model("test_resnet", num_classes=4).eval()
    assert max(Monitor(tmp_path, 16)(network)["knn_accuracy"].values()) == 1


def test_the_monitor_asks_of_no_image_that_it_knows(by_class, monkeypatch):
    asked_of, predict = [], monitor.knn_predict

    def recorded(known, known_labels, asked, *options):
        asked_of.append((known, asked))
        return predict(known, known_labels, asked, *options)

    monkeypatch.setattr(monitor, "knn_predict", recorded)
    Monitor(by_class, 16)(timm.create_model("test_resnet", num_classes=4).eval())
    assert asked_of
    for known, asked in asked_of:
        assert len(known) + len(asked) == 40
        assert not (known[:, None] == asked[None]).all(2).any()


def test_the_monitor_reads_what_it_looks_at(by_class, tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "MOST", 6)
    read = []
    whole = monitor.read_images
    monkeypatch.setattr(monitor, "read_images", lambda files, size: read.extend(files) or whole(files, size))
    options = dict(steps=2, images_per_step=4, precision="fp32", device="cpu", tracker=None, monitor_every=2)
    rotation_ssl.pretrain(sample_images(), tmp_path, "test_resnet", monitor=str(by_class), **options)
    assert len(read) == 6 and {file.parent.name for file in read} == {"class0", "class1"}
    assert [line["step"] for line in lines(tmp_path) if "rankme" in line] == [2]


def test_the_monitor_of_a_network_that_takes_one_size(by_class, tmp_path):
    # the crops of 16 pixels are what it takes, not the images' 32
    recipe = dataclasses.replace(SHORT, model="test_vit", stages=(Stage(2, 16),), padding=0, optimizer=AdamW())
    pixels = read_images(sorted((SAMPLES / "cifar10").glob("*.png")), 32)
    recipe = dataclasses.replace(recipe, image_size=32)
    run(recipe, lambda _: pixels, tmp_path, device="cpu", tracker=None, monitor=by_class, monitor_every=2)
    assert [line["step"] for line in lines(tmp_path) if "rankme" in line] == [2]


def test_the_monitor_wants_a_folder_of_classes(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        Monitor(tmp_path / "nowhere", 16)
    with pytest.raises(ValueError, match="at least 1"):
        rotation_ssl.pretrain(PHOTOS, tmp_path / "new", "test_resnet", monitor=PHOTOS, monitor_every=0)


@given(st.integers(1, 6), st.floats(0.1, 10))
def test_rankme_counts_the_directions_of_equal_features(directions, scale):
    features = scale * torch.eye(8)[:directions].repeat(3, 1)
    # the 1e-7 of its definition is added to each of the 8 parts
    assert rankme(features) == pytest.approx(directions, rel=1e-4)


def test_rankme_by_hand():
    # singular values 3 and 1: parts 3/4 and 1/4
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert rankme(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(math.exp(entropy), rel=1e-5)
    with pytest.raises(ValueError, match="finite features"):
        rankme(torch.tensor([[math.nan, 1.0]]))
