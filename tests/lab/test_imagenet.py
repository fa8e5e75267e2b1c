"""Classifiers on all layers of a frozen backbone at once: each is what it would be alone, and the backbone stays."""

import dataclasses
import json
import shutil
from itertools import islice

import pytest
import torch
from conftest import opened_checkpoints, spy_on_first_step

from rotation_ssl.evaluation.frozen import Frozen, preparation
from rotation_ssl.fit import Checkpoint, fit
from rotation_ssl.precision import supports_bfloat16
from rotation_ssl.probes import max_pooled_probe
from training.evaluation import layers as imagenet
from training.evaluation.labelled import open_labelled, read_into_memory, split_holdout
from training.evaluation.layers import (
    build_probes,
    count_correct,
    measure_layers,
    train_probes,
    with_epochs,
)
from training.evaluation.recipes import IMAGENET_LINEAR_CPU, IMAGENET_LINEAR_PAPER, IMAGENET_NONLINEAR_CPU
from training.evaluation.subject import load_subject
from training.reporting.rows import read_file

LINEAR = dataclasses.replace(
    IMAGENET_LINEAR_CPU, epochs=40, milestones=(25, 35), batch_size=10, lr=0.02, precision="fp32"
)
NONLINEAR = dataclasses.replace(
    IMAGENET_NONLINEAR_CPU, epochs=30, milestones=(20,), batch_size=10, lr=0.02, fc_size=64, precision="fp32"
)


@pytest.fixture(scope="module")
def subject():
    return load_subject("rotnet_alexnet", random=True, size=64)


@pytest.fixture
def train(small_tinyimagenet):
    return read_into_memory(open_labelled("tinyimagenet", small_tinyimagenet, "train", 64), 0)


def test_the_papers_pooling_by_hand():
    alexnet = load_subject("rotnet_alexnet", random=True, size=224)
    layers = [f"conv{i}" for i in range(1, 6)]
    probes = build_probes(IMAGENET_LINEAR_PAPER, alexnet, layers, classes=1000)
    assert [probes[layer][0].output_size for layer in layers] == [12, 7, 5, 6, 6]
    assert [probes[layer][-1].in_features for layer in layers] == [9216, 9408, 9600, 9216, 9216]
    assert not any("1.weight" in probe.state_dict() for probe in probes.values()), "batch norm has no scale"


def test_the_linear_classifier_by_hand():
    torch.manual_seed(0)
    probe = max_pooled_probe(2, 2, 3).eval()
    maps = torch.arange(2 * 16.0).view(1, 2, 4, 4)
    pooled = torch.tensor([5.0, 7, 13, 15, 21, 23, 29, 31])  # the largest of each quarter
    expected = probe[-1].weight @ (pooled / (1 + 1e-5) ** 0.5) + probe[-1].bias
    torch.testing.assert_close(probe(maps)[0], expected)


EMULATED = pytest.mark.skipif(not supports_bfloat16(), reason="bfloat16 is emulated here: it takes a minute")


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=EMULATED)])
def test_layers_learn_a_handful_and_the_backbone_stays(train, precision):
    recipe = dataclasses.replace(LINEAR, precision=precision)
    subject = load_subject("rotnet_alexnet", random=True, size=64)
    before = {name: tensor.clone() for name, tensor in subject.backbone.state_dict().items()}
    layers = ["conv1", "conv3", "conv5"]
    probes = build_probes(recipe, subject, layers, 10)
    order = torch.arange(len(train))
    train_probes(recipe, subject, probes, train, order)
    counts = count_correct(recipe, subject, probes, train, order)
    assert list(counts) == layers and all(len(parts) == 10 for parts in counts.values())
    # chance is 2
    assert all(sum(parts) >= 18 for parts in counts.values()), f"of 20 images of 10 classes: {counts}"
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.backbone.state_dict().items())
    assert not subject.backbone.training and not any(probe.training for probe in probes.values())


def test_the_rest_of_the_network_learns_a_handful(subject, train):
    torch.manual_seed(0)
    probes = build_probes(NONLINEAR, subject, ["conv4", "conv5"], 10)
    names = [name for name, _ in probes["conv4"].named_children()]
    assert names == ["0", "1"] and [type(m).__name__ for m in probes["conv4"][0]] == ["ConvNormAct", "MaxPool2d"]
    assert [type(m).__name__ for m in probes["conv5"][0]] == ["MaxPool2d"], "pool5 alone comes after conv5"
    order = torch.arange(len(train))
    train_probes(NONLINEAR, subject, probes, train, order)
    counts = count_correct(NONLINEAR, subject, probes, train, order)
    assert all(sum(parts) >= 16 for parts in counts.values()), f"of 20 images of 10 classes: {counts}"


