"""Classification on a small VOCdevkit: what is frozen stays, what is learned beats chance, what is written is read."""

import dataclasses
import functools
import random
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_voc import write_small_voc
from torch import nn

from rotation_ssl.evaluation.frozen import preparation
from rotation_ssl.precision import resolved
from training.evaluation.subject import load_subject
from training.protocols import PROTOCOLS
from training.reporting.rows import read_file
from training.transfer import classification as voc
from training.transfer import detection, segmentation
from training.transfer.command import recipe_of, transfer_parser
from training.transfer.data import CLASSES, class_labels, read_annotations
from training.transfer.detector import build_detector
from training.transfer.metrics import mean_over_classes
from training.transfer.network import (
    Backbone,
    Draws,
    RunOptions,
    batches,
    smallest_side,
    train_network,
    transfer_network,
)
from training.transfer.recipes import (
    CLASSIFICATIONS,
    FAST_RCNNS,
    FASTER_RCNNS,
    SEGMENTATIONS,
    VOC_CLASSIFICATION,
    VOC_RECIPES,
    Splits,
)

TINY = ("--size", 64, "--fc-size", 16, "--steps", 3, "--images-per-step", 4)
# forking beside torch's threads is a warning from Python 3.12 on
ALONE = ("--workers", 0)


@pytest.fixture(scope="module")
def devkit(tmp_path_factory):
    return write_small_voc(tmp_path_factory.mktemp("voc"), train=10, test=6)


def run(*arguments):
    return voc.main([str(argument) for argument in (*arguments[:1], *ALONE, *arguments[1:])])


def recipe(steps=3, **changes):
    own = {"steps": steps, "lr": changes.pop("lr", 0.01), "precision": changes.pop("precision", "auto")}
    training = dataclasses.replace(VOC_CLASSIFICATION.training, **own)
    return dataclasses.replace(VOC_CLASSIFICATION, training=training, **changes)


def files_of(images):
    return [image.file for image in images]


@pytest.mark.parametrize("layers", voc.LAYERS)
def test_the_command_end_to_end(layers, devkit, tmp_path, capsys):
    arguments = ("rotnet_alexnet", "--random", "--data", devkit, "--output", tmp_path, "--layers", layers)
    assert run(*arguments, *TINY) == 0
    rows = read_file(tmp_path / "rows.jsonl")
    kinds = [f"voc-classification-{kind}" for kind in ("11-point", "area", "steps")]
    assert [row.protocol for row in rows] == kinds
    assert all(0 < row.value <= 1 and row.correct is None and row.n is None for row in rows)
    assert {(row.weights, row.layer, row.data, row.budget) for row in rows} == {
        ("rotnet_alexnet.random-rescaled", layers, "VOC2007 test", "")
    }
    assert rows[0].settings.startswith("2 classes, 10 crops of 64 pixels, trained on trainval, 3 steps of 4 images, ")
    assert "fresh fc6 and fc7 of 16" in rows[0].settings and "torchvision" in rows[0].versions
    said = capsys.readouterr().out
    assert "aeroplan" in said and "boat" not in said, "classes that the data have"
    state = load_file(tmp_path / "network.safetensors")
    assert (tmp_path / "report.md").exists() and state["head.fc.weight"].shape == (20, 16)


def test_published_weights_are_transferred(devkit, tmp_path):
    options = ("--size", 32, "--steps", 1, "--images-per-step", 2)
    assert run("rotnet_nin", "--data", devkit, "--output", tmp_path, *options) == 0
    row = read_file(tmp_path / "rows.jsonl")[0]
    assert (row.weights, row.layer) == ("rotnet_nin.cifar10", "all") and "layers rescaled" in row.settings
    other = tmp_path / "resnet"
    assert run("rotnet_resnet18", "--random", "--no-rescale", "--data", devkit, "--output", other, *options) == 0
    assert "rescaled" not in read_file(other / "rows.jsonl")[-1].settings


