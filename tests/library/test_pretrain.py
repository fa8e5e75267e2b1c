"""The training loop: that it learns, from any backbone, alone or shared by processes; what it refuses."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
from datetime import timedelta

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT
from safetensors.torch import load_file
from tiny_runs import SHORT, TINY, assert_two_trained_as_one, interrupt, same, sample_images, weights
from torch import nn

from rotation_ssl import zoo
from rotation_ssl.eighths import rotate_eighths
from rotation_ssl.images import normalize
from rotation_ssl.pretraining import loop
from rotation_ssl.pretraining.batches import augmented_batches
from rotation_ssl.pretraining.command import changed
from rotation_ssl.pretraining.loop import pretrain, update_statistics
from rotation_ssl.pretraining.optim import create_optimizers
from rotation_ssl.pretraining.recipe import AdamW, LinearSchedule, Sgd, Stage
from rotation_ssl.pretraining.setup import (
    create_accelerator,
    create_model,
    published_weights_of,
    takes_one_size,
    trained_size,
)
from rotation_ssl.pretraining.state import find_checkpoint
from rotation_ssl.rotations import count_correct, rotate_all, rotation_labels
from training import pretrain as command
from training.__main__ import main
from training.recipes import NIN_CIFAR10_ABLATION_R8, RECIPES


@pytest.fixture(scope="module")
def images():
    return sample_images()


SMOOTHING = 0.4


@pytest.fixture(scope="module")
def handful(images, tmp_path_factory):
    """A run of one of our own networks on eight images, with label smoothing."""
    recipe = dataclasses.replace(
        TINY, model="rotnet_nin3", stages=(Stage(40, 12),), padding=0, flip="none", images_per_step=8, image_size=12,
        label_smoothing=SMOOTHING,
    )  # fmt: skip
    output = tmp_path_factory.mktemp("handful")
    pretrain(recipe, images[:8, :, 2:14, 2:14], output)
    return output


def test_it_learns_a_handful_of_images(images, handful):
    model = timm.create_model("rotnet_nin3")
    model.load_state_dict(weights(handful))
    cfg = model.pretrained_cfg
    batch = normalize(images[:8, :, 2:14, 2:14], cfg["mean"], cfg["std"])
    correct, total = count_correct(model, [rotate_all(batch)], 4)
    assert total == 32 and correct >= 31


def test_it_learns_the_eight_rotations_of_a_handful_of_images(images, tmp_path):
    recipe = dataclasses.replace(
        NIN_CIFAR10_ABLATION_R8, model="test_resnet", stages=(Stage(150, 16),), padding=0, flip="none",
        images_per_step=4, holdout=36, image_size=16, precision="fp32",
    )  # fmt: skip
    file = pretrain(recipe, images.flip(0), tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["recipe"]["rotation_unit"] == 45 and run["rotated_images"] == 150 * 4 * 8
    assert run["holdout_rotation_accuracy"]["n"] == 36 * 8
    model = timm.create_model("test_resnet", num_classes=8)
    model.load_state_dict(load_file(file))
    cfg = model.pretrained_cfg
    views = rotate_eighths(normalize(images.flip(0)[:4], cfg["mean"], cfg["std"]))
    correct, total = count_correct(model, [views], 8)
    assert total == 32 and correct >= 31


def test_outputs(images, tmp_path):
    file = pretrain(TINY, images, tmp_path / "run")
    assert file == tmp_path / "run" / "model.safetensors"
    assert sorted(p.name for p in file.parent.iterdir()) == [
        "config.json",
        "curve.png",
        "metrics.jsonl",
        "model.safetensors",
        "run.json",
    ]
    run = json.loads((file.parent / "run.json").read_text())
    assert run["rotated_images"] == 30 * 4 * 4 and [point["step"] for point in run["curve"]] == list(range(1, 31))
    assert run["recipe"]["name"] == "nin-cifar10-cpu" and run["optimizer"] == "Muon" and run["processes"] == 1
    (tmp_path / "any").touch()
    assert file.stat().st_mode == (tmp_path / "any").stat().st_mode
    assert {tensor.dtype for tensor in weights(file.parent).values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize(
    "steps, points", [(6, range(1, 7)), (59, [*range(2, 59, 2), 59]), (405, [*range(10, 401, 10), 405])]
)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the steps are not real
def test_a_short_run_has_a_curve_too(monkeypatch, tmp_path, steps, points):
    """At least twenty points, where there are as many steps; one every ten steps of a long run: the means between."""
    recipe = dataclasses.replace(SHORT, stages=(Stage(steps, 8),))
    losses = iter(range(1, steps + 1))
    monkeypatch.setattr(loop, "train_step", lambda *args: torch.tensor(float(next(losses))))
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    pretrain(recipe, images, tmp_path)
    curve = json.loads((tmp_path / "run.json").read_text())["curve"]
    assert [point["step"] for point in curve] == list(points)
    begins = [0, *points][:-1]
    assert [point["loss"] for point in curve] == [
        (begin + 1 + end) / 2 for begin, end in zip(begins, points, strict=True)
    ]


def test_the_time_left_is_told_from_the_first_point_on(images, tmp_path, capsys):
    """In a log file too, which is no terminal."""
    pretrain(SHORT, images, tmp_path)
    told = capsys.readouterr().err
    # each point is shown as it is reached; what a slow machine shows between them does not matter
    for done in range(16, 97, 16):
        assert re.search(rf" {done}/96 \[\d\d:\d\d<\d\d:\d\d, [^\r]*loss=", told), told


def test_the_same_seed_gives_the_same_weights_and_another_others(images, tmp_path):
    for name, recipe in (("a", TINY), ("b", TINY), ("c", dataclasses.replace(TINY, seed=1))):
        pretrain(recipe, images, tmp_path / name)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_tensorboard_gets_the_curve(images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = dataclasses.replace(TINY, stages=(Stage(20, 8),))
    pretrain(recipe, images, tmp_path, create_accelerator(recipe, True, trackers="tensorboard", output=tmp_path))
    log = EventAccumulator(str(tmp_path / "tensorboard"))
    log.Reload()
    curve = json.loads((tmp_path / "run.json").read_text())["curve"]
    assert [(e.step, pytest.approx(e.value)) for e in log.Scalars("loss")] == [(p["step"], p["loss"]) for p in curve]
    assert {"learning rate", "crop"} < set(log.Tags()["scalars"])


# --- the order of flip and rotation


class HandcraftedFeatures(nn.Module):
    """Which side of the image is bright: no weights, nothing learned."""

    def forward(self, images):
        top, left = images[:, :, :6].mean((1, 2, 3)), images[..., :6].mean((1, 2, 3))
        bottom, right = images[:, :, -6:].mean((1, 2, 3)), images[..., -6:].mean((1, 2, 3))
        # the bright upper side of an upright image goes to the left by a quarter turn counter-clockwise
        return torch.stack([top - bottom, left - right, bottom - top, right - left], 1)


def skies():
    """Images that are bright above and different left and right, as photographs are."""
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(200, 50, 16)[:, None] + torch.linspace(-20, 20, 16)
    noise = torch.randn(40, 3, 16, 16, generator=generator) * 10
    return (ramp + noise).clamp(0, 255).byte()


def upright_crops(recipe, images):
    model = create_model(recipe)
    batches = augmented_batches(recipe, model, images, len(images), create_accelerator(recipe, True), 0, set())
    return [next(batches) for _ in range(10)]


def test_images_are_mirrored_before_they_are_turned():
    recipe = dataclasses.replace(TINY, stages=(Stage(10, 12),), flip="random")
    batches = upright_crops(recipe, skies())
    assert count_correct(HandcraftedFeatures(), map(rotate_all, batches), 4) == (160, 160)
    # the broken order, by hand: a quarter and three quarters are told apart by chance alone
    labels, right = rotation_labels(4), torch.zeros(4)
    generator = torch.Generator().manual_seed(1)
    for batch in batches:
        turned = rotate_all(batch)
        after = torch.where(torch.rand(16, 1, 1, 1, generator=generator) < 0.5, turned.flip(-1), turned)
        guesses = HandcraftedFeatures()(after).argmax(1)
        right += torch.bincount(labels[guesses == labels], minlength=4)
    assert right[0] == right[2] == 40 and 10 <= right[1] <= 30 and 10 <= right[3] <= 30


def test_mirrored_images_alternate_by_epoch(images):
    recipe = dataclasses.replace(TINY, stages=(Stage(20, 16),), padding=0, flip="alternate")
    marked = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 3, 16, 16).clone()
    marked[..., 0] += 100  # the left column tells which way it is
    model = create_model(recipe)
    cfg = model.pretrained_cfg
    batches = augmented_batches(recipe, model, marked, 40, create_accelerator(recipe, True), 0, set())
    mean, std = (torch.tensor(cfg[name])[0] * 255 for name in ("mean", "std"))
    mirrored = [{}, {}]
    for step, batch in enumerate(batches):
        left, right = (((batch[:, 0, 0, c] * std) + mean).round().int() for c in (0, -1))
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            mirrored[step // 10][min(a, b)] = b > a
    assert len(mirrored[0]) == 40 and 10 < sum(mirrored[0].values()) < 30
    assert all(mirrored[1][image] != was for image, was in mirrored[0].items())


def test_each_epoch_takes_every_image_once(images):
    recipe = dataclasses.replace(TINY, stages=(Stage(20, 16),), padding=0)
    marked = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 3, 16, 16)
    model = create_model(recipe)
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[name])[0] * 255 for name in ("mean", "std"))

    def seen(start):
        batches = augmented_batches(recipe, model, marked, 40, create_accelerator(recipe, True), start, set())
        return [(batch[:, 0, 0, 0] * std + mean).round().int().tolist() for batch in batches]

    steps = seen(0)
    first, second = ([image for step in part for image in step] for part in (steps[:10], steps[10:]))
    assert sorted(first) == sorted(second) == list(range(40)) and first != second
    assert seen(13) == steps[13:]


# --- shares of a step


def test_parts_of_a_step_give_the_step(images, tmp_path):
    """Without batch norm the mean of the parts' gradients is the whole's."""
    large = nn.functional.interpolate(images.float(), size=(32, 32)).byte()
    recipe = dataclasses.replace(
        TINY, model="test_convnext", stages=(Stage(10, 32),), images_per_step=8, optimizer=Sgd(lr=0.01), image_size=32
    )
    for parts in (1, 4):
        pretrain(recipe, large, tmp_path / str(parts), create_accelerator(recipe, True, accumulate=parts))
    one, four = (weights(tmp_path / name) for name in ("1", "4"))
    start = create_model_again(recipe)
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-4, atol=1e-6)
    assert max((one[name] - start[name]).abs().max() for name in one) > 1e-3


def create_model_again(recipe):
    torch.manual_seed(recipe.seed)
    return create_model(recipe).state_dict()


STOPPED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
from tiny_runs import interrupt
from training import pretrain

class Patch:
    setattr = staticmethod(setattr)

if os.environ["RANK"] == "1":
    # one of the two is asked to stop, in its fifth step: both stop, at the same one
    interrupt(Patch, 5, lambda: signal.raise_signal(signal.SIGTERM))
sys.exit(pretrain.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_train_as_one(small_cifar10, tmp_path, capsys):
    """Gloo on loopback, a model without batch norm: the same curve, and the same weights but for rounding, through
    checkpoints at every step, a stop and a resume.
    """
    arguments = [
        *("nin-cifar10-paper", "--model", "test_convnext", "--data", str(small_cifar10), "--steps", "12"),
        *("--images-per-step", "8", "--tracker", "none", "--checkpoint-seconds", "0", "--output"),
    ]
    stopped = tmp_path / "stopped.py"
    stopped.write_text(STOPPED.format(root=str(ROOT), tests=str(ROOT / "tests")))
    two = [*arguments, str(tmp_path / "two")]
    result = torchrun(str(stopped), *two)
    assert result.returncode != 0 and result.stderr.count("stopped; continue with --resume") == 1, result.stderr
    assert find_checkpoint(tmp_path / "two").name == "step-000005"
    assert command.main([*two, "--resume"]) == 2
    assert "is of another run (processes 2 -> 1)" in capsys.readouterr().err
    result = torchrun("-m", "training", "pretrain", *two, "--resume")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("wrote ") == 1
    assert command.main([*arguments, str(tmp_path / "one")]) == 0
    assert_two_trained_as_one(tmp_path)


def torchrun(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run([*starter, *arguments], capture_output=True, text=True, check=False, env=environment)


def test_processes_wait_for_hours_while_the_first_one_downloads(monkeypatch):
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    given = {}

    def no_group(**options):
        given.update(options)
        raise ValueError("there is no second process")

    monkeypatch.setattr(torch.distributed, "init_process_group", no_group)
    AcceleratorState._reset_state(reset_partial_state=True)  # it is that of a single process
    with pytest.raises(ValueError, match="cannot be set up: there is no second process"):
        create_accelerator(TINY, cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert given["timeout"] >= timedelta(hours=2)


def test_shares_that_do_not_divide_a_step(images, tmp_path):
    with pytest.raises(ValueError, match="4 images a step cannot be shared by 3 "):
        pretrain(TINY, images, tmp_path / "new", create_accelerator(TINY, True, accumulate=3))
    assert not (tmp_path / "new").exists()


def test_batch_norms_common_to_processes_keep_activations_and_muon():
    """timm's conversion, not torch's, which drops the activation that timm's own batch norms carry."""
    from timm.layers import convert_sync_batchnorm

    assert loop.convert_sync_batchnorm is convert_sync_batchnorm
    model = convert_sync_batchnorm(timm.create_model("rotnet_nin3"))
    norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert norms and all(isinstance(norm.act, nn.ReLU) for norm in norms)
    assert len(create_optimizers(TINY.optimizer, model, "fp32")) == 2