def test_steps_and_crops_are_the_recipes(subject, train, monkeypatch):
    optimizers, crops = spy_on_first_step(monkeypatch, imagenet)
    recipe = dataclasses.replace(LINEAR, momentum=0.7, weight_decay=0.02)
    probes = build_probes(recipe, subject, ["conv1"], 10)
    train_probes(recipe, subject, probes, train, torch.arange(len(train)))
    (group,) = optimizers[0].param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.02, 0.7, 0.02)
    assert list(map(id, group["params"])) == list(map(id, probes["conv1"].parameters()))
    assert crops == [(56, 0, "reflect", True)], "7/8 of 64 pixels, half of them mirrored"


def test_tests_look_at_the_middle(subject, train, monkeypatch):
    middle = imagenet._central(torch.arange(256).view(1, 1, 16, 16))[0, 0]
    assert middle.tolist() == [list(range(16 * row + 1, 16 * row + 15)) for row in range(1, 15)]
    seen = []
    monkeypatch.setattr(imagenet, "_central", lambda pixels: seen.append(len(pixels)) or pixels[..., 4:60, 4:60])
    probes = build_probes(LINEAR, subject, ["conv1"], 10)
    count_correct(LINEAR, subject, probes, train, torch.arange(2))
    assert seen == [2]


def test_a_layer_learns_the_same_beside_others_as_alone(subject, train):
    few = with_epochs(LINEAR, 2)
    torch.manual_seed(0)
    together = build_probes(few, subject, ["conv2", "conv5"], 10)
    alone = torch.nn.ModuleDict({"conv2": max_pooled_probe(192, 7, 10)})
    alone["conv2"].load_state_dict(together["conv2"].state_dict())
    for probes in (together, alone):
        train_probes(few, subject, probes, train, torch.arange(len(train)))
    for name, tensor in alone["conv2"].state_dict().items():
        torch.testing.assert_close(tensor, together["conv2"].state_dict()[name])


def test_decoded_as_they_come_is_the_same_as_in_memory(subject, small_tinyimagenet, train):
    streamed = open_labelled("tinyimagenet", small_tinyimagenet, "train", 64)
    assert streamed.images.squares is None
    few, rows = with_epochs(LINEAR, 2), []
    for data, workers in ((train, 0), (streamed, 0), (streamed, 2)):
        found = measure_layers(few, subject, ["conv4"], data, data, "x val", workers=workers)
        rows.append([(row.counts, row.layer, row.seed) for row in found])
    assert rows[0] == rows[1] == rows[2]


