"""The measurements end to end on a small CIFAR-10, and against the published rows where the whole one is there."""

import json

import pytest
import timm
import torch
from conftest import SAMPLES

from rotation_ssl.rotations import rotate_all
from training import evaluate
from training.data import load_cifar10, normalize
from training.results import read_file, read_rows

NAME = "rotnet_nin.cifar10"


@pytest.fixture
def small_validation(monkeypatch):
    """The linear probe's split of 40 images instead of 50,000."""
    monkeypatch.setattr(evaluate, "VALIDATION", 10)


def run(*arguments):
    return evaluate.main([str(argument) for argument in arguments])


def test_all_protocols_on_a_small_set(small_cifar10, small_validation, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    assert run("rotnet_nin", "--data-dir", small_cifar10, "--results", file) == 0
    rows = read_file(file)
    assert {(row.protocol, row.layer) for row in rows} == {
        ("rotation accuracy", ""),
        *((protocol, f"block{i}") for protocol in ("k-NN", "linear probe") for i in range(1, 5)),
    }
    model = timm.create_model(NAME, pretrained=True)
    for row in rows:
        assert row.weights == NAME and row.value == row.correct / row.n and row.seed is None
        assert row.n == (160 if row.protocol == "rotation accuracy" else 40)
        # training and test images are the same here: each image's nearest neighbour is itself
        assert row.protocol != "linear probe" or row.value > 0.9
    (rotation,) = [row for row in rows if row.protocol == "rotation accuracy"]
    images = load_cifar10(small_cifar10, "test").images
    batch = normalize(images, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    with torch.inference_mode():
        guesses = model.eval()(rotate_all(batch)).argmax(1).view(4, 40)
    assert rotation.correct == sum(int((guesses[k] == k).sum()) for k in range(4))
    assert "rotation accuracy" in capsys.readouterr().out


def test_random_weights_are_reproducible_and_named(small_cifar10, small_validation, tmp_path):
    for name in ("a", "b"):
        assert run("rotnet_nin", "--random", "--data-dir", small_cifar10, "--results", tmp_path / name) == 0
    first, second = read_file(tmp_path / "a"), read_file(tmp_path / "b")
    assert [(r.key, r.correct, r.sha256) for r in first] == [(r.key, r.correct, r.sha256) for r in second]
    assert {(row.weights, row.seed) for row in first} == {("rotnet_nin.random", 0)}
    assert run("rotnet_nin", "--random", "--seed", 1, "--only", "rotation", "--data-dir", small_cifar10,
               "--results", tmp_path / "a") == 0  # fmt: skip
    assert len(read_file(tmp_path / "a")) == len(first) + 1


def test_measuring_again_replaces_the_rows(small_cifar10, tmp_path):
    for _ in range(2):
        run("rotnet_nin", "--only", "rotation", "--data-dir", small_cifar10, "--results", tmp_path / "rows.jsonl")
    assert len(read_file(tmp_path / "rows.jsonl")) == 1


@pytest.mark.parametrize("model", ["resnet_of_nobody", "resnet18", "rotnet_nin.nope", "rotnet_alexnet"])
def test_unknown_models_are_one_line_errors(model, small_cifar10, capsys):
    assert run(model, "--data-dir", small_cifar10) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error


def test_missing_data_is_a_one_line_error(tmp_path, capsys):
    assert run("rotnet_nin", "--data-dir", tmp_path) == 2
    assert capsys.readouterr().err.startswith(f"error: no CIFAR-10 in {tmp_path}")


def test_reported_rotation_accuracy_holds(whole_cifar10, tmp_path):
    """Every tenth test image keeps this short: within four standard deviations of the reported whole."""
    (reported,) = [r for r in read_rows() if r.weights == NAME and r.protocol == "rotation accuracy"]
    assert reported.n == 40_000
    subject = evaluate.load_subject(NAME, random=False)
    assert subject.sha256 == reported.sha256
    test = load_cifar10(whole_cifar10, "test")
    part = test.subset(torch.arange(0, 10_000, 10))
    (row,) = evaluate.measure_rotation(subject, part, "cpu")
    deviation = (reported.value * (1 - reported.value) / row.n) ** 0.5
    assert abs(row.value - reported.value) < 4 * deviation


def test_sample_images_are_mostly_guessed_right(small_cifar10, tmp_path):
    run("rotnet_nin", "--only", "rotation", "--data-dir", small_cifar10, "--results", tmp_path / "rows.jsonl")
    (row,) = read_file(tmp_path / "rows.jsonl")
    assert row.n == 4 * len(list((SAMPLES / "cifar10").glob("*.png"))) and row.value > 0.7
    assert json.loads((tmp_path / "rows.jsonl").read_text())["source"] == "measured"
