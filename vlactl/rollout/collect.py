"""Playing a queue of episodes: simulators and policy meet here.

A slot whose episode has ended begins the next one at once; the policy serves whatever is ready.
Every inference call has the same number of rows (short batches are padded), so a row's numbers
depend neither on who else was ready nor on when. Calls may be answered by other ranks, and several
may be under way: simulators play on in the meantime.

A queue may be of lanes: a lane is a row of chunks that is filled with one episode after the other,
and the last one is cut where the row is full.

Shapes: C chunks of a trajectory, K actions of a chunk, A action dimensions.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

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
    Sample,
    SlotEvent,
)
from vlactl.api.noise import make_key
from vlactl.distributed.roles import Ranks
from vlactl.errors import TrainingError
from vlactl.rollout.episodes import EpisodeQueue
from vlactl.rollout.inference import Inference, LocalInference, Query, serve
from vlactl.rollout.spill import Spill

LOG = logging.getLogger(__name__)
POLL_SECONDS = 1.0
Progress = Callable[[int, int], None]


class StopRequested(Exception):  # noqa: N818 - a request, not an error
    """The job was asked to end; all ranks have agreed on it."""


@dataclass(slots=True, kw_only=True)
class Trajectory:
    """One played episode: C observations with what the policy chose, and how it went.

    `outcome` is None while the episode is played, and for good where its lane was full before its
    end.
    """

    episode: Episode
    observations: list[Observation] = field(default_factory=list)
    tokens_CKA: list[np.ndarray] = field(default_factory=list)
    logprobs_CKA: list[np.ndarray] = field(default_factory=list)
    actions_CKA: list[np.ndarray] = field(default_factory=list)
    values_CK: list[np.ndarray] = field(default_factory=list)
    rewards: list[np.ndarray] = field(default_factory=list)
    """One array per chunk, as long as actions were executed."""
    outcome: Outcome | None = None
    first_chunk: int = 0
    """Where in its lane the episode begins."""
    final_value: float = 0.0
    """Of the state after the last action, where it was asked for."""
    version: int = 0
    """Updates that the weights had seen that chose its actions."""

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
class Lanes:
    """Rows that are to be filled with episodes.

    Attributes:
        num_chunks: of a row.
        successor: the episode that follows another one in its row; it has the same group.
    """

    num_chunks: int
    successor: Callable[[Episode], Episode]


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """What a rollout brought: trajectories of complete groups, ordered by (group, member)."""

    trajectories: list[Trajectory]
    restarts: int
    dropped_groups: tuple[int, ...]
    last_failure: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be played, and how.

    Attributes:
        episodes: whole groups.
        mode: how the policy chooses tokens.
        version: of the weights that are to act.
        lanes: each of the episodes begins one; None = each is played alone.
        value_ends: ask the policy for the values of the states that trajectories end in. The
            environment must have been built with `final_observations`.
    """

    episodes: Sequence[Episode]
    mode: Sample | Greedy
    version: int
    lanes: Lanes | None = None
    value_ends: bool = False


class Roller(Protocol):
    """What a rank does in a rollout: it plays episodes, or acts for ranks that do."""

    on_finished: Callable[[Trajectory], None] | None
    """Called with each finished trajectory."""

    def collect(self, request: Request, progress: Progress) -> Collection:
        """Play all episodes and return them in the order of (group, member).

        Args:
            request: what to play.
            progress: called with (episodes finished, episodes in all), also while nothing finishes;
                lanes count as episodes.

        Raises:
            TrainingError: the policy or the simulators cannot go on.
            UserError: reported by a simulator.
        """


class Server:
    """A rank that owns no simulators: its policy acts for others until they have finished.

    Args:
        inference: of this rank.
        clients: ranks that it acts for.
        ranks: that exchange messages.
    """

    def __init__(self, inference: LocalInference, clients: Sequence[int], ranks: Ranks) -> None:
        self._inference, self._clients, self._ranks = inference, clients, ranks
        self.on_finished: Callable[[Trajectory], None] | None = None

    def collect(self, _request: Request, progress: Progress) -> Collection:
        """Serve; there are no episodes of its own."""
        serve(self._inference, self._clients, self._ranks, lambda: progress(0, 0))
        return Collection(trajectories=[], restarts=0, dropped_groups=(), last_failure="")


