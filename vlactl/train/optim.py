"""The optimizer and one guarded step of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from vlactl.config.run import OptimConfig
from vlactl.distributed.sharding import whole
from vlactl.errors import TrainingError
from vlactl.train.adamw8bit import ShardedAdamW8bit

LOG = logging.getLogger(__name__)
VALUE_HEAD = "value_head"
FINAL_LR = 0.1
"""Of the learning rates, when they have fallen for `optim.decay_steps`."""


def make_optimizer(
    trainable: Iterable[tuple[str, nn.Parameter]], config: OptimConfig
) -> torch.optim.Optimizer:
    """AdamW with a learning rate of its own for parameters whose name contains `value_head`."""
    named = list(trainable)
    policy = [p for name, p in named if VALUE_HEAD not in name]
    values = [p for name, p in named if VALUE_HEAD in name]
    groups = [{"params": policy, "lr": config.lr}]
    if values:
        groups.append({"params": values, "lr": config.value_lr})
    make = ShardedAdamW8bit if config.optimizer == "adamw8bit" else torch.optim.AdamW
    optimizer = make(groups, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
    if isinstance(optimizer, ShardedAdamW8bit):
        return optimizer  # it has its state from the start
    for parameter in (*policy, *values):
        # Saving an optimizer without state makes torch take a step to create it, and that step
        # would count.
        optimizer.state[parameter] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def half_cosine(passed: float, final: float) -> float:
    """From 1 to `final` while `passed` goes from 0 to 1 (Loshchilov and Hutter 2017)."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * passed))


def set_learning_rates(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int) -> None:
    """Those of a step of the run: a function of `step` alone, so that a resume changes nothing."""
    passed = min(1.0, step / config.decay_steps) if config.decay_steps else 0.0
    factor = half_cosine(passed, FINAL_LR)
    rates = (config.lr, config.value_lr)
    for group, rate in zip(optimizer.param_groups, rates, strict=False):
        group["lr"] = rate * factor


def freeze_policy(named: Iterable[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
    """Forget the gradients of everything but the value head, whose parameters are returned.

    The optimizer leaves a parameter without gradient alone, and its moments too.
    """
    heads = []
    for name, parameter in named:
        if VALUE_HEAD in name:
            heads.append(parameter)
        else:
            parameter.grad = None
    return heads


def learning_rates(optimizer: torch.optim.Optimizer, *, is_warmup: bool) -> dict[str, float]:
    """`actor/lr`, 0 while only the value head is trained, and `critic/lr` where there is one."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    if is_warmup:
        rates[0] = 0.0
    return dict(zip(("actor/lr", "critic/lr"), rates, strict=False))


def guarded_step(
    optimizer: torch.optim.Optimizer,
    loss: float,
    *,
    clip_grad: float,
    on_nonfinite: Literal["stop", "skip"],
) -> float | None:
    """Clip the gradient and step, unless loss or gradient are not finite.

    Gradients and loss are already summed over ranks, so every rank comes to the same decision.

    Returns:
        The gradient norm before clipping, or None where the step was skipped.

    Raises:
        TrainingError: a number is not finite and `on_nonfinite` is "stop"; nothing was updated.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = whole(nn.utils.clip_grad_norm_(parameters, clip_grad))
    finite = math.isfinite(loss) and bool(torch.isfinite(norm))
    problem = f"loss {loss:g}, gradient norm {norm.item():g}: not finite"
    if finite:
        optimizer.step()
    elif on_nonfinite == "stop":
        raise TrainingError(
            f"{problem}, nothing was updated",
            hint="lower optim.lr, or set optim.on_nonfinite=skip to leave out such updates",
        )
    else:
        LOG.warning("%s, the update was skipped", problem)
    optimizer.zero_grad(set_to_none=True)
    return float(norm) if finite else None
