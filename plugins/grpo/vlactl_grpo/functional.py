"""The formulas of GRPO: pure functions of tensors, without configuration, ranks or state.

Everything is computed in float32. Masked entries never reach a result, whatever they hold: they are
replaced before arithmetic, because 0 * NaN is NaN in a sum and in its gradient.

Shapes:
    B  trajectories, group members next to each other; N groups of G members, B = N * G
    C  chunks of a trajectory; S  samples, i.e. chunks of a batch without order
    K  actions of a chunk
    A  tokens of an action; an action's loss is the mean over its tokens
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

KlEstimator = Literal["k1", "k2", "k3"]

STD_EPSILON = 1e-6
# Bounds of the k3 estimator: exp() of a large log-ratio would overflow, and one token must not
# dominate a batch.
K3_MAX_LOG_RATIO = 20.0
K3_MAX = 10.0


class Objective(NamedTuple):
    """The clipped surrogate of every token and what the metrics need to know about it."""

    loss: torch.Tensor
    ratio: torch.Tensor
    clipped_ratio: torch.Tensor
    is_clipped: torch.Tensor
    is_dual_clipped: torch.Tensor


# --------------------------------------------------------------------------------------------
# Trajectories
# --------------------------------------------------------------------------------------------
def valid_actions(dones_BLK: torch.Tensor) -> torch.Tensor:
    """Which actions were taken before an episode was over: bool [B, C, K].

    Args:
        dones_BLK: bool, L = C + 1 rows; row 0 tells of the states before the first chunk. An action
            is valid if no state up to the one it was taken in is done: the action that ends an
            episode is the last valid one.
    """
    num_rows, num_actions = dones_BLK.shape[1:]
    before_BT = dones_BLK.flatten(1)[:, num_actions - 1 : -1]
    valid_BT = before_BT.int().cumsum(dim=1) == 0
    return valid_BT.view(-1, num_rows - 1, num_actions)


def count_valid_actions(valid_BCK: torch.Tensor) -> torch.Tensor:
    """Valid actions of each trajectory: int64 [B]."""
    return valid_BCK.sum(dim=(1, 2))


def episode_returns(rewards_BCK: torch.Tensor, valid_BCK: torch.Tensor) -> torch.Tensor:
    """Undiscounted return of each trajectory over its valid actions: float32 [B]."""
    return rewards_BCK.float().masked_fill(~valid_BCK, 0.0).sum(dim=(1, 2))


# --------------------------------------------------------------------------------------------
# Groups
# --------------------------------------------------------------------------------------------
def degenerate_groups(returns_NG: torch.Tensor) -> torch.Tensor:
    """Groups whose members all have the same return, and so nothing to learn from: bool [N]."""
    return (returns_NG == returns_NG[:, :1]).all(dim=1)


def groups_within(returns_NG: torch.Tensor, lower: float, upper: float) -> torch.Tensor:
    """Groups whose mean return lies within the bounds, which are included: bool [N]."""
    mean_N = returns_NG.mean(dim=1)
    return (mean_N >= lower) & (mean_N <= upper)


def group_advantages(returns_NG: torch.Tensor) -> torch.Tensor:
    """Returns relative to their group, in its unbiased standard deviations: float32 [N, G].

    A degenerate group gets exactly 0: the rounding error of its mean must not be divided by its
    deviation.
    """
    centred_NG = returns_NG - returns_NG.mean(dim=1, keepdim=True)
    variance_N = centred_NG.square().sum(dim=1) / (returns_NG.shape[1] - 1)
    scaled_NG = centred_NG / (variance_N.sqrt()[:, None] + STD_EPSILON)
    return scaled_NG.masked_fill(degenerate_groups(returns_NG)[:, None], 0.0)


# --------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------
def episode_mean_weights(
    mask_SK: torch.Tensor, valid_actions_S: torch.Tensor, num_slots: int, max_episode_steps: int
) -> torch.Tensor:
    """Every trajectory counts the same, however long it was: float32 [S, K].

    The denominator counts all slots, padding included, so that it does not depend on how episodes
    went: with max_episode_steps = C * K the weights of a trajectory add up to C / num_slots.
    """
    per_action_S = max_episode_steps / valid_actions_S.clamp(min=1).float()
    return mask_SK * per_action_S[:, None] / (num_slots * mask_SK.shape[1])


def token_mean_weights(mask_SK: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Every action trained on counts the same: float32 [S, K], `total` being their number."""
    return mask_SK / total.clamp(min=1).float()


# --------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------
def clipped_objective(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> Objective:
    """The pessimistic bound of the importance-weighted objective, per element.

    Args:
        log_ratio: new minus old log-probabilities.
        advantages: broadcast against `log_ratio`.
        clip_low: the ratio is clipped at 1 - clip_low.
        clip_high: the ratio is clipped at 1 + clip_high.
        dual_clip: the loss is at most this many times |advantage|; None = no bound.
    """
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    plain = -advantages * ratio
    clipped = -advantages * clipped_ratio
    loss = torch.maximum(plain, clipped)
    is_dual_clipped = torch.zeros_like(loss, dtype=torch.bool)
    if dual_clip is not None:
        bound = dual_clip * advantages.abs()
        is_dual_clipped = bound < loss
        loss = torch.minimum(loss, bound)
    return Objective(loss, ratio, clipped_ratio, plain < clipped, is_dual_clipped)


def kl_divergence(
    logprobs: torch.Tensor, reference_logprobs: torch.Tensor, estimator: KlEstimator
) -> torch.Tensor:
    """Estimate of KL(policy || reference) from the drawn tokens alone, per element."""
    difference = logprobs - reference_logprobs
    match estimator:
        case "k1":
            return difference
        case "k2":
            return 0.5 * difference.square()
        case "k3":
            log_ratio = (-difference).clamp(-K3_MAX_LOG_RATIO, K3_MAX_LOG_RATIO)
            return (log_ratio.exp() - 1.0 - log_ratio).clamp(-K3_MAX, K3_MAX)


def where_trained(values_SKA: torch.Tensor, mask_SK: torch.Tensor) -> torch.Tensor:
    """Values of trained tokens in float32, 0 elsewhere; gradients stop there too."""
    return values_SKA.float().masked_fill(~mask_SK[:, :, None], 0.0)


def weighted_sum(values_SKA: torch.Tensor, weights_SK: torch.Tensor) -> torch.Tensor:
    """Sum over actions of weight times mean over the action's tokens: a scalar."""
    return (values_SKA.mean(dim=2) * weights_SK).sum()
