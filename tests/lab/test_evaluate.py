"""The measurements end to end on a small CIFAR-10, and against the published rows where the whole one is there."""

import argparse
import dataclasses
import json
import os

import pytest
import timm
import torch
from conftest import SAMPLES, shorten_probes
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, resolve_model_data_config

from rotation_ssl import machine, zoo
from rotation_ssl.evaluation import frozen
from rotation_ssl.evaluation import measure as frozen_measure
from rotation_ssl.evaluation.frozen import preparation
from rotation_ssl.features import extract_features
from rotation_ssl.images import normalize
from rotation_ssl.labelled import LabelledSplits
from rotation_ssl.probes import knn_predict, linear_predict
from rotation_ssl.rotations import rotate_all
from rotation_ssl.zoo.golden import golden_file
from training.datasets import load_cifar10, load_images
from training.evaluation import probes as evaluate
from training.evaluation import subject
from training.evaluation.options import rows_file
from training.reporting.rows import RESULTS_DIR, read_file, read_rows

NAME = "rotnet_nin.cifar10"


def run(*arguments):
    return evaluate.main([str(argument) for argument in arguments])


@pytest.fixture
def short_probes(monkeypatch):
    """Every probe's recipe, at each budget, cut to four epochs."""
    shorten_probes(monkeypatch, epochs=4, milestones=(3,), batch_size=8)


def test_all_protocols_on_a_small_set(small_cifar10, short_probes, tmp_path, capsys):
    output = tmp_path / "out"
    only = ("--only", "rotation", "knn", "linear", "nonlinear", "conv")
    assert run("rotnet_nin", "--data", small_cifar10, "--output", output, "--seeds", 2, *only) == 0
    rows = read_file(output / "rows.jsonl")
    blocks = [f"block{i}" for i in range(1, 5)]
    assert {(row.protocol, row.budget, row.layer, row.seed) for row in rows} == {
        ("rotation", "", "", None),
        *(("knn", "", block, None) for block in blocks),
        *(("linear", "cached", block, None) for block in blocks),
        *((p, "cached", b, s) for p in ("nonlinear", "conv") for b in blocks for s in (0, 1)),
    }
    model = timm.create_model(NAME, pretrained=True)
    for row in rows:
        assert row.weights == NAME and row.value == row.correct / row.n and row.sha256 == zoo.manifest()[NAME]["sha256"]
        assert row.n == (160 if row.protocol == "rotation" else 40) and len(row.counts) == 10
        # training and test images are the same here
        assert row.protocol != "linear" or row.value > 0.9
    (rotation,) = [row for row in rows if row.protocol == "rotation"]
    images = load_cifar10(small_cifar10, "test").images
    batch = normalize(images, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    with torch.inference_mode():
        guesses = model.eval()(rotate_all(batch)).argmax(1).view(4, 40)
    right = torch.stack([guesses[k] == k for k in range(4)]).sum(0)
    assert rotation.counts == tuple(int(part.sum()) for part in right.tensor_split(10))
    assert rotation.source == "measured" and rotation.value > 0.7, "the sample images are mostly guessed right"
    printed = capsys.readouterr().out
    assert "rotation accuracy" in printed and "non-linear probe (cached) block2 seed 1" in printed
    report = json.loads((output / "report.json").read_text())
    assert len(report) == len(rows) and (output / "report.png").stat().st_size > 5000
    assert "| k-NN |" in (output / "report.md").read_text()


def test_probes_at_the_papers_budget_train_on_fresh_views(small_cifar10, short_probes, tmp_path):
    assert run("rotnet_nin", "--data", small_cifar10, "--output", tmp_path, "--budget", "paper", "--layers", "block2",
               "--only", "nonlinear") == 0  # fmt: skip
    (row,) = read_file(tmp_path / "rows.jsonl")
    assert (row.protocol, row.budget, row.layer) == ("nonlinear", "paper", "block2")
    assert "fresh crops" in row.settings and row.value > 0.2


@pytest.mark.parametrize("budget", ["cached", "paper"])
def test_no_buffer_or_parameter_of_the_backbone_moves_while_a_probe_trains(images, short_probes, budget):
    measured = subject.load_subject("rotnet_nin")
    before = {name: tensor.clone() for name, tensor in measured.backbone.state_dict().items()}
    plan = [evaluate.Measurement(p, budget, "block1", 0) for p in ("nonlinear", "conv")]
    assert len(list(evaluate.measure_features(measured, images, plan))) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in measured.backbone.state_dict().items())
    assert not measured.backbone.training


