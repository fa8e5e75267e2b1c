"""Training on labels: what is frozen stays, what is drawn is what was asked for, and a handful can be learned."""

import dataclasses
from itertools import islice

import pytest
import torch
from conftest import opened_checkpoints, spy_on_first_step

from rotation_ssl.evaluation.frozen import preparation
from rotation_ssl.fit import Checkpoint, fit
from rotation_ssl.labelled import labels_subset
from training.evaluation import finetune
from training.evaluation.recipes import FINETUNES
from training.evaluation.subject import load_subject
from training.reporting.rows import read_file

NAME = "rotnet_nin.cifar10"


def run(*arguments):
    return finetune.main([str(argument) for argument in arguments])


def short(name, **changes):
    return dataclasses.replace(FINETUNES[name], **{"images": 96, "batch_size": 16} | changes)


@pytest.mark.parametrize(
    ("name", "epochs", "drops"),
    [("few-labels-paper", 100, [35, 70, 85]), ("supervised-paper", 200, [60, 120, 160])],
)
def test_the_paper_budgets_are_the_authors(name, epochs, drops):
    # config/CIFAR10_ConvClassifier_on_RotNet_NIN4blocks_Conv2_feats_K20.py and config/CIFAR10_supervised_NIN_K20.py
    recipe = FINETUNES[name]
    assert (recipe.images, recipe.batch_size, recipe.lr, recipe.schedule.factor) == (epochs * 50_000, 128, 0.1, 0.2)
    assert [milestone * epochs for milestone in recipe.schedule.milestones] == pytest.approx(drops)


@pytest.mark.parametrize("recipe", [name for name in FINETUNES if name.endswith("-cpu")])
def test_every_recipe_end_to_end(recipe, small_cifar10, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(FINETUNES, recipe, dataclasses.replace(FINETUNES[recipe], batch_size=16))
    arguments = (recipe, "rotnet_nin", "--images", 32, "--data", small_cifar10, "--output", tmp_path)
    assert run(*arguments, "--labels-per-class", 2, 4) == 0
    rows = read_file(tmp_path / "rows.jsonl")
    assert [(row.labels_per_class, row.draw, row.seed) for row in rows] == [(2, "first", 0), (4, "first", 0)]
    weights = "rotnet_nin.random" if recipe == "supervised-cpu" else NAME
    assert {(row.weights, row.protocol, row.layer) for row in rows} == {(weights, FINETUNES[recipe].protocol, "block2")}
    assert all(row.n == 40 and sum(row.counts) == row.correct and "32 crops" in row.settings for row in rows)
    assert "labels a class (first)" in capsys.readouterr().out and (tmp_path / "report.png").exists()
    assert {row.budget for row in rows} == {""}, "32 crops are not the recipe's budget"
    # different K are different numbers, not seeds of one
    report = (tmp_path / "report.md").read_text()
    for row in rows:
        assert f"| {row.title}, first {row.labels_per_class} of each class | {100 * row.value:.2f} % |" in report


def test_a_frozen_backbone_does_not_move_and_a_trained_one_does(images):
    for name, moves in (("few-labels-cpu", False), ("finetune-conv-cpu", True)):
        subject = load_subject(NAME)
        network = finetune.build_network(short(name), subject, "block2", 10)
        before = {key: tensor.clone() for key, tensor in network.backbone.state_dict().items()}
        assert len(network.backbone.blocks) == 2, "later blocks are dropped"
        prepare = preparation(subject.backbone, 32)
        finetune.train_network(short(name), network, images.train, prepare)
        same = all(torch.equal(tensor, before[key]) for key, tensor in network.backbone.state_dict().items())
        assert same is not moves and not network.training
    network = finetune.build_network(short("few-labels-cpu"), load_subject(NAME), "block2", 10)
    network.train()
    assert network.classifier.training and not any(module.training for module in network.backbone.modules())


def test_the_map_is_the_layers(images):
    subject = load_subject(NAME)
    batch = preparation(subject.backbone, 32)(images.test.images[:2])
    expected = subject.backbone.forward_intermediates(batch, intermediates_only=True)
    for index, layer in enumerate(("block1", "block2")):
        network = finetune.build_network(short("few-labels-cpu"), load_subject(NAME), layer, 10)
        torch.testing.assert_close(network.maps(batch), expected[index])


def test_a_handful_is_overfitted(images):
    few = images.train.subset(torch.arange(8))
    # tested on the handful, then on it with wrong labels
    labels = torch.cat([few.labels, (few.labels + 1) % 10])
    test = dataclasses.replace(few, images=few.images.repeat(2, 1, 1, 1), labels=labels)
    recipe = short("supervised-cpu", images=640, batch_size=8, padding=0, lr=0.02)
    subject = finetune.finetune_subject(recipe, "rotnet_nin", 0)
    row = finetune.measure_finetuned(recipe, subject, "block1", dataclasses.replace(images, train=few, test=test))
    # 16 images in ten parts are six of two and four of one
    assert row.counts == (2, 2, 2, 2, 0, 0, 0, 0, 0, 0) and row.settings.endswith(", training accuracy 100.0 %")


def test_the_seed_decides(images):
    def counts(seed):
        recipe = short("few-labels-cpu")
        return finetune.measure_finetuned(recipe, load_subject(NAME), "block1", images, seed=seed)

    assert counts(3).counts == counts(3).counts
    random = [finetune.finetune_subject(FINETUNES["supervised-cpu"], "rotnet_nin", seed) for seed in (0, 1)]
    assert random[0].sha256 != random[1].sha256 and {subject.name for subject in random} == {"rotnet_nin.random"}


def test_labels_by_hand(images):
    data = dataclasses.replace(
        images.train,
        images=torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1),
        labels=torch.tensor([1, 0, 1, 1, 0, 0]),
        classes=("a", "b"),
    )
    assert labels_subset(data, 2).images.flatten().tolist() == [0, 1, 2, 4]
    assert labels_subset(data, 1).images.flatten().tolist() == [0, 1]
    drawn = {
        tuple(labels_subset(data, 2, torch.Generator().manual_seed(seed)).images.flatten().tolist())
        for seed in range(30)
    }
    assert len(drawn) == 9, "each of the 3 x 3 pairs"
    with pytest.raises(ValueError, match="labels_per_class must be 1 to 3, the images of a, got 4"):
        labels_subset(data, 4)


