"""Runs a job to its end: starts torchrun, watches, restarts, stops it, and explains failures.

The supervisor computes nothing and holds no GPU. It learns from `run_dir/status/` where every rank
is, and ends in one of four ways: an exit code (finished, preempted, interrupted) or a `UserError`
that names rank, phase, step and log. In all of them every process of the job is gone.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from vlactl.config.run import RunConfig
from vlactl.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_PREEMPTED, TrainingError, UserError
from vlactl.hub.manifest import newest_checkpoint
from vlactl.launch.plan import Plan
from vlactl.launch.processes import ProcessTree, process_tree, send_signal
from vlactl.launch.progress import EVALUATION, MetricsTail, Progress
from vlactl.launch.status import (
    LOG_DIR_VARIABLE,
    SUPERVISOR_VARIABLE,
    Beat,
    Failure,
    clear_status,
    read_failures,
    read_heartbeats,
    read_result,
)
from vlactl.launch.torchrun import WORKER_MODULE, Job, first_death, torchrun_command

LOGS = "logs"
LAUNCHER_LOG = "launcher.log"
_EXIT_CODES = {"finished": EXIT_OK, "preempted": EXIT_PREEMPTED}
_POLL_SECONDS = 0.2
_START_SECONDS = 60.0
_GRACE_SECONDS = 10.0
_IMPATIENCE_SECONDS = 5.0
_DUMP_SECONDS = 1.0


@dataclass(slots=True)
class StopRequests:
    """What signals have asked the supervisor for."""

    terminated_at: float | None = None
    interrupted: bool = False
    at_once: bool = False

    def on_terminate(self, _number: int, _frame: FrameType | None) -> None:
        """Ask for a checkpoint and an end; a second time within seconds, for an end."""
        now = time.monotonic()
        if self.terminated_at is None:
            self.terminated_at = now
        elif now - self.terminated_at < _IMPATIENCE_SECONDS:
            self.at_once = True

    def on_interrupt(self, _number: int, _frame: FrameType | None) -> None:
        """Ask for an end."""
        self.interrupted = True


@dataclass(frozen=True, slots=True)
class _Attempt:
    """How one start of the job ended: with an exit code, or with an error."""

    exit_code: int = EXIT_OK
    error: UserError | None = None
    retry: bool = False


@dataclass(slots=True, kw_only=True)
class _Supervisor:
    run_dir: Path
    plan: Plan
    job: Job
    config: RunConfig
    progress: Progress
    worker_module: str
    stop: StopRequests
    log_dir: Path = field(init=False)

    def run(self) -> int:
        """Attempt after attempt, until one ends well or there is no sense in another."""
        metrics = MetricsTail(self.run_dir)
        fruitless, last_error = 0, ""
        while True:
            before = self._saved_step()
            attempt = self._attempt(metrics)
            if attempt.error is None:
                return attempt.exit_code
            error = attempt.error
            after = self._saved_step()
            fruitless = 0 if after > before else fruitless + 1
            repeated = after == before and error.message == last_error
            last_error = error.message
            if not attempt.retry or repeated or fruitless > self.config.train.max_restarts:
                raise error
            self.progress.note(f"{error.message}; starting again after step {after}")

    def _attempt(self, metrics: MetricsTail) -> _Attempt:
        clear_status(self.run_dir)
        self.log_dir = _next_log_dir(self.run_dir)
        command = torchrun_command(
            self.plan.world_size, self.run_dir, self.job, worker_module=self.worker_module
        )
        with process_tree(
            command, self._variables(), self.log_dir / LAUNCHER_LOG, grace=_GRACE_SECONDS
        ) as tree:
            attempt = self._watch(tree, metrics)
            if self.stop.at_once:
                tree.end(0.0)
        self._show(metrics)
        return attempt or self._judge(tree.exit_code() or 0)

    def _watch(self, tree: ProcessTree, metrics: MetricsTail) -> _Attempt | None:
        """Follow the job; None when it ended by itself."""
        pulse, beats = time.monotonic(), read_heartbeats(self.run_dir)
        told: set[int] = set()
        while tree.exit_code() is None:
            time.sleep(_POLL_SECONDS)
            now, latest = time.monotonic(), self._show(metrics)
            if latest != beats:
                pulse, beats = now, latest
            if self.stop.interrupted:
                return _Attempt(EXIT_INTERRUPTED)
            if self.stop.at_once:
                return _Attempt(error=TrainingError("stopped at once: nothing was saved"))
            if self.stop.terminated_at is not None:
                _ask_to_stop(tree, told)
                if now - self.stop.terminated_at > self.config.checkpoint.max_seconds:
                    return _Attempt(error=self._overdue())
            if now - pulse > self._patience(beats):
                return _Attempt(error=self._hung(tree, beats), retry=True)
        return None

    def _patience(self, beats: list[Beat]) -> float:
        """Seconds without news that are no reason to worry; starting processes takes some."""
        timeout = self.config.train.hang_timeout
        return timeout if beats else max(timeout, _START_SECONDS)

    def _show(self, metrics: MetricsTail) -> list[Beat]:
        beats = read_heartbeats(self.run_dir)
        self.progress.beats(beats)
        for values in metrics.new():
            self.progress.step(values)
        return beats

    def _judge(self, exit_code: int) -> _Attempt:
        """How a job ended that nobody ended."""
        result = read_result(self.run_dir)
        # After SIGTERM torchrun fails even when every worker saved and left in peace.
        if result == "preempted" or (result == "finished" and exit_code == 0):
            return _Attempt(_EXIT_CODES[result])
        if self.stop.terminated_at is not None:
            if all(beat.phase == "start" for beat in read_heartbeats(self.run_dir)):
                return _Attempt(EXIT_PREEMPTED)  # nothing had begun, so nothing is lost
            return _Attempt(error=self._failure("stopped before anything could be saved"))
        failures = read_failures(self.run_dir)
        if failures and (error := self._told(failures[0])):
            return _Attempt(error=error)
        # Where no rank got as far as a heartbeat, another start would end the same way.
        retry = bool(read_heartbeats(self.run_dir))
        death = first_death((self.log_dir / LAUNCHER_LOG).read_text(errors="replace"))
        if death and death.exit_code < 0:
            return _Attempt(error=self._killed(death.rank, -death.exit_code), retry=retry)
        if failures:
            return _Attempt(error=self._crashed(failures[0]), retry=retry)
        place = f"rank {death.rank}{self._where(death.rank)}" if death else "torchrun"
        code = death.exit_code if death else exit_code
        error = self._failure(f"{place} left with exit code {code}", death.rank if death else None)
        return _Attempt(error=error, retry=retry)

    def _told(self, failure: Failure) -> UserError | None:
        """What a worker found that the user can fix; where a run failed, with the place."""
        if failure.kind == "OutOfMemoryError":
            return self._crashed(
                failure,
                "lower optim.micro_batch_size, rollout.batch_size or env.num_envs, in this order",
            )
        error = failure.user_error()
        if isinstance(error, TrainingError):
            place = f"rank {failure.rank} in {self._activity(failure)}"
            return self._failure(f"{place}: {error.message}", failure.rank, error.hint)
        return error

    def _crashed(self, failure: Failure, advice: str = "") -> TrainingError:
        place = f"rank {failure.rank} failed in {self._activity(failure)}"
        return self._failure(f"{place}: {failure.kind}: {failure.message}", failure.rank, advice)

    def _killed(self, rank: int, number: int) -> TrainingError:
        name = signal.Signals(number).name
        text = f"rank {rank} was killed by {name}{self._where(rank)}"
        advice = "out of memory? the kernel kills the largest process" if name == "SIGKILL" else ""
        return self._failure(text, rank, advice)

    def _hung(self, tree: ProcessTree, beats: list[Beat]) -> TrainingError:
        """Have all ranks write their stacks, one after the other, and end them."""
        for worker in tree.children():
            send_signal(worker, signal.SIGUSR1)
            time.sleep(_DUMP_SECONDS)
        tree.end(0.0)
        places = ", ".join(f"rank {beat.rank}{self._where(beat.rank)}" for beat in beats)
        places = places or "the workers never started"
        text = f"no sign of life for {self._patience(beats):g} s: {places}"
        return self._failure(text, advice=f"stacks of all threads are in {self.log_dir}")

    def _overdue(self) -> TrainingError:
        seconds = self.config.checkpoint.max_seconds
        return self._failure(
            f"stopped: no checkpoint within {seconds:g} s of SIGTERM",
            advice="raise checkpoint.max_seconds if a step takes longer than that",
        )

    def _where(self, rank: int) -> str:
        for beat in read_heartbeats(self.run_dir):
            if beat.rank == rank:
                return f" in {self._activity(beat)}"
        return " before it reported anything"

    def _activity(self, where: Beat | Failure) -> str:
        """What a rank was doing; an evaluation by itself has no steps."""
        if self.job == "train":
            return f"{where.phase} of step {where.step + 1}"
        return "evaluation" if where.phase == EVALUATION else f"{where.phase} of the evaluation"

    def _failure(self, text: str, rank: int | None = None, advice: str = "") -> TrainingError:
        log = self.log_dir / f"rank-{rank}.log"
        hints = [advice, f"log: {log if log.exists() else self.log_dir / LAUNCHER_LOG}"]
        if self.job == "train" and (step := self._saved_step()):
            hints.append(f"go on after step {step}: vlactl train --resume {self.run_dir}")
        return TrainingError(text, hint="\n".join(filter(None, hints)))

    def _saved_step(self) -> int:
        path, _ = newest_checkpoint(self.run_dir)
        return int(path.name.rpartition("-")[2]) if path else 0

    def _variables(self) -> dict[str, str]:
        # torchrun kills workers this long after it was told to stop; by default too soon to save.
        timeout = str(int(self.config.checkpoint.max_seconds))
        return {
            **self.plan.environment,
            "PYTHONUNBUFFERED": "1",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": timeout,
            LOG_DIR_VARIABLE: str(self.log_dir.absolute()),
            SUPERVISOR_VARIABLE: str(os.getpid()),
        }


def supervise(
    run_dir: Path,
    plan: Plan,
    job: Job,
    *,
    config: RunConfig,
    progress: Progress,
    worker_module: str = WORKER_MODULE,
) -> int:
    """Run a job and return the exit code: 0 finished, 75 preempted and saved, 130 interrupted.

    Raises:
        TrainingError: the job failed and more restarts would not help.
        UserError: what a worker said that the user can fix, as the worker said it.
    """
    with _stop_requests() as stop:
        supervisor = _Supervisor(
            run_dir=run_dir,
            plan=plan,
            job=job,
            config=config,
            progress=progress,
            worker_module=worker_module,
            stop=stop,
        )
        try:
            return supervisor.run()
        finally:
            progress.close()


@contextmanager
def _stop_requests() -> Iterator[StopRequests]:
    """Turn SIGTERM and SIGINT into requests as long as a job runs."""
    stop = StopRequests()
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, stop.on_terminate),
        signal.SIGINT: signal.signal(signal.SIGINT, stop.on_interrupt),
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ask_to_stop(tree: ProcessTree, told: set[int]) -> None:
    """Forward SIGTERM to workers, once each: not to torchrun, which would fail the job."""
    for worker in tree.children():
        if worker.pid not in told:
            told.add(worker.pid)
            send_signal(worker, signal.SIGTERM)


def _next_log_dir(run_dir: Path) -> Path:
    """A new folder per attempt, so that a restart never overwrites what explains it."""
    logs = run_dir / LOGS
    numbers = [int(path.name.rpartition("-")[2]) for path in logs.glob("attempt-*")]
    log_dir = logs / f"attempt-{max(numbers, default=0) + 1}"
    log_dir.mkdir(parents=True)
    return log_dir