class Collector:
    """Plays episodes on one rank's slots.

    Args:
        env: simulators.
        inference: chooses actions.
        num_slots: of `env`.
        batch_size: rows of every inference call.
        max_restarts: simulator failures of one rollout after which a failing episode's group
            is dropped.
        should_stop: asked all the time; a rollout that is stopped returns what has finished.
        spill: takes the pictures of trajectories; None = they stay in memory.
    """

    def __init__(
        self,
        env: Environment,
        inference: Inference,
        *,
        num_slots: int,
        batch_size: int,
        max_restarts: int,
        should_stop: Callable[[], bool],
        spill: Spill | None = None,
    ) -> None:
        self._env, self._inference = env, inference
        self._num_slots, self._batch_size = num_slots, batch_size
        self._max_restarts = max_restarts
        self._should_stop = should_stop
        self._spill = spill
        self.on_finished: Callable[[Trajectory], None] | None = None
        self._last_task: dict[int, int] = {}

    def collect(self, request: Request, progress: Progress) -> Collection:
        """Play all episodes; see `Roller`."""
        rollout = _Rollout(request, self._last_task)
        self._fill(rollout)
        while rollout.is_busy and not self._should_stop():
            # There is nothing to wait for while an answer, or a call that can be made, is pending.
            patience = 0.0 if rollout.calls or rollout.has_queries else POLL_SECONDS
            self._handle_events(rollout, self._env.wait(1, patience))
            self._ask(rollout)
            if rollout.calls:
                self._deliver(rollout)
            progress(rollout.num_complete, len(request.episodes))
        while rollout.calls:  # of a rollout that was stopped
            self._deliver(rollout)
        self._inference.finish()
        finished = sorted(rollout.finished, key=lambda t: (t.episode.group, t.episode.member))
        return Collection(
            trajectories=finished,
            restarts=rollout.restarts,
            dropped_groups=tuple(sorted(rollout.dropped)),
            last_failure=rollout.last_failure,
        )

    def _handle_events(self, rollout: _Rollout, events: Sequence[SlotEvent]) -> None:
        for event in events:
            if event.slot not in rollout.active:
                continue  # the last sign of life of a group that was dropped
            if event.result is None:
                self._handle_failure(rollout, event.slot, event.failure)
            else:
                self._handle_result(rollout, event.slot, event.result)
        # Only now: an event that is still in the list belongs to the episode it was sent for.
        self._fill(rollout)

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
        trajectory.outcome = result.outcome
        if result.outcome is None and not rollout.is_full(trajectory):
            assert result.observation is not None, "neither an observation nor an outcome"
            trajectory.observations.append(kept(result.observation, self._spill))
            rollout.ready.append(slot)
            return
        rollout.finish(slot, result.observation)
        if self.on_finished is not None and result.outcome is not None:
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

    def _ask(self, rollout: _Rollout) -> None:
        """Begin calls for the observations that wait, `batch_size` rows each."""
        while rollout.has_queries and len(rollout.calls) < self._inference.capacity:
            queries = rollout.take_queries(self._batch_size)
            rows = [*queries, *[queries[-1]] * (self._batch_size - len(queries))]
            keys = [
                make_key(r.trajectory.episode.seed, len(r.trajectory.actions_CKA)) for r in rows
            ]
            batch = stack_observations([row.observation for row in rows])
            wanted = rollout.request
            self._inference.submit(
                Query(batch=batch, mode=wanted.mode, noise_keys=keys, version=wanted.version)
            )
            rollout.calls.append(queries)

    def _deliver(self, rollout: _Rollout) -> None:
        """Wait for the oldest call, and let its episodes go on."""
        queries, chunks = rollout.calls.popleft(), self._inference.take()
        numbers = (chunks.actions_BKA, chunks.logprobs_BKA, chunks.values_BK)
        if not all(np.isfinite(n[: len(queries)]).all() for n in numbers if n is not None):
            raise TrainingError(
                "the policy returned numbers that are not finite",
                hint="weights or checkpoint are damaged: resume from an earlier checkpoint",
            )
        for row, query in enumerate(queries):
            if query.slot is None:
                query.trajectory.final_value = _first_value(chunks, row)
            elif rollout.active.get(query.slot) is query.trajectory:  # it has not failed since
                _append(query.trajectory, chunks, row)
                self._env.advance(query.slot, chunks.actions_BKA[row])


def _append(trajectory: Trajectory, chunks: ActionChunks, row: int) -> None:
    trajectory.actions_CKA.append(chunks.actions_BKA[row])
    if chunks.tokens_BKA is not None and chunks.logprobs_BKA is not None:
        trajectory.tokens_CKA.append(chunks.tokens_BKA[row])
        trajectory.logprobs_CKA.append(chunks.logprobs_BKA[row])
    if chunks.values_BK is not None:
        trajectory.values_CK.append(chunks.values_BK[row])