def test_a_failed_measurement_keeps_the_trained_network(devkit, tmp_path, tmp_path_factory, capsys, monkeypatch):
    arguments = ("rotnet_alexnet", "--random", "--data", devkit, "--output", tmp_path, *TINY)
    with monkeypatch.context() as patched:
        patched.setattr(voc, "classify", lambda *args: (_ for _ in ()).throw(OSError("no space left")))
        assert run(*arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: no space left"
    kept = (tmp_path / "network.safetensors").read_bytes()
    # another training does not write over it, and the same command measures it
    for other in (("--seed", 1), ("--lr", 0.5), ("--classes", *CLASSES[::-1]), ("--layers", "fc6-8")):
        assert run(*arguments, *other) == 2
        assert (
            "checkpoint.pt belongs to other options, images or weights: remove it, or give" in capsys.readouterr().err
        )
    own = tmp_path_factory.mktemp("weights") / "own.safetensors"
    save_file(timm.create_model("rotnet_alexnet").state_dict(), own)
    moved = write_small_voc(tmp_path_factory.mktemp("other"), train=10, test=6)
    for changed in ((*arguments, "--data", moved), ("rotnet_alexnet", "--weights", own, *arguments[2:])):
        assert run(*changed) == 2
        assert (
            "checkpoint.pt belongs to other options, images or weights: remove it, or give" in capsys.readouterr().err
        )
    with monkeypatch.context() as patched:
        patched.setattr("torch.optim.SGD.step", lambda *args: pytest.fail("it is trained"))
        assert run(*arguments) == 0
    assert len(read_file(tmp_path / "rows.jsonl")) == 3 and not (tmp_path / "checkpoint.pt").exists()
    assert run(*arguments) == 2
    assert "network.safetensors is another training's, or finished: give a new --output" in capsys.readouterr().err
    assert (tmp_path / "network.safetensors").read_bytes() == kept


def test_a_training_stopped_while_it_writes_can_be_run_again(devkit, tmp_path, monkeypatch):
    def stopped(model, file):
        Path(file).write_bytes(b"half")
        assert not (tmp_path / "network.safetensors").exists(), "what a kill leaves here is no network"
        raise KeyboardInterrupt

    arguments = ("rotnet_alexnet", "--random", "--data", devkit, "--output", tmp_path, *TINY)
    with monkeypatch.context() as patched:
        patched.setattr("training.transfer.network.save_model", stopped)
        assert run(*arguments) == 130
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert run(*arguments) == 0
    assert load_file(tmp_path / "network.safetensors")["head.fc.weight"].shape == (20, 16)


def test_trainings_have_folders_of_their_own(devkit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (("--layers", "fc6-8"), ("--layers", "all"), ("--layers", "all", "--seed", 1)):
        assert run("rotnet_alexnet", "--random", "--data", devkit, *TINY, *arguments) == 0
    files = sorted(str(file.relative_to(tmp_path / "runs" / "voc")) for file in tmp_path.rglob("network.safetensors"))
    names = ("all-seed0", "all-seed1", "fc6-8-seed0")
    assert files == [f"rotnet_alexnet.random-rescaled/classification-{name}/network.safetensors" for name in names]
    rows = [read_file(file)[0] for file in sorted(tmp_path.rglob("rows.jsonl"))]
    assert [(row.weights.partition(".")[2], row.seed) for row in rows] == [("random-rescaled", s) for s in (0, 1, 0)]
    assert rows[0].sha256 == rows[2].sha256 != rows[1].sha256
    one, other, _ = (load_file(tmp_path / "runs" / "voc" / file) for file in files)
    first = next(name for name in one if name.startswith("features."))
    assert not torch.equal(one[first], other[first]), "a seed's own convolutions"


def test_a_budget_is_that_of_a_recipe_as_it_is():
    """Every setting and every dataset of one's own makes a number of no budget."""
    parser = transfer_parser("voc", "")

    def budget(*options):
        args = parser.parse_args(["rotnet_alexnet", *options])
        return recipe_of(CLASSIFICATIONS[args.budget], args).budget

    assert budget() == budget("--seed", "3", "--workers", "4", "--output", "x") == budget("--random") == "paper"
    assert budget("--budget", "cpu") == budget("--budget", "cpu", "--year", "2007") == "cpu"
    own = "--steps 9", "--lr 1", "--images-per-step 2", "--no-rescale", "--fc-size 9", "--train train", "--classes car"
    for options in own:
        assert budget(*options.split()) == budget("--budget", "cpu", *options.split()) == "", options
    assert budget("--random", "--no-rescale") == "paper", "reported, by a name of its own"
    # what 'auto' is on this machine is the recipe's own; the other one is not
    assert sorted((budget("--precision", "fp32"), budget("--precision", "bf16"))) == ["", "paper"]


def test_options_change_a_recipe():
    parser = transfer_parser("voc", "")
    options = "--budget cpu --steps 7 --lr 0.5 --dropout 0.25 --clip 2 --weight-decay 0.03"
    options += " --train train --test val --no-rescale"
    args = parser.parse_args(["rotnet_alexnet", *options.split()])
    recipe = recipe_of(CLASSIFICATIONS["cpu"], args)
    assert (recipe.training.steps, recipe.training.lr, recipe.training.clip) == (7, 0.5, 2)
    assert recipe.training.weight_decay == 0.03
    assert recipe.dropout == 0.25 and recipe.training.rescale is False and recipe.training.precision in ("bf16", "fp32")
    assert recipe.splits == Splits("2007", "train", "val")
    assert recipe.training.schedule == CLASSIFICATIONS["cpu"].training.schedule


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (voc, CLASSIFICATIONS["cpu"]),
        (detection, FAST_RCNNS["cpu"]),
        (detection, FASTER_RCNNS["cpu"]),
        (segmentation, SEGMENTATIONS["cpu"]),
    ],
)
def test_every_command_takes_a_weight_decay(command, named):
    args = command.build_parser().parse_args(["rotnet_alexnet", "--budget", "cpu", "--weight-decay", "0.03"])
    recipe = recipe_of(named, args)
    assert named.training.weight_decay != 0.03 == recipe.training.weight_decay and recipe.budget == ""
    assert dataclasses.replace(recipe.training, weight_decay=named.training.weight_decay) == (
        resolved(named.training, "cpu")
    )


