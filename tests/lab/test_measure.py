"""What the card lacks is measured, number by number, and a command that was stopped goes on."""

import argparse
import dataclasses

import pytest
import torch
from conftest import shorten_probes

from rotation_ssl.evaluation import fresh
from training.datasets import DATASETS
from training.protocols import PROTOCOLS
from training.reporting import measure, options, remeasure
from training.reporting.required import CIFAR10, PUBLISHED, REQUIRED, Required
from training.reporting.rows import Row, read_file, write_rows

NAME = "rotnet_nin.cifar10"


@pytest.fixture
def small(small_cifar10, monkeypatch):
    """Three protocols, committed code, and 40 images as the whole of CIFAR-10."""
    numbers = (
        Required(CIFAR10, "rotation", layers=("",)),
        Required(CIFAR10, "knn", layers=("block1", "block2")),
        Required(CIFAR10, "knn", layers=("block3",), of=(PUBLISHED,)),
    )
    monkeypatch.setitem(REQUIRED, NAME, numbers)
    monkeypatch.setattr("training.reporting.rows.current_commit", lambda: "0" * 40)
    monkeypatch.setitem(DATASETS, "cifar10", dataclasses.replace(DATASETS["cifar10"], counts=(40, 40)))
    return small_cifar10


def run(data, folder, *more):
    return measure.main([NAME, "--data", str(data), "--results", str(folder), *more])


def numbers(folder):
    return {row.number for file in folder.glob("*.jsonl") for row in read_file(file)}


def test_what_is_missing_is_measured_and_nothing_else(small, tmp_path, capsys):
    folder = tmp_path / "results"
    folder.mkdir()
    assert run(small, folder, "--list") == 0
    assert "7 numbers are missing" in capsys.readouterr().out and not numbers(folder)
    assert run(small, folder, "--only", "knn") == 0
    assert len(numbers(folder)) == 5 and f"{NAME} k-NN block3 on CIFAR-10 test" in numbers(folder)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    assert run(small, folder) == 0
    assert len(numbers(folder)) == 7 and f"{NAME} rotation accuracy on CIFAR-10 test" in numbers(folder)
    assert all(file.read_bytes().startswith(content) for file, content in before.items())
    capsys.readouterr()
    assert run(small, folder) == 0
    assert "0 numbers are missing" in capsys.readouterr().out


