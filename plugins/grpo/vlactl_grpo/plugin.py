"""Descriptor and configuration of GRPO. Imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from vlactl.api.plugins import AlgorithmConfig, AlgorithmPlugin


class GrpoConfig(AlgorithmConfig):
    """Section `algorithm` for GRPO."""

    name: Literal["grpo"] = "grpo"
    group_size: int = Field(8, ge=2, description="Episodes from the same initial state (G).")
    clip_low: FiniteFloat = Field(0.2, gt=0, lt=1, description="Ratio is clipped at 1 - clip_low.")
    clip_high: FiniteFloat = Field(0.28, gt=0, description="Ratio is clipped at 1 + clip_high.")
    dual_clip: FiniteFloat | None = Field(
        None, gt=1, description="Bound of the loss for negative advantages; none = off."
    )
    filter_rewards: bool = Field(
        True, description="Train only on groups whose mean return lies within the bounds."
    )
    reward_lower_bound: FiniteFloat = Field(0.5, description="Of filter_rewards.")
    reward_upper_bound: FiniteFloat = Field(4.5, description="Of filter_rewards.")
    aggregation: Literal["episode-mean", "token-mean"] = Field(
        "episode-mean",
        description="episode-mean: all trajectories count the same; token-mean: all actions do.",
    )
    entropy_coef: FiniteFloat = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    kl_coef: FiniteFloat = Field(0.0, ge=0, description="Weight of the KL to the reference policy.")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description="Estimator of that KL.")

    @model_validator(mode="after")
    def _ordered_bounds(self) -> Self:
        if self.reward_lower_bound > self.reward_upper_bound:
            raise ValueError("reward_lower_bound must not exceed reward_upper_bound")
        return self

    def blockers(self) -> list[str]:
        """What stands between this configuration and a start."""
        return ["algorithm.kl_coef > 0 needs a reference policy, not built yet"] * (
            self.kl_coef > 0
        )


PLUGIN = AlgorithmPlugin(
    name="grpo",
    summary="group relative policy optimisation with success filter and asymmetric clip",
    config=GrpoConfig,
    factory="vlactl_grpo.algorithm:make_algorithm",
    api_version=1,
)
