"""The ablations: one small budget, measured on the test images, beside the paper's numbers in the card."""

import dataclasses

import pytest
import torch
from conftest import ROOT

from rotation_ssl.pretraining.recipe import Stage
from training.recipes import RECIPES
from training.reporting.rows import read_file, read_rows
from training.reporting.tables import ablation_table
from training.studies import rotations as ablation


def small(name):
    recipe = ablation.ABLATIONS[name]
    return dataclasses.replace(
        recipe, model="rotnet_nin3", stages=(Stage(2, 16), Stage(1, 24)), images_per_step=recipe.images_per_step // 16,
        precision="fp32",
    )  # fmt: skip


def test_those_of_the_papers_table_are_measured_by_default():
    sets = [RECIPES[name].rotations for name in ablation.ROTATION_SETS]
    assert sets == [(0, 1, 2, 3), (0, 2), (1, 3), tuple(range(8))]


def test_a_row_a_seed_and_a_second_time_nothing(images, tmp_path, monkeypatch):
    """Networks of two and of eight rotations, whose heads have as many outputs."""
    file = tmp_path / "rows.jsonl"
    few = torch.arange(10)
    images = dataclasses.replace(images, train=images.train.subset(few), test=images.test.subset(few))
    names = ["nin-cifar10-ablation-r0-180", "nin-cifar10-ablation-r8"]
    monkeypatch.setattr(ablation, "ABLATIONS", {name: small(name) for name in names})
    monkeypatch.setattr(ablation, "SEEDS", (0, 1))
    for name in names:
        ablation.run_ablation(ablation.ABLATIONS[name], images, tmp_path / name, file, (0, 1))
        assert ablation.measured(file, name, (0, 1)) and not ablation.measured(file, name, (0, 1, 2))
    rows = read_file(file)
    assert [(row.recipe, row.seed) for row in rows] == [(name, seed) for name in names for seed in (0, 1)]
    assert {row.data for row in rows} == {"CIFAR-10 test"} and {row.n for row in rows} == {10}
    assert all(row.settings.endswith(" in fp32; features in fp32") for row in rows)
    assert len({row.sha256 for row in rows}) == 2 and {row.layer for row in rows} == {"block2"}
    before = file.read_bytes()
    for name in names:
        ablation.run_ablation(ablation.ABLATIONS[name], images, tmp_path / name, tmp_path / "again.jsonl", (0,))
    again = read_file(tmp_path / "again.jsonl")
    assert [row.sha256 for row in again] == [row.sha256 for row in rows if row.seed == 0], "a finished run is kept"
    assert file.read_bytes() == before
    with pytest.raises(ValueError, match="holds a finished run of another recipe"):
        ablation.run_ablation(ablation.ABLATIONS[names[0]], images, tmp_path / names[1], file)


def test_the_cards_rows_are_of_the_whole_data_and_of_committed_code(small_cifar10, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.reporting.rows.current_commit", lambda: "unknown")
    assert ablation.main(["--data", str(small_cifar10), "--output", str(tmp_path)]) == 2
    assert "the card needs committed code, this is unknown" in capsys.readouterr().err
    monkeypatch.setattr("training.reporting.rows.current_commit", lambda: "0" * 40)
    assert ablation.main(["--data", str(small_cifar10), "--output", str(tmp_path)]) == 2
    assert "this is not the whole of CIFAR-10" in capsys.readouterr().err
    assert list(tmp_path.glob("nin*")) == []


def test_the_table_has_ours_and_the_papers(images, tmp_path):
    file = tmp_path / "rows.jsonl"
    recipe = small("nin-cifar10-ablation-r90-270")
    torch.manual_seed(0)
    ablation.run_ablation(recipe, images, tmp_path / "run", file, (0, 1))
    rows = read_file(file)
    mean = 50 * (rows[0].value + rows[1].value)
    (line,) = [line for line in ablation_table(rows, read_rows()).splitlines() if "90, 270" in line]
    assert f"| {mean:.2f} ± " in line and "_85.52 %_ (paper, table 2)" in line


def test_the_page_has_every_set_of_rotations():
    assert all(ablation.measured(ablation.ROWS, name) for name in ablation.ROTATION_SETS)
    assert ablation_table(read_file(ablation.ROWS), read_rows()) in (ROOT / "docs" / "results.md").read_text()