def test_batches_are_permutations_one_after_the_other(images, monkeypatch):
    found = []
    monkeypatch.setattr(finetune, "fit", lambda network, batches, *args, **options: found.extend(batches))
    network = finetune.build_network(short("few-labels-cpu"), load_subject(NAME), "block1", 10)
    few = images.train.subset(torch.arange(5))
    finetune.train_network(short("few-labels-cpu", images=30, batch_size=3), network, few, torch.Tensor.float)
    assert len(found) == 10
    assert all(sorted(row) == [0, 1, 2, 3, 4] for row in torch.tensor(found).view(6, 5).tolist())
    # as the published numbers were trained
    generator = torch.Generator().manual_seed(0)
    expected = torch.cat([torch.randperm(5, generator=generator) for _ in range(6)])
    assert torch.equal(torch.tensor(found).flatten(), expected)
    found.clear()
    finetune.train_network(short("few-labels-cpu", images=128, batch_size=128), network, few, torch.Tensor.float)
    assert len(found) == 1 and len(found[0]) == 128


@pytest.mark.parametrize("name", ["few-labels-cpu", "finetune-nonlinear-cpu"])
def test_a_stopped_training_resumes_to_the_same_network(name, images, tmp_path, monkeypatch):
    monkeypatch.setattr("rotation_ssl.fit.CHECK_EVERY", 1)
    monkeypatch.setattr("rotation_ssl.fit.CHECKPOINT_SECONDS", 0.0)
    # six steps of 16 images: it stops in the middle of a permutation
    recipe, few, file = short(name), images.train.subset(torch.arange(20)), tmp_path / "training.pt"

    def trained(file=None):
        network = finetune.build_network(recipe, load_subject(NAME), "block1", 10)
        checkpoint = Checkpoint(file)
        finetune.train_network(recipe, network, few, torch.Tensor.float, seed=2, checkpoint=checkpoint)
        return torch.cat([parameter.flatten() for parameter in network.state_dict().values()])

    def stopped(network, batches, *args, **options):
        fit(network, islice(batches, 4), *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "fit", stopped)
        with pytest.raises(ValueError, match="got 4 batches"):
            trained(file)
    assert torch.load(file, weights_only=True)["done"] == 4
    assert torch.equal(trained(file), trained())


