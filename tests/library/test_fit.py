"""The SGD loop by hand: one step, the schedule, clipping, and what stops it."""

import contextlib
import itertools
import resource

import pytest
import torch
from conftest import limited
from torch.nn import functional as F

from rotation_ssl.fit import CHECK_EVERY, Checkpoint, Checkpoints, fit
from rotation_ssl.pretraining.optim import create_scheduler
from rotation_ssl.pretraining.recipe import StepSchedule


def one_weight(value=2.0):
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, value)
    return model


def sgd(model, lr=0.1, **settings):
    return torch.optim.SGD(model.parameters(), lr, **settings)


def test_two_steps_with_momentum_and_weight_decay_by_hand():
    # the loss 3 w has the gradient 3; with decay 0.5 of the weight 2 it is 4, the step 0.1 * 4, the weight 1.6.
    # Then the gradient is 3 + 0.5 * 1.6 = 3.8, momentum 0.9 * 4 + 3.8 = 7.4, the weight 1.6 - 0.74.
    model = one_weight()
    optimizer = sgd(model, momentum=0.9, weight_decay=0.5)
    seen = []

    def loss_of(batch):
        seen.append(model.weight.item())
        assert model.training
        return model(batch).sum()

    fit(model, [torch.tensor([[3.0]])] * 2, loss_of, optimizer, name="w")
    assert seen == pytest.approx([2.0, 1.6]) and model.weight.item() == pytest.approx(0.86)
    assert not model.training


def test_the_rate_falls_at_the_milestones():
    model = one_weight(0.0)
    optimizer = sgd(model)
    scheduler = create_scheduler(StepSchedule(milestones=(0.5, 0.8), factor=0.1), optimizer, 10)
    rates = []

    def loss_of(batch):
        rates.append(optimizer.param_groups[0]["lr"])
        return model(batch).sum()

    batches = itertools.repeat(torch.ones(1, 1))
    fit(model, batches, loss_of, optimizer, name="w", scheduler=scheduler, steps=10)
    assert rates == pytest.approx([0.1] * 5 + [0.01] * 3 + [0.001] * 2)
    # a gradient of 1 at each of these rates
    assert model.weight.item() == pytest.approx(-0.532)


@pytest.mark.parametrize(("clip", "moved"), [(None, (3.0, 4.0)), (1.0, (0.6, 0.8)), (10.0, (3.0, 4.0))])
def test_clipping_scales_all_gradients_together(clip, moved):
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    batch = torch.tensor([[3.0, 4.0]])  # the gradient, of norm 5
    fit(model, [batch], lambda batch: model(batch).sum(), sgd(model, lr=1.0), name="w", clip=clip)
    assert model.weight[0].tolist() == pytest.approx([-value for value in moved])


