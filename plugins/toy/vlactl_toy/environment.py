"""A point on a line is to be brought to a goal. Needs no simulator, and breaks when asked to.

The picture shows the goal as a bright column, the state holds the point's position. An action is
one number in [-1, 1]; the point moves by a tenth of it. The task's index shifts the goal, the
trial's index the start. Success: closer to the goal than 0.08.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

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
from vlactl_toy.plugin import ToyEnvConfig

REACH = 0.08
STEP_SIZE = 0.1


def make_spec(config: ToyEnvConfig) -> EnvSpec:
    """What the toy environment offers."""
    size = config.image_size
    return EnvSpec(
        cameras={"front": (size, size)},
        state_dim=1,
        action_dim=1,
        max_episode_steps=config.max_episode_steps,
        control_hz=10.0,
        tasks=tuple(
            Task(
                index=index,
                name=f"reach_{index}",
                instruction=f"reach goal {index}",
                num_trials=config.num_trials,
            )
            for index in range(config.num_tasks)
        ),
    )


def make_environment(config: ToyEnvConfig, context: EnvContext) -> Environment:
    """Toy simulators in subprocesses."""
    return SimulatorPool(
        "vlactl_toy.environment:make_simulator", config, context, make_spec(config)
    )


def make_simulator(config: ToyEnvConfig, context: EnvContext) -> ToySimulator:
    """One toy simulator."""
    return ToySimulator(config, context)


class ToySimulator:
    """The toy world; see the module's docstring."""

    def __init__(self, config: ToyEnvConfig, context: EnvContext) -> None:
        self._config = config
        self._render_every_step = context.render_every_step
        self._observes_ends = context.final_observations
        self._position = self._goal = 0.0
        self._task = self._steps = 0
        self._broken = False

    @property
    def way(self) -> float:
        """From the point to the goal."""
        return self._goal - self._position

    def begin(self, episode: Episode) -> ChunkResult:
        """Put the point and the goal where task and trial say."""
        self._inject_fault(f"{episode.task}/{episode.trial}/{episode.member}")
        return self._start(episode.task, np.random.default_rng([episode.task, episode.trial]))

    def begin_demonstration(self, task: int, random: np.random.Generator) -> ChunkResult:
        """Put the point where no trial need have put it."""
        self._inject_fault(f"{task}/demonstration")
        return self._start(task, random)

    def advance(self, actions_KA: np.ndarray) -> ChunkResult:
        """Move the point action by action until it is at the goal or time is up."""
        rewards, frames = [], []
        for action_A in actions_KA:
            self._position = float(
                np.clip(self._position + STEP_SIZE * np.clip(action_A[0], -1, 1), -1, 1)
            )
            self._steps += 1
            success = abs(self._position - self._goal) < REACH
            rewards.append(5.0 * success)
            if self._render_every_step:
                frames.append(self._picture())
            if success or self._steps >= self._config.max_episode_steps:
                outcome = Outcome(
                    success_step=self._steps if success else None,
                    success_at_end=success,
                    terminated=success,
                    num_steps=self._steps,
                )
                return ChunkResult(
                    rewards=np.array(rewards, np.float32),
                    observation=self._observe() if self._observes_ends else None,
                    outcome=outcome,
                    frames=frames,
                )
        return ChunkResult(
            rewards=np.array(rewards, np.float32), observation=self._observe(), frames=frames
        )

    def close(self) -> None:
        """Nothing is held."""

    def _start(self, task: int, random: np.random.Generator) -> ChunkResult:
        self._task = task
        self._goal = -0.8 + 1.6 * (task + 0.5) / self._config.num_tasks
        self._position = random.uniform(-0.9, 0.9)
        self._steps = 0
        return ChunkResult(rewards=np.zeros(0, np.float32), observation=self._observe())

    def _observe(self) -> Observation:
        return Observation(
            images={"front": self._picture()},
            state=np.array([np.nan if self._broken else self._position], np.float32),
            instruction=f"reach goal {self._task}",
        )

    def _picture(self) -> np.ndarray:
        size = self._config.image_size
        picture = np.zeros((size, size, 3), np.uint8)
        picture[:, int((self._goal + 1) / 2 * (size - 1)), 0] = 255
        picture[size // 2, int((self._position + 1) / 2 * (size - 1)), 1] = 255
        return picture

    def _inject_fault(self, name: str) -> None:
        """Break once at a chosen episode, so that its second try succeeds."""
        fault = self._config.faults.get(name)
        if fault is None:
            return
        mark = Path(self._config.fault_dir) / name.replace("/", "-")
        if mark.exists():
            return
        mark.write_text(fault)
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            time.sleep(3600)
        if fault == "nan":
            self._broken = True
            return
        raise RuntimeError(f"injected fault in episode {name}")
