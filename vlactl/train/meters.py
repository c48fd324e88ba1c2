"""Seconds of phases and averages over micro-batches and ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from vlactl.api.contracts import Advantages, TrajectoryBatch
from vlactl.distributed.roles import Ranks
from vlactl.rollout.collect import Collection, Trajectory
from vlactl.rollout.episodes import TASK_SUCCESS

LARGE_PHASES = ("sync_weights", "generate_rollouts", "actor_training")
"""Of which the peak of allocated GPU memory is worth knowing."""


class Timer:
    """Seconds spent in named phases of one step, and the most GPU memory in the large ones.

    `time/...` and `memory/...` are those of the worst rank; a rank may lack phases of others.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._values: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        is_large = phase in LARGE_PHASES and self._device.type == "cuda"
        if is_large:
            torch.cuda.reset_peak_memory_stats(self._device)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - start)
            if is_large:
                peak = torch.cuda.max_memory_allocated(self._device) / 2**30
                self._values[f"memory/{phase}_gib"] = peak

    def add(self, phase: str, seconds: float) -> None:
        """Add seconds that something else has measured."""
        name = f"time/{phase}"
        self._values[name] = self._values.get(name, 0.0) + seconds

    def reduced(self, ranks: Ranks) -> dict[str, float]:
        """The largest values of all ranks."""
        worst: dict[str, float] = {}
        for values in ranks.gather(self._values):
            for name, value in values.items():
                worst[name] = max(value, worst.get(name, value))
        return worst


class Averages:
    """Means of (sum, count) pairs that micro-batches and ranks add to."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, value: float, count: float = 1.0) -> None:
        """Add a sum over `count` entries."""
        total, number = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (total + value, number + count)

    def add_terms(self, metrics: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Add what `Algorithm.loss` reports."""
        for name, (value, count) in metrics.items():
            self.add(name, float(value), float(count))

    def reduced(self, ranks: Ranks) -> dict[str, float]:
        """Means over all ranks; a rank may lack names that others have."""
        merged = Averages()
        for sums in ranks.gather(self._sums):
            for name, (value, count) in sums.items():
                merged.add(name, value, count)
        return {name: value / count for name, (value, count) in merged._sums.items() if count}


class RolloutTally:
    """How the episodes of a step went, those that were replaced included.

    Of a lane only the first episode is measured: it alone has the whole horizon. Of those behind it
    the slow ones are cut, and what is left would look too good.
    """

    def __init__(self) -> None:
        self.last_failure = ""
        self._episodes: list[dict[str, float]] = []
        self._num_finished = 0
        self._counts = np.zeros(3)

    def add(self, collection: Collection, *, num_replaced: int = 0) -> list[Trajectory]:
        """Add a round of episodes, and return its trajectories."""
        self.last_failure = collection.last_failure or self.last_failure
        finished = [t for t in collection.trajectories if t.outcome]
        self._num_finished += len(finished)
        self._episodes += [_episode_row(t) for t in finished if t.first_chunk == 0]
        self._counts += [len(collection.dropped_groups), collection.restarts, num_replaced]
        return collection.trajectories

    def reduced(self, ranks: Ranks) -> dict[str, float]:
        """`env/...` over all ranks."""
        dropped, restarts, replaced = np.sum(ranks.gather(self._counts), axis=0).tolist()
        episodes = [row for rank in ranks.gather(self._episodes) for row in rank]
        return _episode_metrics(episodes) | {
            "env/num_trajectories": float(sum(ranks.gather(self._num_finished))),
            "env/dropped_groups": dropped,
            "env/restarts": restarts,
            "env/replaced_groups": replaced,
        }


def _episode_metrics(episodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over episodes, and over those of each task."""
    metrics: dict[str, float] = {}
    if not episodes:
        return metrics
    for name in ("success_once", "success_at_end", "return", "episode_len", "reward"):
        metrics[f"env/{name}"] = float(np.mean([row[name] for row in episodes]))
    for task in sorted({row["task"] for row in episodes}):
        of_task = [row["success_once"] for row in episodes if row["task"] == task]
        metrics[f"{TASK_SUCCESS}{task:.0f}"] = float(np.mean(of_task))
    return metrics


def _episode_row(trajectory: Trajectory) -> dict[str, float]:
    if trajectory.outcome is None:
        raise ValueError("an unfinished trajectory has no metrics")
    outcome = trajectory.outcome
    counted = outcome.success_step or outcome.num_steps  # what follows a success is not counted
    total = float(np.concatenate(trajectory.rewards)[:counted].sum())
    return {
        "task": float(trajectory.episode.task),
        "success_once": float(outcome.success),
        "success_at_end": float(outcome.success_at_end),
        "return": total,
        "episode_len": float(outcome.num_steps),
        "reward": total / counted,
    }


def rollout_metrics(
    batch: TrajectoryBatch, advantages: Advantages, ranks: Ranks
) -> dict[str, float]:
    """`rollout/...`: rewards over valid actions, advantages and returns over trained ones."""
    columns = {
        "rewards": batch.rewards_BCK[batch.valid_BCK],
        "advantages": advantages.advantages_BCK[advantages.mask_BCK],
    }
    if advantages.returns_BCK is not None:
        columns["returns"] = advantages.returns_BCK[advantages.mask_BCK]
    metrics = {f"rollout/{name}": value for name, value in advantages.metrics.items()}
    for name, values in columns.items():
        everything = np.concatenate(ranks.gather(values.numpy()))
        if name == "rewards":
            metrics["rollout/rewards"] = float(everything.mean()) if everything.size else 0.0
            continue
        for statistic in ("mean", "max", "min"):
            reduced = getattr(everything, statistic)() if everything.size else 0.0
            metrics[f"rollout/{name}_{statistic}"] = float(reduced)
    return metrics
