"""Descriptor and configuration of PPO. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, FiniteFloat

from vlactl.api.contracts import Needs
from vlactl.api.plugins import AlgorithmPlugin
from vlactl_policy_gradient.config import Aggregation, PolicyGradientConfig


class PpoConfig(PolicyGradientConfig):
    """Section `algorithm` for PPO with generalised advantage estimation.

    The value head gives a value to whatever rewards are credited to: `reward_level`.
    """

    name: Literal["ppo"] = "ppo"
    group_size: Literal[1] = 1
    aggregation: Aggregation = "token-mean"
    gamma: FiniteFloat = Field(0.99, gt=0, le=1, description="Discount per action, or per chunk.")
    gae_lambda: FiniteFloat = Field(0.95, ge=0, le=1, description="Of the advantage estimator.")
    bootstrap: Literal["always", "truncation", "none"] = Field(
        "always",
        description="After which ends of an episode the value of the last state counts. Where "
        "rollout.auto_reset cuts an unfinished episode, it always does.",
    )
    normalize_advantages: bool = Field(True, description="To mean 0 and deviation 1, all ranks.")
    value_clip: FiniteFloat = Field(0.2, gt=0, description="Largest move of a value in one update.")
    huber_delta: FiniteFloat = Field(10.0, gt=0, description="Of the value loss.")
    value_coef: FiniteFloat = Field(1.0, ge=0, description="Weight of the value loss.")
    critic_warmup_steps: int = Field(
        0, ge=0, description="First steps of a run, in which only the value head is trained."
    )

    def needs(self) -> Needs:
        """A value head, and values of last states: `rollout.auto_reset` cuts episodes anyway."""
        return Needs(
            values=self.reward_level,
            final_values=True,
            reference=self.kl_coef > 0,
            critic_warmup_steps=self.critic_warmup_steps,
        )


PLUGIN = AlgorithmPlugin(
    name="ppo",
    summary="proximal policy optimisation with a value per action or per chunk",
    config=PpoConfig,
    factory="vlactl_ppo.algorithm:make_algorithm",
    api_version=1,
)
