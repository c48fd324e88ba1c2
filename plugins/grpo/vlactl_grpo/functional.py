"""How the returns of a group become advantages: pure functions of tensors.

Shapes: B trajectories, group members next to each other; N groups of G members, B = N * G.
"""

from __future__ import annotations

import torch

from vlactl.api.contracts import Reduce
from vlactl_policy_gradient.functional import moments

STD_EPSILON = 1e-6
MIN_VARIANCE = 1e-8


def episode_returns(rewards_BCK: torch.Tensor, valid_BCK: torch.Tensor) -> torch.Tensor:
    """Undiscounted return of each trajectory over its valid actions: float32 [B]."""
    return rewards_BCK.float().masked_fill(~valid_BCK, 0.0).sum(dim=(1, 2))


def degenerate_groups(returns_NG: torch.Tensor) -> torch.Tensor:
    """Groups whose members all have the same return: bool [N]."""
    return (returns_NG == returns_NG[:, :1]).all(dim=1)


def groups_within(returns_NG: torch.Tensor, lower: float, upper: float) -> torch.Tensor:
    """Groups whose mean return lies within the bounds, which are included: bool [N]."""
    mean_N = returns_NG.mean(dim=1)
    return (mean_N >= lower) & (mean_N <= upper)


def centred_returns(returns_NG: torch.Tensor) -> torch.Tensor:
    """Returns minus the mean of their group: float32 [N, G].

    A degenerate group gets exactly 0: the rounding error of its mean must not be divided by its
    deviation.
    """
    centred_NG = returns_NG - returns_NG.mean(dim=1, keepdim=True)
    return centred_NG.masked_fill(degenerate_groups(returns_NG)[:, None], 0.0)


def group_advantages(returns_NG: torch.Tensor) -> torch.Tensor:
    """Returns relative to their group, in its unbiased standard deviations: float32 [N, G]."""
    centred_NG = centred_returns(returns_NG)
    variance_N = centred_NG.square().sum(dim=1) / (returns_NG.shape[1] - 1)
    return centred_NG / (variance_N.sqrt()[:, None] + STD_EPSILON)


def leave_one_out_advantages(returns_NG: torch.Tensor) -> torch.Tensor:
    """Returns minus the mean of the other members of their group: float32 [N, G]."""
    group_size = returns_NG.shape[1]
    return centred_returns(returns_NG) * (group_size / (group_size - 1))


def whitened(x: torch.Tensor, mask: torch.Tensor, reduce: Reduce) -> torch.Tensor:
    """Distances from the mean of all ranks' masked entries, in their deviations: float32."""
    mean, variance = moments(x, mask, reduce)
    return ((x - mean) / variance.clamp(min=MIN_VARIANCE).sqrt()).float()