def test_several_losses_are_summed():
    model = torch.nn.Linear(1, 2, bias=False)
    torch.nn.init.zeros_(model.weight)
    fit(model, [torch.ones(1, 1)], lambda batch: model(batch)[0] * torch.tensor([1.0, 2.0]), sgd(model), name="w")
    assert model.weight[:, 0].tolist() == pytest.approx([-0.1, -0.2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [1, 7, CHECK_EVERY, CHECK_EVERY + 3])
@pytest.mark.parametrize("steps", [None, CHECK_EVERY + 5])
def test_a_loss_that_is_not_finite_stops_with_its_step(value, at, steps):
    model = one_weight()
    batches = (torch.full((1, 1), value if step == at else 0.0) for step in range(1, CHECK_EVERY + 6))
    with pytest.raises(ValueError, match=f"the loss of the head became {value} in step {at}: lower the learning rate"):
        fit(model, batches, lambda batch: model(batch).sum(), sgd(model, lr=0.0), name="the head", steps=steps)


def test_too_few_batches_are_an_error():
    model = one_weight()
    for batches, steps, message in (([], None, "got 0 batches.* at least 1"), ([1.0] * 3, 4, "got 3 batches.* 4")):
        with pytest.raises(ValueError, match=message):
            fit(model, batches, lambda batch: model.weight.sum(), sgd(model), name="w", steps=steps)


def test_no_batch_is_taken_after_the_last_step():
    model, batches = one_weight(), iter(range(5))
    fit(model, batches, lambda batch: model.weight.sum(), sgd(model), name="w", steps=3)
    assert list(batches) == [3, 4]


def test_the_bar_counts_images_and_shows_the_loss(capsys):
    model = one_weight()
    for quiet in (True, False):
        fit(
            model, [0] * 4, lambda batch: model.weight.sum() * 0 + 1.5, sgd(model), name="a probe", steps=4,
            images_per_step=25, quiet=quiet,
        )  # fmt: skip
        shown = capsys.readouterr().err
        assert (shown == "") is quiet
    assert "a probe" in shown and "100/100" in shown and "img/s, loss 1.500" in shown


def trained_on_a_handful(seed, autocast=None):
    torch.manual_seed(seed)
    inputs, labels = torch.randn(8, 5), torch.arange(8) % 4
    model = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    optimizer = sgd(model, lr=0.2, momentum=0.9)
    batches = ((inputs[part], labels[part]) for _ in range(60) for part in torch.randperm(8).split(4))

    def loss_of(batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    fit(model, batches, loss_of, optimizer, name="a handful", autocast=autocast)
    return model, (model(inputs).argmax(1) == labels).float().mean().item()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_handful_is_overfitted(autocast):
    assert trained_on_a_handful(0, autocast)[1] == 1.0


def test_the_same_seed_gives_the_same_bits():
    first, again, other = (trained_on_a_handful(seed)[0][0].weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


# checkpoints


def train_until(end, file=None, steps=50):
    """Train with dropout and falling rates up to a step; returns all weights."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Dropout(), torch.nn.Linear(8, 1))
    optimizer = sgd(model, lr=0.01, momentum=0.9)
    scheduler = create_scheduler(StepSchedule(milestones=(0.3, 0.7), factor=0.5), optimizer, steps)
    checkpoint = Checkpoint(file, "x")
    batches = torch.randn(steps, 4, 2, generator=torch.Generator().manual_seed(1))[checkpoint.done : end]
    checkpoint.restore(model=model, optimizer=optimizer, scheduler=scheduler)

    def loss_of(batch):
        return model(batch).square().mean()

    with contextlib.nullcontext() if end == steps else pytest.raises(ValueError, match=f"w got {end} batches"):
        fit(model, batches, loss_of, optimizer, name="w", scheduler=scheduler, steps=steps, checkpoint=checkpoint)
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


def test_a_training_goes_on_from_its_checkpoint_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("rotation_ssl.fit.CHECKPOINT_SECONDS", 0.0)
    whole = train_until(50)
    file = tmp_path / "parts.pt"
    for end, done in ((25, 20), (45, 40)):
        train_until(end, file)
        assert torch.load(file, weights_only=True)["done"] == done
    assert torch.equal(train_until(50, file), whole)
    # nothing is left to train
    assert torch.equal(train_until(50, file), whole)


def test_a_checkpoint_is_saved_once_a_minute_and_at_the_end(tmp_path):
    train_until(45, tmp_path / "parts.pt")
    assert not (tmp_path / "parts.pt").exists()
    train_until(50, tmp_path / "parts.pt")
    assert (tmp_path / "parts.pt").exists()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    checkpoint = Checkpoint(tmp_path / "parts.pt", "x")
    checkpoint.restore(model=torch.nn.Linear(100, 100))
    checkpoint.save(7, at_once=True)
    with (
        limited(resource.RLIMIT_FSIZE, 20_000),
        pytest.raises(OSError, match=rf"^{checkpoint.file} cannot be written .*: make room on the disk and try again$"),
    ):
        checkpoint.save(8, at_once=True)
    assert list(tmp_path.iterdir()) == [checkpoint.file] and Checkpoint(checkpoint.file, "x").done == 7


def test_trainings_in_one_folder_keep_out_of_each_others_way(tmp_path):
    ours, others = Checkpoints(tmp_path / "runs"), Checkpoints(tmp_path / "runs")
    saved = {}
    for owner, identity in ((ours, "a"), (ours, "b"), (others, "c")):
        checkpoint = owner.open(identity)
        checkpoint.restore()
        checkpoint.save(7, at_once=True)
        saved[identity] = checkpoint.file
    assert len(set(saved.values())) == 3
    assert [Checkpoints(tmp_path / "runs").open(name).done for name in "abcd"] == [7, 7, 7, 0]
    ours.remove()
    assert list((tmp_path / "runs").iterdir()) == [saved["c"]]
    assert Checkpoints().open("c").done == 0, "nothing is saved without a folder"


def test_losses_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr("rotation_ssl.fit.CHECKPOINT_SECONDS", 0.0)
    model = one_weight()
    checkpoint = Checkpoint(tmp_path / "parts.pt", "x")
    checkpoint.restore(model=model)
    losses = [1.0] * (CHECK_EVERY - 1) + [float("nan")] * 3
    with pytest.raises(ValueError, match=f"became nan in step {CHECK_EVERY}"):
        fit(model, losses, lambda loss: model.weight.sum() * loss, sgd(model), name="w", checkpoint=checkpoint)
    assert not checkpoint.file.exists()


def test_what_is_no_checkpoint_of_the_training_is_refused(tmp_path):
    file = tmp_path / "parts.pt"
    train_until(50, file)
    content = file.read_bytes()
    with pytest.raises(
        ValueError, match=r"parts\.pt belongs to other options, images or weights: remove it, or give another"
    ):
        Checkpoint(file, "y")
    for wrong in ({"head": torch.nn.Linear(2, 2)}, {"model": torch.nn.Linear(2, 2)}):
        with pytest.raises(ValueError, match=r"parts\.pt is no checkpoint \(.+\): remove it"):
            Checkpoint(file, "x").restore(**wrong)
    assert file.read_bytes() == content
    file.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"parts\.pt is no checkpoint \(.+\): remove it"):
        Checkpoint(file, "x")
    with pytest.raises(IsADirectoryError):
        Checkpoint(file.parent, "x")