@pytest.mark.parametrize("named", [FAST_RCNNS["cpu"], FASTER_RCNNS["cpu"]])
def test_regions_are_those_of_the_command_line(named):
    args = detection.build_parser().parse_args(["rotnet_alexnet", "--regions", "36", "--fc-size", "16"])
    recipe = recipe_of(named, args)
    assert named.regions != 36 == recipe.regions and recipe.budget == ""
    network = transfer_network(load_subject("rotnet_alexnet", random=True, size=64), 20, [], 16, scaled=False)
    detector = build_detector(recipe, network, 20, given_regions=named.protocol == "voc-fast-rcnn")
    assert detector.roi_heads.fg_bg_sampler.batch_size_per_image == 36


@pytest.mark.parametrize("recipe", VOC_RECIPES.values(), ids=VOC_RECIPES)
def test_the_table_has_every_recipe(recipe):
    ids = [id for id in PROTOCOLS if id.startswith(recipe.protocol)]
    assert ids and (recipe.budget == "" or all(PROTOCOLS[id].recipes[recipe.budget] is recipe for id in ids))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_say_the_precision(precision, devkit, tmp_path):
    arguments = ("rotnet_alexnet", "--random", "--data", devkit, "--output", tmp_path, *TINY)
    assert run(*arguments, "--precision", precision) == 0
    assert read_file(tmp_path / "rows.jsonl")[0].settings.endswith(f", {precision}")
    assert load_file(tmp_path / "network.safetensors")["head.fc.weight"].dtype == torch.float32


