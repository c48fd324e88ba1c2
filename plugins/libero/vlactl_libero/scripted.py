"""Whole episodes of LIBERO that end in success, as the actions that were taken.

They exist to be replayed: to compare one simulator core with another over whole episodes, and to
measure speed on motions and lengths as they occur. A scripted controller that reads the simulator's
state found them; they are no demonstrations to learn from, and no measure of any policy.

How they were recorded, in stock LIBERO (mujoco 3.3.7, robosuite 1.4.0):
1. a fresh `ControlEnv` of the task without cameras, `seed(FIXTURE_SEED)` and one `reset()`, which
   rebuilds the scene and so draws the poses of fixtures;
2. `set_init_state` with the trial's row of the task's file of initial states;
3. `SETTLING_STEPS` steps with the all-zero action;
4. the actions stored here, each clipped to [-1, 1] and rounded to float32 before it was stepped as
   float64; the last one solves the task, none before it does.
A second process replayed every episode: it ended at the same step in a bit-identical state. That is
only to be expected of the versions above.

`scripted.npz` maps "suite/task name/trial" to float32 [T, A]: T control steps, A numbers of an
action. Imports no simulator.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

import numpy as np

SETTLING_STEPS = 15
FIXTURE_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScriptedEpisode:
    """One episode: its task, the row of its initial state and float32 actions [T, A], read-only."""

    suite: str
    task_name: str
    trial: int
    actions: np.ndarray


def episodes(suite: str | None = None) -> list[ScriptedEpisode]:
    """The episodes of a suite, or all, in LIBERO's order; none for a suite without any."""
    path = resources.files(__package__).joinpath("scripted.npz")
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return [
            _episode(key, arrays[key])
            for key in arrays.files
            if suite is None or key.startswith(f"{suite}/")
        ]


def _episode(key: str, actions: np.ndarray) -> ScriptedEpisode:
    suite, task_name, trial = key.split("/")
    actions.flags.writeable = False
    return ScriptedEpisode(suite=suite, task_name=task_name, trial=int(trial), actions=actions)
