"""Optimisers and schedules from their settings: the recipes say which numbers, this module which classes."""

from collections.abc import Iterable

import torch
from timm.optim import Muon as TimmMuon
from timm.scheduler import MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from training.recipes import LinearSchedule, Muon, Sgd, StepSchedule


def create_sgd(settings: Sgd, parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
    """SGD with Nesterov momentum on the parameters, one group."""
    return torch.optim.SGD(
        parameters, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay, nesterov=True
    )


def create_optimizers(settings: Sgd | Muon, model: nn.Module) -> list[torch.optim.Optimizer]:
    """SGD for all parameters, or Muon for the filters of the convolutions and SGD for the others."""
    if isinstance(settings, Sgd):
        return [create_sgd(settings, model.parameters())]
    filters = [p for p in model.parameters() if p.ndim == 4]
    muon = TimmMuon(
        filters,
        lr=settings.lr,
        momentum=settings.momentum,
        nesterov=True,
        # the plain update: timm's default multiplies the rate by 0.2 sqrt(max(out, in)), about 14 on these filters
        adjust_lr_fn=None,
        conv_mode="flatten",
    )
    return [muon, create_sgd(settings.rest, [p for p in model.parameters() if p.ndim != 4])]


def create_scheduler(
    schedule: LinearSchedule | StepSchedule, steps: int, optimizer: torch.optim.Optimizer
) -> Scheduler:
    """timm's scheduler for a run of ``steps`` optimiser steps; call its ``step_update`` before each, from 0."""
    if isinstance(schedule, LinearSchedule):
        warmup = round(schedule.warmup * steps)
        return PolyLRScheduler(
            optimizer, steps - warmup, power=1.0, warmup_t=warmup, warmup_prefix=True, t_in_epochs=False
        )
    # timm applies a milestone one index early, see MultiStepLRScheduler
    milestones = [round(fraction * steps) + 1 for fraction in schedule.milestones]
    return MultiStepLRScheduler(optimizer, milestones, decay_rate=schedule.factor, t_in_epochs=False)


@torch.no_grad()
def renormalize_filters(model: nn.Module) -> None:
    """Scale every filter bank to the norm sqrt(out channels); batch norm makes the outputs independent of it."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
