"""Descriptor and configuration of PPO. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, FiniteFloat

from vlactl.api.plugins import AlgorithmConfig, AlgorithmPlugin


class PpoConfig(AlgorithmConfig):
    """Section `algorithm` for PPO with generalised advantage estimation."""

    name: Literal["ppo"] = "ppo"
    group_size: Literal[1] = 1
    gamma: FiniteFloat = Field(0.99, gt=0, le=1, description="Discount.")
    gae_lambda: FiniteFloat = Field(0.95, ge=0, le=1, description="Of the advantage estimator.")
    clip_low: FiniteFloat = Field(0.2, gt=0, lt=1, description="Ratio is clipped at 1 - clip_low.")
    clip_high: FiniteFloat = Field(0.28, gt=0, description="Ratio is clipped at 1 + clip_high.")
    value_clip: FiniteFloat = Field(0.2, gt=0, description="Largest move of a value in one update.")
    huber_delta: FiniteFloat = Field(10.0, gt=0, description="Of the value loss.")
    value_coef: FiniteFloat = Field(1.0, ge=0, description="Weight of the value loss.")
    entropy_coef: FiniteFloat = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    normalize_advantages: bool = Field(True, description="To mean 0 and deviation 1, all ranks.")

    def blockers(self) -> list[str]:
        """What stands between this configuration and a start."""
        return ["PPO is planned but not built yet: use the grpo preset of the same suite"]


PLUGIN = AlgorithmPlugin(
    name="ppo",
    summary="proximal policy optimisation with a value head (plans only, for now)",
    config=PpoConfig,
    factory="vlactl_ppo.algorithm:make_algorithm",
    api_version=1,
)
