"""Playing evaluation episodes and writing each one down, so that nothing is played twice."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlactl.api.contracts import Episode, Greedy, Sample, Task
from vlactl.distributed.roles import World
from vlactl.evaluate.results import (
    EpisodeJournal,
    EpisodeResult,
    read_results,
    save_actions,
    summarise,
    write_json,
)
from vlactl.rollout.collect import Collector, Progress, Trajectory
from vlactl.rollout.episodes import share_of_rank


class Recorder:
    """Stores result and actions of every finished episode of one rank.

    The actions are all that a film needs: replayed on the same initial state they give the same
    episode.
    """

    def __init__(self, directory: Path, rank: int, *, durable: bool) -> None:
        self._directory, self._durable = directory, durable
        self._journal = EpisodeJournal(directory / f"episodes-{rank}.jsonl", durable=durable)

    def record(self, trajectory: Trajectory, repeat: int) -> None:
        """Write one episode down; `repeat` tells episodes of one (task, trial) apart."""
        result = _result(trajectory, repeat)
        actions_TA = trajectory.executed_actions
        save_actions(self._directory, result, actions_TA, durable=self._durable)
        self._journal.append(result)


def prune_rollouts(directory: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` recorded training rollouts."""
    for old in sorted(directory.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


@dataclass(slots=True, kw_only=True)
class Evaluator:
    """Plays a fixed list of episodes and sums them up.

    Attributes:
        collector: of this rank.
        episodes: of all ranks.
        tasks: of the environment.
        mode: how the policy chooses tokens.
        world: the ranks that share the episodes.
        header: what eval.json says beside the results.
    """

    collector: Collector
    episodes: Sequence[Episode]
    tasks: Sequence[Task]
    mode: Sample | Greedy
    world: World
    header: dict[str, Any]

    def run(self, directory: Path, progress: Progress) -> dict[str, float]:
        """Play what `directory` does not hold yet, write eval.json, return `eval/...` metrics."""
        known = {(r.task, r.trial, r.repeat) for r in read_results(directory)}
        self.world.barrier()  # everybody has read before anybody writes
        todo = [e for e in self.episodes if (e.task, e.trial, e.member) not in known]
        recorder = Recorder(directory, self.world.rank, durable=True)

        def write_down(trajectory: Trajectory) -> None:
            recorder.record(trajectory, trajectory.episode.member)
            trajectory.observations.clear()  # an evaluation of thousands must not keep pictures

        self.collector.on_finished = write_down
        self.collector.collect(
            share_of_rank(todo, self.world.rank, self.world.size), self.mode, progress
        )
        self.world.barrier()
        summary = summarise(self._wanted(read_results(directory)), self.tasks)
        if self.world.is_main:
            write_json(directory / "eval.json", self.header | summary)
        total = summary["total"]
        return {
            "eval/success_once": total["rate"] or 0.0,
            "eval/num_trajectories": float(total["trials"]),
        }

    def _wanted(self, results: Sequence[EpisodeResult]) -> list[EpisodeResult]:
        wanted = {(e.task, e.trial, e.member) for e in self.episodes}
        return [r for r in results if (r.task, r.trial, r.repeat) in wanted]


def _result(trajectory: Trajectory, repeat: int) -> EpisodeResult:
    if trajectory.outcome is None:
        raise ValueError("an unfinished trajectory has no result")
    episode, outcome = trajectory.episode, trajectory.outcome
    return EpisodeResult(
        task=episode.task,
        trial=episode.trial,
        repeat=repeat,
        success=outcome.success,
        num_steps=outcome.num_steps,
        episode_return=trajectory.episode_return,
        seed=episode.seed,
    )
