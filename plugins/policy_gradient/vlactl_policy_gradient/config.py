"""Keys that all policy gradient algorithms have. Imports no torch.

Rewards are credited to actions or to whole chunks (`reward_level`): that decides what has an
advantage, a value and a place in the mask. Ratios (`logprob_level`) and entropies
(`entropy_level`) may be finer than that, never coarser.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from vlactl.api.plugins import AlgorithmConfig

RewardLevel = Literal["action", "chunk"]
Level = Literal["token", "action", "chunk"]
Aggregation = Annotated[
    Literal["episode-mean", "token-mean"],
    Field(
        description="episode-mean: all trajectories count the same; token-mean: all actions (at "
        "reward_level chunk: all chunks) do."
    ),
]

KlCoefficient = Annotated[
    FiniteFloat,
    Field(ge=0, description="Weight of the KL to the initial policy, averaged over tokens."),
]
KlEstimator = Annotated[
    Literal["k1", "k2", "k3", "abs"],
    Field(description="Estimator of that KL; the gradient of k1 is 0 on average."),
]


class PolicyGradientConfig(AlgorithmConfig):
    """Section `algorithm` of everything that maximises a clipped surrogate."""

    reward_level: RewardLevel = Field(
        "action", description="What rewards are credited to: each action, or the chunk as a whole."
    )
    logprob_level: Level = Field(
        "token", description="What has a probability ratio of its own: token, action or chunk."
    )
    clip_low: FiniteFloat = Field(0.2, gt=0, lt=1, description="Ratio is clipped at 1 - clip_low.")
    clip_high: FiniteFloat = Field(0.28, gt=0, description="Ratio is clipped at 1 + clip_high.")
    dual_clip: FiniteFloat | None = Field(
        None, gt=1, description="Bound of the loss for negative advantages; none = off."
    )
    clip_log_ratio_min: FiniteFloat = Field(
        -20.0, lt=0, description="Log-ratios below this are raised to it, without gradient."
    )
    clip_log_ratio_max: FiniteFloat = Field(
        20.0,
        gt=0,
        description="Log-ratios above this are lowered to it, so that exp cannot overflow.",
    )
    max_behaviour_weight: FiniteFloat | None = Field(
        5.0,
        gt=1,
        description="With train.staleness: what an older policy chose is left out where its "
        "importance weight exceeds this; none = never.",
    )
    aggregation: Aggregation = "episode-mean"
    entropy_coef: FiniteFloat = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    entropy_level: Level = Field(
        "token", description="Whose entropy is averaged: a token's, or sums over action or chunk."
    )
    kl_coef: KlCoefficient = 0.0
    kl_estimator: KlEstimator = "k3"

    @model_validator(mode="after")
    def _no_level_is_coarser_than_the_rewards(self) -> Self:
        for key in ("logprob_level", "entropy_level"):
            if self.reward_level == "action" and getattr(self, key) == "chunk":
                raise ValueError(
                    f'{key} = "chunk" needs reward_level = "chunk": one number per chunk cannot '
                    f'be weighed action by action; set reward_level = "chunk", or {key} to '
                    '"token" or "action"'
                )
        return self