def test_the_seed_decides_a_trained_probe(images, short_probes):
    measured = subject.load_subject("rotnet_nin")

    def counts(*seeds):
        plan = [evaluate.Measurement("nonlinear", "cached", "block1", seed) for seed in seeds]
        rows = evaluate.measure_features(measured, dataclasses.replace(images, test=shifted(images.test)), plan)
        return [row.counts for row in rows]

    found = counts(0, 1, 2, 3)
    assert counts(0) == found[:1] and len(set(found)) > 1


def shifted(data):
    """Images that the probe has not seen in this form, so that it errs on some of them."""
    return dataclasses.replace(data, images=data.images.roll(5, -1))


def test_any_timm_model_by_name(small_cifar10, short_probes, tmp_path):
    assert run("resnet18", "--random", "--data", small_cifar10, "--size", 32, "--output", tmp_path) == 0
    rows = read_file(tmp_path / "rows.jsonl")
    assert {row.protocol for row in rows} == {"knn", "linear", "nonlinear"}
    assert {row.layer for row in rows} == {"act1", "layer1", "layer2", "layer3", "layer4"}
    assert {row.weights for row in rows} == {"resnet18.random"}


def test_ones_own_images_and_weights(tmp_path, short_probes):
    """Photographs of several sizes in folders, classes of one's own, weights of one's own: the documented command."""
    files = sorted((SAMPLES / "cifar10").glob("*.png"))
    for split in ("train", "val"):
        for name in ("cat", "ship"):
            folder = tmp_path / "mine" / split / name
            folder.mkdir(parents=True)
            for file in files:
                if file.stem.startswith(name):
                    (folder / file.name).write_bytes(file.read_bytes())
    photograph = next(file for file in SAMPLES.rglob("*.jpg"))
    for name in ("cat", "ship"):
        (tmp_path / "mine" / "train" / name / photograph.name).write_bytes(photograph.read_bytes())
        for extra in range(10):
            (tmp_path / "mine" / "train" / name / f"{extra}.png").write_bytes(files[extra].read_bytes())
    state = timm.create_model("resnet18", num_classes=7).state_dict()
    save_file(state, tmp_path / "mine.safetensors")
    images = ("--dataset", "folder", "--data", tmp_path / "mine", "--size", 48)
    arguments = ("--weights", tmp_path / "mine.safetensors", *images, "--output", tmp_path / "out")
    assert run("resnet18", *arguments, "--only", "knn", "linear") == 0
    rows = read_file(tmp_path / "out" / "rows.jsonl")
    assert {row.data for row in rows} == {"mine test at 48 pixels"}
    assert {row.weights for row in rows} == {f"resnet18@{rows[0].sha256[:12]}"}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "resnet18@" in text and "layer4" in text


def test_random_weights_are_reproducible_and_named(small_cifar10, tmp_path):
    only = ("--only", "knn", "--layers", "block1")
    for name in ("a", "b"):
        assert run("rotnet_nin", "--random", "--data", small_cifar10, "--output", tmp_path / name, *only) == 0
    first, second = (read_file(tmp_path / name / "rows.jsonl") for name in ("a", "b"))
    assert [(r.key, r.correct, r.sha256) for r in first] == [(r.key, r.correct, r.sha256) for r in second]
    assert {row.weights for row in first} == {"rotnet_nin.random"}
    assert run("rotnet_nin", "--random", "--seed", 1, "--data", small_cifar10, "--output", tmp_path / "a", *only) == 0
    rows = read_file(tmp_path / "a" / "rows.jsonl")
    assert len(rows) == len(first) + 1 and rows[-1].weights == "rotnet_nin.random1"
    assert rows[-1].sha256 != first[0].sha256


def test_measuring_again_replaces_the_rows(small_cifar10, tmp_path):
    for _ in range(2):
        run("rotnet_nin", "--only", "knn", "--layers", "block1", "--data", small_cifar10, "--output", tmp_path)
    assert len(read_file(tmp_path / "rows.jsonl")) == 1


