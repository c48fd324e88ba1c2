"""Rewards of an episode, from success and from the distance to what is to be reached.

With raw_t = reward_coef * solved_t - (1 if use_step_penalty), the reward of step t is
raw_t - raw_{t-1} (where raw_{-1} = 0) if use_rel_reward and raw_t if not, and in both cases
shaping_coef * (distance_{t-1} - distance_t) on top.
"""

from __future__ import annotations

from vlactl_libero.plugin import LiberoConfig


class Rewards:
    """Rewards of one episode, step by step.

    Args:
        config: coefficients and switches.
        distance: metres, before the first step.
    """

    def __init__(self, config: LiberoConfig, distance: float) -> None:
        self._config = config
        self._raw = 0.0
        self._distance = distance

    def step(self, solved: bool, distance: float) -> float:
        """The reward of a step that led to this."""
        config = self._config
        raw = config.reward_coef * solved - config.use_step_penalty
        reward = raw - self._raw if config.use_rel_reward else raw
        reward += config.shaping_coef * (self._distance - distance)
        self._raw, self._distance = raw, distance
        return reward
