"""Runs a job to its end: starts torchrun, watches, restarts, stops it, and explains failures.

The supervisor computes nothing and holds no GPU. It learns from `run_dir/status/` where every rank
is, and ends in one of four ways: an exit code (finished, preempted, interrupted) or a `UserError`
that names rank, phase, step and log. In all of them every process of the job is gone.

Of several machines, node 0 supervises; what happens on the others is in `vlactl.launch.follow`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from vlactl.config.run import RunConfig
from vlactl.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_PREEMPTED, TrainingError, UserError
from vlactl.launch.hangs import START, Hang, HangWatch, Patience
from vlactl.launch.localjob import GRACE_SECONDS, LocalJob, local_job
from vlactl.launch.network import ALONE, Cluster, find_port
from vlactl.launch.nodes import Followers, Told, leading
from vlactl.launch.plan import Plan
from vlactl.launch.progress import MetricsTail, Progress
from vlactl.launch.status import (
    LOG_DIR_VARIABLE,
    SUPERVISOR_VARIABLE,
    Beat,
    clear_status,
    read_failures,
    read_heartbeats,
    read_result,
)
from vlactl.launch.stops import StopRequests, stop_requests
from vlactl.launch.torchrun import WORKER_MODULE, Death, Job, torchrun_command
from vlactl.launch.verdict import LAUNCHER_LOG, Verdict, saved_step

LOGS = "logs"
_EXIT_CODES = {"finished": EXIT_OK, "preempted": EXIT_PREEMPTED}
_POLL_SECONDS = 0.2
_LOOK_SECONDS = 1.0


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
    cluster: Cluster
    followers: Followers
    verdict: Verdict = field(init=False)
    beats: list[Beat] = field(init=False)

    def run(self) -> int:
        """Attempt after attempt, until one ends well or there is no sense in another.

        There is none after two in a row that saved nothing and ended in the same step.
        """
        metrics = MetricsTail(self.run_dir)
        number, fruitless, last_reached = 0, 0, -1
        while True:
            before = saved_step(self.run_dir)
            attempt = self._attempt(number, metrics)
            if attempt.error is None:
                return attempt.exit_code
            error = attempt.error
            after = saved_step(self.run_dir)
            reached = max((beat.step for beat in self.beats), default=0)
            fruitless = 0 if after > before else fruitless + 1
            again = fruitless > 1 and reached == last_reached
            number, last_reached = number + 1, reached
            if not attempt.retry or again or fruitless > self.config.train.max_restarts:
                raise error
            self.progress.note(f"{error.message}; starting again after step {after}")

    def _attempt(self, number: int, metrics: MetricsTail) -> _Attempt:
        self.beats = []
        self.followers.gather(self.stop)
        if asked := self._asked():
            return asked
        clear_status(self.run_dir)
        log_dir = _next_log_dir(self.run_dir)
        self.verdict = Verdict(
            run_dir=self.run_dir, job=self.job, log_dir=log_dir, cluster=self.cluster
        )
        port = find_port(self.cluster, number)
        self.followers.start(number, port, log_dir)
        command = job_command(
            self.plan,
            self.cluster,
            port,
            run_dir=self.run_dir,
            job=self.job,
            worker_module=self.worker_module,
        )
        variables = job_variables(self.plan, self.config, self.cluster, log_dir)
        with local_job(command, variables, log_dir / LAUNCHER_LOG) as local:
            attempt = self._watch(local, metrics)
            death = local.death()
            self.followers.over(grace=0.0 if self.stop.at_once else GRACE_SECONDS)
            if self.stop.at_once:
                local.end(0.0)
        lost = self.followers.wait_for_all()
        self._show(metrics)
        if attempt is None and lost:
            attempt = _Attempt(error=self.verdict.lost(lost, self._ranks_per_node))
        return attempt or self._judge(death, local.exit_code() or 0)

    @property
    def _ranks_per_node(self) -> int:
        return self.plan.world_size // self.cluster.nnodes

    def _asked(self) -> _Attempt | None:
        """What follows from a signal that came while nothing ran."""
        if self.stop.interrupted:
            return _Attempt(EXIT_INTERRUPTED)
        return None if self.stop.terminated_at is None else _Attempt(EXIT_PREEMPTED)

    def _watch(self, local: LocalJob, metrics: MetricsTail) -> _Attempt | None:
        """Follow the job; None when it ended by itself."""
        timeout, saving = self.config.train.hang_timeout, self.config.checkpoint.max_seconds
        hangs = HangWatch(self.plan.world_size, Patience(hang_timeout=timeout, saving=saving))
        looked = -_LOOK_SECONDS
        while local.exit_code() is None or self.followers.are_running():
            time.sleep(_POLL_SECONDS)
            if ending := self._ending(local):
                return ending
            if time.monotonic() - looked < _LOOK_SECONDS:
                continue
            looked = time.monotonic()
            self._show(metrics)
            self.followers.look(self.stop)
            if lost := self.followers.lost():
                return _Attempt(error=self.verdict.lost(lost, self._ranks_per_node))
            others_failed = bool(read_failures(self.run_dir)) or self.followers.have_failed()
            local.end_survivors(others_failed=others_failed)
            if local.has_failed_long_ago():
                self.followers.over(grace=GRACE_SECONDS)
            elif not local.exit_code() and (hang := hangs.look(self.beats, looked)):
                return self._hung(local, hang)
        return None

    def _ending(self, local: LocalJob) -> _Attempt | None:
        """How the attempt ends that signals have asked to end, if it does so now."""
        if self.stop.interrupted:
            return _Attempt(EXIT_INTERRUPTED)
        if self.stop.at_once:
            return _Attempt(error=TrainingError("stopped at once: nothing was saved"))
        if self.stop.terminated_at is None:
            return None
        local.ask_to_stop()
        seconds = self.config.checkpoint.max_seconds
        if time.monotonic() - self.stop.terminated_at <= seconds:
            return None
        error = self.verdict.failure(
            f"stopped: no checkpoint within {seconds:g} s of SIGTERM",
            advice="raise checkpoint.max_seconds if a step takes longer than that",
        )
        return _Attempt(error=error)

    def _show(self, metrics: MetricsTail) -> None:
        self.beats = read_heartbeats(self.run_dir)
        self.progress.beats(self.beats)
        for values in metrics.new():
            self.progress.step(values)

    def _hung(self, local: LocalJob, hang: Hang) -> _Attempt:
        """Have all ranks write their stacks, and end them."""
        self.followers.over(dump=True)
        local.dump_stacks()
        error = self.verdict.hung(hang)
        local.end(0.0)
        if result := read_result(self.run_dir):
            self.progress.note(f"all is saved, but {error.message}; ended by force")
            return _Attempt(_EXIT_CODES[result])
        return _Attempt(error=error, retry=True)

    def _judge(self, death: Death | None, exit_code: int) -> _Attempt:
        """How a job ended that nobody ended."""
        result = read_result(self.run_dir)
        was_stopped = self.stop.terminated_at is not None
        failed = any([exit_code, *self.followers.exit_codes()])
        # After SIGTERM torchrun fails even when every worker saved and left in peace.
        if result == "preempted" or (result == "finished" and (was_stopped or not failed)):
            return _Attempt(_EXIT_CODES[result])
        if was_stopped and all(beat.phase == START for beat in self.beats):
            return _Attempt(EXIT_PREEMPTED)  # nothing had begun, so nothing is lost
        if was_stopped and not (read_failures(self.run_dir) or death or self.followers.deaths()):
            return _Attempt(error=self.verdict.failure("stopped before anything could be saved"))
        attempt = self._explain(death, exit_code)
        return replace(attempt, retry=False) if was_stopped else attempt

    def _explain(self, death: Death | None, exit_code: int) -> _Attempt:
        """What a job failed of: the most telling of what its ranks and torchruns have said."""
        failures = read_failures(self.run_dir)
        if failures and (error := self.verdict.told(failures[0])):
            return _Attempt(error=error)
        # Where no rank got as far as a heartbeat, another start would end the same way.
        retry = bool(self.beats)
        deaths = [*([death] if death else []), *self.followers.deaths()]
        first = min(deaths, key=lambda each: not each.is_kill, default=None)
        if first and first.is_kill:
            return _Attempt(error=self.verdict.died(first), retry=retry)
        if failures:
            return _Attempt(error=self.verdict.crashed(failures[0]), retry=retry)
        if first:
            return _Attempt(error=self.verdict.died(first), retry=retry)
        code = next(filter(None, [exit_code, *self.followers.exit_codes()]), 0)
        error = self.verdict.failure(f"torchrun left with exit code {code}", advice=self._meeting())
        return _Attempt(error=error, retry=retry)

    def _meeting(self) -> str:
        """What to look at when several torchruns have not come together."""
        if self.cluster.nnodes == 1 or self.beats:
            return ""
        return (
            f"do all nodes reach {self.cluster.host}, ports {self.cluster.port} and up? "
            "a firewall, or the wrong network: see --interface"
        )


def supervise(
    run_dir: Path,
    plan: Plan,
    job: Job,
    *,
    config: RunConfig,
    progress: Progress,
    worker_module: str = WORKER_MODULE,
    cluster: Cluster = ALONE,
) -> int:
    """Run a job and return the exit code: 0 finished, 75 preempted and saved, 130 interrupted.

    Raises:
        TrainingError: the job failed and more restarts would not help.
        UserError: what a worker or another node said that the user can fix, as it was said.
    """
    with stop_requests() as stop, leading(run_dir, cluster) as followers:
        supervisor = _Supervisor(
            run_dir=run_dir,
            plan=plan,
            job=job,
            config=config,
            progress=progress,
            worker_module=worker_module,
            stop=stop,
            cluster=cluster,
            followers=followers,
        )
        try:
            code = supervisor.run()
        finally:
            progress.close()
        followers.end(Told(exit_code=code))
        return code


def job_command(
    plan: Plan,
    cluster: Cluster,
    port: int,
    *,
    run_dir: Path,
    job: Job,
    worker_module: str = WORKER_MODULE,
) -> list[str]:
    """What starts the workers of this machine."""
    return torchrun_command(
        plan.world_size // cluster.nnodes,
        run_dir,
        job,
        worker_module=worker_module,
        rendezvous=cluster.rendezvous(port),
    )


def job_variables(
    plan: Plan, config: RunConfig, cluster: Cluster, log_dir: Path
) -> Mapping[str, str]:
    """Environment of the workers of this machine, beside what it has itself."""
    # torchrun kills workers this long after it was told to stop; by default too soon to save.
    timeout = str(int(config.checkpoint.max_seconds))
    return {
        **plan.environment,
        **cluster.variables(),
        "PYTHONUNBUFFERED": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": timeout,
        LOG_DIR_VARIABLE: str(log_dir.absolute()),
        SUPERVISOR_VARIABLE: str(os.getpid()),
    }


def _next_log_dir(run_dir: Path) -> Path:
    """A new folder per attempt, so that a restart never overwrites what explains it."""
    logs = run_dir / LOGS
    numbers = [int(path.name.rpartition("-")[2]) for path in logs.glob("attempt-*")]
    log_dir = logs / f"attempt-{max(numbers, default=0) + 1}"
    log_dir.mkdir(parents=True)
    return log_dir