def test_a_training_is_told_from_every_other(images, tmp_path, monkeypatch):
    usual = recipe, subject, layer, _ = short("few-labels-cpu"), load_subject(NAME), "block1", images
    others = [
        (dataclasses.replace(recipe, lr=0.3), *usual[1:]),
        (recipe, load_subject("rotnet_nin", random=True), *usual[2:]),
        (recipe, load_subject(NAME, size=40), *usual[2:]),
        (*usual[:2], "block2", images),
        (*usual, 2),
        (*usual, 3),
        (*usual, 2, "random"),
        (*usual, None, "first", 1),
        (recipe, subject, layer, dataclasses.replace(images, train=images.test.subset(torch.arange(20)))),
    ]
    last, trainings = "training.evaluation.finetune.build_network", [usual, *others]
    opened = opened_checkpoints(monkeypatch, tmp_path, last, finetune.measure_finetuned, trainings)
    assert len(set(opened)) == len(opened) == 1 + len(others)


@pytest.mark.parametrize(
    ("name", "rates"),
    [("few-labels-cpu", [0.05]), ("finetune-conv-cpu", [0.05, 0.003]), ("supervised-cpu", [0.05, 0.05])],
)
def test_steps_and_crops_are_the_recipes(name, rates, images, monkeypatch):
    optimizers, crops = spy_on_first_step(monkeypatch, finetune)
    recipe = short(name, batch_size=2, lr=0.05, backbone_lr=0.003, momentum=0.7, weight_decay=0.02)
    subject = load_subject(NAME)
    network = finetune.build_network(recipe, subject, "block1", 10)
    finetune.train_network(recipe, network, images.train, preparation(subject.backbone, 32))
    groups = optimizers[0].param_groups
    assert [(group["lr"], group["momentum"], group["weight_decay"]) for group in groups] == [
        (rate, 0.7, 0.02) for rate in rates
    ]
    parts = (network.classifier, network.backbone)[: len(rates)]
    assert all(
        list(map(id, group["params"])) == list(map(id, part.parameters()))
        for group, part in zip(groups, parts, strict=True)
    )
    assert crops == [(32, 4, "constant", True)], "half of them mirrored"


def test_any_timm_model_is_cut_at_a_layer(images):
    subject = load_subject("resnet18", random=True, size=32)
    row = finetune.measure_finetuned(short("finetune-conv-cpu", images=32), subject, "layer2", images)
    assert row.layer == "layer2" and row.labels_per_class is None and row.draw == ""


def test_random_draws_differ_by_seed_and_are_kept_apart(small_cifar10, tmp_path, monkeypatch):
    monkeypatch.setitem(FINETUNES, "few-labels-cpu", short("few-labels-cpu"))
    arguments = ("few-labels-cpu", "rotnet_nin", "--images", 16, "--data", small_cifar10, "--output", tmp_path)
    assert run(*arguments, "--labels-per-class", 1, "--draw", "random", "--seeds", 2) == 0
    assert run(*arguments, "--labels-per-class", 1, "--seed", 5) == 0
    rows = read_file(tmp_path / "rows.jsonl")
    assert [(row.draw, row.seed) for row in rows] == [("random", 0), ("random", 1), ("first", 5)]
    with pytest.raises(SystemExit, match="2"):
        run(*arguments, "--seeds", 0)
    assert " ± " in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["supervised-cpu", "rotnet_nin", "--weights", "mine.safetensors"], "leave the weights file out"),
        (["few-labels-cpu", "rotnet_nin", "--images", "100"], "takes 128 images a step, --images 100 is too few"),
        (["few-labels-cpu", "rotnet_nin", "--record"], "this is not the whole of CIFAR-10"),
        (["few-labels-cpu", "rotnet_nin", "--labels-per-class", "5"], "must be 1 to 4, the images of"),
        (["few-labels-cpu", "rotnet_nin", "--layer", "conv1"], "it has block1, block2, block3, block4"),
        (["few-labels-cpu", "resnet18", "--random", "--size", "32"], "no recommended layer: choose --layer from act1"),
        (["few-labels-cpu", "rotnet_nin", "--images", "16", "--record"], "leave out what changes them"),
        (["few-labels-cpu", "nobody"], "no model 'nobody'"),
    ],
)
def test_bad_input_is_a_one_line_error(arguments, message, small_cifar10, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("training.reporting.rows.current_commit", lambda: "0" * 40)
    assert run(*arguments, "--data", small_cifar10, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()
