"""PPO as the engine sees it: the formulas of `functional`, bound to a configuration.

Rewards are credited to actions or to whole chunks; the value head gives one value to each of them,
and each gets an advantage. Groups mean nothing here.

Shapes: see `vlactl.api.contracts`; T steps of a trajectory, C * K or C.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vlactl.api.contracts import (
    Advantages,
    Algorithm,
    End,
    LossTerms,
    MicroBatch,
    PolicyOutput,
    Reduce,
    TrajectoryBatch,
)
from vlactl_policy_gradient.algorithm import PolicyGradient
from vlactl_policy_gradient.functional import (
    to_entries,
    trained_total,
    weighted_sum,
    where_trained,
)
from vlactl_ppo import functional
from vlactl_ppo.plugin import PpoConfig

BOOTSTRAPPED = {
    "none": (End.CUT,),
    "truncation": (End.CUT, End.TRUNCATED),
    "always": (End.CUT, End.TRUNCATED, End.SUCCESS),
}
SPREAD = (
    "critic/return_mean",
    "critic/return_square_mean",
    "critic/error_mean",
    "critic/error_square_mean",
)


def make_algorithm(config: PpoConfig) -> Algorithm:
    """PPO with the given settings; what the plugin's descriptor names."""
    return Ppo(config)


class Ppo(PolicyGradient):
    """Proximal policy optimisation."""

    config: PpoConfig

    def useful_groups(self, batch: TrajectoryBatch) -> torch.Tensor:
        """All: every episode teaches something."""
        return torch.ones(len(batch.rewards_BCK) // batch.group_size, dtype=torch.bool)

    def advantages(self, batch: TrajectoryBatch, reduce: Reduce) -> Advantages:
        """Generalised advantage estimates and, as targets of the values, what they add up to."""
        assert batch.values_BCK is not None, "needs().values was ignored"
        mask_BCK = to_entries(batch.valid_BCK, self.config.reward_level)
        advantages_BCK = self._estimates(batch).view_as(mask_BCK)
        returns_BCK = (advantages_BCK + batch.values_BCK).masked_fill(~mask_BCK, 0.0)
        if self.config.normalize_advantages:
            advantages_BCK = functional.normalised(advantages_BCK, mask_BCK, reduce)
        return Advantages(
            advantages_BCK=advantages_BCK.masked_fill(~mask_BCK, 0.0),
            mask_BCK=mask_BCK,
            returns_BCK=returns_BCK,
        )

    def loss(self, out: PolicyOutput, batch: MicroBatch) -> LossTerms:
        """The policy's loss plus that of the values."""
        policy, values = super().loss(out, batch), self._value_loss(out, batch)
        return LossTerms(
            loss=policy.loss + self.config.value_coef * values.loss,
            parts={**policy.parts, **values.parts},
            metrics={**policy.metrics, **values.metrics},
        )

    def derived_metrics(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Explained variance over all samples of the step, where returns vary."""
        if not all(name in means for name in SPREAD):
            return {}
        explained = functional.explained_variance(*(means[name] for name in SPREAD))
        return {} if explained is None else {"critic/explained_variance": explained}

    def _estimates(self, batch: TrajectoryBatch) -> torch.Tensor:
        """Advantages [B, T] before normalisation."""
        level, ends_BCK = self.config.reward_level, batch.ends_BCK
        assert batch.values_BCK is not None
        assert batch.final_values_BCK is not None, "needs().final_values was ignored"
        counted = torch.tensor(BOOTSTRAPPED[self.config.bootstrap], dtype=ends_BCK.dtype)
        final_BCK = batch.final_values_BCK.masked_fill(~torch.isin(ends_BCK, counted), 0.0)
        rewards_BCK = batch.rewards_BCK.float().masked_fill(~batch.valid_BCK, 0.0)
        return functional.generalised_advantages(
            to_entries(rewards_BCK, level).flatten(1),
            batch.values_BCK.flatten(1),
            to_entries(batch.valid_BCK, level).flatten(1),
            to_entries(ends_BCK != End.NONE, level).flatten(1),
            to_entries(final_BCK, level).flatten(1),
            self.config.gamma,
            self.config.gae_lambda,
        )

    def _value_loss(self, out: PolicyOutput, batch: MicroBatch) -> LossTerms:
        config, mask_SK = self.config, batch.mask_SK
        assert out.values_SK is not None, "needs().values was ignored"
        assert batch.old_values_SK is not None
        assert batch.returns_SK is not None
        values_SK = where_trained(out.values_SK, mask_SK)
        old_SK = where_trained(batch.old_values_SK, mask_SK)
        returns_SK = where_trained(batch.returns_SK, mask_SK)
        losses_SK = functional.clipped_value_loss(
            values_SK, old_SK, returns_SK, config.value_clip, config.huber_delta
        )
        loss = weighted_sum(losses_SK[:, :, None], batch.weights_SK)
        per_entry = {
            "critic/value_clip_ratio": (values_SK - old_SK).abs() > config.value_clip,
            **_spread(values_SK, returns_SK),
        }
        metrics = {
            name: trained_total(entry_SK[:, :, None], mask_SK)
            for name, entry_SK in per_entry.items()
        }
        return LossTerms(loss=loss, parts={"critic/value_loss": loss}, metrics=metrics)


def _spread(values_SK: torch.Tensor, returns_SK: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `explained_variance` wants to know, in float64: variances are differences of squares."""
    returns, errors = returns_SK.double(), returns_SK.double() - values_SK.double()
    return dict(zip(SPREAD, (returns, returns.square(), errors, errors.square()), strict=True))
