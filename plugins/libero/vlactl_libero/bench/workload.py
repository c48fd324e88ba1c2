"""What the contenders play: the same tasks, initial states and actions on both sides.

Shapes: N simulators, K actions of a chunk, A dimensions of an action, T steps of a script.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlactl.api.noise import generator
from vlactl_libero.plugin import LiberoConfig
from vlactl_libero.scripted import episodes
from vlactl_libero.tasks import ACTION_DIM, suite_tasks

MAX_ACTION = 0.5
NEVER = 10**9
"""A horizon that is not reached: speed is measured without ends of episodes."""
CHECK_STEPS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A contender as its process builds it.

    Attributes:
        side: key of `contender_process.SIDES`.
        config: the environment's section.
        tasks: of each simulator, as indices into the suite.
        cameras: to render.
        device_index: GPU to render on; -1 = none.
        chunk_length: actions per observation, where the contender knows chunks.
    """

    side: str
    config: LiberoConfig
    tasks: tuple[int, ...]
    cameras: tuple[str, ...]
    device_index: int
    chunk_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """A recorded episode: its task, initial state and actions float32 [T, A]."""

    task: int
    trial: int
    actions_TA: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """How scripted episodes went.

    Attributes:
        episodes: that were played, or begun where time ran out.
        successes: among them.
        steps: control steps executed: of all episodes together, in lock-step of each.
        seconds: without `reset_seconds`.
        reset_seconds: of a reset of all simulators, where they are reset together.
    """

    episodes: int
    successes: int
    steps: int
    seconds: float
    reset_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a simulator shows after `CHECK_STEPS` actions: proprioception and picture digests."""

    state: tuple[float, ...]
    pictures: tuple[str, ...]


def spread_tasks(config: LiberoConfig, scripts: Sequence[Script]) -> tuple[int, ...]:
    """A task for each simulator: those of the suite in turn, starting with those that have scripts.

    Simulators of one task are neighbours, as those of a group are in training.
    """
    scripted = {script.task for script in scripts}
    tasks = sorted(range(len(suite_tasks(config.full_suite))), key=lambda t: t not in scripted)
    return tuple(sorted(tasks[i % len(tasks)] for i in range(config.num_envs)))


def read_scripts(suite: str) -> list[Script]:
    """The recorded episodes of a suite; none for most."""
    indices = {(task.suite, task.name): i for i, task in enumerate(suite_tasks(suite))}
    return [
        Script(
            task=indices[episode.suite, episode.task_name],
            trial=episode.trial,
            actions_TA=episode.actions,
        )
        for episode in episodes()
        if (episode.suite, episode.task_name) in indices
    ]


def deal(scripts: Sequence[Script], tasks: Sequence[int]) -> list[list[Script]]:
    """For each simulator the scripts of its task; may be none."""
    return [[script for script in scripts if script.task == task] for task in tasks]


def lend(hands: Sequence[list[Script]]) -> list[list[Script]]:
    """The same, but who has none gets another's."""
    givers = [hand for hand in hands if hand]
    return [hand or givers[i % len(givers)] for i, hand in enumerate(hands)]


def random_actions(simulator: int, trial: int) -> Iterator[np.ndarray]:
    """Endless actions float64 [A] of one simulator after one reset; the gripper opens or closes."""
    numbers = generator("bench", simulator, trial)
    while True:
        action = numbers.uniform(-MAX_ACTION, MAX_ACTION, ACTION_DIM)
        action[-1] = np.sign(action[-1])
        yield action


def scripted_actions(script: Script | None) -> Iterator[np.ndarray]:
    """A script's actions as float64 [A], then (or without a script) none at all for ever."""
    yield from () if script is None else script.actions_TA.astype(np.float64)
    while True:
        yield np.zeros(ACTION_DIM)


def digest(picture: np.ndarray) -> str:
    """Of a picture's bytes."""
    return hashlib.sha256(picture.tobytes()).hexdigest()