def test_holdout_measures_training_images_and_reads_no_test_image(small_cifar10, tmp_path):
    for file in (small_cifar10 / "test").rglob("*.png"):
        file.unlink()
    assert run("rotnet_nin", "--only", "rotation", "--holdout", 10, "--data", small_cifar10, "--output", tmp_path) == 0
    (row,) = read_file(tmp_path / "rows.jsonl")
    assert row.n == 40 and row.data == "CIFAR-10, last 10 training images"


def test_the_size_is_what_stands_beside_the_weights(tmp_path):
    network = timm.create_model(NAME, pretrained=True)
    file, described = tmp_path / "model.safetensors", tmp_path / "config.json"
    save_file(network.state_dict(), file)
    assert subject.load_subject("rotnet_nin", weights=file).size == 32
    described.write_text(json.dumps({"pretrained_cfg": {"input_size": [3, 48, 48]}}))
    assert subject.load_subject("rotnet_nin", weights=file).size == 48
    assert subject.load_subject("rotnet_nin", weights=file, size=64).size == 64
    for text in ("", "[]", "{}"):
        described.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json does not give the input_size of its weights"):
            subject.load_subject("rotnet_nin", weights=file)
        assert subject.load_subject("rotnet_nin", weights=file, size=64).size == 64
    # of another file
    save_file(network.state_dict(), tmp_path / "mine.safetensors")
    assert subject.load_subject("rotnet_nin", weights=tmp_path / "mine.safetensors").size == 32


