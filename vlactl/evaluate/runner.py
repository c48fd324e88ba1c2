"""Playing evaluation episodes and writing each one down, so that nothing is played twice."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlactl.api.contracts import Episode, Greedy, Sample, Task
from vlactl.distributed.roles import World
from vlactl.errors import TrainingError
from vlactl.evaluate.results import (
    EVAL_SUMMARY,
    REDONE_EPISODES,
    EpisodeJournal,
    EpisodeResult,
    add_redone,
    merge_journals,
    read_results,
    save_actions,
    summarise,
)
from vlactl.launch.status import StopFlag
from vlactl.report.atomic import write_json
from vlactl.rollout.collect import Progress, Request, Roller, StopRequested, Trajectory
from vlactl.rollout.episodes import deal


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


def prune_recordings(directory: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` folders of recorded episodes."""
    for old in sorted(directory.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def forget_recordings(directory: Path, first_step: int) -> None:
    """Remove recorded episodes of steps that a resumed run will play again."""
    for folder in directory.glob("step-*"):
        if int(folder.name.rpartition("-")[2]) >= first_step:
            shutil.rmtree(folder)


@dataclass(slots=True, kw_only=True)
class Evaluator:
    """Plays a fixed list of episodes and sums them up.

    Attributes:
        roller: what this rank does in a rollout; None = nothing.
        env_processes: rank of each env process, which share the episodes.
        episodes: of all ranks.
        tasks: of the environment.
        mode: how the policy chooses tokens.
        world: the ranks.
        stop: whether the job was asked to end.
        header: what eval.json says beside the results.
    """

    roller: Roller | None
    env_processes: Sequence[int]
    episodes: Sequence[Episode]
    tasks: Sequence[Task]
    mode: Sample | Greedy
    world: World
    stop: StopFlag
    header: dict[str, Any]

    def run(self, directory: Path, version: int, progress: Progress) -> dict[str, float]:
        """Play what `directory` does not hold yet, write eval.json, return `eval/...` metrics.

        Args:
            directory: of the evaluation.
            version: of the weights that are to act.
            progress: called with (episodes finished, episodes in all) of this rank.

        Raises:
            StopRequested: before all was played; the same directory continues it.
            TrainingError: episodes are missing because their simulators kept failing.
        """
        everyone = self.world.everyone
        known = {result.key for result in read_results(directory)}
        everyone.barrier()  # everybody has read before anybody writes
        todo = [e for e in self.episodes if (e.task, e.trial, e.member) not in known]
        faults = everyone.gather(self._play(directory, todo, version, progress))
        restarts = sum(number for number, _ in faults)
        redone = add_redone(directory, restarts) if self.world.is_main else 0
        if everyone.any(self.stop.requested):
            raise StopRequested
        results = self._complete(directory, next((why for _, why in faults if why), ""))
        summary = summarise(results, self.tasks)
        everyone.barrier()  # everybody has read what is merged now
        if self.world.is_main:
            merge_journals(directory)
            # In training the version of the weights is the number of finished steps.
            policy = {"step": version} | self.header["policy"]
            header = self.header | {"policy": policy, REDONE_EPISODES: redone}
            write_json(directory / EVAL_SUMMARY, header | summary)
        total = summary["total"]
        return {
            "eval/success_once": total["rate"],
            "eval/num_trajectories": float(total["trials"]),
        }

    def _play(
        self, directory: Path, todo: Sequence[Episode], version: int, progress: Progress
    ) -> tuple[int, str]:
        """This rank's share; returns how many episodes were redone, and why the last one was."""
        if self.roller is None:
            return 0, ""
        mine = deal(todo, self.world.rank, self.env_processes)
        if self.world.env.is_member:
            recorder = Recorder(directory, self.world.rank, durable=True)

            def write_down(trajectory: Trajectory) -> None:
                recorder.record(trajectory, trajectory.episode.member)
                trajectory.observations.clear()  # of thousands, the pictures would be too many

            self.roller.on_finished = write_down
        request = Request(episodes=mine, mode=self.mode, version=version)
        collection = self.roller.collect(request, progress)
        return collection.restarts, collection.last_failure

    def _complete(self, directory: Path, last_failure: str) -> list[EpisodeResult]:
        wanted = {(e.task, e.trial, e.member) for e in self.episodes}
        results = [result for result in read_results(directory) if result.key in wanted]
        if missing := len(wanted) - len(results):
            others = f"; {directory} keeps the other episodes" if results else ""
            raise TrainingError(
                f"{missing} of {len(wanted)} episodes could not be played, simulators kept "
                f"failing: {last_failure}",
                hint=f"all reasons are in the rank logs{others}",
            )
        return results


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
