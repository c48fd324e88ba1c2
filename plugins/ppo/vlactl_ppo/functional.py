"""Advantages from values, and the loss of the values: pure functions of tensors in float32.

Shapes: B trajectories, T steps of a trajectory (actions, or chunks taken as a whole).
"""

from __future__ import annotations

import torch

from vlactl.api.contracts import Reduce
from vlactl_policy_gradient.functional import moments

STD_EPSILON = 1e-5
# Of the mean square: below that, a variance from sums in float64 is nothing but rounding.
NO_VARIANCE = 1e-12


def generalised_advantages(
    rewards_BT: torch.Tensor,
    values_BT: torch.Tensor,
    valid_BT: torch.Tensor,
    is_last_BT: torch.Tensor,
    final_values_BT: torch.Tensor,
    gamma: float,
    gae_lambda: float,
) -> torch.Tensor:
    """Generalised advantage estimates, 0 where nothing was done: float32 [B, T].

    A row may hold one episode after the other, with steps that were not taken anywhere between:
    these are skipped, whatever they hold.

    Args:
        rewards_BT: of the steps.
        values_BT: of the states that the steps were taken in.
        valid_BT: bool, the step was taken.
        is_last_BT: bool, the step was its episode's last.
        final_values_BT: at last steps, what the state after them counts.
        gamma: discount.
        gae_lambda: 0 = one-step advantages, 1 = discounted sums.
    """
    advantages_BT = torch.zeros_like(rewards_BT)
    next_value_B = next_advantage_B = torch.zeros_like(rewards_BT[:, 0])
    for t in reversed(range(rewards_BT.shape[1])):
        valid_B, is_last_B, value_B = valid_BT[:, t], is_last_BT[:, t], values_BT[:, t]
        after_B = torch.where(is_last_B, final_values_BT[:, t], next_value_B)
        carried_B = next_advantage_B.masked_fill(is_last_B, 0.0)
        error_B = rewards_BT[:, t] + gamma * after_B - value_B
        advantage_B = error_B + gamma * gae_lambda * carried_B
        advantages_BT[:, t] = advantage_B.masked_fill(~valid_B, 0.0)
        next_advantage_B = torch.where(valid_B, advantage_B, next_advantage_B)
        next_value_B = torch.where(valid_B, value_B, next_value_B)
    return advantages_BT


def normalised(x: torch.Tensor, mask: torch.Tensor, reduce: Reduce) -> torch.Tensor:
    """Distances from the mean of all ranks' masked entries, in their deviations: float32."""
    mean, variance = moments(x, mask, reduce)
    return ((x - mean) / (variance.sqrt() + STD_EPSILON)).float()


def huber(error: torch.Tensor, delta: float) -> torch.Tensor:
    """Half the square of small errors, and linear beyond delta, per element."""
    size = error.abs()
    return torch.where(size < delta, 0.5 * error.square(), delta * (size - 0.5 * delta))


def clipped_value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    value_clip: float,
    huber_delta: float,
) -> torch.Tensor:
    """The larger loss of a value and of the value moved by at most `value_clip`, per element."""
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    return torch.maximum(
        huber(returns - values, huber_delta), huber(returns - clipped, huber_delta)
    )


def explained_variance(
    return_mean: float, return_square_mean: float, error_mean: float, error_square_mean: float
) -> float | None:
    """1 - Var(error) / Var(return) from means over all samples; None where returns do not vary."""
    variance = return_square_mean - return_mean**2
    if variance <= NO_VARIANCE * return_square_mean:
        return None
    return 1.0 - (error_square_mean - error_mean**2) / variance
