"""vlactl's side: the environment behind its slots, driven as training drives it.

A slot gets its next action chunk as soon as it has delivered its observation; nobody waits for
anybody else.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import cycle, islice

import numpy as np

from vlactl.api.contracts import ChunkResult, EnvContext, Episode
from vlactl.errors import EnvironmentNotReadyError
from vlactl_libero.bench.workload import (
    CHECK_STEPS,
    NEVER,
    Played,
    Script,
    Seen,
    Setup,
    digest,
    random_actions,
    scripted_actions,
)
from vlactl_libero.environment import make_environment

_POLL_SECONDS = 1.0


class _Play:
    """A scripted episode under way."""

    def __init__(self, script: Script, horizon: int) -> None:
        self._actions = scripted_actions(script)
        self._steps_left = horizon

    def next_chunk(self, result: ChunkResult, length: int) -> np.ndarray | None:
        """What to do after `result`; None = nothing, it is solved or at the horizon."""
        self._steps_left -= len(result.rewards)
        if result.outcome is not None or self._steps_left == 0:
            return None
        return np.stack(list(islice(self._actions, min(length, self._steps_left))))


class Slots:
    """N slots of the environment."""

    def __init__(self, setup: Setup) -> None:
        self._tasks, self._cameras = setup.tasks, setup.cameras
        self._chunk_length = setup.chunk_length
        self._env = make_environment(
            setup.config.model_copy(update={"max_episode_steps": NEVER}),
            EnvContext(
                num_slots=len(setup.tasks),
                cameras=setup.cameras,
                device_index=setup.device_index,
            ),
        )
        self._trial = 0
        self._actions = [random_actions(slot, 0) for slot in range(len(setup.tasks))]

    def reset(self, trial: int) -> float:
        """Begin in all slots at once, until all have delivered an observation."""
        self._trial = trial
        self._actions = [random_actions(slot, trial) for slot in range(len(self._tasks))]
        start = time.perf_counter()
        self._begin_all([(task, trial) for task in self._tasks])
        return time.perf_counter() - start

    def warm(self, slots: Sequence[int]) -> None:
        """Begin in some slots and play a chunk there."""
        for slot in slots:
            self._begin(slot, self._tasks[slot], self._trial)
        self._collect(len(slots))
        for slot in slots:
            self._advance(slot, self._chunk_length)
        self._collect(len(slots))

    def check(self) -> list[Seen | None]:
        """Play the first random actions in one chunk and look."""
        for slot in range(len(self._tasks)):
            self._advance(slot, CHECK_STEPS)
        results = self._collect(len(self._tasks))
        return [self._look(results[slot]) for slot in range(len(self._tasks))]

    def run(self, seconds: float) -> tuple[int, float]:
        """Play random actions for a while.

        The clock starts when every slot has finished a chunk and stops with the end of one: at
        both times all slots are busy.
        """
        for slot in range(len(self._tasks)):
            self._advance(slot, self._chunk_length)
        started: set[int] = set()
        while len(started) < len(self._tasks):
            started.update(self._go_on())
        steps, elapsed, start = 0, 0.0, time.perf_counter()
        while elapsed < seconds or steps == 0:
            steps += sum(self._go_on().values())
            elapsed = time.perf_counter() - start
        self._collect(len(self._tasks))
        return steps, elapsed

    def play_queue(self, hands: list[list[Script]], num_episodes: int, horizon: int) -> Played:
        """Play a queue of episodes, slot i those of `hands[i]` in turn; success frees a slot.

        Each slot's first model is there before the clock starts.
        """
        self._begin_all([(hand[0].task, hand[0].trial) for hand in hands])
        turns = [cycle(hand) for hand in hands]
        plays: dict[int, _Play] = {}
        idle = list(range(len(hands)))
        begun = steps = successes = 0
        start = time.perf_counter()
        while plays or begun < num_episodes:
            while idle and begun < num_episodes:
                slot = idle.pop(0)
                plays[slot] = self._start(slot, next(turns[slot]), horizon)
                begun += 1
            for slot, result in self._wait():
                steps += len(result.rewards)
                chunk_KA = plays[slot].next_chunk(result, self._chunk_length)
                if chunk_KA is None:
                    del plays[slot]
                    idle.append(slot)
                    successes += result.outcome is not None
                else:
                    self._env.advance(slot, chunk_KA)
        seconds = time.perf_counter() - start
        return Played(episodes=num_episodes, successes=successes, steps=steps, seconds=seconds)

    def close(self) -> None:
        """Stop all simulators."""
        self._env.close()

    def _start(self, slot: int, script: Script, horizon: int) -> _Play:
        self._begin(slot, script.task, script.trial)
        return _Play(script, horizon)

    def _begin_all(self, starts: Sequence[tuple[int, int]]) -> None:
        for slot, (task, trial) in enumerate(starts):
            self._begin(slot, task, trial)
        self._collect(len(starts))

    def _begin(self, slot: int, task: int, trial: int) -> None:
        self._env.begin(slot, Episode(task=task, trial=trial, group=0, member=0, seed=0))

    def _go_on(self) -> dict[int, int]:
        """Wait for slots and give each its next chunk; returns the steps that each has made.

        An episode that random actions have solved begins again.
        """
        results = self._wait()
        for slot, result in results:
            if result.outcome is not None:
                self._begin(slot, self._tasks[slot], self._trial)
            else:
                self._advance(slot, self._chunk_length)
        return {slot: len(result.rewards) for slot, result in results}

    def _advance(self, slot: int, num_actions: int) -> None:
        self._env.advance(slot, np.stack(list(islice(self._actions[slot], num_actions))))

    def _collect(self, number: int) -> dict[int, ChunkResult]:
        results: dict[int, ChunkResult] = {}
        while len(results) < number:
            results.update(self._wait())
        return results

    def _wait(self) -> list[tuple[int, ChunkResult]]:
        """What has arrived; a failure of a simulator spoils the measurement and ends it."""
        results = []
        for event in self._env.wait(1, _POLL_SECONDS):
            if event.result is None:
                raise EnvironmentNotReadyError(f"a simulator failed: {event.failure}")
            results.append((event.slot, event.result))
        return results

    def _look(self, result: ChunkResult) -> Seen | None:
        if result.observation is None:
            return None
        images = result.observation.images
        return Seen(
            state=tuple(result.observation.state.tolist()),
            pictures=tuple(digest(images[camera]) for camera in self._cameras),
        )
