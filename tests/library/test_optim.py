"""Schedules worked by hand, Muon's plain step, and filters whose scale does not matter."""

import math

import pytest
import timm
import torch

from rotation_ssl.pretraining.optim import (
    create_optimizers,
    create_scheduler,
    renormalize_filters,
)
from rotation_ssl.pretraining.recipe import AdamW, CosineSchedule, LinearSchedule, Muon, Sgd
from training.recipes import NIN_CIFAR10_AUTHORS, NIN_CIFAR10_PAPER


def learning_rates(schedule, steps, at):
    (optimizer,) = create_optimizers(Sgd(lr=1.0), torch.nn.Linear(2, 2), "fp32")
    optimizer.param_groups[0]["initial_lr"] = 1.0
    rates = []
    for step in at:
        create_scheduler(schedule, optimizer, steps, done=step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_linear_schedule_by_hand():
    assert learning_rates(LinearSchedule(warmup=0.2), 100, [0, 10, 20, 60, 99]) == pytest.approx(
        [0, 0.5, 1, 0.5, 1 / 80]
    )


def test_held_and_cosine_schedules_by_hand():
    held = learning_rates(LinearSchedule(warmup=0.2, hold=0.3), 100, [0, 10, 20, 49, 50, 75, 99])
    assert held == pytest.approx([0, 0.5, 1, 1, 1, 0.5, 1 / 50])
    assert learning_rates(LinearSchedule(warmup=0.2, hold=0.8), 100, [20, 99]) == [1, 1]
    assert learning_rates(LinearSchedule(warmup=0.0, hold=1.0), 1, [0]) == [1]
    assert learning_rates(CosineSchedule(warmup=0.2), 100, [0, 10, 20, 60]) == pytest.approx([0, 0.5, 1, 0.5])
    assert learning_rates(CosineSchedule(warmup=0.0), 4, range(4)) == pytest.approx(
        [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]
    )
    # the scheduler asks for the rate after the last step too
    assert learning_rates(CosineSchedule(warmup=0.6), 1, [0, 1]) == [0, 1]


@pytest.mark.parametrize(
    ("recipe", "epochs", "drops"), [(NIN_CIFAR10_PAPER, 100, (30, 60, 80)), (NIN_CIFAR10_AUTHORS, 200, (60, 120, 160))]
)
def test_step_schedules_of_the_paper_and_its_code(recipe, epochs, drops):
    steps_per_epoch = recipe.steps // epochs
    rates = learning_rates(recipe.schedule, recipe.steps, [e * steps_per_epoch + d for e in drops for d in (-1, 0)])
    assert rates == pytest.approx([1, 0.2, 0.2, 0.04, 0.04, 0.008])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_optimizers_have_the_settings_of_the_recipe(precision):
    def assert_groups(optimizer, **expected):
        for group in optimizer.param_groups:
            assert {name: group[name] for name in expected} == expected

    model = timm.create_model("rotnet_nin3")
    settings = Sgd(lr=0.3, momentum=0.7, weight_decay=0.02)
    expected = {"lr": 0.3, "momentum": 0.7, "weight_decay": 0.02, "nesterov": True, "dampening": 0}
    (sgd,) = create_optimizers(settings, model, precision)
    assert_groups(sgd, **expected)
    (adamw,) = create_optimizers(AdamW(lr=0.02, betas=(0.8, 0.95), weight_decay=0.3), model, precision)
    assert type(adamw) is torch.optim.AdamW
    assert_groups(adamw, lr=0.02, betas=(0.8, 0.95), weight_decay=0.3)
    muon, rest = create_optimizers(Muon(lr=0.04, momentum=0.5, rest=settings), model, precision)
    assert_groups(muon, lr=0.04, momentum=0.5)
    assert_groups(rest, **expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_muon_takes_the_plain_orthogonal_step(precision):
    model = timm.create_model("rotnet_nin3")
    muon, sgd = create_optimizers(Muon(lr=0.5), model, precision)
    filters = [p for p in model.parameters() if p.ndim == 4]
    assert len(filters) == 9 and sum(len(g["params"]) for o in (muon, sgd) for g in o.param_groups) == len(
        list(model.parameters())
    )
    wide = filters[3]  # 192 x 2,400: a random gradient of this shape is well conditioned, five iterations suffice
    before = wide.detach().clone()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    muon.step()
    step = (before - wide.detach()).flatten(1) / 0.5
    # an orthogonal step has singular values near 1; timm's default scaling would make them about 10
    values = torch.linalg.svdvals(step)
    assert values.min() > 0.5 and values.max() < 1.5


@pytest.mark.parametrize("groups", [1, 8], ids=["dense", "depthwise"])
def test_muon_in_float32_goes_where_timms_goes(groups):
    """Three steps with momentum; what timm rounds to bfloat16 moves it by a few hundredths of the way."""
    moved = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3, groups=groups, bias=False), torch.nn.BatchNorm2d(16))
        muon, _ = create_optimizers(Muon(lr=0.1), model, precision)
        before = model[0].weight.detach().clone()
        for _ in range(3):
            model[0].weight.grad = torch.randn(16, 8 // groups, 3, 3)
            muon.step()
        moved[precision] = model[0].weight.detach() - before
    assert (moved["fp32"] - moved["bf16"]).norm() < 0.03 * moved["bf16"].norm()


def test_renormalized_filters_do_not_change_the_function():
    model = timm.create_model("rotnet_nin3").train()
    x = torch.randn(4, 3, 16, 16)
    before = model(x)
    renormalize_filters(model)
    for p in model.parameters():
        if p.ndim == 4:
            assert p.norm().item() == pytest.approx(math.sqrt(len(p)), rel=1e-4)
    torch.testing.assert_close(model(x), before, rtol=1e-2, atol=1e-2)
