"""The training loop: exact resuming through real kills, what it refuses, and that it learns."""

import dataclasses
import io
import json
import signal
import subprocess
import sys
import textwrap

import pytest
import timm
import torch
from conftest import ROOT, SAMPLES
from safetensors.torch import load_file

from rotation_ssl.images import normalize, read_images
from rotation_ssl.rotations import count_correct_rotations
from training import pretrain as command
from training.eighths import count_correct_eighths
from training.optimizers import create_optimizers
from training.pretrain import augmented_batch, load_checkpoint, pretrain
from training.recipes import (
    NIN_CIFAR10_CPU,
    NIN_CIFAR10_CPU_R8,
    RECIPES,
    Sgd,
    Stage,
    shortened,
)
from training.results import current_commit

# timm's smallest ResNet: the loop takes any timm model, and thirty steps take a second
TINY = dataclasses.replace(
    NIN_CIFAR10_CPU, model="test_resnet", stages=(Stage(20, 8), Stage(10, 12)), images_per_step=4, padding=2
)


@pytest.fixture(scope="module")
def images():
    return read_images(sorted((SAMPLES / "cifar10").glob("*.png")), 16)


def weights(folder):
    return load_file(folder / "weights.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_learns_a_handful_of_images(images, tmp_path):
    recipe = dataclasses.replace(
        TINY, model="rotnet_nin3", stages=(Stage(60, 16),), padding=0, flip="none", images_per_step=8
    )
    pretrain(recipe, images[:8], tmp_path)
    model = timm.create_model("rotnet_nin3")
    model.load_state_dict(weights(tmp_path))
    cfg = model.pretrained_cfg
    batch = normalize(images[:8], cfg["mean"], cfg["std"])
    correct, total = count_correct_rotations(model, [batch])
    assert total == 32 and correct >= 31


def test_outputs(images, tmp_path):
    file = pretrain(TINY, images, tmp_path / "run")
    assert file == tmp_path / "run" / "weights.safetensors"
    assert sorted(p.name for p in file.parent.iterdir()) == ["curve.png", "run.json", "weights.safetensors"]
    run = json.loads((file.parent / "run.json").read_text())
    assert run["rotated_images"] == 30 * 4 * 4 and [point["step"] for point in run["curve"]] == [10, 20, 30]
    assert run["recipe"]["name"] == "nin-cifar10-cpu" and run["optimizer"] == "Muon"
    assert file.stat().st_mode & 0o777 == 0o644
    assert {tensor.dtype for tensor in weights(file.parent).values()} == {torch.float32, torch.int64}


def test_the_same_seed_gives_the_same_weights_and_another_others(images, tmp_path):
    for name, recipe in (("a", TINY), ("b", TINY), ("c", dataclasses.replace(TINY, seed=1))):
        pretrain(recipe, images, tmp_path / name)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.parametrize("recipe", [TINY, dataclasses.replace(TINY, optimizer=Sgd())], ids=["muon", "sgd"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_request_saves_and_resumes_exactly(images, tmp_path, monkeypatch, recipe, number):
    pretrain(recipe, images, tmp_path / "whole")

    def interrupted(recipe, model, images, step):
        if step == 13:
            signal.raise_signal(number)
        return augmented_batch(recipe, model, images, step)

    monkeypatch.setattr(command, "augmented_batch", interrupted)
    checkpoint = pretrain(recipe, images, tmp_path / "parts")
    monkeypatch.undo()
    assert checkpoint.name == "checkpoint.pt" and not (tmp_path / "parts" / "weights.safetensors").exists()
    assert torch.load(checkpoint, weights_only=True)["step"] == 14
    pretrain(recipe, images, tmp_path / "parts", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert not checkpoint.exists()


KILLED = """
    import os, signal, sys
    from pathlib import Path
    import torch
    sys.path[:0] = [{tests!r}, {root!r}]
    from test_pretrain import TINY
    from training import pretrain as command
    from rotation_ssl.images import read_images
    from conftest import SAMPLES

    steps = 0
    augmented_batch = command.augmented_batch
    def killed(*args):
        global steps
        steps += 1
        if steps == {step}:
            os.kill(os.getpid(), signal.SIGKILL)
        return augmented_batch(*args)
    command.augmented_batch = killed
    torch.set_num_threads({threads})
    images = read_images(sorted((SAMPLES / "cifar10").glob("*.png")), 16)
    command.pretrain(TINY, images, Path({output!r}), checkpoint_seconds=0.0)
"""


@pytest.mark.parametrize("step", [12, 25])
def test_a_kill_loses_at_most_one_interval_and_resumes_exactly(images, tmp_path, step):
    pretrain(TINY, images, tmp_path / "whole")
    code = textwrap.dedent(KILLED).format(
        tests=str(ROOT / "tests"), root=str(ROOT), step=step, output=str(tmp_path / "parts"),
        threads=torch.get_num_threads(),
    )  # fmt: skip
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["step"] == step // 10 * 10
    pretrain(TINY, images, tmp_path / "parts", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@pytest.fixture
def stopped(images, tmp_path, monkeypatch):
    """A run stopped at step 11."""

    def interrupted(recipe, model, images, step):
        if step == 10:
            signal.raise_signal(signal.SIGTERM)
        return augmented_batch(recipe, model, images, step)

    monkeypatch.setattr(command, "augmented_batch", interrupted)
    pretrain(TINY, images, tmp_path / "stopped")
    monkeypatch.undo()
    return tmp_path / "stopped"


def test_a_checkpoint_of_another_recipe_is_refused_and_kept(images, stopped):
    before = (stopped / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="number of images 40 -> 39"):
        pretrain(TINY, images[:39], stopped, resume=True)
    other = dataclasses.replace(TINY, images_per_step=8, optimizer=Sgd())
    with pytest.raises(ValueError, match=r"another recipe \(optimizer Muon\(.*\) -> Sgd\(.*images_per_step 4 -> 8"):
        pretrain(other, images, stopped, resume=True)
    with pytest.raises(ValueError, match="holds a run already: --resume"):
        pretrain(TINY, images, stopped)
    assert (stopped / "checkpoint.pt").read_bytes() == before


def test_a_damaged_checkpoint_is_refused(images, stopped):
    file = stopped / "checkpoint.pt"
    whole = file.read_bytes()
    foreign = io.BytesIO()
    torch.save({"model": torch.nn.Linear(1, 1)}, foreign)
    for content in (whole[: len(whole) // 2], b"", b"some text", foreign.getvalue()):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint\.pt is not a checkpoint") as caught:
            pretrain(TINY, images, stopped, resume=True)
        assert "\n" not in str(caught.value)
        assert file.read_bytes() == content


def test_a_finished_run_is_not_overwritten(images, tmp_path):
    pretrain(TINY, images, tmp_path)
    before = (tmp_path / "weights.safetensors").read_bytes()
    for resume in (False, True):
        with pytest.raises(ValueError, match="holds a run already"):
            pretrain(TINY, images, tmp_path, resume=resume)
    assert (tmp_path / "weights.safetensors").read_bytes() == before


def test_nothing_to_resume_and_too_few_images(images, tmp_path):
    with pytest.raises(ValueError, match="nothing to resume"):
        pretrain(TINY, images, tmp_path / "new", resume=True)
    with pytest.raises(ValueError, match="takes 4 images a step, there are 3"):
        pretrain(TINY, images[:3], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_loss_that_is_not_finite_stops_the_run(images, tmp_path):
    recipe = dataclasses.replace(TINY, optimizer=Sgd(lr=1e30))
    with pytest.raises(ValueError, match=r"the loss became .* by step"):
        pretrain(recipe, images, tmp_path)
    assert not (tmp_path / "weights.safetensors").exists()


def test_held_out_images_are_never_trained_on(images, tmp_path):
    recipe = dataclasses.replace(TINY, holdout=10)
    changed = images.clone()
    changed[-10:] = 0
    pretrain(recipe, images, tmp_path / "a")
    pretrain(recipe, changed, tmp_path / "b")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert json.loads((tmp_path / "a" / "run.json").read_text())["holdout_rotation_accuracy"]["n"] == 40


@pytest.mark.parametrize("holdout", [-1, 40])
def test_holdout_is_checked(images, tmp_path, holdout):
    with pytest.raises(ValueError, match=rf"holdout must be 0 .* got {holdout}"):
        pretrain(dataclasses.replace(TINY, holdout=holdout), images, tmp_path / "new")


def test_a_run_is_finished_only_when_its_weights_are_whole(images, tmp_path, monkeypatch):
    """A full disk while the outputs are written leaves the checkpoint, and resuming finishes."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        pretrain(TINY, images, tmp_path / "run", checkpoint_seconds=0.0)
    monkeypatch.undo()
    pretrain(TINY, images, tmp_path / "run", resume=True)
    pretrain(TINY, images, tmp_path / "whole")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_each_epoch_takes_every_image_once(monkeypatch, images):
    model = timm.create_model("rotnet_nin3", device="meta")
    marked = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 3, 16, 16)
    recipe = dataclasses.replace(TINY, padding=0)
    cfg = model.pretrained_cfg
    means = torch.tensor(cfg["mean"])[0] * 255, torch.tensor(cfg["std"])[0] * 255

    def seen(step):
        batch = augmented_batch(recipe, model, marked, step)
        return (batch[:, 0, 0, 0] * means[1] + means[0]).round().int().tolist()

    first, second = ([i for step in range(e * 10, e * 10 + 10) for i in seen(step)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(40)) and first != second
    assert seen(3) == seen(3)


def test_recipes_are_complete_values():
    assert all(name == recipe.name for name, recipe in RECIPES.items())
    assert [NIN_CIFAR10_CPU.crop_at(s) for s in (0, 1349, 1350, 1949)] == [24, 24, 32, 32]
    assert NIN_CIFAR10_CPU.rotated_images == NIN_CIFAR10_CPU.steps * 64 * 4
    for recipe in RECIPES.values():
        assert timm.is_model(recipe.model) and recipe.steps > 0


def test_ablations_have_the_same_budget():
    names = ("cifar10-cpu-r0-180", "cifar10-cpu-r90-270", "cifar10-cpu-r8")
    for recipe in [RECIPES[f"nin-{name}"] for name in names] + [RECIPES[f"nin{n}-cifar10-cpu"] for n in (3, 5)]:
        assert (recipe.steps, recipe.rotated_images) == (NIN_CIFAR10_CPU.steps, NIN_CIFAR10_CPU.rotated_images)
        assert recipe.images_per_step * len(recipe.rotations) == 256
        varied = {"name", "note", "model", "images_per_step", "rotations", "rotation_unit"}
        for field in {f.name for f in dataclasses.fields(recipe)} - varied:
            assert getattr(recipe, field) == getattr(NIN_CIFAR10_CPU, field)


def test_rotations_and_their_unit_fit():
    for unit, rotations in ((45, (0, 1, 2, 3)), (45, (1, 0, *range(2, 8))), (30, (0, 1, 2, 3))):
        with pytest.raises(ValueError, match=r"rotation_unit must be 90 or 45|taken all eight"):
            dataclasses.replace(TINY, rotation_unit=unit, rotations=rotations)


def steps_of(recipe):
    return [stage.steps for stage in recipe.stages]


def test_a_shortened_recipe_by_hand():
    assert steps_of(shortened(NIN_CIFAR10_CPU, 195)) == [135, 60]
    assert steps_of(shortened(NIN_CIFAR10_CPU, 2)) == [1, 1]
    assert shortened(NIN_CIFAR10_CPU, NIN_CIFAR10_CPU.steps) == NIN_CIFAR10_CPU
    uneven = dataclasses.replace(TINY, stages=(Stage(1, 8), Stage(1, 12), Stage(98, 16)))
    assert steps_of(shortened(uneven, 4)) == [1, 1, 2]
    assert steps_of(shortened(dataclasses.replace(uneven, stages=uneven.stages[::-1]), 4)) == [2, 1, 1]
    for steps in (-1, 0, 1, 1951):
        with pytest.raises(ValueError, match=f"can have 2 to 1950 steps, got {steps}"):
            shortened(NIN_CIFAR10_CPU, steps)


@pytest.mark.parametrize("steps", range(2, 31))
def test_a_shortened_recipe_has_the_steps_asked_for(steps):
    recipe = shortened(TINY, steps)
    assert recipe.steps == steps and min(steps_of(recipe)) >= 1
    assert abs(steps_of(recipe)[0] - steps * 2 / 3) <= 0.5
    assert [stage.crop for stage in recipe.stages] == [8, 12]


def test_the_command_shortens_and_records_it(small_cifar10, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "tiny", dataclasses.replace(TINY, name="tiny"))
    arguments = ["tiny", "--data-dir", str(small_cifar10), "--output", str(tmp_path / "run")]
    assert command.main([*arguments, "--steps", "1"]) == 2
    assert command.main([*arguments, "--steps", "3"]) == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [stage["steps"] for stage in run["recipe"]["stages"]] == [2, 1] and run["rotated_images"] == 48


def test_it_learns_the_eight_rotations_of_a_handful_of_images(images, tmp_path):
    recipe = dataclasses.replace(
        NIN_CIFAR10_CPU_R8, model="test_resnet", stages=(Stage(150, 16),), padding=0, flip="none", images_per_step=4,
        holdout=36,
    )  # fmt: skip
    file = pretrain(recipe, images.flip(0), tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["recipe"]["rotation_unit"] == 45 and run["rotated_images"] == 150 * 4 * 8
    assert run["holdout_rotation_accuracy"]["n"] == 36 * 8
    model = timm.create_model("test_resnet", num_classes=8)
    model.load_state_dict(load_file(file))
    cfg = model.pretrained_cfg
    correct, total = count_correct_eighths(model, [normalize(images.flip(0)[:4], cfg["mean"], cfg["std"])])
    assert total == 32 and correct >= 31


def test_command_line_errors_are_one_line(tmp_path, capsys):
    status = command.main(["nin-cifar10-cpu", "--data-dir", str(tmp_path / "nowhere"), "--output", str(tmp_path / "o")])
    assert status == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: no CIFAR-10 in") and "\n" not in error
    assert command.main(["nin-cifar10-cpu", "--device", "cuda:99"]) == 2
    assert capsys.readouterr().err.startswith("error: device 'cuda:99' cannot be used")
    assert not (tmp_path / "o").exists()


def test_checkpoint_loading_reports_the_step(stopped):
    model = timm.create_model(TINY.model, num_classes=4)
    step, curve, commit = load_checkpoint(
        stopped / "checkpoint.pt", {}, model, create_optimizers(TINY.optimizer, model)
    )
    assert step == 11 and len(curve) == 1 and commit == current_commit()
