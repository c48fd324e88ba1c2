"""A hand on a square table is to reach the corner that the instruction names.

The picture shows the hand in green and the goal in red; the state is the hand's x and y, each from
-1 to 1. An action moves the hand by at most a fifth of a unit in x and in y.
"""

from __future__ import annotations

import numpy as np

from vlactl.api.contracts import (
    ChunkResult,
    EnvContext,
    Environment,
    EnvSpec,
    Episode,
    Observation,
    Outcome,
    Task,
)
from vlactl.api.simulators import SimulatorPool
from vlactl_example_env.plugin import ReachConfig

CORNERS = {
    "upper left": (-0.7, -0.7),
    "upper right": (0.7, -0.7),
    "lower left": (-0.7, 0.7),
    "lower right": (0.7, 0.7),
}
REACH = 0.3
STEP_SIZE = 0.2
NUM_TRIALS = 10


def make_spec(config: ReachConfig) -> EnvSpec:
    """What this environment offers, known without starting it."""
    return EnvSpec(
        cameras={"front": (config.image_size, config.image_size)},
        state_dim=2,
        action_dim=2,
        max_episode_steps=config.max_episode_steps,
        control_hz=10.0,
        tasks=tuple(
            Task(
                index=index,
                name=corner.replace(" ", "_"),
                instruction=f"move the hand to the {corner} corner",
                num_trials=NUM_TRIALS,
            )
            for index, corner in enumerate(CORNERS)
        ),
    )


def make_environment(config: ReachConfig, context: EnvContext) -> Environment:
    """One simulator process per slot; the pool sees to crashes, timeouts and pictures."""
    return SimulatorPool(
        "vlactl_example_env.environment:make_simulator", config, context, make_spec(config)
    )


def make_simulator(config: ReachConfig, context: EnvContext) -> ReachSimulator:
    """Called inside each simulator process."""
    return ReachSimulator(config, context)


class ReachSimulator:
    """One table: see `vlactl.api.contracts.Simulator`."""

    def __init__(self, config: ReachConfig, context: EnvContext) -> None:
        self._config, self._context = config, context
        self._instruction = ""
        self._goal = self._hand = np.zeros(2)
        self._steps = 0

    def begin(self, episode: Episode) -> ChunkResult:
        """Put the hand where the trial says: the same trial always starts alike."""
        corner, goal = list(CORNERS.items())[episode.task]
        self._instruction = f"move the hand to the {corner} corner"
        self._goal = np.array(goal)
        self._hand = np.random.default_rng(episode.trial).uniform(-0.5, 0.5, 2)
        self._steps = 0
        return ChunkResult(rewards=np.zeros(0, np.float32), observation=self._observe())

    def advance(self, actions_KA: np.ndarray) -> ChunkResult:
        """Run the chunk, and stop early at the goal or at the horizon."""
        rewards, frames = [], []
        for action_A in actions_KA:
            self._hand = np.clip(self._hand + STEP_SIZE * np.clip(action_A, -1, 1), -1, 1)
            self._steps += 1
            success = bool(np.linalg.norm(self._hand - self._goal) < REACH)
            rewards.append(float(success))
            if self._context.render_every_step:
                frames.append(self._picture())
            if success or self._steps == self._config.max_episode_steps:
                outcome = Outcome(
                    success_step=self._steps if success else None,
                    success_at_end=success,
                    terminated=success,
                    num_steps=self._steps,
                )
                return ChunkResult(
                    rewards=np.array(rewards, np.float32),
                    observation=self._observe() if self._context.final_observations else None,
                    outcome=outcome,
                    frames=frames,
                )
        return ChunkResult(
            rewards=np.array(rewards, np.float32), observation=self._observe(), frames=frames
        )

    def close(self) -> None:
        """Nothing to free."""

    def _observe(self) -> Observation:
        return Observation(
            images={"front": self._picture()},
            state=self._hand.astype(np.float32),
            instruction=self._instruction,
        )

    def _picture(self) -> np.ndarray:
        size = self._config.image_size
        picture = np.zeros((size, size, 3), np.uint8)
        for channel, (x, y) in ((0, self._goal), (1, self._hand)):
            row, column = int((y + 1) / 2 * (size - 1)), int((x + 1) / 2 * (size - 1))
            picture[row, column, channel] = 255
        return picture
