"""Playing a queue of episodes: simulators and policy meet here.

A slot whose episode has ended begins the next one at once; the policy serves whatever is ready.
Every inference call has the same number of rows (short batches are padded), so a row's numbers
depend neither on who else was ready nor on when.

Shapes: C chunks of a trajectory, K actions of a chunk, A action dimensions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vlactl.api.contracts import (
    ActionChunks,
    ChunkResult,
    Environment,
    Episode,
    Greedy,
    Observation,
    ObservationBatch,
    Outcome,
    Policy,
    Sample,
)
from vlactl.api.noise import make_key
from vlactl.errors import TrainingError
from vlactl.rollout.episodes import EpisodeQueue

LOG = logging.getLogger(__name__)
POLL_SECONDS = 1.0
Progress = Callable[[int, int], None]


class StopRequested(Exception):  # noqa: N818 - a request, not an error
    """The job was asked to end; all ranks have agreed on it."""


@dataclass(slots=True, kw_only=True)
class Trajectory:
    """One played episode: C observations with what the policy chose, and how it went."""

    episode: Episode
    observations: list[Observation] = field(default_factory=list)
    tokens_CKA: list[np.ndarray] = field(default_factory=list)
    logprobs_CKA: list[np.ndarray] = field(default_factory=list)
    actions_CKA: list[np.ndarray] = field(default_factory=list)
    values_CK: list[np.ndarray] = field(default_factory=list)
    rewards: list[np.ndarray] = field(default_factory=list)
    """One array per chunk, as long as actions were executed."""
    outcome: Outcome | None = None

    @property
    def executed_actions(self) -> np.ndarray:
        """float64 [num_steps, A]."""
        pairs = zip(self.actions_CKA, self.rewards, strict=True)
        return np.concatenate([actions[: len(rewards)] for actions, rewards in pairs])

    @property
    def episode_return(self) -> float:
        """Sum of all rewards."""
        return float(sum(float(rewards.sum()) for rewards in self.rewards))


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """What a rollout brought: complete trajectories, ordered by (group, member)."""

    trajectories: list[Trajectory]
    restarts: int
    dropped_groups: tuple[int, ...]
    last_failure: str


class Collector:
    """Plays episodes with one policy on one rank's slots.

    Args:
        env: simulators.
        policy: chooses actions.
        num_slots: of `env`.
        batch_size: rows of every inference call.
        max_restarts: simulator failures of one rollout after which a failing episode's group
            is dropped.
        should_stop: asked all the time; a rollout that is stopped returns what has finished.

    `on_finished` is called with each finished trajectory.
    """

    def __init__(
        self,
        env: Environment,
        policy: Policy,
        *,
        num_slots: int,
        batch_size: int,
        max_restarts: int,
        should_stop: Callable[[], bool],
    ) -> None:
        self._env, self._policy = env, policy
        self._num_slots, self._batch_size = num_slots, batch_size
        self._max_restarts = max_restarts
        self._should_stop = should_stop
        self.on_finished: Callable[[Trajectory], None] | None = None
        self._last_task: dict[int, int] = {}

    def collect(
        self, episodes: Sequence[Episode], mode: Sample | Greedy, progress: Progress
    ) -> Collection:
        """Play all episodes and return them in the order of (group, member).

        Args:
            episodes: whole groups.
            mode: how the policy chooses tokens.
            progress: called with (episodes finished, episodes in all), also while nothing finishes.

        Raises:
            TrainingError: the policy or the simulators cannot go on.
            UserError: reported by a simulator.
        """
        rollout = _Rollout(episodes, self._last_task)
        self._fill(rollout)
        while rollout.active and not self._should_stop():
            for event in self._env.wait(1, POLL_SECONDS):
                if event.slot not in rollout.active:
                    continue  # the last sign of life of a group that was dropped
                if event.result is None:
                    self._handle_failure(rollout, event.slot, event.failure)
                else:
                    self._handle_result(rollout, event.slot, event.result)
            # Only now: an event that is still in the list belongs to the episode it was sent for.
            self._fill(rollout)
            self._serve(rollout, mode)
            progress(len(rollout.finished), len(episodes))
        finished = sorted(rollout.finished, key=lambda t: (t.episode.group, t.episode.member))
        return Collection(
            trajectories=finished,
            restarts=rollout.restarts,
            dropped_groups=tuple(sorted(rollout.dropped)),
            last_failure=rollout.last_failure,
        )

    def _fill(self, rollout: _Rollout) -> None:
        """Begin an episode in every slot that is free, as long as there are any."""
        for slot in range(self._num_slots):
            if slot not in rollout.active:
                episode = rollout.next_episode(slot)
                if episode is not None:
                    self._env.begin(slot, episode)

    def _handle_result(self, rollout: _Rollout, slot: int, result: ChunkResult) -> None:
        trajectory = rollout.active[slot]
        if trajectory.observations:
            trajectory.rewards.append(result.rewards)
        if result.observation is not None:
            trajectory.observations.append(result.observation)
            rollout.ready.append(slot)
            return
        trajectory.outcome = result.outcome
        rollout.finish(slot)
        if self.on_finished is not None:
            self.on_finished(trajectory)

    def _handle_failure(self, rollout: _Rollout, slot: int, reason: str) -> None:
        episode = rollout.active[slot].episode
        rollout.restarts += 1
        rollout.last_failure = reason.strip().splitlines()[-1]
        where = f"task {episode.task}, trial {episode.trial}, member {episode.member}"
        if rollout.restarts > self._max_restarts:
            LOG.warning("group of %s dropped, too many failures; slot %d: %s", where, slot, reason)
            rollout.drop_group(episode.group)
        else:
            LOG.warning("episode is redone (%s); slot %d: %s", where, slot, reason)
            rollout.redo(slot)

    def _serve(self, rollout: _Rollout, mode: Sample | Greedy) -> None:
        """Run the policy on all observations that wait, `batch_size` rows at a time."""
        while rollout.ready:
            slots = rollout.ready[: self._batch_size]
            del rollout.ready[: self._batch_size]
            trajectories = [rollout.active[slot] for slot in slots]
            chunks = self._act(trajectories, mode)
            for row, (slot, trajectory) in enumerate(zip(slots, trajectories, strict=True)):
                trajectory.tokens_CKA.append(chunks.tokens_BKA[row])
                trajectory.logprobs_CKA.append(chunks.logprobs_BKA[row])
                trajectory.actions_CKA.append(chunks.actions_BKA[row])
                if chunks.values_BK is not None:
                    trajectory.values_CK.append(chunks.values_BK[row])
                self._env.advance(slot, chunks.actions_BKA[row])

    def _act(self, trajectories: Sequence[Trajectory], mode: Sample | Greedy) -> ActionChunks:
        padding = [trajectories[-1]] * (self._batch_size - len(trajectories))
        rows = [*trajectories, *padding]
        keys = [make_key(t.episode.seed, len(t.tokens_CKA)) for t in rows]
        chunks = self._policy.act(
            stack_observations([t.observations[-1] for t in rows]), mode, keys
        )
        if not np.isfinite(chunks.actions_BKA[: len(trajectories)]).all():
            raise TrainingError(
                "the policy returned actions that are not finite",
                hint="weights or checkpoint are damaged: resume from an earlier checkpoint",
            )
        return chunks


class _Rollout:
    """Who plays what, in one call of `collect`."""

    def __init__(self, episodes: Sequence[Episode], last_task: dict[int, int]) -> None:
        self.queue = EpisodeQueue(episodes)
        self.active: dict[int, Trajectory] = {}
        self.ready: list[int] = []
        self.finished: list[Trajectory] = []
        self.dropped: set[int] = set()
        self.restarts = 0
        self.last_failure = ""
        self._last_task = last_task

    def next_episode(self, slot: int) -> Episode | None:
        served = [trajectory.episode.task for trajectory in self.active.values()]
        episode = self.queue.take(self._last_task.get(slot), served)
        if episode is not None:
            self._last_task[slot] = episode.task
            self.active[slot] = Trajectory(episode=episode)
        return episode

    def finish(self, slot: int) -> None:
        trajectory = self.active.pop(slot)
        if trajectory.episode.group not in self.dropped:
            self.finished.append(trajectory)

    def redo(self, slot: int) -> None:
        self.queue.put_back(self.active.pop(slot).episode)

    def drop_group(self, group: int) -> None:
        """Forget a group: members that wait, play or have played."""
        self.dropped.add(group)
        self.queue.drop_group(group)
        self.finished = [t for t in self.finished if t.episode.group != group]
        members = [slot for slot, t in self.active.items() if t.episode.group == group]
        for slot in members:
            del self.active[slot]
        self.ready = [slot for slot in self.ready if slot not in members]


def stack_observations(observations: Sequence[Observation]) -> ObservationBatch:
    """Observations of equal shapes as one batch."""
    cameras = observations[0].images
    return ObservationBatch(
        images={name: np.stack([o.images[name] for o in observations]) for name in cameras},
        state=np.stack([o.state for o in observations]),
        instructions=tuple(o.instruction for o in observations),
    )
