"""The stock side: LIBERO's own `SubprocVectorEnv` of its own environments, driven as it is meant.

All simulators step together, every step renders all cameras, and observations come through pipes.
A reset rebuilds every scene, all of them at the same time (RLinf rebuilds one after another).

Importing this module imports the simulator: only the contender's process does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from vlactl_libero import quiet
from vlactl_libero.bench.workload import (
    CHECK_STEPS,
    Played,
    Script,
    Seen,
    Setup,
    digest,
    random_actions,
    scripted_actions,
)
from vlactl_libero.init_states import read_state
from vlactl_libero.placement import place
from vlactl_libero.stock import build, picture_of, state_of
from vlactl_libero.tasks import ACTION_DIM, suite_tasks

with quiet.imports():
    from libero.libero.envs import SubprocVectorEnv
    from libero.libero.envs.env_wrapper import ControlEnv


class LockStep:
    """N stock environments that step together."""

    def __init__(self, setup: Setup) -> None:
        self._config = config = setup.config
        suite = suite_tasks(config.full_suite)
        self._tasks = [suite[task] for task in setup.tasks]
        self._cameras = setup.cameras
        size = config.image_size
        with quiet.stdout():  # the workers inherit it
            self._envs = SubprocVectorEnv(
                [partial(_make_env, t.bddl_file, size, self._cameras) for t in self._tasks]
            )
        self._actions = [random_actions(i, 0) for i in range(len(self._tasks))]

    def reset(self, trial: int) -> float:
        """Rebuild all scenes, set their initial states and let them settle."""
        self._actions = [random_actions(i, trial) for i in range(len(self._tasks))]
        return self._begin([trial] * len(self._tasks))

    def check(self) -> list[Seen]:
        """Play the first random actions and look."""
        for _ in range(CHECK_STEPS):
            observations = self._step()[0]
        return [self._look(observation) for observation in observations]

    def run(self, seconds: float) -> tuple[int, float]:
        """Play random actions for a while, at least one."""
        steps, start = 0, time.perf_counter()
        while steps == 0 or time.perf_counter() - start < seconds:
            self._step()
            steps += len(self._tasks)
        return steps, time.perf_counter() - start

    def play_wave(self, scripts: list[Script | None], horizon: int, seconds: float) -> Played:
        """Play one episode per simulator, all to the horizon or until time is up.

        Simulators without a script hold still.
        """
        trials = [0 if script is None else script.trial for script in scripts]
        self._actions = [scripted_actions(script) for script in scripts]
        reset_seconds = self._begin(trials)
        solved = np.zeros(len(scripts), bool)
        steps, start = 0, time.perf_counter()
        while steps < horizon and (steps == 0 or time.perf_counter() - start < seconds):
            solved |= self._step()[2].astype(bool)
            steps += 1
        return Played(
            episodes=len(scripts),
            successes=int(solved.sum()),
            steps=steps,
            seconds=time.perf_counter() - start,
            reset_seconds=reset_seconds,
        )

    def close(self) -> None:
        """End all workers."""
        self._envs.close()

    def _begin(self, trials: list[int]) -> float:
        start = time.perf_counter()
        self._envs.seed([self._config.fixture_seed] * len(trials))
        self._envs.reset()
        states = [read_state(t.init_file, n) for t, n in zip(self._tasks, trials, strict=True)]
        self._envs.set_init_state(states)
        action = np.zeros(ACTION_DIM)
        if self._config.reset_gripper_open:
            action[-1] = -1.0
        for _ in range(self._config.wait_steps):
            self._envs.step(np.tile(action, (len(trials), 1)))
        return time.perf_counter() - start

    def _step(self) -> tuple[np.ndarray, ...]:
        """One action in all simulators; observations, rewards, success flags and more."""
        actions_NA = np.stack([next(actions) for actions in self._actions])
        result: tuple[np.ndarray, ...] = self._envs.step(actions_NA)
        return result

    def _look(self, observation: Mapping[str, np.ndarray]) -> Seen:
        pictures = [picture_of(observation, camera) for camera in self._cameras]
        return Seen(
            state=tuple(state_of(observation).tolist()),
            pictures=tuple(digest(picture) for picture in pictures),
        )


def _make_env(bddl_file: Path, image_size: int, cameras: Sequence[str]) -> ControlEnv:
    return place(0, lambda _: build(bddl_file, image_size, cameras))
