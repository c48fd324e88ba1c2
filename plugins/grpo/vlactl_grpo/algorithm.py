"""GRPO as the engine sees it: the formulas of `functional`, bound to a configuration.

Advantages come from comparing the returns of a group's members. Two things take entries out of the
mask: the filter on a group's mean return, and equal returns in a group. The advantages of such a
group are 0: its samples cost a forward and a backward pass and push nowhere, unless entropy or KL
have a weight. Groups out of the mask leave the denominator of token-mean; that of episode-mean is
fixed.

All terms of the loss share the same weights, which add up over micro-batches and ranks.

Shapes: see `vlactl.api.contracts`; N groups of G members.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vlactl.api.contracts import (
    Advantages,
    Algorithm,
    LossTerms,
    MicroBatch,
    Needs,
    PolicyOutput,
    Reduce,
    TrajectoryBatch,
)
from vlactl_grpo import functional
from vlactl_grpo.plugin import GrpoConfig


def make_algorithm(config: GrpoConfig) -> Algorithm:
    """GRPO with the given settings; what the plugin's descriptor names."""
    return Grpo(config)


class Grpo:
    """Group relative policy optimisation."""

    def __init__(self, config: GrpoConfig) -> None:
        self.config = config
        self.needs = Needs(groups=True, reference=config.kl_coef > 0)

    def advantages(self, batch: TrajectoryBatch, reduce: Reduce) -> Advantages:
        """Advantages within groups, and which entries are trained on."""
        returns_B = functional.episode_returns(batch.rewards_BCK, batch.valid_BCK)
        returns_NG = returns_B.view(len(returns_B) // batch.group_size, batch.group_size)
        kept_N = self._kept(returns_NG)
        degenerate_N = functional.degenerate_groups(returns_NG)
        trained_N = kept_N & ~degenerate_N if self._only_advantages_matter() else kept_N
        trained_B = trained_N.repeat_interleave(batch.group_size)
        advantages_B = functional.group_advantages(returns_NG).flatten()
        return Advantages(
            advantages_BCK=advantages_B[:, None, None] * batch.valid_BCK,
            mask_BCK=batch.valid_BCK & trained_B[:, None, None],
            metrics=_group_metrics(kept_N, degenerate_N, reduce),
        )

    def weights(
        self,
        mask_SK: torch.Tensor,
        valid_actions_S: torch.Tensor,
        num_slots: int,
        max_episode_steps: int,
        reduce: Reduce,
    ) -> torch.Tensor:
        """Weight of each action in one optimizer step, by `algorithm.aggregation`."""
        if self.config.aggregation == "token-mean":
            return functional.token_mean_weights(mask_SK, reduce.sum(mask_SK.sum()))
        return functional.episode_mean_weights(
            mask_SK, valid_actions_S, num_slots, max_episode_steps
        )

    def loss(self, out: PolicyOutput, batch: MicroBatch) -> LossTerms:
        """Clipped policy loss, minus the entropy bonus, plus the KL to the reference policy."""
        log_ratio_SKA = functional.where_trained(
            out.logprobs_SKA - batch.old_logprobs_SKA, batch.mask_SK
        )
        objective = functional.clipped_objective(
            log_ratio_SKA,
            batch.advantages_SK[:, :, None],
            self.config.clip_low,
            self.config.clip_high,
            self.config.dual_clip,
        )
        loss = functional.weighted_sum(objective.loss, batch.weights_SK)
        parts = {
            "actor/policy_loss": loss,
            "actor/policy_loss_abs": functional.weighted_sum(
                objective.loss.abs(), batch.weights_SK
            ),
        }
        metrics = _policy_metrics(objective, log_ratio_SKA, batch.mask_SK)
        for name, coefficient, values_SKA in self._regularisers(out, batch):
            metrics[name] = _total(values_SKA, batch.mask_SK)
            if coefficient != 0:
                loss = loss + coefficient * functional.weighted_sum(values_SKA, batch.weights_SK)
        return LossTerms(loss=loss, parts=parts, metrics=metrics)

    def _kept(self, returns_NG: torch.Tensor) -> torch.Tensor:
        if not self.config.filter_rewards:
            return torch.ones_like(returns_NG[:, 0], dtype=torch.bool)
        lower, upper = self.config.reward_lower_bound, self.config.reward_upper_bound
        return functional.groups_within(returns_NG, lower, upper)

    def _only_advantages_matter(self) -> bool:
        return self.config.entropy_coef == 0 and self.config.kl_coef == 0

    def _regularisers(
        self, out: PolicyOutput, batch: MicroBatch
    ) -> Iterator[tuple[str, float, torch.Tensor]]:
        """Metric, coefficient and values [S, K, A] of the terms beside the policy loss."""
        entropy_SKA = functional.where_trained(out.entropy_SKA, batch.mask_SK)
        yield "actor/entropy_loss", -self.config.entropy_coef, entropy_SKA
        if self.config.kl_coef > 0:
            reference_SKA = batch.reference_logprobs_SKA
            assert reference_SKA is not None, "needs.reference was ignored"
            kl_SKA = functional.kl_divergence(
                out.logprobs_SKA, reference_SKA, self.config.kl_estimator
            )
            yield (
                "actor/kl_loss",
                self.config.kl_coef,
                functional.where_trained(kl_SKA, batch.mask_SK),
            )


def _group_metrics(
    kept_N: torch.Tensor, degenerate_N: torch.Tensor, reduce: Reduce
) -> dict[str, float]:
    counts = torch.stack([kept_N.sum(), degenerate_N.sum(), torch.ones_like(kept_N).sum()])
    kept, degenerate, total = reduce.sum(counts).tolist()
    return {
        "groups/kept": kept / max(total, 1),
        "groups/degenerate": degenerate / max(total, 1),
    }


def _policy_metrics(
    objective: functional.Objective, log_ratio_SKA: torch.Tensor, mask_SK: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    ratio_SKA = objective.ratio
    per_token = {
        "actor/ratio": ratio_SKA,
        "actor/ratio_abs": (ratio_SKA - 1.0).abs(),
        "actor/clipped_ratio": objective.clipped_ratio,
        "actor/dual_cliped_ratio": ratio_SKA * objective.is_dual_clipped,
        "actor/approx_kl": -log_ratio_SKA,
        "actor/clip_fraction": objective.is_clipped,
    }
    return {name: _total(values, mask_SK) for name, values in per_token.items()}


def _total(values_SKA: torch.Tensor, mask_SK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum and number of the trained tokens' values."""
    trained_SKA = functional.where_trained(values_SKA.detach(), mask_SK)
    return trained_SKA.sum(), mask_SK.sum() * values_SKA.shape[2]
