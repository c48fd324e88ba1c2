"""The half of an algorithm that GRPO and PPO share: weights and the policy loss.

All terms of the loss share the same weights, which add up over micro-batches and ranks. What
remains to a subclass are the advantages, and what it adds to the loss.

Shapes: see `vlactl_policy_gradient.functional`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from vlactl.api.contracts import LossTerms, MicroBatch, PolicyOutput, Reduce
from vlactl_policy_gradient import functional
from vlactl_policy_gradient.config import PolicyGradientConfig


class PolicyGradient:
    """Base of algorithms with a clipped surrogate."""

    def __init__(self, config: PolicyGradientConfig) -> None:
        self.config = config

    def weights(
        self,
        mask_SK: torch.Tensor,
        valid_actions_S: torch.Tensor,
        num_slots: int,
        max_episode_steps: int,
        reduce: Reduce,
    ) -> torch.Tensor:
        """Weight of each entry in one optimizer step, by `algorithm.aggregation`."""
        if self.config.aggregation == "token-mean":
            return functional.token_mean_weights(mask_SK, reduce.sum(mask_SK.sum()))
        return functional.episode_mean_weights(
            mask_SK, valid_actions_S, num_slots, max_episode_steps
        )

    def loss(self, out: PolicyOutput, batch: MicroBatch) -> LossTerms:
        """Clipped policy loss, minus the entropy bonus, plus the KL to the reference policy.

        While only the critic is trained the metrics are measured, and the loss is a constant 0.
        """
        objective, log_ratio_SKA, dropped = self._objective(out, batch)
        loss = functional.weighted_sum(objective.loss, batch.weights_SK)
        loss_abs = functional.weighted_sum(objective.loss.abs(), batch.weights_SK)
        if batch.critic_only:
            loss = torch.zeros_like(loss)
        parts = {"actor/policy_loss": loss, "actor/policy_loss_abs": loss_abs}
        metrics = _policy_metrics(objective, log_ratio_SKA, batch.mask_SK)
        if dropped is not None:
            metrics["actor/dropped_fraction"] = functional.trained_total(dropped, batch.mask_SK)
        for name, coefficient, values_SKA in self._regularisers(out, batch):
            metrics[name] = functional.trained_total(values_SKA, batch.mask_SK)
            if coefficient != 0 and not batch.critic_only:
                loss = loss + coefficient * functional.weighted_sum(values_SKA, batch.weights_SK)
        return LossTerms(loss=loss, parts=parts, metrics=metrics)

    def derived_metrics(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Nothing, unless a subclass says otherwise."""
        return {}

    def _objective(
        self, out: PolicyOutput, batch: MicroBatch
    ) -> tuple[functional.Objective, torch.Tensor, torch.Tensor | None]:
        """The surrogate, the log-ratios [S, K, A] to the policy that acted, and what is dropped."""
        if batch.lags_S is not None:
            return self._decoupled_objective(out, batch, batch.lags_S)
        difference_SKA = functional.where_trained(
            out.logprobs_SKA - batch.old_logprobs_SKA, batch.mask_SK
        )
        log_ratio_SKA = functional.at_level(difference_SKA, self.config.logprob_level).clamp(
            self.config.clip_log_ratio_min, self.config.clip_log_ratio_max
        )
        objective = functional.clipped_objective(
            log_ratio_SKA,
            functional.where_trained(batch.advantages_SK, batch.mask_SK)[:, :, None],
            self.config.clip_low,
            self.config.clip_high,
            self.config.dual_clip,
        )
        return objective, log_ratio_SKA, None

    def _decoupled_objective(
        self, out: PolicyOutput, batch: MicroBatch, lags_S: torch.Tensor
    ) -> tuple[functional.Objective, torch.Tensor, torch.Tensor]:
        """The surrogate where older policies acted: see `functional.decoupled_objective`.

        The version that is being made is one more than the one at the start of the step. What acted
        at the start is its own proximal policy, as without `train.staleness`. Ratios are those to
        the proximal policy.
        """
        config, mask_SK = self.config, batch.mask_SK
        new_SKA, old_SKA = (
            functional.at_level(functional.where_trained(values, mask_SK), config.logprob_level)
            for values in (out.logprobs_SKA, batch.old_logprobs_SKA)
        )
        bounds = (config.clip_log_ratio_min, config.clip_log_ratio_max)
        log_ratio_SKA = (new_SKA - old_SKA).clamp(*bounds)
        new_SKA = old_SKA + log_ratio_SKA
        objective = functional.decoupled_objective(
            new_SKA,
            old_SKA,
            functional.proximal_logprobs(new_SKA, old_SKA, -1 - lags_S[:, None, None], 0),
            functional.where_trained(batch.advantages_SK, mask_SK)[:, :, None],
            config.clip_low,
            config.clip_high,
            config.dual_clip,
            config.max_behaviour_weight,
        )
        surrogate = objective.surrogate._replace(loss=objective.loss)
        return surrogate, log_ratio_SKA, ~objective.is_kept

    def _regularisers(
        self, out: PolicyOutput, batch: MicroBatch
    ) -> Iterator[tuple[str, float, torch.Tensor]]:
        """Metric, coefficient and values [S, K, A] of the terms beside the policy loss."""
        entropy_SKA = functional.where_trained(out.entropy_SKA, batch.mask_SK)
        yield (
            "actor/entropy_loss",
            -self.config.entropy_coef,
            functional.at_level(entropy_SKA, self.config.entropy_level),
        )
        if self.config.kl_coef > 0:
            assert batch.reference_logprobs_SKA is not None, "needs().reference was ignored"
            kl_SKA = functional.kl_divergence(
                functional.where_trained(out.logprobs_SKA, batch.mask_SK),
                functional.where_trained(batch.reference_logprobs_SKA, batch.mask_SK),
                self.config.kl_estimator,
            )
            yield "actor/kl_loss", self.config.kl_coef, kl_SKA


def _policy_metrics(
    objective: functional.Objective, log_ratio_SKA: torch.Tensor, mask_SK: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    ratio_SKA = objective.ratio
    per_element = {
        "actor/ratio": ratio_SKA,
        "actor/ratio_abs": (ratio_SKA - 1.0).abs(),
        "actor/clipped_ratio": objective.clipped_ratio,
        "actor/dual_cliped_ratio": ratio_SKA * objective.is_dual_clipped,
        "actor/approx_kl": -log_ratio_SKA,
        "actor/clip_fraction": objective.is_clipped,
    }
    return {name: functional.trained_total(values, mask_SK) for name, values in per_element.items()}
