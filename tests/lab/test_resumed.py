"""Commands that are killed while they train and given again: the same result, or one clear error."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_voc import write_grid, write_small_voc

from training import __main__ as lab
from training.reporting.rows import read_file
from training.transfer.proposals import write_proposals

STEPS, KILLED_AFTER = 6, 3
OPTIONS = {
    "voc": ("--size", "64", "--images-per-step", "4"),
    "detect": ("--side", "128", "--images-per-step", "1"),
    "segment": ("--year", "2007", "--train", "trainval", "--test", "test", "--images-per-step", "2"),
}


@pytest.fixture(scope="module")
def devkit(tmp_path_factory):
    return write_small_voc(tmp_path_factory.mktemp("voc"), train=6, test=4)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A folder of two classes of noise, which the least difference decides between; 96 images of each to train on."""
    root, generator = tmp_path_factory.mktemp("labelled"), torch.Generator().manual_seed(0)
    for split, count in (("train", 96), ("val", 60)):
        for name in ("one", "other"):
            (root / split / name).mkdir(parents=True)
            noise = torch.randint(256, (count, 64, 64, 3), dtype=torch.uint8, generator=generator).numpy()
            for number, pixels in enumerate(noise):
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def proposals(devkit):
    return write_grid(devkit, devkit.parent / "regions.safetensors")


def fewer(proposals):
    """The first half of every image's regions, in another file."""
    file = proposals.with_name("fewer.safetensors")
    write_proposals(file, {name: boxes[: len(boxes) // 2] for name, boxes in load_file(proposals).items()})
    return file


def run_and_kill(arguments):
    """Run a command in a process that is killed when it has written the checkpoint of step 3."""
    code = f"""
        import os, signal
        from rotation_ssl import fit
        from training import __main__ as lab

        def save_and_die(checkpoint, done, at_once=False):
            save(checkpoint, done, at_once=True)
            if done == {KILLED_AFTER}:
                os.kill(os.getpid(), signal.SIGKILL)

        save, fit.Checkpoint.save, fit.CHECK_EVERY = fit.Checkpoint.save, save_and_die, 1
        lab.main({arguments})
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, check=False).returncode


@pytest.mark.slow
@pytest.mark.parametrize("command", OPTIONS)
def test_a_killed_transfer_goes_on_to_the_same_network(command, devkit, proposals, tmp_path, monkeypatch, capsys):
    own = OPTIONS[command] + (("--proposals", str(proposals)) if command == "detect" else ())
    arguments = [command, "rotnet_alexnet", "--random", "--data", str(devkit), "--steps", str(STEPS), *own]
    arguments += ["--fc-size", "16", "--workers", "0", "--output"]
    assert lab.main([*arguments, str(tmp_path / "whole")]) == 0
    assert run_and_kill([*arguments, str(tmp_path / "killed")]) == -signal.SIGKILL
    (checkpoint,) = (tmp_path / "killed").iterdir()
    # as if it had been trained for an hour
    torch.save(torch.load(checkpoint, weights_only=True) | {"seconds": 3600.0}, checkpoint)
    if command == "detect":
        assert lab.main([*arguments, str(tmp_path / "killed"), "--proposals", str(fewer(proposals))]) == 2
        assert "checkpoint.pt belongs to other options, images or weights" in capsys.readouterr().err
    taken = []
    step = torch.optim.SGD.step
    monkeypatch.setattr("torch.optim.SGD.step", lambda *args: taken.append(1) or step(*args))
    assert lab.main([*arguments, str(tmp_path / "killed")]) == 0
    assert len(taken) == STEPS - KILLED_AFTER
    networks = [(tmp_path / output / "network.safetensors").read_bytes() for output in ("whole", "killed")]
    assert networks[0] == networks[1]
    assert not checkpoint.exists()
    assert all(row.seconds > 3600 for row in read_file(tmp_path / "killed" / "rows.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "trainings"),
    [
        (["finetune", "few-labels-cpu", "rotnet_nin.cifar10", "--images", "768", "--labels-per-class", "9", "96"], 2),
        (["probe-layers", "imagenet-linear-cpu", "rotnet_alexnet.photos", "--layers", "conv1", "--epochs", "6"], 1),
    ],
)
def test_a_killed_training_on_labels_goes_on_to_the_same_numbers(command, trainings, labelled, tmp_path, monkeypatch):
    arguments = [*command, "--dataset", "folder", "--data", str(labelled), "--output"]
    assert lab.main([*arguments, str(tmp_path / "whole")]) == 0
    assert run_and_kill([*arguments, str(tmp_path / "killed")]) == -signal.SIGKILL
    (checkpoint,) = (tmp_path / "killed").iterdir()
    torch.save(torch.load(checkpoint, weights_only=True) | {"seconds": 3600.0}, checkpoint)
    taken = []
    step = torch.optim.SGD.step
    monkeypatch.setattr("torch.optim.SGD.step", lambda *args: taken.append(1) or step(*args))
    assert lab.main([*arguments, str(tmp_path / "killed")]) == 0
    assert len(taken) == trainings * STEPS - KILLED_AFTER
    whole, killed = (read_file(tmp_path / output / "rows.jsonl") for output in ("whole", "killed"))
    assert [(row.number, row.counts, row.settings) for row in whole] == [
        (row.number, row.counts, row.settings) for row in killed
    ]
    assert [row.seconds > 3600 for row in killed] == [True] + [False] * (trainings - 1)
    assert not list((tmp_path / "killed").glob("training-*"))
