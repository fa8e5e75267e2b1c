"""`rotation-ssl evaluate`: what each layer of a backbone is worth on labelled images of one's own."""

import json
import re
import shutil
import sys

import pytest
import timm
import torch
from conftest import SAMPLES, shorten_probes

from rotation_ssl import cli, machine
from rotation_ssl.cli import evaluate
from rotation_ssl.evaluation import measure, report
from rotation_ssl.evaluation.frozen import Frozen
from rotation_ssl.evaluation.protocols import PROTOCOLS, ProbeRecipe, Protocol
from rotation_ssl.labelled import LabelledImages, LabelledSplits


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """The CIFAR-10 samples by class, 30 to train on and 10 to test on."""
    root = tmp_path_factory.mktemp("labelled")
    for i, file in enumerate(sorted((SAMPLES / "cifar10").glob("*.png"))):
        folder = root / ("val" if i % 4 == 3 else "train") / f"class{i % 2 if i % 4 != 3 else (i // 4) % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file.name).write_bytes(file.read_bytes())
    return root


def test_every_layer_by_every_protocol(labelled, tmp_path, capsys, monkeypatch):
    shorten_probes(monkeypatch, epochs=2, milestones=(1,))
    output = tmp_path / "report"
    assert cli.main(["evaluate", "rotnet_nin", "--data", str(labelled), "--output", str(output)]) == 0
    told = capsys.readouterr().out
    results = json.loads((output / "report.json").read_text())
    layers = ["block1", "block2", "block3", "block4"]
    protocols = ["knn", "linear", "nonlinear", "conv"]
    assert {(r["protocol"], r["layer"]) for r in results} == {
        ("rotation", ""),
        *((protocol, layer) for protocol in protocols for layer in layers),
    }
    for result in results:
        assert result["value"] == result["correct"] / result["n"] and result["settings"]
        assert not result["layer"] or "; features in " in result["settings"]
        assert result["n"] == (40 if result["protocol"] == "rotation" else 10)
        assert f"({result['correct']} of {result['n']}, " in told
    assert "| protocol | block1 | block2 | block3 | block4 |" in (output / "report.md").read_text()
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["evaluate", "rotnet_nin", "--data", str(labelled), "--output", str(output)]) == 2
    assert "already contains a report" in capsys.readouterr().err


