"""The transfers to PASCAL VOC as text: what stands in which column, and how far ours are above random weights."""

import dataclasses

import pytest

from training.reporting.required import PUBLISHED, RANDOM, REQUIRED, RESCALED, Required, missing_rows
from training.reporting.rows import Row
from training.reporting.tables import evaluation_lines
from training.reporting.transfers import transfer_lines, transfer_margin, transfer_table, transfer_times

OURS = "rotnet_alexnet.photos"


def row(weights, protocol, value, layer="all", seed=0, source="measured"):
    budget = "cpu" if source == "measured" else "paper"
    return Row(weights, protocol, layer, value, source, "VOC2007 test", budget, seed=seed)


ROWS = [
    row("rotnet_alexnet.paper", "voc-classification", 0.7297, seed=None, source="paper, table 7"),
    row(OURS, "voc-classification-11-point", 0.50),
    row(OURS, "voc-classification-11-point", 0.52, seed=1),
    row(OURS, "voc-classification-area", 0.49),
    row(OURS, "voc-classification-steps", 0.48),
    row(OURS, "voc-segmentation", 0.20),
    row(f"rotnet_alexnet.{RANDOM}", "voc-classification-11-point", 0.30),
    row(f"rotnet_alexnet.{RESCALED}", "voc-classification-11-point", 0.35),
    row(f"rotnet_alexnet.{RESCALED}", "voc-segmentation", 0.125),
]


def test_ours_come_first_and_the_papers_are_marked():
    header, _, *lines = transfer_table(ROWS).splitlines()
    assert header == "| weights | classification, all layers | segmentation |", "only what somebody has"
    assert lines == [
        "| `rotnet_alexnet.photos` | 51.00 ± 1.41 % | 20.00 % |",
        "| random weights | 30.00 % |  |",
        "| random weights, rescaled | 35.00 % | 12.50 % |",
        "| _paper, table 7, paper budget_ | _72.97 %_ |  |",
    ]


def test_other_budgets_are_another_line():
    ours = [row(OURS, "voc-classification-11-point", 0.70), row(f"rotnet_alexnet.{RESCALED}", "voc-segmentation", 0.9)]
    paper = [dataclasses.replace(each, budget="paper") for each in ours]
    lines = transfer_table([*ROWS, *paper]).splitlines()[2:]
    assert lines[0] == "| `rotnet_alexnet.photos` | 51.00 ± 1.41 % | 20.00 % |"
    assert "| `rotnet_alexnet.photos`, paper budget | 70.00 % |  |" in lines
    assert "| random weights, rescaled, paper budget |  | 90.00 % |" in lines
    assert transfer_margin([*ROWS, *paper]) == transfer_margin(ROWS)


def test_other_images_are_another_column():
    paper = dataclasses.replace(
        row("rotnet_alexnet.paper", "voc-segmentation", 0.391, seed=None, source="paper, table 7"), data="VOC2012 val"
    )
    header, *lines = transfer_table([*ROWS, paper]).splitlines()
    assert header.endswith("| segmentation | segmentation, VOC2012 |")
    assert lines[1] == "| `rotnet_alexnet.photos` | 51.00 ± 1.41 % | 20.00 % |  |"
    assert lines[-1] == "| _paper, table 7, paper budget_ | _72.97 %_ |  | _39.1 %_ |"


def test_the_margin_is_over_rescaled_random_weights():
    told = f"`{OURS}` minus rescaled random weights, in points: "
    assert transfer_margin(ROWS) == f"{told}+16 in classification, all layers (1 seed); +8 in segmentation (1 seed)."
    more = row(f"rotnet_alexnet.{RESCALED}", "voc-classification-11-point", 0.354, seed=1)
    assert transfer_margin([*ROWS, more]).startswith(f"{told}+15.8 in classification, all layers (2 seeds); ")
    assert transfer_margin(ROWS[:3]) == "", "nothing to compare with"


def test_the_other_average_precision_has_a_table_without_the_papers():
    first, second = transfer_lines(ROWS).split("With average precision as the area under the precision-recall curve:")
    assert "72.97" in first and "49.00 %" in second and "72.97" not in second and "20.00" not in second
    assert "By the area" not in transfer_lines(ROWS[:1])


def test_times_are_the_longest_of_a_kind():
    told = {"threads": 1, "device": "a CPU", "settings": "fresh fc6 and fc7, bf16"}
    timed = [dataclasses.replace(r, seconds=60.0 * i, **told) for i, r in enumerate(ROWS[1:], 10)]
    assert transfer_times(timed) == (
        "- classification, all layers: at most 16 minutes on 1 thread (a CPU, bf16)\n"
        "- segmentation: at most 17 minutes on 1 thread (a CPU, bf16)"
    )
    assert transfer_times(ROWS) == ""


def test_transfers_are_in_no_table_of_probes():
    assert evaluation_lines(OURS, ROWS) == []


@pytest.mark.parametrize("tag", [RANDOM, RESCALED])
def test_what_is_missing_of_random_weights_has_their_name(monkeypatch, tag):
    wanted = Required("VOC2007 test", "voc-segmentation", "cpu", ("all",), (0,), of=(PUBLISHED, tag))
    monkeypatch.setitem(REQUIRED, OURS, (wanted,))
    assert [r.weights for r in missing_rows([], OURS)] == [OURS, f"rotnet_alexnet.{tag}"]
    assert [r.weights for r in missing_rows(ROWS, OURS)] == ([] if tag == RESCALED else [f"rotnet_alexnet.{tag}"])
