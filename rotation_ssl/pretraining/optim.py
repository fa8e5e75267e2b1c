"""Optimisers and schedules from their settings: the recipes say which numbers, this module which classes."""

import math
from collections.abc import Iterable

import torch
from timm.optim import Muon as TimmMuon
from timm.optim.muon import zeropower_via_newtonschulz
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from rotation_ssl.pretraining.recipe import AdamW, CosineSchedule, LinearSchedule, Muon, Sgd, StepSchedule

Schedule = LinearSchedule | CosineSchedule | StepSchedule
# of Muon's five iterations, timm's default: https://leloykun.github.io/ponder/muon-opt-coeffs/
QUINTIC = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


class Float32Muon(torch.optim.Optimizer):
    """timm's Muon in float32, for filters (out, in, h, w): timm's iterates in bfloat16, whatever the weights are.

    A CPU that does not multiply bfloat16 emulates it, and the step takes ten times as long as the rest of the training.
    """

    def __init__(self, filters: Iterable[nn.Parameter], lr: float, momentum: float) -> None:
        super().__init__(filters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move each filter bank by the orthogonalised Nesterov momentum of its gradient; there is no closure."""
        for group in self.param_groups:
            for filters in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[filters].setdefault("momentum_buffer", torch.zeros_like(filters))
                momentum.lerp_(filters.grad, 1 - group["momentum"])
                update = filters.grad.lerp(momentum, group["momentum"]).flatten(1)
                step = zeropower_via_newtonschulz(update, len(QUINTIC), QUINTIC, dtype=torch.float32)
                filters.sub_(step.reshape(filters.shape), alpha=group["lr"])


def create_sgd(settings: Sgd, parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
    """SGD with Nesterov momentum on the parameters, one group."""
    return torch.optim.SGD(
        parameters, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay, nesterov=True
    )


def create_optimizers(settings: Sgd | Muon | AdamW, model: nn.Module, precision: str) -> list[torch.optim.Optimizer]:
    """SGD or AdamW for all parameters, or Muon for the filters of the convolutions and SGD for the others.

    Args:
        settings: of the recipe.
        model: whose parameters are optimised.
        precision: 'fp32', or 'bf16' or 'fp16', whose Muon iterates in bfloat16.

    Raises:
        ValueError: Muon, which rescales the filters, for a model whose outputs depend on their scale.
    """
    if isinstance(settings, Sgd):
        return [create_sgd(settings, model.parameters())]
    if isinstance(settings, AdamW):
        return [torch.optim.AdamW(model.parameters(), settings.lr, settings.betas, weight_decay=settings.weight_decay)]
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if not 0 < convolutions <= norms:
        raise ValueError(
            f"Muon rescales filters, which needs batch norm after every convolution: {type(model).__name__} has "
            f"{convolutions} convolutions and {norms} batch norms; take a recipe with SGD or AdamW"
        )
    filters = [p for p in model.parameters() if p.ndim == 4]
    muon: torch.optim.Optimizer
    if precision == "fp32":
        muon = Float32Muon(filters, settings.lr, settings.momentum)
    else:
        muon = TimmMuon(
            # all of them, as in fp32: timm would leave depthwise and narrow filters to Adam, at Muon's high rate
            [{"params": filters, "use_muon": True}],
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=True,
            # the plain update: timm's default multiplies the rate by 0.2 sqrt(max(out, in)), about 14 on these filters
            adjust_lr_fn=None,
            conv_mode="flatten",
        )
    return [muon, create_sgd(settings.rest, [p for p in model.parameters() if p.ndim != 4])]


def learning_rate_factor(schedule: Schedule, step: int, steps: int) -> float:
    """The part of its peak that the learning rate has in step ``step``, from 0, of a run of ``steps``."""
    if isinstance(schedule, StepSchedule):
        passed = sum(step >= round(milestone * steps) for milestone in schedule.milestones)
        return schedule.factor**passed
    warmup = round(schedule.warmup * steps)
    if step < warmup:
        return step / warmup
    if isinstance(schedule, CosineSchedule):
        return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2
    held = warmup + round(schedule.hold * steps)
    return min(1.0, (steps - step) / max(1, steps - held))


def create_scheduler(schedule: Schedule, optimizer: torch.optim.Optimizer, steps: int, done: int = 0) -> LambdaLR:
    """The schedule of a run of ``steps`` steps, for an optimizer that has taken ``done`` of them with it."""
    # not the chained schedulers of PyTorch: they multiply the last rate instead of the peak, and the rates of published
    # runs would differ in their last bits
    return LambdaLR(optimizer, lambda step: learning_rate_factor(schedule, step, steps), last_epoch=done - 1)


@torch.no_grad()
def renormalize_filters(model: nn.Module) -> None:
    """Scale every filter bank to the norm sqrt(out channels); batch norm makes the outputs independent of it."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