def test_what_needs_a_gpu_is_refused_without_one(images, tmp_path):
    with pytest.raises(ValueError, match="SyncBatchNorm runs on GPUs alone"):
        pretrain(TINY, images, tmp_path / "new", sync_batchnorm=True)
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        create_accelerator(dataclasses.replace(TINY, precision="fp16", optimizer=Sgd()), cpu=True)
    with pytest.raises(ValueError, match="Unsupported logging capability: nothing"):
        create_accelerator(TINY, cpu=True, trackers="nothing", output=tmp_path)
    with pytest.raises(ValueError, match="tracker 'aim' is not installed: pip install it, or --tracker none"):
        create_accelerator(TINY, cpu=True, trackers="aim", output=tmp_path)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_module_of_two_names_is_written_under_both(images, tmp_path, monkeypatch, average):
    def create_shared(recipe):
        network = create_model(recipe)
        network.add_module("again", network.fc)
        return network

    monkeypatch.setattr(loop, "create_model", create_shared)
    recipe = dataclasses.replace(SHORT, average=average)
    pretrain(recipe, images, tmp_path / "whole")
    state, network = weights(tmp_path / "whole"), create_shared(recipe)
    network.load_state_dict(state)
    shared = [name for name in state if name.startswith("again.")]
    assert shared and all(torch.equal(state[name], state[name.replace("again", "fc")]) for name in shared)
    interrupt(monkeypatch, 4, lambda: signal.raise_signal(signal.SIGTERM))
    assert pretrain(recipe, images, tmp_path / "parts").name == "step-000004"
    pretrain(recipe, images, tmp_path / "parts", resume=True)
    assert same(weights(tmp_path / "parts"), state)