def _first_value(chunks: ActionChunks, row: int) -> float:
    if chunks.values_BK is None:
        raise TrainingError("the policy has no value head, but the algorithm needs values")
    return float(chunks.values_BK[row, 0])


class _Waiting(NamedTuple):
    """An observation that waits for the policy; `slot` is None where its episode has ended."""

    trajectory: Trajectory
    observation: Observation
    slot: int | None


class _Rollout:
    """Who plays what, in one call of `collect`."""

    def __init__(self, request: Request, last_task: dict[int, int]) -> None:
        self.request = request
        self.queue = EpisodeQueue(request.episodes)
        self.active: dict[int, Trajectory] = {}
        self.ready: list[int] = []
        self.calls: deque[list[_Waiting]] = deque()
        """Observations that are with the policy, oldest call first."""
        self.finished: list[Trajectory] = []
        self.dropped: set[int] = set()
        self.num_complete = 0
        """Lanes that are full, or episodes without lanes."""
        self.restarts = 0
        self.last_failure = ""
        self._last_task = last_task
        self._ends: list[_Waiting] = []
        self._first_chunks: dict[Episode, int] = {}

    def next_episode(self, slot: int) -> Episode | None:
        served = [trajectory.episode.task for trajectory in self.active.values()]
        episode = self.queue.take(self._last_task.get(slot), served)
        if episode is not None:
            self._last_task[slot] = episode.task
            first_chunk = self._first_chunks.get(episode, 0)
            self.active[slot] = Trajectory(
                episode=episode, first_chunk=first_chunk, version=self.request.version
            )
        return episode

    @property
    def has_queries(self) -> bool:
        """Whether an observation waits for the policy."""
        return bool(self.ready or self._ends)

    @property
    def is_busy(self) -> bool:
        """Whether anything is yet to come."""
        return bool(self.active or self.calls or self.has_queries)

    def take_queries(self, count: int) -> list[_Waiting]:
        """Up to `count` observations; those that an episode waits for come first."""
        slots = self.ready[:count]
        del self.ready[:count]
        queries = [_Waiting(self.active[s], self.active[s].observations[-1], s) for s in slots]
        num_ends = count - len(queries)
        queries += self._ends[:num_ends]
        del self._ends[:num_ends]
        return queries

    def is_full(self, trajectory: Trajectory) -> bool:
        """Whether nothing fits into the trajectory's lane any more."""
        if self.request.lanes is None:
            return False
        return trajectory.first_chunk + len(trajectory.rewards) >= self.request.lanes.num_chunks

    def finish(self, slot: int, last_observation: Observation | None) -> None:
        trajectory = self.active.pop(slot)
        self.finished.append(trajectory)
        if self.request.value_ends:
            if last_observation is None:
                raise TrainingError("the environment does not observe the ends of episodes")
            self._ends.append(_Waiting(trajectory, last_observation, None))
        if self.request.lanes is None or self.is_full(trajectory):
            self.num_complete += 1
        else:
            successor = self.request.lanes.successor(trajectory.episode)
            self._first_chunks[successor] = trajectory.first_chunk + len(trajectory.rewards)
            self.queue.put_back(successor)

    def redo(self, slot: int) -> None:
        self.queue.put_back(self.active.pop(slot).episode)
        self.ready = [other for other in self.ready if other != slot]

    def drop_group(self, group: int) -> None:
        """Forget a group: members that wait, play or have played."""
        self.dropped.add(group)
        self.queue.drop_group(group)
        self.finished = [t for t in self.finished if t.episode.group != group]
        self._ends = [query for query in self._ends if query.trajectory.episode.group != group]
        members = [slot for slot, t in self.active.items() if t.episode.group == group]
        for slot in members:
            del self.active[slot]
        self.ready = [slot for slot in self.ready if slot not in members]


def kept(observation: Observation, spill: Spill | None) -> Observation:
    """The same observation, its pictures in files where there is a place for them."""
    if spill is None:
        return observation
    images = {name: spill.keep(image) for name, image in observation.images.items()}
    return replace(observation, images=images)


def stack_observations(observations: Sequence[Observation]) -> ObservationBatch:
    """Observations of equal shapes as one batch."""
    cameras = observations[0].images
    return ObservationBatch(
        images={name: np.stack([o.images[name] for o in observations]) for name in cameras},
        state=np.stack([o.state for o in observations]),
        instructions=tuple(o.instruction for o in observations),
    )
