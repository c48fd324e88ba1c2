"""Rejection-sampling fine-tuning as the engine sees it.

The policy plays, episodes with a high return are kept, and the negative log-likelihood of their
tokens is minimised: supervised learning on the policy's own successes, step after step. It is what
remains of a policy gradient with advantages 1 and 0 and without importance weights, and the
baseline that GRPO and PPO have to beat: it never learns what to avoid, and it needs no trust
region. Where older policies acted (`train.staleness`), their successes are imitated as they are.

Known as expert iteration (Anthony et al. 2017, arXiv:1705.08439), RAFT (Dong et al. 2023,
arXiv:2304.06767; with one episode per state, the best) and RFT (Yuan et al. 2023,
arXiv:2308.01825).

Shapes: see `vlactl.api.contracts`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vlactl.api.contracts import (
    Advantages,
    Algorithm,
    LossTerms,
    MicroBatch,
    PolicyOutput,
    Reduce,
    TrajectoryBatch,
)
from vlactl_policy_gradient.functional import (
    kl_divergence,
    token_mean_weights,
    trained_total,
    weighted_sum,
    where_trained,
)
from vlactl_rft import functional
from vlactl_rft.plugin import RftConfig


def make_algorithm(config: RftConfig) -> Algorithm:
    """Rejection-sampling fine-tuning with the given settings; what the descriptor names."""
    return Rft(config)


class Rft:
    """Rejection-sampling fine-tuning."""

    def __init__(self, config: RftConfig) -> None:
        self.config = config

    def useful_groups(self, batch: TrajectoryBatch) -> torch.Tensor:
        """Groups with an episode that is kept."""
        return self._kept(batch).flatten(1).any(1).view(-1, batch.group_size).any(1)

    def advantages(self, batch: TrajectoryBatch, reduce: Reduce) -> Advantages:
        """1, or what balances groups, for the actions of kept episodes; others are left out."""
        kept_BCK = self._kept(batch)
        factors_BCK = kept_BCK.float()
        if self.config.balance_groups:
            factors_BCK = factors_BCK * functional.balanced(kept_BCK, batch.group_size, reduce)
        useful_N = self.useful_groups(batch)
        counts = torch.stack([useful_N.sum(), torch.ones_like(useful_N).sum()])
        kept, total = reduce.sum(counts).tolist()
        return Advantages(
            advantages_BCK=factors_BCK,
            mask_BCK=kept_BCK,
            metrics={"groups/kept": kept / max(total, 1)},
        )

    def weights(
        self,
        mask_SK: torch.Tensor,
        valid_actions_S: torch.Tensor,
        num_slots: int,
        max_episode_steps: int,
        reduce: Reduce,
    ) -> torch.Tensor:
        """Every action of a kept episode in the optimizer step counts the same."""
        return token_mean_weights(mask_SK, reduce.sum(mask_SK.sum()))

    def loss(self, out: PolicyOutput, batch: MicroBatch) -> LossTerms:
        """Negative log-likelihood of the tokens that were drawn, plus the KL to the reference."""
        mask_SK = batch.mask_SK
        logprobs_SKA = where_trained(out.logprobs_SKA, mask_SK)
        factors_SK = where_trained(batch.advantages_SK, mask_SK)
        loss = weighted_sum(-logprobs_SKA * factors_SK[:, :, None], batch.weights_SK)
        parts = {"actor/policy_loss": loss}
        ratio_SKA = (logprobs_SKA - where_trained(batch.old_logprobs_SKA, mask_SK)).exp()
        metrics = {
            "actor/ratio": trained_total(ratio_SKA, mask_SK),
            "actor/entropy_loss": trained_total(out.entropy_SKA, mask_SK),
        }
        if self.config.kl_coef > 0:
            assert batch.reference_logprobs_SKA is not None, "needs().reference was ignored"
            reference_SKA = where_trained(batch.reference_logprobs_SKA, mask_SK)
            kl_SKA = kl_divergence(logprobs_SKA, reference_SKA, self.config.kl_estimator)
            metrics["actor/kl_loss"] = trained_total(kl_SKA, mask_SK)
            loss = loss + self.config.kl_coef * weighted_sum(kl_SKA, batch.weights_SK)
        return LossTerms(loss=loss, parts=parts, metrics=metrics)

    def derived_metrics(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """None."""
        return {}

    def _kept(self, batch: TrajectoryBatch) -> torch.Tensor:
        """Actions of episodes with a high return: bool [B, C, K]."""
        returns_BCK = functional.returns_of_episodes(
            batch.rewards_BCK, batch.valid_BCK, batch.ends_BCK
        )
        return batch.valid_BCK & (returns_BCK >= self.config.min_return)