# --- averaged weights


def test_averaged_weights_by_hand(images, tmp_path, monkeypatch):
    recipe = dataclasses.replace(TINY, stages=(Stage(3, 8),), average=0.5, schedule=LinearSchedule(0.0, 1.0))
    seen = []
    whole = loop.train_step

    def record(recipe, model, *args):
        seen.append(next(model.parameters()).detach().clone())
        return whole(recipe, model, *args)

    monkeypatch.setattr(loop, "train_step", record)
    kept = []
    monkeypatch.setattr(loop, "update_statistics", lambda r, model, b: kept.append(next(model.parameters()).clone()))
    plain = dataclasses.replace(recipe, average=0.0)
    for name, r in (("averaged", recipe), ("plain", plain)):
        pretrain(r, images, tmp_path / name)
    after_1, after_2, after_3 = seen[1], seen[2], weights(tmp_path / "plain")["conv1.0.weight"]
    by_hand = 0.5 * (0.5 * after_1 + 0.5 * after_2) + 0.5 * after_3
    torch.testing.assert_close(weights(tmp_path / "averaged")["conv1.0.weight"], by_hand)
    assert len(kept) == 1


def test_statistics_are_the_mean_over_the_batches(images):
    recipe = dataclasses.replace(TINY, stages=(Stage(3, 8),))
    model = create_model(recipe)
    batches = upright_three(recipe, model, images)
    first = model.bn1 if hasattr(model, "bn1") else next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    inputs = []
    hook = first.register_forward_hook(lambda _, args, __: inputs.append(args[0].mean((0, 2, 3))))
    momentum = first.momentum
    update_statistics(recipe, model, batches)
    hook.remove()
    torch.testing.assert_close(first.running_mean, torch.stack(inputs).mean(0))
    assert len(inputs) == 3 and first.momentum == momentum


