"""Every key that an algorithm accepts has an effect."""

from dataclasses import replace
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from vlactl_grpo.algorithm import make_algorithm as make_grpo
from vlactl_grpo.plugin import GrpoConfig
from vlactl_ppo.algorithm import make_algorithm as make_ppo
from vlactl_ppo.plugin import PpoConfig
from vlactl_rft.algorithm import make_algorithm as make_rft
from vlactl_rft.plugin import RftConfig

from vlactl.api.contracts import End, MicroBatch, PolicyOutput, TrajectoryBatch
from vlactl.api.plugins import AlgorithmConfig
from vlactl_policy_gradient.config import PolicyGradientConfig

Keys = dict[str, Any]
MAKERS = {GrpoConfig: make_grpo, PpoConfig: make_ppo, RftConfig: make_rft}

# Key -> another value, and the keys without which it says nothing.
COMMON: dict[str, tuple[Any, Keys]] = {
    "reward_level": ("chunk", {}),
    "logprob_level": ("action", {}),
    "clip_low": (0.1, {}),
    "clip_high": (0.1, {}),
    "dual_clip": (1.1, {}),
    "clip_log_ratio_min": (-0.1, {}),
    "clip_log_ratio_max": (0.1, {}),
    "entropy_coef": (0.1, {}),
    "entropy_level": ("action", {"entropy_coef": 0.1}),
    "kl_coef": (0.1, {}),
    "kl_estimator": ("k2", {"kl_coef": 0.1}),
    "max_behaviour_weight": (1.1, {}),
}
OTHER_VALUES: dict[type[AlgorithmConfig], dict[str, tuple[Any, Keys]]] = {
    GrpoConfig: COMMON
    | {
        "group_size": (4, {}),
        "aggregation": ("token-mean", {}),
        "advantage": ("rloo", {}),
        "filter_rewards": (False, {}),
        "reward_lower_bound": (2.5, {}),
        "reward_upper_bound": (1.0, {}),
        "resample_rounds": (1, {}),
    },
    PpoConfig: COMMON
    | {
        "aggregation": ("episode-mean", {}),
        "gamma": (0.5, {}),
        "gae_lambda": (0.5, {}),
        "bootstrap": ("truncation", {}),
        "normalize_advantages": (False, {}),
        "value_clip": (0.1, {}),
        "huber_delta": (0.1, {}),
        "value_coef": (0.5, {}),
        "critic_warmup_steps": (1, {}),
    },
    RftConfig: {
        "group_size": (4, {"balance_groups": True}),
        "min_return": (1.5, {}),
        "balance_groups": (True, {"min_return": 0.0}),
        "kl_coef": COMMON["kl_coef"],
        "kl_estimator": COMMON["kl_estimator"],
        "resample_rounds": (1, {}),
    },
}
# Any two values of these differ, too.
CHOICES: list[tuple[type[AlgorithmConfig], str, Keys]] = [
    (GrpoConfig, "advantage", {}),
    (GrpoConfig, "kl_estimator", {"kl_coef": 0.1}),
    (PpoConfig, "bootstrap", {}),
    (PpoConfig, "logprob_level", {"reward_level": "chunk"}),
    (PpoConfig, "entropy_level", {"reward_level": "chunk", "entropy_coef": 0.1}),
]


def has_one_value(annotation: Any) -> bool:
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


@pytest.mark.parametrize("config", MAKERS)
def test_no_key_is_forgotten(config):
    keys = {
        name for name, field in config.model_fields.items() if not has_one_value(field.annotation)
    }
    assert OTHER_VALUES[config].keys() == keys


@pytest.mark.parametrize(
    ("config", "key"), [(config, key) for config, keys in OTHER_VALUES.items() for key in keys]
)
def test_every_key_has_an_effect(config, key):
    value, others = OTHER_VALUES[config][key]
    assert results(config, others) == results(config, others)
    assert results(config, others | {key: value}) != results(config, others)


@pytest.mark.parametrize(("config", "key", "others"), CHOICES)
def test_every_choice_is_another_one(config, key, others):
    choices = get_args(config.model_fields[key].annotation)
    assert len({repr(results(config, others | {key: choice})) for choice in choices}) == len(
        choices
    )


class OneRank:
    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return value.clone()


def results(config: type[AlgorithmConfig], keys: Keys) -> list[Any]:
    """All that the engine gets from an algorithm: needs, advantages, weights and loss."""
    settings = config(**keys)
    algorithm = MAKERS[config](settings)
    batch = trajectories(settings)
    advantages = algorithm.advantages(batch, OneRank())
    # All chunks are the samples of one optimizer step.
    mask_SK = advantages.mask_BCK.flatten(0, 1)
    valid_S = batch.valid_BCK.sum((1, 2)).repeat_interleave(batch.valid_BCK.shape[1])
    weights_SK = algorithm.weights(mask_SK, valid_S, len(mask_SK), 12, OneRank())
    returns_BCK, values_BCK = advantages.returns_BCK, batch.values_BCK
    generator = torch.Generator().manual_seed(1)
    new_SKA, old_SKA, reference_SKA, entropy_SKA = torch.randn(
        4, len(mask_SK), 3, 2, generator=generator
    ).unbind()
    judged = MicroBatch(
        old_logprobs_SKA=old_SKA,
        advantages_SK=advantages.advantages_BCK.flatten(0, 1),
        mask_SK=mask_SK,
        weights_SK=weights_SK,
        returns_SK=None if returns_BCK is None else returns_BCK.flatten(0, 1),
        old_values_SK=values_BCK.flatten(0, 1),
        reference_logprobs_SKA=reference_SKA,
    )
    moved_SK = values_BCK.flatten(0, 1) + 0.3
    out = PolicyOutput(logprobs_SKA=new_SKA, entropy_SKA=entropy_SKA.abs(), values_SK=moved_SK)
    return [
        settings.needs(),
        advantages.advantages_BCK.tolist(),
        advantages.mask_BCK.tolist(),
        weights_SK.tolist(),
        algorithm.loss(out, judged).loss.item(),
        algorithm.loss(out, replace(judged, lags_S=torch.ones(len(mask_SK)))).loss.item(),
    ]


def trajectories(settings: AlgorithmConfig) -> TrajectoryBatch:
    """16 episodes of at most 4 chunks, of all lengths and ends; later ones earn more."""
    generator = torch.Generator().manual_seed(0)
    shape = (16, 4, 3)
    length_B = torch.randint(4, 13, (16,), generator=generator)
    returns_B = torch.arange(16) * 0.2 - 1.0
    last_BT = torch.arange(12) == length_B[:, None] - 1
    ends_B = torch.arange(16) % End.CUT + 1
    values_BCK = torch.randn(shape, generator=generator)
    if isinstance(settings, PolicyGradientConfig) and settings.reward_level == "chunk":
        values_BCK = values_BCK[:, :, :1]
    return TrajectoryBatch(
        rewards_BCK=(last_BT * returns_B[:, None]).view(shape),
        valid_BCK=(torch.arange(12) < length_B[:, None]).view(shape),
        ends_BCK=(last_BT * ends_B[:, None]).to(torch.int8).view(shape),
        group_size=settings.group_size,
        values_BCK=values_BCK,
        final_values_BCK=(last_BT * 2.0).view(shape),
    )
