"""Rewards of LIBERO episodes."""

from __future__ import annotations

import pytest
from vlactl_libero.plugin import LiberoConfig
from vlactl_libero.rewards import Rewards

SOLVED = [False, True, True, False, True]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 5, 0, -5, 5]),
        ({"use_rel_reward": False}, [0, 5, 5, 0, 5]),
        ({"reward_coef": 1, "use_rel_reward": False, "use_step_penalty": True}, [-1, 0, 0, -1, 0]),
        ({"reward_coef": 1, "use_step_penalty": True}, [-1, 1, 0, -1, 1]),
    ],
)
def test_rewards_of_success(options, expected):
    rewards = Rewards(LiberoConfig(**options), distance=0.0)
    assert [rewards.step(solved, 0.0) for solved in SOLVED] == expected


def test_shaping_adds_up_to_the_way_covered():
    rewards = Rewards(LiberoConfig(shaping_coef=2.0), distance=0.5)
    steps = [rewards.step(solved=False, distance=d) for d in (0.4, 0.45, 0.1)]
    assert steps == pytest.approx([0.2, -0.1, 0.7])
    assert sum(steps) == pytest.approx(2.0 * (0.5 - 0.1))