def upright_three(recipe, model, images):
    return augmented_batches(recipe, model, images, len(images), create_accelerator(recipe, True), 0, set())


def test_label_smoothing_has_a_floor(handful):
    """A loss with smoothing s on four rotations cannot go below the entropy of (1 - 3 s / 4, s / 4, s / 4, s / 4)."""
    target = torch.tensor([0.7, 0.1, 0.1, 0.1])
    entropy = -(target * target.log()).sum().item()
    assert target[1:].sum() == pytest.approx(3 / 4 * SMOOTHING)
    last = json.loads((handful / "run.json").read_text())["curve"][-1]["loss"]
    assert entropy <= last < entropy + 0.1


# --- backbones


@pytest.mark.parametrize("model", ["test_convnext", "test_vit", "test_efficientnet", "rotnet_alexnet"])
def test_any_backbone_of_timm(images, tmp_path, model):
    size = 64 if model == "rotnet_alexnet" else 32
    large = nn.functional.interpolate(images.float(), size=(size, size)).byte()
    recipe = dataclasses.replace(
        TINY, model=model, image_size=size, stages=(Stage(2, size),), padding=0, optimizer=AdamW()
    )
    pretrain(recipe, large, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again(torch.zeros(1, 3, size, size)).shape == (1, 4)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in weights(tmp_path).items())
    assert again.pretrained_cfg["input_size"] == (3, size, size) and not again.pretrained_cfg.get("license")
    timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7)


