"""The formulas of policy gradients: pure functions of tensors, without configuration or state.

Everything is computed in float32; sums over ranks go through `Reduce`. Masked entries never reach a
result, whatever they hold: they are replaced before arithmetic, because 0 * NaN is NaN in a sum and
in its gradient.

Shapes:
    B  trajectories
    C  chunks of a trajectory; S  samples, i.e. chunks of a batch without order
    K  actions of a chunk, or 1 where it is taken as a whole; what has an index (S, K) in mask,
       weights and advantages is called an entry, and its loss is a mean over what is finer
    A  tokens of an action, or 1 where it is taken as a whole
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from vlactl.api.contracts import Reduce

KlEstimator = Literal["k1", "k2", "k3", "abs"]

# Bounds of the k3 estimator: exp() of a large log-ratio would overflow, and one token must not
# dominate a batch.
K3_MAX_LOG_RATIO = 20.0
K3_MAX = 10.0


class Objective(NamedTuple):
    """The clipped surrogate of every element and what the metrics need to know about it."""

    loss: torch.Tensor
    ratio: torch.Tensor
    clipped_ratio: torch.Tensor
    is_clipped: torch.Tensor
    is_dual_clipped: torch.Tensor


class DecoupledObjective(NamedTuple):
    """The clipped surrogate around a proximal policy, weighted back to the one that acted."""

    loss: torch.Tensor
    """0 where the weight is too large. `decoupled_loss` takes these out of the denominator, too;
    where weights are fixed beforehand they stay in it."""
    is_kept: torch.Tensor
    surrogate: Objective
    """Before weighting."""
    proximal_log_ratio: torch.Tensor
    """New minus proximal log-probabilities."""
    behaviour_log_ratio: torch.Tensor
    """Proximal minus behaviour log-probabilities."""


# --------------------------------------------------------------------------------------------
# Trajectories
# --------------------------------------------------------------------------------------------
def to_entries(x_BCK: torch.Tensor, level: Literal["action", "chunk"]) -> torch.Tensor:
    """Actions as they are, or of each chunk the sum (of bools: whether there is any)."""
    if level == "action":
        return x_BCK
    if x_BCK.dtype == torch.bool:
        return x_BCK.any(dim=2, keepdim=True)
    return x_BCK.sum(dim=2, keepdim=True)


def moments(
    x: torch.Tensor, mask: torch.Tensor, reduce: Reduce
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased variance of the masked entries of all ranks: float64 scalars.

    No entry has mean 0, and a single one has variance 0.
    """
    entries = x[mask].double()
    count = torch.tensor(float(entries.numel()), dtype=torch.float64)
    total, count = reduce.sum(torch.stack([entries.sum(), count]))
    mean = total / count.clamp(min=1)
    squares = reduce.sum((entries - mean).square().sum())
    return mean, squares / (count - 1).clamp(min=1)


# --------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------
def episode_mean_weights(
    mask_SK: torch.Tensor, valid_actions_S: torch.Tensor, num_slots: int, max_episode_steps: int
) -> torch.Tensor:
    """Every trajectory counts the same, however long it was: float32 [S, K].

    The denominator counts all slots, padding included, so that it does not depend on how episodes
    went: with max_episode_steps = C * K the weights of a trajectory add up to C / num_slots. Where
    a whole chunk is one entry, a last chunk that was cut short counts like a full one.
    """
    per_action_S = max_episode_steps / valid_actions_S.clamp(min=1).float()
    return mask_SK * per_action_S[:, None] / (num_slots * mask_SK.shape[1])


