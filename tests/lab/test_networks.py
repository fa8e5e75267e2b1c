"""The study of networks: trained alike, measured as `orient` sees photographs, shown from rows."""

import dataclasses
import re

import pytest
from conftest import SAMPLES
from safetensors.torch import load_file

from rotation_ssl import zoo
from rotation_ssl.images import read_image
from rotation_ssl.orientation import predict_orientation
from rotation_ssl.pretraining.images import open_files
from rotation_ssl.pretraining.recipe import Stage
from rotation_ssl.pretraining.setup import create_model
from training.recipes import ALEXNET_PHOTOS_CPU
from training.reporting.rows import read_file
from training.studies import networks
from training.studies.networks import CANDIDATES, candidate

PHOTOS = sorted((SAMPLES / "photos").glob("*.jpg"))
LISTS = {"imagewoof": PHOTOS[:2], "caltech101": PHOTOS[2:5]}


def test_networks_differ_in_the_network_and_the_steps_alone():
    for recipe in CANDIDATES.values():
        same = {name: getattr(ALEXNET_PHOTOS_CPU, name) for name in ("name", "model", "model_args", "stages", "note")}
        assert recipe.precision == "fp32"
        assert dataclasses.replace(recipe, precision="auto", **same) == ALEXNET_PHOTOS_CPU
        # the same shares of crops of 96 and 128 pixels
        assert [stage.crop for stage in recipe.stages] == [96, 128]
        assert recipe.stages[0].steps == pytest.approx(0.8 * recipe.steps, abs=0.5)
        assert sum(p.numel() for p in create_model(recipe).parameters()) < 6e6, "a file of 12 MB in half precision"
    assert zoo.manifest()["rotnet_alexnet.photos"]["orientation"]["size"] == networks.SIZE


@pytest.fixture
def small_study(tmp_path, monkeypatch):
    """A network of two steps, measured on the sample photographs; the file of its rows, and the command's arguments."""
    recipe = candidate("small", "resnet18", 2, channels=(8, 8, 8, 8))
    stages = (Stage(1, 32), Stage(1, 48))
    recipe = dataclasses.replace(recipe, stages=stages, images_per_step=2, image_size=64)
    monkeypatch.setattr(networks, "CANDIDATES", {"small": recipe})
    monkeypatch.setattr(networks, "SIZE", 64)
    monkeypatch.setattr(networks, "photo_list", lambda name, root: LISTS[name])
    monkeypatch.setattr(networks, "open_unlabelled", lambda *_: open_files(PHOTOS, 64))
    file = tmp_path / "rows.jsonl"
    arguments = ["--data", "photos", "--photos", "sets", "--output", str(tmp_path / "runs"), "--rows", str(file)]
    assert networks.main(arguments) == 0
    return file, arguments


def test_a_network_is_measured_on_both_datasets(small_study, monkeypatch):
    file, arguments = small_study
    rows = read_file(file)
    assert [(row.data, row.n, row.recipe) for row in rows] == [
        ("Imagewoof val", 2, "small"),
        ("Caltech-101 test", 3, "small"),
    ]
    assert {row.weights.split("@")[0] for row in rows} == {"resnet18"} and len({row.sha256 for row in rows}) == 1
    assert all("64 pixels, 4 turns, temperature" in row.settings for row in rows)
    # the same as the library says of each photograph
    temperature = float(re.search(r"temperature (\S+)", rows[0].settings)[1])
    model = create_model(networks.CANDIDATES["small"]).eval()
    model.load_state_dict(load_file(file.parent / "runs" / "small" / "model.safetensors"))
    for row, files in zip(rows, LISTS.values(), strict=True):
        found = predict_orientation(model, list(map(read_image, files)), size=64, temperature=temperature)
        assert row.correct == sum(each.rotation == 0 for each in found)
    # its rows are there: nothing is measured again
    monkeypatch.setattr(networks, "run_candidate", None)
    assert networks.main(arguments) == 0


def test_a_finished_training_is_measured_without_training_again(small_study, monkeypatch):
    file, arguments = small_study
    before = read_file(file)
    file.unlink()
    monkeypatch.setattr("rotation_ssl.pretraining.loop.train_step", None)
    assert networks.main(arguments) == 0
    assert [(row.sha256, row.correct) for row in read_file(file)] == [(row.sha256, row.correct) for row in before]


def test_a_network_that_does_not_learn_does_not_end_the_study(small_study, monkeypatch, capsys):
    file, arguments = small_study
    file.unlink()
    small = networks.CANDIDATES["small"]
    monkeypatch.setattr(
        networks, "CANDIDATES", {"no": dataclasses.replace(small, name="no", model="none"), "small": small}
    )
    assert networks.main(arguments) == 1
    assert "no has no numbers: model 'none' cannot be made" in capsys.readouterr().err
    assert {row.recipe for row in read_file(file)} == {"small"}


def test_the_page_follows_the_rows(small_study, tmp_path, monkeypatch):
    page = tmp_path / "STUDY.md"
    page.write_text("before\n<!-- rendered: networks -->\n<!-- end -->\nafter\n")
    monkeypatch.setattr(networks, "PAGE", page)
    monkeypatch.setattr(networks, "ROWS", small_study[0])
    text = networks.page_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    rows = read_file(small_study[0])
    line = next(line for line in text.splitlines() if "`small`" in line)
    assert f"| {100 * rows[0].value:.2f} % | {100 * rows[1].value:.2f} % |" in line
    assert f"{100 * sum(row.correct for row in rows) / 5:.2f} %" in line and "| 16 |" in line