def test_only_some_of_it_and_of_any_backbone(labelled, tmp_path, capsys):
    arguments = ["evaluate", "local-dir:" + str(tmp_path / "mine"), "--data", str(labelled), "--output"]
    small = ["--size", "32", "--steps", "1", "--images-per-step", "4", "--precision", "fp32", "--tracker", "none"]
    made = ["pretrain", "--data", str(labelled), "--model", "test_resnet", "--output", str(tmp_path / "mine")]
    assert cli.main([*made, *small]) == 0
    assert cli.main([*arguments, str(tmp_path / "r"), "--only", "knn", "--layers", "layer1", "layer3"]) == 0
    results = json.loads((tmp_path / "r" / "report.json").read_text())
    assert [(r["protocol"], r["layer"]) for r in results] == [("knn", "layer1"), ("knn", "layer3")]
    assert cli.main([*arguments, str(tmp_path / "s"), "--layers", "block9"]) == 2
    assert "no layer block9 in local-dir:" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_too_few_images_are_refused_before_anything_is_reported(labelled, tmp_path, capsys):
    for split in ("train", "test"):
        shutil.copytree(labelled / "val", tmp_path / "few" / split)
    output = tmp_path / "report"
    for _ in range(2):
        assert cli.main(["evaluate", "rotnet_nin", "--data", str(tmp_path / "few"), "--output", str(output)]) == 2
        assert "k-NN needs 20 training images or more, got 10" in capsys.readouterr().err
        assert not output.exists()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--only", "rotation", "--layers", "conv1"], "--layers is for k-NN and probes"),
        (["--size", "30"], "test_vit does not take images of 30 pixels ("),
        (["--output", "a file"], "a file is not a folder: give another --output"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_images_are_read(labelled, tmp_path, capsys, monkeypatch, options, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").touch()
    monkeypatch.setattr(evaluate, "load_folder_split", None)
    monkeypatch.setattr(evaluate, "load_model", lambda name, device: timm.create_model(name, num_classes=4))
    assert cli.main(["evaluate", "test_vit", "--data", str(labelled), "--output", "r", *options]) == 2
    assert why in capsys.readouterr().err


def test_images_that_do_not_fit_into_memory_are_refused_before_they_are_read(labelled, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "load_folder_split", None)
    monkeypatch.setattr(machine, "available_memory", lambda: 1000)
    assert cli.main(["evaluate", "rotnet_nin", "--data", str(labelled), "--output", str(tmp_path / "r")]) == 2
    assert re.search(
        r"images of 32 pixels need 0\.0 GiB of memory, 0\.0 are available: give fewer", capsys.readouterr().err
    )


def test_images_without_classes_are_refused(labelled, tmp_path, capsys):
    assert cli.main(["evaluate", "rotnet_nin", "--data", str(SAMPLES), "--output", str(tmp_path / "r")]) == 2
    assert f"data folder {SAMPLES / 'train'} does not exist" in capsys.readouterr().err


def test_without_matplotlib_the_numbers_are_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    number = measure.Number(measure.Measurement("knn", "", "block1"), (1,) * 10, 20, "k = 20", 1.0)
    with pytest.raises(ImportError, match=r"no figure without matplotlib: pip install 'rotation-ssl\[demo\]'"):
        report.write_report(tmp_path, [report.reported(number, "mine", "my images")])
    assert json.loads((tmp_path / "report.json").read_text())[0]["value"] == 0.5
    assert "| k-NN | 50.00 % |" in (tmp_path / "report.md").read_text()


def test_the_command_asks_for_matplotlib_before_its_work(labelled, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["evaluate", "rotnet_nin", "--data", str(labelled), "--output", str(tmp_path / "r")]) == 2
    assert capsys.readouterr().err == "error: no figure without matplotlib: pip install 'rotation-ssl[demo]'\n"
    assert not (tmp_path / "r").exists()


def test_rotation_accuracy_that_is_asked_for_is_not_passed_over(labelled, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", lambda name, device: timm.create_model(name, num_classes=10))
    arguments = ["evaluate", "test_resnet", "--data", str(labelled), "--size", "32", "--output", str(tmp_path / "r")]
    assert cli.main([*arguments, "--only", "rotation"]) == 2
    assert "rotation accuracy needs a network with 4 outputs, this one has 10: leave it out" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_new_probe_is_a_function_and_an_entry_of_the_table(labelled, tmp_path, capsys, monkeypatch):
    """Options, numbers, text and figures follow."""

    def centroid_probe(features, classes):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(features[0].numel(), classes))

    recipe = ProbeRecipe(epochs=2, milestones=(), views=2, grid=2, batch_size=8)
    toy = Protocol("toy", "toy probe", "#000000", {"cached": recipe}, centroid_probe)
    monkeypatch.setitem(PROTOCOLS, "toy", toy)
    arguments = ["evaluate", "rotnet_nin", "--data", str(labelled), "--output", str(tmp_path / "r")]
    assert cli.main([*arguments, "--only", "toy", "--layers", "block3"]) == 0
    (result,) = json.loads((tmp_path / "r" / "report.json").read_text())
    assert (result["protocol"], result["budget"], result["layer"]) == ("toy", "cached", "block3")
    assert "toy probe (cached) block3: " in capsys.readouterr().out
    assert "| toy probe (cached) |" in (tmp_path / "r" / "report.md").read_text()


def test_cached_probes_use_all_of_their_views(monkeypatch):
    shorten_probes(monkeypatch, ids=["nonlinear"], epochs=3, lr=0.05, momentum=0.7, weight_decay=0.02)
    recipe, trained, drawn = PROTOCOLS["nonlinear"].recipes["cached"], [], []

    def fill(images, size, padding, mode, flip, generator):
        """Each view has a value of its own, as has the image itself, 0."""
        drawn.append(flip)
        return torch.full_like(images, len(drawn))

    def train(probe, batches, **settings):
        trained.append(
            ({value for epoch in range(3) for f, _ in batches(epoch) for value in f.unique().tolist()}, settings)
        )

    def pixels(frozen, images, grids, bar=None):
        return {layer: images[:, :1, :grid, :grid].bfloat16() for layer, grid in grids.items()}

    monkeypatch.setattr(measure, "crop_and_flip", fill)
    monkeypatch.setattr(measure, "train_probe", train)
    monkeypatch.setattr(Frozen, "maps", pixels)
    data = LabelledImages(torch.zeros(20, 3, 32, 32, dtype=torch.uint8), torch.arange(20) % 2, ("a", "b"))
    frozen = Frozen(timm.create_model("rotnet_nin").eval(), 32)
    measurement = measure.Measurement("nonlinear", "cached", "block2", 0)
    list(measure.measure_features(frozen, LabelledSplits("twenty", data, data), [measurement]))
    ((values, settings),) = trained
    assert recipe.views == 4 and values == {0, 1, 2, 3}
    assert drawn == [True] * 3, "half of the crops may be mirrored"
    assert {name: settings[name] for name in ("lr", "momentum", "weight_decay")} == {
        "lr": 0.05, "momentum": 0.7, "weight_decay": 0.02,
    }  # fmt: skip


def test_the_precision_that_is_asked_for_is_that_of_the_features(labelled, tmp_path, monkeypatch):
    # of which the default is one, whatever the machine
    monkeypatch.setattr(evaluate, "load_model", lambda name, device: timm.create_model(name, num_classes=4))
    for precision in ("fp32", "bf16"):
        arguments = ["evaluate", "test_resnet", "--data", str(labelled), "--output", str(tmp_path / precision)]
        arguments += ["--size", "32", "--only", "knn", "--layers", "layer4", "--precision", precision]
        assert cli.main(arguments) == 0
        (result,) = json.loads((tmp_path / precision / "report.json").read_text())
        assert result["settings"].endswith(f"; features in {precision}")


@pytest.mark.parametrize(
    ("protocol", "budget", "message"),
    [
        ("spline", "cached", "no protocol 'spline'; there are rotation, knn, linear, nonlinear, conv"),
        ("nonlinear", "cheap", "protocol nonlinear has no budget 'cheap'; it has 'cached', 'paper'"),
        ("knn", "cached", "protocol knn has no budget 'cached'; it has ''"),
    ],
)
def test_an_unknown_protocol_or_budget_is_an_error(protocol, budget, message):
    with pytest.raises(ValueError, match=message):
        measure.Measurement(protocol, budget, "block1")
