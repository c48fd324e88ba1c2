"""Descriptor and configuration of GRPO. Imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from vlactl.api.contracts import Needs
from vlactl.api.plugins import AlgorithmPlugin
from vlactl_policy_gradient.config import PolicyGradientConfig


class GrpoConfig(PolicyGradientConfig):
    """Section `algorithm` for GRPO and its relatives, which compare the returns of a group."""

    name: Literal["grpo"] = "grpo"
    group_size: int = Field(8, ge=2, description="Episodes from the same initial state (G).")
    advantage: Literal["grpo", "rloo", "reinforce++", "reinforce++-baseline"] = Field(
        "grpo",
        description="grpo: return relative to the group, in its deviations; rloo: to the mean of "
        "the other members; reinforce++: to all actions of the step, in their deviations; "
        "reinforce++-baseline: that, after subtracting the group's mean.",
    )
    filter_rewards: bool = Field(
        True, description="Train only on groups whose mean return lies within the bounds."
    )
    reward_lower_bound: FiniteFloat = Field(0.5, description="Of filter_rewards.")
    reward_upper_bound: FiniteFloat = Field(4.5, description="Of filter_rewards.")
    resample_rounds: int = Field(
        0,
        ge=0,
        description="Rounds in which groups that teach nothing are replaced by new ones; 0 = they "
        "are left out of the update.",
    )

    @model_validator(mode="after")
    def _ordered_bounds(self) -> Self:
        if self.reward_lower_bound > self.reward_upper_bound:
            raise ValueError("reward_lower_bound must not exceed reward_upper_bound")
        return self

    @model_validator(mode="after")
    def _something_to_resample(self) -> Self:
        if self.resample_rounds and self.advantage == "reinforce++" and not self.filter_rewards:
            raise ValueError(
                'resample_rounds: with advantage = "reinforce++" every group teaches something; '
                "set filter_rewards = true, or resample_rounds = 0"
            )
        return self

    def needs(self) -> Needs:
        """New groups for those that teach nothing, and a reference policy where there is a KL."""
        return Needs(reference=self.kl_coef > 0, resample_rounds=self.resample_rounds)


PLUGIN = AlgorithmPlugin(
    name="grpo",
    summary="group relative policy optimisation, RLOO and REINFORCE++, with success filter",
    config=GrpoConfig,
    factory="vlactl_grpo.algorithm:make_algorithm",
    api_version=1,
)
