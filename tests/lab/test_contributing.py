"""A new dataset is one entry, a new recipe one value, new weights one command and what is to be measured of them."""

import dataclasses
import json

import pytest
import timm
from conftest import assert_state
from safetensors.torch import load_file

from rotation_ssl import zoo
from rotation_ssl.labelled import labelled_files
from rotation_ssl.pretraining.recipe import Stage
from training import datasets, pretrain, recipes
from training.evaluation import probes
from training.reporting import bundle, measure, publish, required
from training.reporting.rows import read_file

NAME = "rotnet_nin.toy"


def toy_files(root, split):
    """A dataset as a new entry lists it: files, labels and classes."""
    return labelled_files(root / split)


@pytest.fixture
def toy_data(monkeypatch, small_cifar10):
    """The entry of a dataset, and where it is."""
    monkeypatch.setitem(datasets.DATASETS, "toy", datasets.DataSet("Toy test", (40, 40), 32, toy_files, 32))
    return small_cifar10


def test_one_entry_is_a_dataset(toy_data, tmp_path):
    command = ["rotnet_nin", "--dataset", "toy", "--data", toy_data, "--only", "knn", "--output", tmp_path / "out"]
    assert probes.main([str(argument) for argument in command]) == 0
    rows = read_file(tmp_path / "out" / "rows.jsonl")
    assert [(row.data, row.n) for row in rows] == [("Toy test", 40)] * 4


def test_one_value_is_a_recipe_and_one_command_its_weights(
    monkeypatch, toy_data, copied, set_manifest, tmp_path, capsys
):
    recipe = dataclasses.replace(
        recipes.NIN_CIFAR10_CPU, name="toy", data="toy", stages=(Stage(2, 16),), images_per_step=4, precision="fp32"
    )
    monkeypatch.setitem(recipes.RECIPES, "toy", recipe)
    monkeypatch.setattr(pretrain, "current_commit", lambda: "0" * 40)
    run = tmp_path / "run"
    assert pretrain.main(["toy", "--data", str(toy_data), "--output", str(run), "--device", "cpu"]) == 0
    assert json.loads((run / "run.json").read_text())["recipe"]["name"] == "toy"

    monkeypatch.setitem(bundle.DATA_NAMES, "toy", "40 toy images")
    assert publish.main(["bundle", str(run), NAME]) == 0
    assert f"python -m training measure {NAME}" in capsys.readouterr().out
    set_manifest(json.loads((copied / "weights" / "manifest.json").read_text()))
    assert_state(timm.create_model(NAME, pretrained=True), load_file(run / "model.safetensors"))
    assert zoo.manifest()[NAME]["data"] == "40 toy images"

    wanted = (required.Required("Toy test", "rotation", layers=("",), of=(required.PUBLISHED,)),)
    monkeypatch.setitem(required.REQUIRED, NAME, wanted)
    (row,) = measure.missing(NAME, copied / "results")
    assert (row.weights, row.protocol, row.data) == (NAME, "rotation", "Toy test")