def test_batched_crops_score_as_single_images_do(devkit, monkeypatch):
    images = read_annotations(devkit, "2007", "trainval")
    subject = load_subject("rotnet_alexnet", random=True, size=64)
    network = transfer_network(subject, 20, files_of(images), 16)
    prepare = preparation(subject.backbone, 64)
    settings = recipe(test_crops=4, precision="fp32")
    batched = voc.classify(settings, network, images, prepare, 64)
    monkeypatch.setattr(voc, "TEST_IMAGES", 1)
    single = voc.classify(settings, network, images, prepare, 64)
    assert single.shape == (10, 20) and single.std() > 0
    torch.testing.assert_close(batched, single, rtol=1e-4, atol=1e-5)
    rounded = voc.classify(recipe(test_crops=4, precision="bf16"), network, images, prepare, 64)
    assert rounded.dtype == torch.float32 and 0 < (rounded - single).norm() < 0.1 * single.norm()


def test_frozen_layers_do_not_move(devkit):
    images = read_annotations(devkit, "2007", "trainval")
    subject = load_subject("rotnet_alexnet", random=True, size=64)
    for layers, moves in (("fc6-8", False), ("all", True)):
        network = transfer_network(subject, 20, files_of(images), 16)
        before = {name: tensor.clone() for name, tensor in network.named_parameters()}
        prepare, labels = preparation(subject.backbone, 64), class_labels(images, 20)
        voc.train_classifier(recipe(), network, layers, images, labels, prepare, 64)
        for name, tensor in network.named_parameters():
            if not name.endswith("bias"):  # that of a unit which never speaks stays
                assert torch.equal(tensor, before[name]) is not (moves or name.startswith("head")), name
        assert not network.training
        assert [type(layer) for layer in network.head.fc6][-1] is nn.Dropout and network.head.drop.p == 0.5


def test_fc_layers_are_those_of_the_weights_or_fresh():
    convolutions = load_subject("rotnet_alexnet", random=True, size=64)
    subject = dataclasses.replace(convolutions, backbone=timm.create_model("rotnet_alexnet", fc_size=48))
    kept = transfer_network(subject, 5, [], scaled=False)
    torch.testing.assert_close(kept.head.fc7[0].weight.norm(1), fold_of(subject.backbone.head.fc7).norm(1))
    fresh = transfer_network(subject, 5, [], 32, scaled=False)
    assert fresh.head.fc6[0].weight.shape == (32, 9216) and fresh.head.fc.weight.shape == (5, 32)
    assert transfer_network(subject, 5, [], 0, scaled=False).head.fc.weight.shape == (5, 256)
    assert not any(isinstance(module, nn.BatchNorm1d) for module in fresh.modules())
    with pytest.raises(ValueError, match="has no fc6 and fc7"):
        transfer_network(load_subject("resnet18", random=True, size=64), 5, [], 32, scaled=False)


def test_weights_without_fc_layers_get_fresh_ones(tmp_path):
    backbone = timm.create_model("rotnet_alexnet", fc_size=0)
    save_file(backbone.state_dict(), tmp_path / "convolutions.safetensors")
    subject = load_subject("rotnet_alexnet", weights=tmp_path / "convolutions.safetensors", size=64)
    assert subject.backbone.head.fc_size == 0
    network = transfer_network(subject, 5, [], scaled=False)
    assert network.head.fc6[0].weight.shape == (4096, 9216) and network.head.fc.weight.shape == (5, 4096)


def fold_of(layer):
    linear, norm = layer[0], layer[1]
    return linear.weight * (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None]


def test_the_loss_by_hand():
    logits = torch.tensor([[0.0, 2.0, -1.0], [1.0, 0.0, 3.0]])
    labels = torch.tensor([[1, 0, -1], [-1, 1, 1]])
    p = logits.sigmoid()
    expected = -(p[0, 0].log() + (1 - p[0, 1]).log() + p[1, 1].log() + p[1, 2].log()) / 2
    torch.testing.assert_close(voc.multi_label_loss(logits, labels), expected)