class Volumes(nn.Module):
    """A network with a Conv3d, as timm's lambda_resnet26t has."""

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 16, 16), "architecture": "volumes"}
        self.num_classes = self.num_features = 4
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.volumes, self.head = nn.Conv3d(1, 1, (1, 3, 3)), nn.Linear(4, 4)

    def forward(self, images):
        features = self.norm(self.conv(images)).relu()
        return self.head(self.volumes(features.unsqueeze(1)).squeeze(1).mean((2, 3)))


def test_a_backbone_with_a_convolution_in_three_dimensions(images, tmp_path, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: Volumes())
    pretrain(SHORT, images, tmp_path)
    assert weights(tmp_path)["volumes.weight"].shape == (1, 1, 1, 3, 3)


def test_a_registered_model_without_a_configuration(monkeypatch):
    def bare(pretrained=False, num_classes=10, **kwargs):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))

    # what register_model does for a module without default_cfgs
    monkeypatch.setitem(timm.models._registry._model_entrypoints, "bare", bare)
    recipe = dataclasses.replace(TINY, model="bare")
    create_model(recipe)
    assert not takes_one_size("bare") and trained_size(recipe) == 16


class Stubborn(nn.Linear):
    """A network whose head is what it is."""

    def __init__(self):
        super().__init__(3, 10)

    def forward(self, images):
        return super().forward(images.mean((2, 3)))


