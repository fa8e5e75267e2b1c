"""docs/imagenet.md, done: its commands, on a small folder, small images and small fc layers."""

import dataclasses
import re
import shlex
import shutil

from conftest import ROOT

from training.__main__ import main
from training.evaluation import layers
from training.evaluation.recipes import LAYER_PROBES
from training.protocols import PROTOCOLS
from training.recipes import RECIPES
from training.reporting.pages import layer_table
from training.reporting.rows import read_rows

PAGE = (ROOT / "docs" / "imagenet.md").read_text()
SMALL = {
    "pretrain": ["--device", "cpu", "--steps", "1", "--images-per-step", "2", "--size", "80", "--tracker", "none"],
    "probe-layers": ["--epochs", "1", "--size", "64", "--device", "cpu"],
}


def test_the_page(small_cifar10, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ILSVRC2012", "PLACES205"):
        shutil.copytree(small_cifar10 / "train", tmp_path / name / "train")
        shutil.copytree(small_cifar10 / "test", tmp_path / name / "val")
    for name in ("alexnet-imagenet-paper", "alexnet-places205-paper"):
        monkeypatch.setitem(RECIPES, name, dataclasses.replace(RECIPES[name], model_args=(("fc_size", 16),)))
    for name, recipe in LAYER_PROBES.items():
        monkeypatch.setitem(LAYER_PROBES, name, dataclasses.replace(recipe, batch_size=20, image_size=64, fc_size=16))
    # the network's own fc layers, which the weights of the first command decide elsewhere, are 4096 wide
    monkeypatch.setattr("timm.create_model", narrow(layers.timm.create_model))
    commands = [command for command in page_commands() if not of_bundled_weights(command)]
    assert len(commands) == 5
    for command in commands:
        words = shlex.split(command)
        assert main([*words[3:], *SMALL[words[3]], *less_workers(words)]) == 0, command
        output = tmp_path / words[words.index("--output") + 1]
        assert (output / ("report.md" if words[3] == "probe-layers" else "model.safetensors")).is_file()
    (linear,) = [read for read in (tmp_path / "runs" / "imagenet" / "linear").glob("rows.jsonl")]
    assert len(linear.read_text().splitlines()) == 5


def test_the_commands_of_the_bundled_weights(small_cifar10, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sets = tmp_path / "SETS"
    for name in ("imagenette2-320", "imagewoof2-320"):
        shutil.copytree(small_cifar10 / "train", sets / name / "train")
        shutil.copytree(small_cifar10 / "test", sets / name / "val")
    places = sets / "miniplaces" / "data"
    shutil.copytree(small_cifar10 / "train", places / "images" / "train")
    files = sorted((places / "images").rglob("*.png"))
    classes = sorted({file.parent for file in files})
    listed = "".join(f"{file.relative_to(places / 'images')} {classes.index(file.parent)}\n" for file in files)
    for name in ("train", "val"):
        (places / f"{name}.txt").write_text(listed)
    for name, recipe in LAYER_PROBES.items():
        monkeypatch.setitem(LAYER_PROBES, name, dataclasses.replace(recipe, batch_size=20))
    # check measures images that were not reported: an epoch tells as much as ten
    short = layers.with_epochs(LAYER_PROBES["imagenet-linear-cpu"], 1)
    monkeypatch.setitem(PROTOCOLS["linear-sgd"].recipes, "cpu", short)
    *probes, again = (shlex.split(command)[3:] for command in page_commands() if of_bundled_weights(command))
    for probe in probes:
        assert main([*probe, *SMALL[probe[0]]]) == 0
    for output in ("miniplaces", "imagenet20"):
        rows = (tmp_path / "runs" / "imagenet" / output / "rows.jsonl").read_text()
        assert rows.count('"weights": "rotnet_alexnet.photos"') == 5
    assert again[0] == "check" and main(again) == 1
    assert "measured other images (MiniPlaces val, 40)" in capsys.readouterr().out


def page_commands():
    return re.findall(r"^python -m .*$", PAGE, re.MULTILINE)


def of_bundled_weights(command):
    return "SETS" in command


def narrow(create_model):
    """timm.create_model, with fc layers of 16 for AlexNet."""

    def create(name, *arguments, **kwargs):
        if name == "rotnet_alexnet":
            kwargs = {"fc_size": 16} | kwargs
        return create_model(name, *arguments, **kwargs)

    return create


def less_workers(words):
    return ["--workers", "1" if words[3] == "probe-layers" else "0"]


def test_the_papers_numbers_are_those_of_the_rows():
    assert layer_table(read_rows()) in PAGE, "again: python -m training publish render"
    assert "_50.0 %_" in PAGE and "_36.5 %_" in PAGE