def token_mean_weights(mask_SK: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Every entry trained on counts the same: float32 [S, K], `total` being their number."""
    return mask_SK / total.clamp(min=1).float()


def weighted_sum(values_SKA: torch.Tensor, weights_SK: torch.Tensor) -> torch.Tensor:
    """Sum over entries of weight times mean over the entry's values: a scalar."""
    per_action_SK = values_SKA.mean(dim=2)
    per_entry_SK = per_action_SK.unflatten(1, (weights_SK.shape[1], -1)).mean(dim=2)
    return (per_entry_SK * weights_SK).sum()


def trained_total(
    values_SKA: torch.Tensor, mask_SK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum and number of the trained entries' values, for metrics: without gradient, float64."""
    values_per_entry = values_SKA.shape[1] * values_SKA.shape[2] // mask_SK.shape[1]
    trained_SKA = values_SKA.detach().double().masked_fill(~mask_SK[:, :, None], 0.0)
    return trained_SKA.sum(), mask_SK.sum() * values_per_entry


def where_trained(values: torch.Tensor, mask_SK: torch.Tensor) -> torch.Tensor:
    """Values [S, K] or [S, K, A] in float32, 0 outside the mask; gradients stop there too."""
    mask = mask_SK if values.ndim == mask_SK.ndim else mask_SK[:, :, None]
    return values.float().masked_fill(~mask, 0.0)


# --------------------------------------------------------------------------------------------
# Policy loss
# --------------------------------------------------------------------------------------------
def at_level(values_SKA: torch.Tensor, level: Literal["token", "action", "chunk"]) -> torch.Tensor:
    """Tokens as they are, or their sums over actions [S, K, 1] or chunks [S, 1, 1]."""
    match level:
        case "token":
            return values_SKA
        case "action":
            return values_SKA.sum(dim=2, keepdim=True)
        case "chunk":
            return values_SKA.sum(dim=(1, 2), keepdim=True)


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


def proximal_logprobs(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    versions: torch.Tensor,
    current_version: float,
) -> torch.Tensor:
    """Log-probabilities of a policy between the one that acted and the present one.

    A guess at those of the version before the present one: the older the acting version, the
    nearer it is to the present. What acted at the present version is its own proximal policy.
    """
    lag = current_version - versions
    share = torch.where(lag == 0, 0.0, (lag - 1.0) / lag).clamp(0.0, 1.0)
    return torch.lerp(old_logprobs, logprobs.detach(), share)


def decoupled_objective(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    proximal: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    max_weight: float | None,
) -> DecoupledObjective:
    """PPO's objective when samples come from older versions of the policy, per element.

    The trust region is around the proximal policy; importance weights proximal / behaviour correct
    for who acted.

    Args:
        logprobs: of the policy that is trained.
        old_logprobs: of the policy that acted.
        proximal: log-probabilities of the policy that the ratio is clipped around, no gradient.
        advantages: broadcast against the log-probabilities.
        clip_low: the ratio is clipped at 1 - clip_low.
        clip_high: the ratio is clipped at 1 + clip_high.
        dual_clip: the loss is at most this many times |advantage|; None = no bound.
        max_weight: elements with a larger importance weight are dropped; None = none are.
    """
    proximal_log_ratio = logprobs - proximal
    behaviour_log_ratio = proximal - old_logprobs
    surrogate = clipped_objective(proximal_log_ratio, advantages, clip_low, clip_high, dual_clip)
    weight = behaviour_log_ratio.exp()
    is_kept = torch.ones_like(weight, dtype=torch.bool)
    if max_weight is not None:
        is_kept = weight <= max_weight
    loss = (surrogate.loss * weight).masked_fill(~is_kept, 0.0)
    return DecoupledObjective(loss, is_kept, surrogate, proximal_log_ratio, behaviour_log_ratio)


def decoupled_loss(
    objective: DecoupledObjective, mask: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean loss of the elements that are trained on and kept, and what describes them.

    Args:
        objective: of all elements.
        mask: bool, elements that are trained on.
    """
    surrogate, kept = objective.surrogate, mask & objective.is_kept
    loss = objective.loss[mask].sum() / kept.sum().clamp(min=1)
    metrics = {
        "policy_loss": loss,
        "proximal_ratio": surrogate.ratio[mask].mean(),
        "clipped_proximal_ratio": surrogate.clipped_ratio[mask].mean(),
        "clip_fraction": surrogate.is_clipped[mask].float().mean(),
        "dual_clip_fraction": surrogate.is_dual_clipped[mask].float().mean(),
        "behav_clip_fraction": 1 - kept.sum() / mask.sum(),
        "proximal_approx_kl": -objective.proximal_log_ratio[mask].mean(),
        "behav_approx_kl": -objective.behaviour_log_ratio[kept].mean(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def kl_divergence(
    logprobs: torch.Tensor, reference_logprobs: torch.Tensor, estimator: KlEstimator
) -> torch.Tensor:
    """Estimate of KL(policy || reference) from the drawn tokens alone, per element."""
    difference = logprobs - reference_logprobs
    match estimator:
        case "k1":
            return difference
        case "abs":
            return difference.abs()
        case "k2":
            return 0.5 * difference.square()
        case "k3":
            log_ratio = (-difference).clamp(-K3_MAX_LOG_RATIO, K3_MAX_LOG_RATIO)
            return (log_ratio.exp() - 1.0 - log_ratio).clamp(-K3_MAX, K3_MAX)