def test_a_stopped_command_keeps_what_it_measured(small, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "results"
    folder.mkdir()
    original = remeasure.measure_features

    def stopped(*arguments, **more):
        rows = original(*arguments, **more)
        yield next(rows)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(remeasure, "measure_features", stopped)
        assert run(small, folder) == 130
    assert "run the same command again to continue" in capsys.readouterr().err
    assert len(numbers(folder)) == 2
    assert run(small, folder) == 0
    assert len(numbers(folder)) == 7


def test_a_stopped_training_on_new_crops_goes_on(small, tmp_path, monkeypatch):
    monkeypatch.setitem(REQUIRED, NAME, (Required(CIFAR10, "nonlinear", "paper", ("block1",), (0,), of=(PUBLISHED,)),))
    monkeypatch.setattr("rotation_ssl.fit.CHECKPOINT_SECONDS", 0.0)
    shorten_probes(monkeypatch, epochs=3, milestones=(), precision="fp32")
    original, epochs = fresh.fit, []

    def fit(*arguments, name, **more):
        if len(epochs) == 2:
            epochs.clear()
            raise KeyboardInterrupt
        original(*arguments, name=name, **more)
        epochs.append(name)

    def measured(name, status, patch=fit):
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.setattr(fresh, "fit", patch)
        assert run(small, tmp_path / name, "--output", str(tmp_path / "states" / name)) == status
        return [row.counts for file in (tmp_path / name).iterdir() for row in read_file(file)]

    whole = measured("whole", 0, original)
    assert measured("stopped", 130) == [] and epochs == []
    assert measured("stopped", 0) == whole
    assert epochs == ["the probes in epoch 3"]


def test_a_stopped_fine_tuning_goes_on(small, tmp_path, monkeypatch):
    numbers = (Required(CIFAR10, "few-labels", "cpu", ("block2",), (0,), (2, 4), of=(PUBLISHED,)),)
    monkeypatch.setitem(REQUIRED, NAME, numbers)
    shorten_probes(monkeypatch, PROTOCOLS, ["few-labels"], images=64, batch_size=16, precision="fp32")
    monkeypatch.setattr("rotation_ssl.fit.CHECK_EVERY", 1)
    monkeypatch.setattr("rotation_ssl.fit.CHECKPOINT_SECONDS", 0.0)
    results, states, steps, step = tmp_path / "results", tmp_path / "states", [], torch.optim.SGD.step

    def counted_step(*args):
        # in the third step of the second training
        if len(steps) == 4 + 2:
            steps.append("stop")
            raise KeyboardInterrupt
        steps.append("step")
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr("torch.optim.SGD.step", counted_step)
        assert run(small, results, "--output", str(states)) == 130
        (row,) = read_file(results / f"{NAME}.jsonl")
        assert row.labels_per_class == 2
        assert run(small, results, "--output", str(states)) == 0
        assert steps.count("step") == 4 + 4
    resumed = read_file(results / f"{NAME}.jsonl")[1]
    assert not list(states.iterdir())
    assert run(small, tmp_path / "whole", "--output", str(tmp_path / "new")) == 0
    whole = read_file(tmp_path / "whole" / f"{NAME}.jsonl")[1]
    assert (whole.labels_per_class, whole.counts, whole.settings) == (4, resumed.counts, resumed.settings)


def test_rows_of_other_bytes_are_measured_anew(small, tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    assert run(small, folder, "--only", "knn") == 0
    file = folder / f"{NAME}.jsonl"
    rows = read_file(file)
    write_rows(file, [dataclasses.replace(rows[0], sha256="f" * 64, value=0.0, correct=0, counts=())])
    assert run(small, folder, "--only", "knn") == 0
    assert [row.sha256 for row in read_file(file)] == [rows[1].sha256] * 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--data", "nowhere"), "no CIFAR-10 in nowhere"),
        (("--device", "abacus"), "device 'abacus' cannot be used"),
    ],
)
def test_bad_arguments(small, tmp_path, capsys, more, message):
    assert run(small, tmp_path, *more) == 2
    assert message in capsys.readouterr().err


def test_data_come_from_the_folder_of_their_option(tmp_path):
    """Of one row on Tiny-ImageNet: nowhere without its option, in the folder that it names, and a wrong one is said."""
    parser = argparse.ArgumentParser()
    options.add_data_arguments(parser)
    row = Row("a.b", "linear-sgd", "conv1", 0.5, "measured", "Tiny-ImageNet val", "cpu", seed=0)
    others = [word for name in ("photos", "cifar100", "voc") for word in (f"--{name}", str(tmp_path / name))]
    assert options.source_of(row, parser.parse_args(others)) is None
    (tmp_path / "tiny").mkdir()
    args = parser.parse_args([*others, "--tinyimagenet", str(tmp_path / "tiny")])
    assert options.option_of(row, args) == "tinyimagenet"
    assert options.source_of(row, args, whole=True) == remeasure.Source("tinyimagenet", tmp_path / "tiny", whole=True)
    args = parser.parse_args(["--tinyimagenet", str(tmp_path / "none")])
    with pytest.raises(ValueError, match=r"--tinyimagenet .*none is not a folder: give the one that holds Tiny-Image"):
        options.source_of(row, args)


def test_only_bundled_weights_and_committed_code(small, tmp_path, capsys, monkeypatch):
    assert measure.main(["rotnet_nin.nope", "--results", str(tmp_path)]) == 2
    assert "rotnet_nin.nope is not among the weights whose numbers are reported" in capsys.readouterr().err
    monkeypatch.setattr("training.reporting.rows.current_commit", lambda: "unknown")
    assert run(small, tmp_path) == 2
    assert "the card needs committed code, this is unknown" in capsys.readouterr().err
