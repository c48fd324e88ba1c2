"""Shows how the toy world is solved: straight to the goal, unless a burst pushes the point."""

from __future__ import annotations

import numpy as np

from vlactl.api.contracts import (
    ChunkResult,
    Demonstration,
    DemonstrationContext,
    EnvContext,
    Episode,
    Observation,
)
from vlactl_toy.environment import STEP_SIZE, ToySimulator
from vlactl_toy.plugin import ToyEnvConfig

UNDISTURBED = 0.25
"""Of the episodes."""
USUAL_STEPS = 8
BURST_STEPS = (1, 3)
"""The shortest, and one more than the longest."""
FAR = 0.3
"""From the goal: closer to it, a burst might reach it by itself."""


def make_demonstrator(config: ToyEnvConfig, context: DemonstrationContext) -> ToyDemonstrator:
    """An expert of the toy world."""
    return ToyDemonstrator(config, context)


class ToyDemonstrator:
    """See `vlactl.api.contracts.Demonstrator`."""

    def __init__(self, config: ToyEnvConfig, context: DemonstrationContext) -> None:
        self._simulator = ToySimulator(config, EnvContext(num_slots=1, cameras=context.cameras))
        self._cameras = context.cameras
        self._burst_rate = context.bursts / USUAL_STEPS

    def demonstrate(self, task: int, seed: int, trial: int | None = None) -> Demonstration:
        """Walk to the goal."""
        random = np.random.default_rng(seed)
        result = self._begin(task, seed, trial, random)
        rate = 0.0 if random.random() < UNDISTURBED else self._burst_rate
        seen: list[Observation] = []
        actions: list[float] = []
        perturbed: list[bool] = []
        push, left = 0.0, 0
        while result.outcome is None:
            assert result.observation is not None
            is_far = abs(self._simulator.way) > FAR
            if not left and is_far and random.random() < rate:
                push, left = random.uniform(-1, 1), int(random.integers(*BURST_STEPS))
            seen.append(result.observation)
            perturbed.append(left > 0)
            actions.append(push if left else np.clip(self._simulator.way / STEP_SIZE, -1, 1))
            left = max(0, left - 1)
            result = self._simulator.advance(np.array([[actions[-1]]]))
        return Demonstration(
            images={name: np.stack([each.images[name] for each in seen]) for name in self._cameras},
            states_TP=np.stack([each.state for each in seen]),
            actions_TA=np.array(actions)[:, None],
            perturbed_T=np.array(perturbed),
            success=result.outcome.success,
        )

    def close(self) -> None:
        """Nothing is held."""

    def _begin(
        self, task: int, seed: int, trial: int | None, random: np.random.Generator
    ) -> ChunkResult:
        if trial is None:
            return self._simulator.begin_demonstration(task, random)
        return self._simulator.begin(Episode(task=task, trial=trial, group=0, member=0, seed=seed))