def test_crops_are_squares_inside_the_image():
    image = Image.new("RGB", (50, 30), (10, 200, 30))
    for seed in range(20):
        crop = voc.random_crop(image, 24, (0.2, 2.0), random.Random(seed))
        # nothing from outside of the image, however small the scale
        assert crop.shape == (3, 24, 24) and crop.flatten(1).unique(dim=1).flatten().tolist() == [10, 200, 30]
    stripes = Image.linear_gradient("L").convert("RGB")
    sides = {tuple(voc.random_crop(stripes, 8, (1, 1), random.Random(seed)).flatten().tolist()) for seed in range(8)}
    assert len(sides) > 1


def test_crops_are_mirrored_or_not():
    # brighter from one side to the other
    ramp = Image.linear_gradient("L").rotate(90).convert("RGB")
    for scales in ((1, 1), (0.05, 0.05)):
        slopes = [voc.random_crop(ramp, 8, scales, random.Random(seed))[0].int().diff().sign() for seed in range(20)]
        assert all(slope.unique().numel() == 1 for slope in slopes), "of a row, all in one direction"
        assert {int(slope[0, 0]) for slope in slopes} == {-1, 1}


def test_steps_are_the_recipes(monkeypatch):
    given = []
    monkeypatch.setattr("training.transfer.network.fit", lambda *args, **options: given.append((args[3], options)))
    training = dataclasses.replace(VOC_CLASSIFICATION.training, lr=0.05, momentum=0.7, weight_decay=0.02, clip=3.0)
    network = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    train_network(training, network, [1], lambda image, rng: image, torch.stack, "x", RunOptions())
    ((optimizer, options),) = given
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"], options["clip"]) == (0.05, 0.7, 0.02, 3.0)
    assert list(map(id, group["params"])) == list(map(id, network[1].parameters()))


def test_a_sample_is_the_same_whoever_loads_it():
    draws = Draws(range(5), lambda image, rng: (image, rng.random()), 20, seed=3)
    backwards = [draws[i] for i in reversed(range(20))][::-1]
    assert backwards == [draws[i] for i in range(20)]
    assert all(sorted(index for index, _ in backwards[k : k + 5]) == list(range(5)) for k in range(0, 20, 5))
    assert len({value for _, value in backwards}) == 20


# Python 3.12 and later warn of every fork beside torch's threads
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_does_not_decode_is_named_by_whoever_reads_it(workers, tmp_path, capsys):
    devkit = write_small_voc(tmp_path / "voc", train=2, test=2)
    image = read_annotations(devkit, "2007", "test")[0].file
    # its header tells the size still
    image.write_bytes(image.read_bytes()[:1000])
    arguments = ("rotnet_alexnet", "--random", "--data", devkit, "--output", tmp_path / "out", *TINY)
    assert run(*arguments, "--workers", workers) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert error.startswith(f"error: image {image} does not decode") and not (tmp_path / "out").exists()


# Python 3.12 and later warn of every fork beside torch's threads
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_processes_that_read_images_change_nothing(devkit):
    files = list(enumerate(files_of(read_annotations(devkit, "2007", "train"))))
    draws = Draws(files, functools.partial(voc._crop, 16, (0.5, 2.0)), 12, seed=0)
    alone, together = (list(batches(draws, 4, workers)) for workers in (0, 2))
    assert [[index for index, _ in batch] for batch in alone] == [[index for index, _ in batch] for batch in together]
    assert all(torch.equal(a[1], b[1]) for x, y in zip(alone, together, strict=True) for a, b in zip(x, y, strict=True))


