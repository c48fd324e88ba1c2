"""The optimizer and one guarded step of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from vlactl.config.run import OptimConfig
from vlactl.errors import TrainingError

VALUE_HEAD = "value_head"


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
    return torch.optim.AdamW(
        groups, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )


def guarded_step(
    optimizer: torch.optim.Optimizer,
    loss: torch.Tensor,
    *,
    clip_grad: float,
    on_nonfinite: Literal["stop", "skip"],
) -> torch.Tensor:
    """Clip the gradient and step, unless loss or gradient are not finite.

    Gradients and loss are already summed over ranks, so every rank comes to the same decision.

    Returns:
        The gradient norm before clipping.

    Raises:
        TrainingError: a number is not finite and `on_nonfinite` is "stop"; nothing was updated.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, clip_grad)
    if torch.isfinite(norm) and torch.isfinite(loss):
        optimizer.step()
    elif on_nonfinite == "stop":
        raise TrainingError(
            f"loss {loss.item():g}, gradient norm {norm.item():g}: not finite, nothing was updated",
            hint="lower optim.lr, or set optim.on_nonfinite=skip to leave out such updates",
        )
    optimizer.zero_grad(set_to_none=True)
    return norm
