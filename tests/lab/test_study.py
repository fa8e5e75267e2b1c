"""The study: variants differ where they say, of the same budget; rows, page and figure belong together."""

import dataclasses
import json
import shutil

import pytest

from rotation_ssl.pretraining.recipe import Stage
from training.datasets import load_images
from training.reporting import publish
from training.reporting.rows import read_file
from training.studies import networks
from training.studies import nin_cifar10 as study
from training.studies.nin_cifar10 import BASE, BUDGET, LONG_BUDGET, QUESTIONS, VARIANTS, pixels, run_variant, variant

SMALL = dataclasses.replace(
    BASE, model="rotnet_nin3", stages=(Stage(1, 16), Stage(1, 32)), images_per_step=8, holdout=10, precision="fp32"
)


def test_variants_have_the_budget_and_hold_images_out():
    assert len(VARIANTS) == sum(map(len, QUESTIONS.values())), "two variants of one name"
    for recipe in VARIANTS.values():
        assert recipe.rotated_images in (BUDGET, 143_360, LONG_BUDGET) and recipe.holdout == 5_000
        assert dataclasses.replace(recipe, name="base") != BASE or recipe.name in ("base", "few-images")
    assert variant("base") == BASE
    # 280 steps of 256 crops of 24 pixels and 120 of 32
    assert pixels(BASE) == 280 * 256 * 24**2 + 120 * 256 * 32**2


def set_small(patched):
    small = {"Chance": (SMALL,), "Seeds": (dataclasses.replace(SMALL, name="seed-1", seed=1),)}
    patched.setattr(study, "QUESTIONS", small)
    patched.setattr(study, "VARIANTS", {recipe.name: recipe for own in small.values() for recipe in own})
    patched.setattr(study, "PROBE_IMAGES", 20)


@pytest.fixture(scope="module")
def trained(small_module, tmp_path_factory):
    """Two variants of two steps, measured; their rows."""
    images = load_images("cifar10", small_module, 32, holdout=10)
    file = tmp_path_factory.mktemp("study") / "rows.jsonl"
    with pytest.MonkeyPatch.context() as patched:
        set_small(patched)
        for recipe in study.VARIANTS.values():
            run_variant(recipe, images, file.parent / recipe.name, file)
    return file


@pytest.fixture
def small_study(trained, monkeypatch):
    """The study of these two variants alone; their rows."""
    set_small(monkeypatch)
    return trained


def test_a_variant_is_measured_on_the_held_out_images(small_study):
    rows = read_file(small_study)
    assert [row.recipe for row in rows] == ["base"] * 3 + ["seed-1"] * 3
    assert {row.data for row in rows} == {"CIFAR-10, last 10 training images"}
    rotation = rows[0]
    run = json.loads((small_study.parent / "base" / "run.json").read_text())
    assert (rotation.correct, rotation.n) == tuple(run["holdout_rotation_accuracy"].values())
    assert {row.n for row in rows if row.layer == "block2"} == {10}
    assert all("; features in fp32; 20 labelled images" in row.settings for row in rows if row.layer)
    assert set(study.results(small_study)) == {"base", "seed-1"}


def test_a_part_of_cifar10_is_not_for_the_page(small_cifar10, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "HOLDOUT", 10)
    monkeypatch.setattr(study, "require_committed", lambda what: None)
    arguments = ["--data", str(small_cifar10), "--output", str(tmp_path), "--only", "base"]
    assert study.main(arguments) == 2
    assert "is of the whole of CIFAR-10, not of 40 images" in capsys.readouterr().err
    monkeypatch.setattr(study, "run_variant", None)
    monkeypatch.setattr(study, "finished_run", None)

    def fails(*_):
        raise ValueError("the rate is too high")

    monkeypatch.setattr(study, "run_variant", fails)
    assert study.main([*arguments, "--rows", str(tmp_path / "rows.jsonl")]) == 1
    assert "base has no numbers: the rate is too high" in capsys.readouterr().err


def test_page_and_figure_follow_the_rows(small_study, tmp_path, monkeypatch):
    page, figure = tmp_path / "STUDY.md", tmp_path / "study.png"
    page.write_text("before\n<!-- rendered: runs -->\n<!-- end -->\nafter\n")
    monkeypatch.setattr(study, "PAGE", page)
    monkeypatch.setattr(study, "FIGURE", figure)
    monkeypatch.setattr(study, "ROWS", small_study)
    monkeypatch.setattr(study, "CHANCE", ["base"])
    assert study.render_figure(check=True) == [figure] and not figure.exists()
    assert study.render_figure() == [figure]
    assert study.render_figure(check=True) == []
    text = study.page_text()
    rows = [row for row in read_file(small_study) if row.recipe == "seed-1" and row.protocol == "linear"]
    assert f"{100 * rows[0].value:.2f} %" in next(line for line in text.splitlines() if "seed-1" in line)
    assert text.startswith("before\n") and text.endswith("\nafter\n")


def test_publishing_renders_the_page_and_the_figure(copied, monkeypatch, capsys):
    page, figure = copied / "nin_cifar10.md", copied / "study.png"
    page.write_text(study.PAGE.read_text().replace("72.90 %", "1.00 %"))
    shutil.copyfile(copied / "docs" / "figures" / "rotnet_nin.cifar10.filters.png", figure)
    monkeypatch.setattr(study, "FIGURE", figure)
    committed = study.PAGE.read_bytes()
    monkeypatch.setattr(study, "PAGE", page)
    monkeypatch.setattr(study, "draw", lambda found, file: figure.write_bytes(b"drawn"))
    assert publish.main(["render", "--check"]) == 1
    assert "differs nin_cifar10.md\ndiffers study.png" in capsys.readouterr().out
    assert publish.main(["render"]) == 0
    assert page.read_bytes() == committed and figure.read_bytes() == b"drawn"


def test_no_rows_no_page(copied, monkeypatch, capsys):
    monkeypatch.setattr(study, "results", lambda file: {})
    assert publish.main(["render"]) == 2
    assert "no rows of the base" in capsys.readouterr().err


def test_a_refused_rendering_writes_nothing(copied, monkeypatch, capsys):
    page, figure = copied / "nin_cifar10.md", copied / "study.png"
    page.write_text(stale := study.PAGE.read_text().replace("72.90 %", "1.00 %"))
    monkeypatch.setattr(study, "PAGE", page)
    monkeypatch.setattr(study, "FIGURE", figure)
    monkeypatch.setattr(networks, "ROWS", copied / "nowhere.jsonl")
    assert publish.main(["render"]) == 2
    told = f"{networks.ROWS} has no rows of alexnet, alexnet-fc-256, regnetx-004: run the study first"
    assert told in capsys.readouterr().err
    assert page.read_text() == stale and not figure.exists()