def test_a_file_is_normalised_as_what_stands_beside_it_or_as_its_tag(tmp_path):
    file, described = tmp_path / "model.safetensors", tmp_path / "config.json"

    def input_of(model):
        cfg = resolve_model_data_config(subject.load_subject(model, weights=file, size=64).backbone)
        return cfg["mean"], cfg["std"]

    save_file(timm.create_model("mobilenetv3_large_100").state_dict(), file)
    assert input_of("mobilenetv3_large_100")[0] == IMAGENET_DEFAULT_MEAN
    halves = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert input_of("mobilenetv3_large_100.ra4_e3600_r224_in1k") == halves
    mine = {"input_size": [3, 64, 64], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    described.write_text(json.dumps({"pretrained_cfg": mine}))
    assert input_of("mobilenetv3_large_100") == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    save_file(timm.create_model("rotnet_nin").state_dict(), file)
    assert input_of("rotnet_nin") == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    described_so = subject.load_subject("rotnet_nin", weights=file).identity
    described.unlink()
    assert subject.load_subject("rotnet_nin", weights=file, size=64).identity != described_so


def test_a_network_whose_modules_have_two_names():
    assert subject.load_subject("coat_lite_tiny", random=True).name == "coat_lite_tiny.random"


def test_random_weights_have_the_layers_of_the_bundled_ones(set_manifest):
    entry = zoo.manifest()["rotnet_alexnet.photos"]
    set_manifest({NAME: zoo.manifest()[NAME]})
    assert subject.load_subject("rotnet_alexnet", random=True).backbone.head.fc_size == 4096
    set_manifest({"rotnet_alexnet.photos": entry})
    random = subject.load_subject("rotnet_alexnet", random=True)
    assert random.backbone.head.fc_size == 0 and random.size == 128


def test_random_weights_beside_a_tag_are_of_its_network_and_size():
    default = subject.load_subject("rotnet_alexnet", random=True)
    beside = subject.load_subject("rotnet_alexnet.gidaris_in1k", random=True)
    assert (default.size, default.backbone.head.fc_size) == (128, 0)
    assert (beside.size, beside.backbone.head.fc_size) == (224, 4096)
    assert (default.name, beside.name) == ("rotnet_alexnet.random", "rotnet_alexnet.gidaris_in1k-random")
    with pytest.raises(ValueError, match="in1k-random has no entry there"):
        rows_file(argparse.Namespace(record=True), beside)


def test_maps_are_pooled_to_what_memory_bears():
    nin = subject.load_subject("rotnet_nin", random=True)
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert frozen.map_grids(frozen.Frozen(nin.backbone, nin.size), image, ["block1", "block2"], 8) == {
        "block1": 8,
        "block2": 8,
    }
    assert frozen.map_grids(frozen.Frozen(nin.backbone, nin.size), image, ["block1", "block2"], 16) == {
        "block1": 11,
        "block2": 8,
    }
    resnet = subject.load_subject("resnet18", random=True, size=64)
    # 64 x 16 x 16 -> 8; 512 x 2 x 2 stays; a vector is one cell
    assert frozen.map_grids(frozen.Frozen(resnet.backbone, resnet.size), image, ["layer1", "layer4", "fc"], 8) == {
        "layer1": 8,
        "layer4": 2,
        "fc": 1,
    }


def test_cached_features_are_those_of_the_images_as_they_are(small_cifar10):
    """k-NN and the linear probe take view 0: no crop, no flip; other views are the same at every call."""
    images = load_cifar10(small_cifar10, "train").images
    assert frozen_measure._view(images, 0) is images
    assert torch.equal(frozen_measure._view(images, 1), frozen_measure._view(images, 1))
    assert not torch.equal(frozen_measure._view(images, 1), frozen_measure._view(images, 2))
    nin = subject.load_subject("rotnet_nin")
    prepare = preparation(nin.backbone, 32)
    maps = frozen.Frozen(nin.backbone, 32).maps(images, {"block2": 4})["block2"]
    expected = extract_features(nin.backbone, images, ["block2"], grid=4, prepare=prepare)["block2"]
    assert maps.dtype == torch.bfloat16 and maps.shape == (40, 192, 4, 4)
    torch.testing.assert_close(maps.flatten(1).float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet_of_nobody"], "no model 'resnet_of_nobody'"),
        (["rotnet_nin.nope"], "no weights tagged"),
        (["rotnet_nin3"], "has no pretrained weights"),
        (["vit_tiny_patch16_224", "--random", "--size", "32"], "does not take images of 32 pixels"),
        (["rotnet_nin", "--layers", "block7"], "no layer block7"),
        (["rotnet_nin", "--record"], "this is not the whole of CIFAR-10: 40 training and 40 test images"),
        (["resnet18", "--random", "--only", "rotation", "--size", "32"], "this one has 1000: leave it out"),
        (["rotnet_nin", "--layers", "block1", "--only", "rotation"], "--layers is for k-NN and probes"),
        (["rotnet_nin", "--layers", "block7", "--only", "knn"], "block1, block2, block3, block4"),
        (["rotnet_nin", "--weights", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
        (["rotnet_nin", "--weights", "a", "--random"], "exclude each other"),
        (["rotnet_nin", "--record", "--holdout", "5"], "leave out what changes them"),
        (["resnet18", "--random", "--size", "32", "--record"], "leave out what changes them"),
        (["rotnet_nin", "--record", "--precision", "fp32"], "leave out what changes them"),
        (["rotnet_nin", "--holdout", "40"], "holdout must be 1 to 39"),
    ],
)  # fmt: skip
def test_bad_input_is_a_one_line_error_and_writes_nothing(
    arguments, message, small_cifar10, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr("training.reporting.rows.current_commit", lambda: "0" * 40)
    before = {file: file.read_bytes() for file in RESULTS_DIR.rglob("*") if file.is_file()}
    assert run(*arguments, "--data", small_cifar10, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()
    assert before == {file: file.read_bytes() for file in RESULTS_DIR.rglob("*") if file.is_file()}


def test_uncommitted_code_is_not_recorded(small_cifar10, monkeypatch, capsys):
    monkeypatch.setattr("training.reporting.rows.current_commit", lambda: "0" * 40 + "-dirty")
    assert run("rotnet_nin", "--record", "--data", small_cifar10) == 2
    assert "--record needs committed code, this is 000" in capsys.readouterr().err


def test_weights_that_have_no_entry_are_not_recorded(small_cifar10, tmp_path, nin_state, capsys):
    save_file(nin_state, tmp_path / "mine.safetensors")
    assert run("rotnet_nin", "--weights", tmp_path / "mine.safetensors", "--record", "--data", small_cifar10) == 2
    assert "has no entry there" in capsys.readouterr().err


def test_damaged_weights_of_another_network_are_refused(small_cifar10, tmp_path, capsys):
    (tmp_path / "half.safetensors").write_bytes(golden_file(NAME).read_bytes()[:1000])
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "other.safetensors")
    for model, file, message in (
        ("resnet34", "half.safetensors", "is not a whole safetensors file"),
        ("resnet34", "other.safetensors", "does not fit resnet34: it lacks"),
        ("rotnet_nin", "half.safetensors", "half.safetensors"),
    ):
        assert run(model, "--weights", tmp_path / file, "--data", small_cifar10) == 2
        assert message in capsys.readouterr().err


def test_missing_data_is_a_one_line_error(tmp_path, capsys):
    assert run("rotnet_nin", "--data", tmp_path) == 2
    assert capsys.readouterr().err.startswith(f"error: no CIFAR-10 in {tmp_path}")


def test_classes_that_differ_are_named(small_cifar10, tmp_path, capsys):
    (small_cifar10 / "test" / "cat").rename(small_cifar10 / "test" / "lynx")
    arguments = ("--dataset", "folder", "--data", small_cifar10, "--only", "knn", "--output", tmp_path / "out")
    assert run("rotnet_nin", *arguments) == 2
    assert "lynx (not in train), cat (not in test)" in capsys.readouterr().err


def test_fewer_training_images_than_neighbours(tmp_path, capsys):
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "few" / split / name
            folder.mkdir(parents=True)
            for file in sorted((SAMPLES / "cifar10").glob("*.png"))[:3]:
                (folder / file.name).write_bytes(file.read_bytes())
    arguments = ("--dataset", "folder", "--data", tmp_path / "few", "--only", "knn", "--output", tmp_path / "out")
    assert run("rotnet_nin", *arguments) == 2
    assert "k-NN needs 20 training images or more, got 6" in capsys.readouterr().err


def test_what_does_not_fit_into_memory_is_refused_before_it_is_computed(images, monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"features of block1 need 0.0 GiB of memory, 0.0 are available"):
        next(
            evaluate.measure_features(
                subject.load_subject("rotnet_nin"), images, [evaluate.Measurement("knn", "", "block1")]
            )
        )


def test_numbers_are_those_of_the_test_images(images):
    """Training and test images that differ: the predictions of the package's own functions, scored by hand."""
    whole, order = images.train, torch.randperm(40)
    images = LabelledSplits("CIFAR-10 test", whole.subset(order[:28]), whole.subset(order[28:]))
    nin = subject.load_subject("rotnet_nin")
    plan = evaluate.plan(["block3"], ["knn", "linear"], "cached", [])
    rows = {row.protocol: row for row in evaluate.measure_features(nin, images, plan)}
    prepare = preparation(nin.backbone, 32)
    train, test = (
        extract_features(nin.backbone, part.images, ["block3"], grid=4, prepare=prepare, dtype=torch.bfloat16)["block3"]
        for part in (images.train, images.test)
    )
    means = [part.float().unflatten(1, (192, 16)).mean(2) for part in (train, test)]
    neighbours = knn_predict(means[0], images.train.labels, means[1], 10)
    linear, _ = linear_predict(train, images.train.labels, test, 10, validation=2)
    for protocol, predictions in (("knn", neighbours), ("linear", linear)):
        right = predictions == images.test.labels
        assert rows[protocol].counts == tuple(int(part.sum()) for part in right.tensor_split(10))
        assert 0 < rows[protocol].correct < 12


def test_training_images_of_a_folder_are_shuffled_always_in_the_same_way(small_cifar10):
    first, second = (load_images("folder", small_cifar10, 32).train for _ in range(2))
    assert torch.equal(first.labels, second.labels) and torch.equal(first.images, second.images)
    assert len(set(first.labels[-10:].tolist())) > 3


@pytest.mark.slow
def test_rotation_accuracy_of_a_tenth_is_the_reported_count(whole_cifar10):
    (reported,) = [r for r in read_rows() if r.weights == NAME and r.protocol == "rotation"]
    assert reported.n == 40_000
    measured = subject.load_subject(NAME)
    assert measured.sha256 == reported.sha256
    test = load_cifar10(whole_cifar10, "test")
    row = evaluate.measure_rotation(measured, test, "CIFAR-10 test", parts=[4])
    assert row.n == 4000 and abs(row.correct - reported.counts[4]) <= 4, os.environ.get("ROTATION_SSL_DATA")
