"""Rows of a transfer to PASCAL VOC are measured again by the command that made them."""

import dataclasses

import pytest
from small_voc import write_small_voc

from rotation_ssl.fit import Checkpoints
from training.reporting import remeasure
from training.reporting.check import judge
from training.reporting.remeasure import MeasureOptions, Source, measure_source, transfer_arguments, transfer_training
from training.reporting.rows import Row, read_file
from training.transfer import classification, detection
from training.transfer.data import COUNTS
from training.transfer.recipes import CLASSIFICATIONS, VOC_CLASSIFICATION_CPU


def row(weights="rotnet_alexnet.photos", protocol="voc-classification-area", layer="all", **fields):
    given = {"value": 0.5, "budget": "cpu", "seed": 2} | fields
    return Row(weights, protocol, layer, source="measured", data="VOC2007 test", **given)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A small VOCdevkit as the whole of VOC2007."""
    monkeypatch.setitem(COUNTS, ("2007", "Main"), (10, 6))
    return Source("voc2007", write_small_voc(tmp_path, train=10, test=6))


def test_a_training_gives_its_rows_again(source, tmp_path, monkeypatch):
    training = dataclasses.replace(VOC_CLASSIFICATION_CPU.training, steps=2, images_per_step=4, fresh_fc_size=16)
    recipe = dataclasses.replace(VOC_CLASSIFICATION_CPU, training=training, test_crops=2, size=64)
    monkeypatch.setitem(CLASSIFICATIONS, "cpu", recipe)
    words = ["rotnet_alexnet", "--random", "--budget", "cpu", "--data", str(source.folder), "--output", str(tmp_path)]
    assert classification.main([*words, "--workers", "0"]) == 0
    rows = read_file(tmp_path / "rows.jsonl")
    assert {(r.weights, r.budget) for r in rows} == {("rotnet_alexnet.random-rescaled", "cpu")} and len(rows) == 3
    parser = classification.build_parser
    monkeypatch.setattr(classification, "build_parser", lambda: without_workers(parser()))
    pairs = list(measure_source(rows[:2], source))
    assert [old for old, _ in pairs] == rows[:2] and all(old.value == new.value for old, new in pairs)
    assert all(judge(old, new, rows).holds for old, new in pairs)
    # stopped before the rows were recorded: nothing is trained again
    how = MeasureOptions(checkpoints=Checkpoints(tmp_path / "states"))
    next(measure_source(rows[:2], source, how))
    (kept,) = (tmp_path / "states").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(classification, "measure", lambda args: pytest.fail("trained again"))
        (kept / "checkpoint.pt").touch()
        with pytest.raises(pytest.fail.Exception):
            list(measure_source(rows[:2], source, how))
        (kept / "checkpoint.pt").unlink()
    monkeypatch.setattr(classification, "measure", None)
    assert [old for old, _ in measure_source(rows[:2], source, how)] == rows[:2]
    assert not any((tmp_path / "states").iterdir())
    moved = dataclasses.replace(pairs[0][1], value=pairs[0][1].value + 0.021)
    assert not judge(rows[0], moved, rows).holds


def without_workers(parser):
    parser.set_defaults(workers=0)
    return parser


def test_the_options_are_those_of_the_row(tmp_path):
    source = Source("voc2007", tmp_path, proposals=tmp_path / "regions.safetensors")
    module, args = transfer_arguments(row(layer="fc6-8"), source, tmp_path / "out")
    assert module is classification
    assert (args.model, args.random, args.layers, args.seed, args.budget) == (
        "rotnet_alexnet.photos", False, "fc6-8", 2, "cpu",
    )  # fmt: skip
    for tag, rescaled in (("random", False), ("random-rescaled", True)):
        module, args = transfer_arguments(row(f"rotnet_alexnet.{tag}", "voc-fast-rcnn-11-point"), source, tmp_path)
        assert module is detection and args.random and args.rescale is rescaled and args.proposals == source.proposals


@pytest.mark.parametrize(
    ("protocol", "lists", "expected"),
    [
        ("voc-classification-area", "Main", "5,011 and 4,952"),
        ("voc-fast-rcnn-area", "Main", "5,011 and 4,952"),
        ("voc-segmentation", "Segmentation", "422 and 210"),
    ],
)
def test_a_part_of_voc2007_is_refused_before_anything_is_trained(tmp_path, monkeypatch, protocol, lists, expected):
    devkit = write_small_voc(tmp_path, train=10, test=6)
    monkeypatch.setattr(remeasure, "transfer_arguments", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError) as refused:
        list(measure_source([row(protocol=protocol)], Source("", devkit)))
    told = f"trainval and test of ImageSets/{lists} name 10 and 6 images, expected {expected}; unpack it again"
    assert str(refused.value) == f"{devkit} is not the whole of VOC2007: {told}"


def test_rows_come_as_they_are_measured():
    rows = [row(seed=seed, value=0.5) for seed in (0, 1, 2)]

    def measured():
        yield dataclasses.replace(rows[2], value=0.6)
        yield dataclasses.replace(rows[2], seed=7)
        yield dataclasses.replace(rows[0], value=0.7)

    pairs = remeasure._paired(rows, measured())
    assert next(pairs) == (rows[2], dataclasses.replace(rows[2], value=0.6))
    assert next(pairs)[0] == rows[0]
    with pytest.raises(ValueError, match="seed 1 on VOC2007 test is not among what was measured again"):
        next(pairs)


def test_what_cannot_be_measured_again_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"needs the regions to look at: give --proposals FILE"):
        transfer_arguments(row(protocol="voc-fast-rcnn-area"), Source("voc2007", tmp_path), tmp_path)
    with pytest.raises(ValueError, match="has no recipe: it cannot be measured again"):
        transfer_arguments(row(budget=""), Source("voc2007", tmp_path), tmp_path)


def test_average_precisions_of_one_training_are_one_training():
    kinds = {transfer_training(row(protocol=f"voc-classification-{kind}")) for kind in ("area", "11-point", "steps")}
    assert len(kinds) == 1 and transfer_training(row(layer="fc6-8")) not in kinds
