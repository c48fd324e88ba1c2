"""Descriptor and configuration of rejection-sampling fine-tuning. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, FiniteFloat

from vlactl.api.contracts import Needs
from vlactl.api.plugins import AlgorithmConfig, AlgorithmPlugin
from vlactl_policy_gradient.config import KlCoefficient, KlEstimator


class RftConfig(AlgorithmConfig):
    """Section `algorithm` for supervised updates on the policy's own successful episodes."""

    name: Literal["rft"] = "rft"
    group_size: int = Field(8, ge=1, description="Episodes from the same initial state (G).")
    min_return: FiniteFloat = Field(
        0.5,
        description="Return from which an episode is trained on. The default keeps solved "
        "episodes, where nothing but success is rewarded.",
    )
    balance_groups: bool = Field(
        False,
        description="Every group with a success counts the same, however many of its episodes "
        "succeeded, so that tasks which are often solved do not dominate; false = every action of "
        "a kept episode does.",
    )
    kl_coef: KlCoefficient = 0.0
    kl_estimator: KlEstimator = "k3"
    resample_rounds: int = Field(
        0,
        ge=0,
        description="Rounds in which groups without a success are replaced by new ones; 0 = the "
        "update goes without them.",
    )

    def needs(self) -> Needs:
        """New groups for those without a success, and a reference policy where there is a KL."""
        return Needs(reference=self.kl_coef > 0, resample_rounds=self.resample_rounds)


PLUGIN = AlgorithmPlugin(
    name="rft",
    summary="rejection-sampling fine-tuning: imitate the policy's own successful episodes",
    config=RftConfig,
    factory="vlactl_rft.algorithm:make_algorithm",
    api_version=1,
)
