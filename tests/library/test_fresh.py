"""Probes on new crops every epoch: trained together as each alone, resumable, in memory that does not grow."""

import copy
import dataclasses

import pytest
import timm
import torch
from torch import nn

import rotation_ssl  # noqa: F401  registers the models with timm
from rotation_ssl import fit
from rotation_ssl.evaluation import fresh
from rotation_ssl.evaluation.fresh import ProbeSpec, train_fresh, training_identity
from rotation_ssl.evaluation.frozen import Frozen
from rotation_ssl.evaluation.protocols import ProbeRecipe
from rotation_ssl.labelled import LabelledImages
from rotation_ssl.probes import convolutional_probe, nonlinear_probe, probe_predict

RECIPE = ProbeRecipe(epochs=4, milestones=(2,), views=0, grid=None, batch_size=5, padding=2)


@pytest.fixture(autouse=True)
def save_every_epoch(monkeypatch):
    monkeypatch.setattr(fit, "CHECKPOINT_SECONDS", 0.0)


@pytest.fixture(scope="module")
def frozen():
    torch.manual_seed(0)
    return Frozen(timm.create_model("rotnet_nin").eval(), 32)


@pytest.fixture(scope="module")
def images():
    """12 of two colours, which leave a last batch of two."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(12) % 2
    noise = torch.randint(0, 60, (12, 3, 32, 32), generator=generator)
    return LabelledImages((noise + 150 * labels[:, None, None, None]).to(torch.uint8), labels, ("dark", "light"))


def heads(recipe=RECIPE):
    return [
        ProbeSpec("nonlinear of block2", "block2", recipe, lambda m: nonlinear_probe(m[0].numel(), 2)),
        ProbeSpec("conv of block1", "block1", dataclasses.replace(recipe, milestones=(1, 3)),
             lambda m: convolutional_probe(m.shape[1], 2)),
    ]  # fmt: skip


def resume(file, frozen, images, heads, seed):
    checkpoint = fit.Checkpoint(file, training_identity(frozen, images, heads, seed))
    return train_fresh(frozen, images, heads, seed, checkpoint)


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_probes_trained_together_are_those_trained_alone(frozen, images):
    together = train_fresh(frozen, images, heads(), seed=3)
    for probe, head in zip(together, heads(), strict=True):
        (alone,) = train_fresh(frozen, images, [head], seed=3)
        assert equal(probe, alone) and not alone.training
        (other,) = train_fresh(frozen, images, [head], seed=4)
        assert not equal(probe, other)


def test_training_has_the_settings_of_the_recipe(frozen, images, monkeypatch):
    made, sgd = [], torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *args, **options: made.append(sgd(*args, **options)) or made[-1])
    recipe = dataclasses.replace(RECIPE, epochs=1, lr=0.05, momentum=0.7, weight_decay=0.02)
    train_fresh(frozen, images, heads(recipe), seed=0)
    expected = {"lr": 0.05, "momentum": 0.7, "weight_decay": 0.02, "nesterov": True}
    assert [{name: group[name] for name in expected} for group in made[0].param_groups] == [expected, expected]


def test_half_of_the_crops_may_be_mirrored(frozen, images, monkeypatch):
    flips, crop = [], fresh.crop_and_flip
    monkeypatch.setattr(fresh, "crop_and_flip", lambda *args: flips.append(args[4]) or crop(*args))
    train_fresh(frozen, images, heads(dataclasses.replace(RECIPE, epochs=1)), seed=0)
    assert flips == [True] * 3, "in each of the three batches"


def test_they_learn(frozen, images):
    recipe = dataclasses.replace(RECIPE, epochs=12, milestones=(8,))
    maps = frozen.whole_maps(["block1", "block2"])(images.images)
    for probe, head in zip(train_fresh(frozen, images, heads(recipe), seed=0), heads(), strict=True):
        assert torch.equal(probe_predict(probe, maps[head.layer]), images.labels), head.name


@pytest.fixture(scope="module")
def whole(frozen, images):
    """Probes of a training that was not stopped."""
    return train_fresh(frozen, images, heads(), seed=1)


@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_a_stream_that_was_stopped_goes_on_to_the_same_probes(frozen, images, whole, tmp_path, monkeypatch, epoch):
    class Killed(BaseException):
        pass

    def stop(generator_seed, at):
        if at == epoch:
            raise Killed
        return generator(generator_seed, at)

    generator, file = fresh.epoch_generator, tmp_path / "probes.pt"
    with monkeypatch.context() as patched:
        patched.setattr(fresh, "epoch_generator", stop)
        if epoch < RECIPE.epochs:
            with pytest.raises(Killed):
                resume(file, frozen, images, heads(), seed=1)
        else:
            resume(file, frozen, images, heads(), seed=1)
    asked = []
    monkeypatch.setattr(fresh, "epoch_generator", lambda seed, at: asked.append(at) or generator(seed, at))
    assert equal(resume(file, frozen, images, heads(), seed=1), whole)
    assert asked == list(range(epoch, RECIPE.epochs))


def test_a_checkpoint_of_other_probes_images_or_weights_is_refused_and_kept(frozen, images, tmp_path):
    file = tmp_path / "probes.pt"
    resume(file, frozen, images, heads(), seed=0)
    content = file.read_bytes()
    longer = dataclasses.replace(RECIPE, epochs=9)
    torch.manual_seed(1)
    # the same first layer
    deeper = copy.deepcopy(frozen.backbone)
    list(deeper.parameters())[-1].data += 1
    others = [
        (dataclasses.replace(frozen, backbone=deeper), images, heads(), 0),
        (frozen, images, heads(longer), 0),
        (frozen, images, heads(), 1),
        (frozen, images.subset(torch.arange(10)), heads(), 0),
        (frozen, dataclasses.replace(images, labels=images.labels.flip(0)), heads(), 0),
        (frozen, dataclasses.replace(images, images=images.images.flip(0)), heads(), 0),
        (Frozen(timm.create_model("rotnet_nin").eval(), 32), images, heads(), 0),
    ]
    for backbone, data, probes, seed in others:
        with pytest.raises(ValueError, match=r"probes\.pt belongs to other options, images or weights: remove it"):
            resume(file, backbone, data, probes, seed)
    assert file.read_bytes() == content
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"probes\.pt is no checkpoint \(.+\): remove it"):
        resume(file, frozen, images, heads(), seed=0)


def test_a_loss_that_is_not_finite_stops_in_its_epoch_and_keeps_the_one_before(frozen, images, tmp_path):
    def broken(example):
        probe = nonlinear_probe(example[0].numel(), 2)
        passes = iter(range(100))
        probe.register_forward_hook(lambda _, __, output: output * (float("nan") if next(passes) > 4 else 1.0))
        return probe

    (good, _), file = heads(), tmp_path / "probes.pt"
    with pytest.raises(ValueError, match="the loss of the probes in epoch 2 became nan in step 3"):
        resume(file, frozen, images, [dataclasses.replace(good, build=broken)], seed=0)
    assert torch.load(file, weights_only=True)["done"] == 1


def test_recipes_that_do_not_go_together_are_refused(frozen, images):
    first, second = heads()
    second = dataclasses.replace(second, recipe=dataclasses.replace(RECIPE, batch_size=4))
    with pytest.raises(ValueError, match="nonlinear of block2, conv of block1 cannot be trained together"):
        train_fresh(frozen, images, [first, second], seed=0)
