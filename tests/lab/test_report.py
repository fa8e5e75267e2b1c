"""Reports of measurements: every line says what it is of, and one is not many."""

import dataclasses

import pytest

from rotation_ssl.evaluation.report import report_text
from rotation_ssl.messages import counted
from training.reporting import report
from training.reporting.rows import Row

ROW = Row("rotnet_nin.cifar10", "linear", "block1", 0.5, "measured", "CIFAR-10 test", "cached", "L2 0.1", sha256="ab")


def settings_of(rows):
    return [line for line in report_text(rows).splitlines() if line.startswith("- ")]


def test_settings_say_whose_they_are():
    rows = [
        dataclasses.replace(ROW, protocol="rotation", layer="", budget="", settings="4 rotations of each image"),
        ROW,
        dataclasses.replace(ROW, layer="block2", settings="L2 0.01"),
        dataclasses.replace(ROW, layer="block3"),
    ]
    probes = [
        dataclasses.replace(ROW, protocol="nonlinear", seed=seed, settings=f"20 epochs in {precision}")
        for seed, precision in ((0, "bf16"), (1, "fp32"), (2, "fp32"))
    ]
    assert settings_of([*rows, *probes]) == [
        "- rotation accuracy: 4 rotations of each image.",
        "- linear probe, L-BFGS (cached), block1, block3: L2 0.1.",
        "- linear probe, L-BFGS (cached), block2: L2 0.01.",
        "- non-linear probe (cached), block1: 20 epochs in bf16.",
        "- non-linear probe (cached), block1: 20 epochs in fp32.",
    ]
    few = [
        dataclasses.replace(ROW, labels_per_class=labels, draw="first", settings=f"{labels} crops")
        for labels in (20, 100)
    ]
    assert settings_of(few) == [
        "- linear probe, L-BFGS (cached), first 20 of each class, block1: 20 crops.",
        "- linear probe, L-BFGS (cached), first 100 of each class, block1: 100 crops.",
    ]


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0, ("0 images", "0 classes")), (1, ("1 image", "1 class")), (2, ("2 images", "2 classes"))],
)
def test_one_is_not_many(number, expected):
    assert (counted(number, "image"), counted(number, "class", "classes")) == expected


def test_the_name_of_a_number_of_one_label():
    one = dataclasses.replace(ROW, labels_per_class=1, draw="first")
    probe = "rotnet_nin.cifar10 linear probe, L-BFGS (cached) block1"
    assert one.number == f"{probe} 1 label a class (first) on CIFAR-10 test"
    assert "2 labels a class" in dataclasses.replace(one, labels_per_class=2).number


def test_the_commit_is_that_of_the_code_that_runs(monkeypatch):
    """A commit in the hours of a training is not the one that its rows name."""
    told = []
    monkeypatch.setattr(report, "current_commit", lambda: told.append("commit"))

    def measure():
        told.append("measured")
        raise ValueError("stopped")

    assert report.run_measuring(measure, "cpu") == 2
    assert told == ["commit", "measured"]