def test_a_run_begins_with_pretrained_weights(images, tmp_path):
    published = timm.create_model("rotnet_nin.cifar10", pretrained=True).state_dict()
    recipe = dataclasses.replace(TINY, model="rotnet_nin.cifar10", pretrained=True, optimizer=Sgd(lr=1e-6))
    assert same(create_model(recipe).state_dict(), published)
    pretrain(recipe, images, tmp_path)
    after = weights(tmp_path)
    convolutions = [name for name, value in after.items() if value.ndim == 4]
    assert not same(after, published) and all(
        torch.allclose(after[name], published[name], atol=1e-4) for name in convolutions
    )
    entry = zoo.manifest()["rotnet_nin.cifar10"]
    begun = {"name": "rotnet_nin.cifar10", "sha256": entry["sha256"], "rotated_images": entry["rotated_images"]}
    assert json.loads((tmp_path / "run.json").read_text())["begun_with"] == begun
    own = create_model(dataclasses.replace(recipe, model=f"local-dir:{tmp_path}"))
    assert same(own.state_dict(), after) and published_weights_of(own) == {}
    with pytest.raises(ValueError, match=r"model 'rotnet_resnet18' cannot be made .*no pretrained weights"):
        create_model(dataclasses.replace(recipe, model="rotnet_resnet18"))


def test_backbones_that_do_not_fit(monkeypatch):
    large = {"stages": (Stage(1, 32),), "image_size": 32}
    with pytest.raises(ValueError, match="model 'resnet_of_nobody' cannot be made"):
        create_model(dataclasses.replace(TINY, model="resnet_of_nobody"))
    with pytest.raises(ValueError, match="rotnet_alexnet does not take crops of 8 pixels"):
        create_model(dataclasses.replace(TINY, model="rotnet_alexnet"))
    with pytest.raises(ValueError, match=r"model 'gcvit_xxtiny' cannot be made \(division by zero\)"):
        create_model(dataclasses.replace(TINY, model="gcvit_xxtiny"))
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: Stubborn())
    with pytest.raises(ValueError, match=r"gives \(2, 10\) for two images, not \(2, 4\): it has no head that can be"):
        create_model(TINY)
    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(ValueError, match="needs batch norm after every convolution: ConvNeXt has"):
        create_optimizers(
            TINY.optimizer, create_model(dataclasses.replace(TINY, model="test_convnext", **large)), "fp32"
        )


# --- what is refused


