"""GRPO as the engine sees it: the formulas of `functional`, bound to a configuration.

Advantages come from comparing the returns of a group's members. Two things take entries out of the
mask: the filter on a group's mean return, and equal returns in a group. The advantages of such a
group are 0: its samples cost a forward and a backward pass and push nowhere, unless entropy or KL
have a weight. Groups out of the mask leave the denominator of token-mean; that of episode-mean is
fixed. REINFORCE++ without a baseline compares all episodes of the step with each other, so there
equal returns in a group are as good as any.

Shapes: see `vlactl.api.contracts`; N groups of G members.
"""

from __future__ import annotations

import torch

from vlactl.api.contracts import Advantages, Algorithm, Reduce, TrajectoryBatch
from vlactl_grpo import functional
from vlactl_grpo.plugin import GrpoConfig
from vlactl_policy_gradient.algorithm import PolicyGradient
from vlactl_policy_gradient.functional import to_entries


def make_algorithm(config: GrpoConfig) -> Algorithm:
    """GRPO with the given settings; what the plugin's descriptor names."""
    return Grpo(config)


class Grpo(PolicyGradient):
    """Group relative policy optimisation."""

    config: GrpoConfig

    def useful_groups(self, batch: TrajectoryBatch) -> torch.Tensor:
        """Groups that the filter keeps and whose returns tell members apart."""
        return self._useful(_grouped_returns(batch))

    def advantages(self, batch: TrajectoryBatch, reduce: Reduce) -> Advantages:
        """Advantages within groups, and which entries are trained on."""
        returns_NG = _grouped_returns(batch)
        kept_N, useful_N = self._kept(returns_NG), self._useful(returns_NG)
        valid_BCK = to_entries(batch.valid_BCK, self.config.reward_level)
        compared_BCK = valid_BCK & _of_members(useful_N, batch)
        mask_BCK = compared_BCK
        if self.config.entropy_coef > 0 or self.config.kl_coef > 0:
            mask_BCK = valid_BCK & _of_members(kept_N, batch)
        return Advantages(
            advantages_BCK=self._scores(returns_NG, compared_BCK, reduce),
            mask_BCK=mask_BCK,
            metrics=_group_metrics(kept_N, functional.degenerate_groups(returns_NG), reduce),
        )

    def _scores(
        self, returns_NG: torch.Tensor, compared_BCK: torch.Tensor, reduce: Reduce
    ) -> torch.Tensor:
        """Advantages by `algorithm.advantage`, 0 where nothing is compared: float32 [B, C, K]."""
        match self.config.advantage:
            case "grpo":
                scores_NG = functional.group_advantages(returns_NG)
            case "rloo":
                scores_NG = functional.leave_one_out_advantages(returns_NG)
            case "reinforce++":
                scores_NG = returns_NG
            case "reinforce++-baseline":
                scores_NG = functional.centred_returns(returns_NG)
        scores_BCK = scores_NG.flatten()[:, None, None].expand_as(compared_BCK)
        if self.config.advantage.startswith("reinforce++"):
            scores_BCK = functional.whitened(scores_BCK, compared_BCK, reduce)
        return scores_BCK.masked_fill(~compared_BCK, 0.0)

    def _kept(self, returns_NG: torch.Tensor) -> torch.Tensor:
        if not self.config.filter_rewards:
            return torch.ones_like(returns_NG[:, 0], dtype=torch.bool)
        lower, upper = self.config.reward_lower_bound, self.config.reward_upper_bound
        return functional.groups_within(returns_NG, lower, upper)

    def _useful(self, returns_NG: torch.Tensor) -> torch.Tensor:
        kept_N = self._kept(returns_NG)
        if self.config.advantage == "reinforce++":
            return kept_N
        return kept_N & ~functional.degenerate_groups(returns_NG)


def _grouped_returns(batch: TrajectoryBatch) -> torch.Tensor:
    returns_B = functional.episode_returns(batch.rewards_BCK, batch.valid_BCK)
    return returns_B.view(len(returns_B) // batch.group_size, batch.group_size)


def _of_members(groups_N: torch.Tensor, batch: TrajectoryBatch) -> torch.Tensor:
    return groups_N.repeat_interleave(batch.group_size)[:, None, None]


def _group_metrics(
    kept_N: torch.Tensor, degenerate_N: torch.Tensor, reduce: Reduce
) -> dict[str, float]:
    counts = torch.stack([kept_N.sum(), degenerate_N.sum(), torch.ones_like(kept_N).sum()])
    kept, degenerate, total = reduce.sum(counts).tolist()
    return {
        "groups/kept": kept / max(total, 1),
        "groups/degenerate": degenerate / max(total, 1),
    }
