"""What the rotation head is good for, as text."""

import dataclasses

from training.reporting.applications import (
    coverage_table,
    one_class_line,
    orientation_line,
    orientation_table,
    outliers_line,
    outliers_table,
    thresholds_line,
)
from training.reporting.required import REQUIRED
from training.reporting.rows import Row
from training.reporting.tables import evaluation_lines, results_tables

ALEXNET, NIN = "rotnet_alexnet.orientation", "rotnet_nin.cifar10"


def row(weights, protocol, data, value=None, correct=None, n=None, layer="", source="measured"):
    return Row(weights, protocol, layer, correct / n if n else value, source, data, correct=correct, n=n)


ORIENTATION = [
    row(ALEXNET, "orientation", "VOC2007 test", correct=160, n=200),
    row(ALEXNET, "orientation-decided-99", "VOC2007 test", correct=80, n=200),
    row(ALEXNET, "orientation-wrong-99", "VOC2007 test", correct=2, n=200),
    row(ALEXNET, "orientation-decided-99.5", "VOC2007 test", correct=50, n=200),
    row(ALEXNET, "orientation-wrong-99.5", "VOC2007 test", correct=0, n=200),
]
OUTLIERS = [
    row(NIN, "outliers-rotation", "CIFAR-100 test", 0.7),
    row(NIN, "outliers-rotation-fpr95", "CIFAR-100 test", 0.9),
    row(NIN, "outliers-knn", "CIFAR-100 test", 0.8, layer="block2"),
    row(NIN, "outliers-rotation", "uniform noise", 1.0),
    row(NIN, "one-class-knn", "CIFAR-10 test", 0.75, layer="block2"),
]


def test_precision_is_of_what_was_decided():
    assert orientation_table(ORIENTATION).splitlines()[2] == (
        "| `rotnet_alexnet.orientation`, VOC2007 test | 80.00 % | 40.00 % | 97.50 % | 25.00 % | 100.00 % |"
    )
    told = (
        "At the default threshold, `orient` decides on 40.00 % of VOC2007 test"
        " (97.50 % of these decisions are correct)."
    )
    others = [
        *(dataclasses.replace(row, weights="rotnet_alexnet.other") for row in ORIENTATION),
        *(dataclasses.replace(row, data="EXIF orientation examples test") for row in ORIENTATION),
    ]
    assert orientation_line([*ORIENTATION, *others]) == told, "of the command's network on photographs alone"
    nothing = [dataclasses.replace(each, correct=0, value=0.0) for each in ORIENTATION if "99" in each.protocol]
    assert orientation_line(nothing) == "At the default threshold, `orient` decides on 0.00 % of VOC2007 test."


def test_where_none_is_decided_no_precision_is_told():
    none = [dataclasses.replace(row, value=0.0, correct=0) for row in ORIENTATION[1:]]
    assert orientation_table([ORIENTATION[0], *none]).splitlines()[2] == (
        "| `rotnet_alexnet.orientation`, VOC2007 test | 80.00 % | 0.00 % |  | 0.00 % |  |"
    )


def test_accuracy_over_coverage():
    shares = range(10, 100, 10)
    top = [row(ALEXNET, f"orientation-top-{s}", "VOC2007 test", correct=s * 2 - s // 10, n=s * 2) for s in shares]
    table = coverage_table([*ORIENTATION, *top]).splitlines()
    assert (
        table[0]
        == "| most confident photographs | 10 % | 20 % | 30 % | 40 % | 50 % | 60 % | 70 % | 80 % | 90 % | all |"
    )
    assert table[2] == f"| `{ALEXNET}`, VOC2007 test |{' 95.00 % |' * 9} 80.00 % |"
    assert coverage_table(ORIENTATION) == ""


def test_the_thresholds_are_the_manifests():
    entries = {NIN: {}, ALEXNET: {"orientation": {"threshold": 0.92691, "sure_threshold": 0.97358}}}
    told = "- `rotnet_alexnet.orientation`: 0.9269 by default; `--threshold 0.9736` for 99.5 %."
    assert thresholds_line(entries) == told


def test_outliers_by_both_scores():
    assert outliers_table(OUTLIERS).splitlines() == [
        "| normal images | outliers | rotation, AUROC | rotation, FPR at 95 % | k-NN, AUROC |",
        "|---|---|---|---|---|",
        "| CIFAR-10 test | `rotnet_nin.cifar10`, CIFAR-100 test | 70.00 % | 90.00 % | 80.00 % |",
        "| CIFAR-10 test | `rotnet_nin.cifar10`, uniform noise | 100.00 % |  |  |",
    ]
    told = (
        "With CIFAR-10 test as normal images and CIFAR-100 test as outliers, `rotnet_nin.cifar10` reaches an AUROC of"
        " 70.00 % by rotation and 80.00 % by k-NN."
    )
    assert outliers_line(OUTLIERS) == told
    both = [*OUTLIERS, row("rotnet_alexnet.photos", "outliers-knn", "Imagenette val", 0.6, layer="conv4")]
    other = "With MiniPlaces val as normal images and Imagenette val as outliers, `rotnet_alexnet.photos` reaches an"
    assert outliers_line(both) == f"{told} {other} AUROC of 60.00 % by k-NN."
    assert outliers_table(both).splitlines()[-1].startswith("| MiniPlaces val | `rotnet_alexnet.photos`, Imagenette")
    assert "75.00 % on CIFAR-10 test by k-NN (`rotnet_nin.cifar10`)" in one_class_line(OUTLIERS)
    theirs = Row("x", "one-class-rotation", "", 0.905, "Someone 2019 (unchecked)", "CIFAR-10 test")
    assert one_class_line([*OUTLIERS, theirs]).endswith("separately reach _90.5 %_ (unchecked) (Someone 2019).")
    assert "separately" not in one_class_line(OUTLIERS)


def test_without_rows_nothing_is_told():
    texts = (orientation_table([]), orientation_line([]), outliers_table([]), outliers_line([]), one_class_line([]))
    assert set(texts) == {""}


def test_they_are_in_no_table_of_probes():
    entries = {NIN: {"source": "bundled", "recommended_layer": "block2"}}
    assert results_tables(OUTLIERS, entries) == ""
    assert evaluation_lines(NIN, OUTLIERS) == evaluation_lines(ALEXNET, ORIENTATION) == []


def test_all_of_them_are_required():
    wanted = {required.protocol for weights in (ALEXNET, NIN) for required in REQUIRED[weights]}
    assert {own.protocol for own in (*ORIENTATION, *OUTLIERS)} <= wanted