def test_a_finished_run_is_not_overwritten(images, tmp_path):
    pretrain(TINY, images, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already contains a run"):
        pretrain(TINY, images, tmp_path)
    with pytest.raises(ValueError, match=r"a finished run of another recipe \(seed differ\)"):
        pretrain(dataclasses.replace(TINY, seed=1), images, tmp_path, resume=True)
    # whoever always says --resume, as jobs do that may be killed, gets what is there
    assert pretrain(TINY, images, tmp_path, resume=True) == tmp_path / "model.safetensors"
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_nothing_to_resume_and_images_that_do_not_fit(images, tmp_path):
    with pytest.raises(ValueError, match="nothing to resume"):
        pretrain(TINY, images, tmp_path / "new", resume=True)
    with pytest.raises(ValueError, match="3 images cannot make a step of 4"):
        pretrain(TINY, images[:3], tmp_path / "new")
    with pytest.raises(ValueError, match="takes images of 16 pixels, these are of 12"):
        pretrain(TINY, images[..., :12, :12], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_held_out_images_are_never_trained_on(images, tmp_path):
    recipe = dataclasses.replace(TINY, holdout=10)
    changed = images.clone()
    changed[-10:] = 0
    pretrain(recipe, images, tmp_path / "a")
    pretrain(recipe, changed, tmp_path / "b")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert json.loads((tmp_path / "a" / "run.json").read_text())["holdout_rotation_accuracy"]["n"] == 40


def test_held_out_images_are_made_to_fit_a_backbone_of_one_size(images, tmp_path):
    recipe = dataclasses.replace(
        TINY, model="test_vit", stages=(Stage(2, 16),), padding=0, optimizer=AdamW(), holdout=10
    )  # fmt: skip
    pretrain(recipe, images, tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["holdout_rotation_accuracy"]["n"] == 40


def test_whole_images_are_checked_before_the_training(images, tmp_path):
    """The held-out images are whole, and come last: an error then would cost the weights."""
    recipe = dataclasses.replace(
        TINY, model="vit_tiny_patch16_224", stages=(Stage(2, 16),), padding=0, optimizer=AdamW()
    )  # fmt: skip
    pretrain(recipe, images, tmp_path / "vit")
    # a ViT whose name does not say that it takes one size
    larger = dataclasses.replace(recipe, model=f"local-dir:{tmp_path / 'vit'}", image_size=32, holdout=10)
    with pytest.raises(ValueError, match=r"does not take whole images of 32 pixels \(.*\): give images of a"):
        create_model(larger)
    create_model(dataclasses.replace(larger, image_size=16))
    eighths = dataclasses.replace(TINY, rotations=tuple(range(8)), rotation_unit=45, image_size=72)
    with pytest.raises(ValueError, match="images of 72 pixels cannot be held out of rotations by 45 degrees"):
        create_model(dataclasses.replace(eighths, holdout=1))
    create_model(eighths)


def test_crops_that_are_resized_and_arguments_of_the_model(images, tmp_path):
    recipe = dataclasses.replace(
        TINY, model="rotnet_alexnet", model_args=(("fc_size", 0),), scale=(0.4, 1.0), padding=0,
        stages=(Stage(2, 64), Stage(1, 72)), holdout=10, optimizer=AdamW(),
    )  # fmt: skip
    pretrain(recipe, images, tmp_path)
    assert weights(tmp_path)["head.fc.weight"].shape == (4, 256), "no fc6 and fc7"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 72, 72]
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["recipe"]["model_args"] == [["fc_size", 0]] and run["holdout_rotation_accuracy"]["n"] == 40
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert same(loaded.state_dict(), weights(tmp_path))
    with pytest.raises(ValueError, match="does not take crops of 32 pixels"):
        pretrain(dataclasses.replace(recipe, stages=(Stage(1, 32),)), images, tmp_path / "small")


@pytest.mark.parametrize("seconds", [-1.0, math.nan])
def test_the_time_between_checkpoints_is_checked(images, tmp_path, seconds):
    with pytest.raises(ValueError, match=rf"checkpoint_seconds must be 0 or more, got {seconds}"):
        pretrain(TINY, images, tmp_path / "new", checkpoint_seconds=seconds)


@pytest.mark.parametrize("holdout", [-1, 40])
def test_holdout_is_checked(images, tmp_path, holdout):
    with pytest.raises(ValueError, match=rf"holdout must be 0 .* got {holdout}"):
        pretrain(dataclasses.replace(TINY, holdout=holdout), images, tmp_path / "new")


# --- the command


def test_the_command_changes_a_recipe_and_records_it(small_cifar10, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "tiny", dataclasses.replace(TINY, name="tiny", image_size=32))
    arguments = ["tiny", "--data", str(small_cifar10), "--output", str(tmp_path / "run"), "--device", "cpu"]
    assert command.main([*arguments, "--steps", "1"]) == 2
    assert "steps must be at least 2, one for each stage of tiny, got 1" in capsys.readouterr().err
    assert command.main([*arguments, "--accumulate", "0"]) == 2
    assert command.main([*arguments, "--steps", "3", "--seed", "5", "--images-per-step", "8"]) == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [stage["steps"] for stage in run["recipe"]["stages"]] == [2, 1] and run["rotated_images"] == 96
    assert run["recipe"]["seed"] == 5
    assert (tmp_path / "run" / "tensorboard").is_dir()


def test_another_model_is_made_without_the_arguments_of_the_recipes_own():
    recipe = dataclasses.replace(TINY, model="rotnet_alexnet", model_args=(("fc_size", 0),))
    assert changed(recipe, model="test_resnet").model_args == ()
    assert changed(recipe, model="rotnet_alexnet", seed=1).model_args == (("fc_size", 0),)
    assert changed(recipe, model="resnet18", model_args=(("stem_width", 32),)).model_args == (("stem_width", 32),)


def test_a_processor_without_bfloat16_is_told(small_cifar10, tmp_path, monkeypatch, capsys):
    # no folder to monitor by: it is told before anything is trained
    arguments = [
        "nin-cifar10-cpu",
        "--data",
        str(small_cifar10),
        "--device",
        "cpu",
        "--monitor",
        str(tmp_path / "nowhere"),
        "--output",
        str(tmp_path / "run"),
    ]
    told = "cpu has no known bfloat16 instructions: bf16 may be many times slower than fp32"
    for precision, flags, expected in (
        ("bf16", set(), True),
        ("bf16", {"amx_bf16"}, False),
        ("fp32", set(), False),
        ("auto", set(), False),
    ):
        monkeypatch.setattr("rotation_ssl.precision.cpu_flags", lambda flags=flags: flags)
        assert command.main([*arguments, "--images-per-step", "8", "--precision", precision]) == 2
        error = capsys.readouterr().err
        assert (told in error) == expected and "nowhere does not exist" in error


def test_command_line_errors_are_one_line(tmp_path, capsys):
    status = command.main(
        ["nin-cifar10-cpu", "--device", "cpu", "--data", str(tmp_path / "nowhere"), "--output", str(tmp_path / "o")]
    )
    assert status == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: no CIFAR-10 in") and "\n" not in error
    assert command.main(["nin-cifar10-cpu", "--size", "64", "--data", str(tmp_path), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("error: CIFAR-10's images are of 32 pixels, not 64")
    assert not (tmp_path / "o").exists()
    assert command.main(["nin-cifar10-cpu", "--seed", str(2**64), "--data", str(tmp_path), "--device", "cpu"]) == 2
    assert capsys.readouterr().err == f"error: seed must be below 2**64, got {2**64}\n"


def test_memory_that_is_short_is_told_in_one_line(small_cifar10, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "tiny", dataclasses.replace(TINY, name="tiny", image_size=32))
    arguments = ["tiny", "--data", str(small_cifar10), "--output", str(tmp_path / "run"), "--device", "cpu"]

    def fail(message):
        def step(*args):
            raise RuntimeError(message)

        monkeypatch.setattr(loop, "train_step", step)

    fail("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it")
    assert command.main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: CUDA out of memory. Tried to allocate 2.00 GiB. (use fewer --images-per-step, or split a step: "
        "--accumulate)"
    )
    fail("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        command.main(arguments)


@pytest.mark.parametrize("name", ["pretrain", "evaluate", "finetune", "check", "study", "networks"])
def test_help_says_how_to_leave_the_allocator_alone(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert "ROTATION_SSL_MALLOPT=0" in capsys.readouterr().out
