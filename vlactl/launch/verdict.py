"""What went wrong with an attempt, in words that name rank, phase, step and log."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlactl.errors import TrainingError, UserError
from vlactl.hub.manifest import newest_checkpoint
from vlactl.launch.hangs import Hang
from vlactl.launch.network import Cluster
from vlactl.launch.nodes import Report
from vlactl.launch.placement import join_ranges
from vlactl.launch.progress import EVALUATION
from vlactl.launch.status import Beat, Failure, read_heartbeats
from vlactl.launch.torchrun import Death, Job

LAUNCHER_LOG = "launcher.log"
_OUT_OF_MEMORY = "OutOfMemoryError"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Makes errors out of what is known about one attempt; `cluster` = where it ran."""

    run_dir: Path
    job: Job
    log_dir: Path
    cluster: Cluster

    def told(self, failure: Failure) -> UserError | None:
        """What a worker found that the user can fix; where a run failed, with the place."""
        if failure.kind == _OUT_OF_MEMORY:
            peak = f"the rank had {failure.peak_gib:.1f} GiB at most; " if failure.peak_gib else ""
            return self.crashed(
                failure,
                f"{peak}lower optim.micro_batch_size, rollout.batch_size or env.num_envs, "
                "in this order",
            )
        error = failure.user_error()
        if isinstance(error, TrainingError):
            place = f"rank {failure.rank} in {self._activity(failure)}"
            return self.failure(f"{place}: {error.message}", failure.rank, error.hint)
        return error

    def crashed(self, failure: Failure, advice: str = "") -> TrainingError:
        """An exception."""
        place = f"rank {failure.rank} failed in {self._activity(failure)}"
        return self.failure(f"{place}: {failure.kind}: {failure.message}", failure.rank, advice)

    def died(self, death: Death) -> TrainingError:
        """A process that left without a word."""
        rank, where = death.rank, self._where(death.rank)
        if death.exit_code >= 0:
            return self.failure(f"rank {rank}{where} left with exit code {death.exit_code}", rank)
        name = signal.Signals(-death.exit_code).name
        advice = "out of memory? the kernel kills the largest process" if name == "SIGKILL" else ""
        return self.failure(f"rank {rank} was killed by {name}{where}", rank, advice)

    def hung(self, hang: Hang) -> TrainingError:
        """Ranks that do nothing."""
        places = ", ".join(f"rank {rank}{self._where(rank)}" for rank in hang.ranks)
        hints = [hang.advice, f"stacks of all threads are in {self.log_dir}"]
        advice = "\n".join(filter(None, hints))
        return self.failure(f"{places}: {hang.reason}", hang.ranks[0], advice)

    def lost(self, nodes: Sequence[Report], ranks_per_node: int) -> TrainingError:
        """Machines that are not heard of any more."""
        texts = []
        for report in nodes:
            first = report.node * ranks_per_node
            ranks = join_ranges(range(first, first + ranks_per_node))
            texts.append(f"node {report.node} ({report.host}), ranks {ranks}{self._where(first)}")
        return self.failure(f"{', '.join(texts)}: lost", advice="was its launcher killed?")

    def failure(self, text: str, rank: int | None = None, advice: str = "") -> TrainingError:
        """An error with what is known beside it: the log, and where the run can go on."""
        log = self.log_dir / f"rank-{rank}.log"
        hints = [advice, f"log: {log if log.exists() else self.log_dir / LAUNCHER_LOG}"]
        if self.job != "eval" and (step := saved_step(self.run_dir)):
            command = f"vlactl {self.job} --resume {self.run_dir}{self.cluster.options}"
            hints.append(f"go on after step {step}: {command}")
        return TrainingError(text, hint="\n".join(filter(None, hints)))

    def _where(self, rank: int) -> str:
        for beat in read_heartbeats(self.run_dir):
            if beat.rank == rank:
                return f" in {self._activity(beat)}"
        return " before it reported anything"

    def _activity(self, where: Beat | Failure) -> str:
        """What a rank was doing; an evaluation by itself has no steps."""
        if self.job != "eval":
            return f"{where.phase} of step {where.step + 1}"
        return "evaluation" if where.phase == EVALUATION else f"{where.phase} of the evaluation"


def saved_step(run_dir: Path) -> int:
    """Of the newest complete checkpoint; 0 = there is none."""
    path, _ = newest_checkpoint(run_dir)
    return int(path.name.rpartition("-")[2]) if path else 0