def test_the_map_lies_over_its_image():
    """A cell of the padded AlexNet's conv5 answers to the pixels around its own place."""
    subject = load_subject("rotnet_alexnet", random=True, size=64)
    backbone = Backbone(transfer_network(subject, 20, [], 0, scaled=False))
    assert (backbone.out_channels, backbone.reduction) == (256, 16)
    for height, width in ((160, 224), (600, 800), (65, 97)):
        with torch.no_grad():
            rows, columns = backbone(torch.zeros(1, 3, height, width)).shape[-2:]
        assert abs(rows - height / 16) <= 1 and abs(columns - width / 16) <= 1
    image = torch.zeros(1, 3, 320, 320, requires_grad=True)
    backbone(image + torch.randn(1, 3, 320, 320) * 0.1)[0, :, 10, 10].sum().backward()
    reach = image.grad.abs().sum((0, 1))
    # the middle of what the cell sees, against the middle of its place: pixels 160 to 176
    middle = (reach.sum(1) * (torch.arange(320) + 0.5)).sum() / reach.sum()
    assert abs(float(middle) - 168) < 6
    assert smallest_side(backbone) <= 31


def test_one_seed_one_result(devkit):
    images = read_annotations(devkit, "2007", "train")

    def scores(seed):
        subject = load_subject("rotnet_alexnet", random=True, size=64)
        network = transfer_network(subject, 20, files_of(images), 16, seed=seed)
        prepare, labels = preparation(subject.backbone, 64), class_labels(images, 20)
        voc.train_classifier(recipe(), network, "all", images, labels, prepare, 64, RunOptions(seed=seed))
        return voc.classify(recipe(), network, images, prepare, 64, RunOptions(seed=seed))

    assert torch.equal(scores(1), scores(1)) and not torch.equal(scores(1), scores(2))


@pytest.mark.slow
@pytest.mark.parametrize("layers", voc.LAYERS)
def test_it_learns(layers, tmp_path):
    """Three classes, an object in each image: chance is the part of images that show a class, about a third."""
    classes = ("aeroplane", "horse", "car")
    devkit = write_small_voc(tmp_path, train=60, test=40, classes=classes, objects=(1, 1), sides=(96, 124))
    train, test = (read_annotations(devkit, "2007", split, CLASSES) for split in ("trainval", "test"))
    shown = class_labels(test, 20).float()
    chance = float((shown == 1).float().sum(0).sum() / (shown >= 0).float()[:, shown.amax(0) == 1].sum())
    assert 0.25 < chance < 0.4
    subject = load_subject("rotnet_alexnet", random=True, size=64)
    network = transfer_network(subject, 20, files_of(train), 64)
    # whole images, nearly: a few minutes' worth of objects cannot be learned from their parts
    settings = recipe(steps=150, lr=0.01, scales=(0.45, 0.6), test_crops=4, dropout=0.0)
    by_class = voc.measure_classification(settings, subject, network, layers, train, test, 20)
    found = {kind: mean_over_classes(values) for kind, values in by_class.items()}
    assert found["11-point"] > chance + 0.25 and found["area"] > chance + 0.25, (chance, found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rotnet_alexnet", "--random", "--year", "2012"], "expected VOCdevkit/VOC2012"),
        (["rotnet_alexnet", "--random", "--test", "val2"], "there are the splits"),
        (["rotnet_alexnet", "--random", "--test", "train"], "000001.jpg is trained on and measured ("),
        (["rotnet_alexnet", "--random", "--classes", "car"], "class 'aeroplane': the classes are car"),
        (["rotnet_alexnet", "--random", "--classes", "car", "car"], "names a class twice"),
        (["rotnet_alexnet", "--random", "--size", "32"], "does not take images of 32 pixels"),
        (["rotnet_alexnet", "--random", "--layers", "fc6-8", "--fc-size", "0", "--steps", "1"], "give --layers all"),
        (["rotnet_resnet18", "--random", "--size", "64"], "cannot be rescaled"),
        (["rotnet_alexnet", "--random", "--lr", "0"], "lr must be above 0"),
        (["rotnet_nin3"], "has no pretrained weights"),
    ],
)
def test_bad_input_is_a_one_line_error(arguments, message, devkit, capsys, tmp_path):
    fitting = [] if "--size" in arguments else ["--size", "64"]
    assert run(*arguments, "--data", devkit, "--output", tmp_path / "out", *fitting) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()