@pytest.mark.parametrize("workers", [None, 2])
def test_a_stopped_training_resumes_to_the_same_probes(
    subject, small_tinyimagenet, train, workers, tmp_path, monkeypatch
):
    monkeypatch.setattr("rotation_ssl.fit.CHECK_EVERY", 1)
    monkeypatch.setattr("rotation_ssl.fit.CHECKPOINT_SECONDS", 0.0)
    # eight steps, two an epoch; with dropout
    recipe, file = dataclasses.replace(with_epochs(NONLINEAR, 4), milestones=(1, 3)), tmp_path / "training.pt"
    data = train if workers is None else open_labelled("tinyimagenet", small_tinyimagenet, "train", 64)

    def trained(file=None):
        torch.manual_seed(0)
        probes = build_probes(recipe, subject, ["conv4", "conv5"], 10)
        checkpoint = Checkpoint(file)
        train_probes(recipe, subject, probes, data, torch.arange(20), 1, workers or 0, checkpoint)
        return torch.cat([value.flatten() for probe in probes.values() for value in probe.state_dict().values()])

    def stopped(probes, batches, *args, **options):
        fit(probes, islice(batches, 5), *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(imagenet, "fit", stopped)
        with pytest.raises(ValueError, match="got 5 batches"):
            trained(file)
    assert torch.load(file, weights_only=True)["done"] == 5
    assert torch.equal(trained(file), trained())


def test_a_training_is_told_from_every_other(subject, train, small_tinyimagenet, tmp_path, monkeypatch):
    usual = (LINEAR, subject, ["conv4"], train, train, "x val")
    others = [
        (dataclasses.replace(LINEAR, lr=0.3), *usual[1:]),
        (LINEAR, load_subject("rotnet_alexnet", random=True, seed=1, size=64), *usual[2:]),
        (*usual[:2], ["conv4", "conv5"], *usual[3:]),
        (*usual[:3], open_labelled("tinyimagenet", small_tinyimagenet, "train", 48), *usual[4:]),
        (*usual[:3], open_labelled("tinyimagenet", small_tinyimagenet, "val", 64), *usual[4:]),
        (*usual, 5),
        (*usual, 0, 1),
    ]
    # the same images, not in memory
    streamed = (*usual[:3], open_labelled("tinyimagenet", small_tinyimagenet, "train", 64), *usual[4:])
    last, trainings = "training.evaluation.layers.check_decoding", [usual, *others, streamed]
    *opened, again = opened_checkpoints(
        monkeypatch, tmp_path, last, lambda *training, **more: next(measure_layers(*training, **more)), trainings
    )
    assert len(set(opened)) == len(opened) == 1 + len(others)
    assert again == opened[0]


def test_features_are_those_of_the_layers(subject):
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    maps = Frozen(subject.backbone, 64).whole_maps(["conv5", "conv2"])(images)
    with torch.no_grad():
        expected = subject.backbone.features[:3](preparation(subject.backbone, 64)(images))
    assert list(maps) == ["conv5", "conv2"]
    torch.testing.assert_close(maps["conv2"], expected)


def test_a_folder_has_its_classes_and_labels(small_cifar10, tmp_path):
    shutil.move(small_cifar10 / "test", small_cifar10 / "val")
    data = open_labelled("folder", small_cifar10, "val", 32)
    assert len(data.classes) == 10 and data.labels.tolist() == [i // 4 for i in range(40)]
    assert data.images.name_of(5).endswith(".png") and "/automobile/" in data.images.name_of(5)
    (small_cifar10 / "train" / "archive.tar").write_bytes(b"")
    (small_cifar10 / "train" / ".ipynb_checkpoints").mkdir()
    assert open_labelled("folder", small_cifar10, "val", 32).classes == data.classes, (
        "files and hidden folders are no classes"
    )
    (small_cifar10 / "val" / "zebra").mkdir()
    with pytest.raises(ValueError, match="contains classes that train does not have: zebra"):
        open_labelled("folder", small_cifar10, "val", 32)
    with pytest.raises(ValueError, match="no class folders in"):
        open_labelled("folder", tmp_path / "nowhere", "train", 32)


def test_held_out_images_are_apart(train):
    trained, held = split_holdout(train, 6)
    assert sorted([*trained.tolist(), *held.tolist()]) == list(range(20)) and len(held) == 6
    for holdout in (0, 20):
        with pytest.raises(ValueError, match=f"holdout must be 1 to 19 of the training images, got {holdout}"):
            split_holdout(train, holdout)


def test_a_broken_file_is_named(subject, small_tinyimagenet):
    broken = sorted(small_tinyimagenet.glob("train/*/images/*"))[7]
    broken.write_bytes(b"no image")
    data = open_labelled("tinyimagenet", small_tinyimagenet, "train", 64)
    with pytest.raises(ValueError, match=f"image .*{broken.name} does not decode: replace or remove it"):
        read_into_memory(data, 0)
    # and where the images are decoded as they are trained on
    again, val = (open_labelled("tinyimagenet", small_tinyimagenet, split, 64) for split in ("train", "val"))
    with pytest.raises(ValueError, match=f"image .*{broken.name} does not decode: replace or remove it"):
        next(iter(measure_layers(with_epochs(LINEAR, 1), subject, ["conv1"], again, val, "x val")))


def test_a_broken_file_of_torchvisions_data_sets_is_named(small_tinyimagenet):
    broken = sorted(small_tinyimagenet.glob("train/*/images/*"))[7]
    broken.write_bytes(b"no image")
    data = open_labelled("torch/image_folder", small_tinyimagenet / "train", "train", 64)
    with pytest.raises(ValueError, match=f"image .*{broken.name} does not decode: replace or remove it"):
        read_into_memory(data, 0)


def test_what_cannot_be_probed(subject, train):
    with pytest.raises(ValueError, match="no layer conv9 in this backbone; it has conv1"):
        build_probes(LINEAR, subject, ["conv9"], 10)
    resnet = load_subject("test_resnet", random=True, size=64)
    assert build_probes(LINEAR, resnet, ["layer4"], 10)
    with pytest.raises(ValueError, match="the layers of test_resnet after a layer are not known"):
        build_probes(NONLINEAR, resnet, ["layer4"], 10)
    # layers with dots in their names, of a network that gives tokens
    vit = load_subject("test_vit", random=True, size=160)
    assert list(build_probes(LINEAR, vit, ["blocks.0", "blocks.1"], 10)) == ["blocks.0", "blocks.1"]
    with pytest.raises(ValueError, match="takes 10 images a step, got 9"):
        train_probes(LINEAR, subject, build_probes(LINEAR, subject, ["conv1"], 10), train, torch.arange(9))
    hot = dataclasses.replace(LINEAR, lr=1e30)
    with pytest.raises(ValueError, match=r"the loss of imagenet-linear-cpu, conv1 became \w+ in step"):
        train_probes(hot, subject, build_probes(hot, subject, ["conv1"], 10), train, torch.arange(20))


def test_the_command_writes_rows_and_a_report(small_tinyimagenet, tmp_path, capsys, monkeypatch):
    arguments = ["imagenet-linear-cpu", "rotnet_alexnet", "--random", "--size", "64", "--dataset", "tinyimagenet"]
    arguments += [
        "--data",
        str(small_tinyimagenet),
        "--output",
        str(tmp_path / "out"),
        "--layers",
        "conv1",
        "conv3",
    ]
    with pytest.raises(SystemExit, match="2"):
        imagenet.main([*arguments, "--epochs", "0"])
    assert "argument --epochs: must be a whole number of at least 1, got 0" in capsys.readouterr().err
    assert imagenet.main(arguments) == 2
    assert "takes 192 images a step, got 20" in capsys.readouterr().err
    assert imagenet.main([*arguments, "--size", "32"]) == 2
    assert "rotnet_alexnet does not take images of 32 pixels" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(imagenet.LAYER_PROBES, "imagenet-linear-cpu", with_epochs(LINEAR, 2))
    assert imagenet.main([*arguments, "--seeds", "2"]) == 0
    assert imagenet.main([*arguments, "--epochs", "1"]) == 0
    rows = read_file(tmp_path / "out" / "rows.jsonl")
    assert [(row.layer, row.seed, row.budget) for row in rows] == [
        *(("conv1", 0, "cpu"), ("conv3", 0, "cpu"), ("conv1", 1, "cpu"), ("conv3", 1, "cpu")),
        *(("conv1", 0, ""), ("conv3", 0, "")),
    ]
    assert {(row.weights, row.data) for row in rows} == {("rotnet_alexnet.random", "Tiny-ImageNet val at 64 pixels")}
    assert [row.settings.split("; ")[1][:8] for row in rows] == 4 * ["2 epochs"] + 2 * ["1 epoch "]
    # what could not be kept is said before anything is trained
    monkeypatch.setattr(imagenet, "measure_layers", lambda *args: pytest.fail("trained"))
    (tmp_path / "file").touch()
    assert imagenet.main([*arguments, "--output", str(tmp_path / "file")]) == 2
    assert f"{tmp_path / 'file'} is no folder that one may write to: give another --output" in capsys.readouterr().err
    (tmp_path / "out" / "rows.jsonl").write_text("{}\n")
    assert imagenet.main(arguments) == 2
    assert "rows.jsonl, line 1 is not a result row" in capsys.readouterr().err
    report = (tmp_path / "out" / "report.md").read_text()
    assert "linear probe, max-pooled, SGD" in report and (tmp_path / "out" / "report.png").exists()


def test_a_broken_validation_image_is_found_before_the_training(subject, small_tinyimagenet, train, monkeypatch):
    val = open_labelled("tinyimagenet", small_tinyimagenet, "val", 64)
    broken = sorted(small_tinyimagenet.glob("val/images/*"))[3]
    broken.write_bytes(b"no image")
    monkeypatch.setattr(imagenet, "train_probes", lambda *args: pytest.fail("trained"))
    with pytest.raises(ValueError, match=f"image .*{broken.name} does not decode: replace or remove it"):
        next(iter(measure_layers(with_epochs(LINEAR, 1), subject, ["conv1"], train, val, "x val")))


def test_rows_say_what_they_are_of(subject, train):
    rows = list(
        measure_layers(with_epochs(LINEAR, 1), subject, ["conv1"], train, train, "Tiny-ImageNet val", 5, seed=3)
    )
    (row,) = rows
    assert (row.protocol, row.budget, row.layer, row.seed) == ("linear-sgd", "cpu", "conv1", 3)
    assert row.data == "Tiny-ImageNet, 5 training images" and row.n == 5 and row.value == row.correct / 5
    assert "max-pooled to 12 x 12" in row.settings and json.dumps(dataclasses.asdict(row))
    assert with_epochs(IMAGENET_LINEAR_PAPER, 70).milestones == (10, 30, 50)
    assert with_epochs(IMAGENET_LINEAR_PAPER, 1).milestones == (1, 1, 1), "the rate is the recipe's to begin with"
