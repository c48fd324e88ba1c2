"""What a machine other than node 0 does for a job: starts its part of every attempt, and ends it.

It decides nothing: node 0 does, through `run_dir/nodes/leader.json`. What it is asked for, and what
happens here, it reports. In the end it leaves as node 0 does.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vlactl.config.run import RunConfig
from vlactl.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, ConfigError, TrainingError, UserError
from vlactl.launch.localjob import LocalJob, local_job
from vlactl.launch.network import Cluster
from vlactl.launch.nodes import (
    ARRIVAL_SECONDS,
    LEADER,
    NODE,
    NODES,
    POLL_SECONDS,
    Announcement,
    Pulse,
    Report,
    Told,
    read_fresh,
)
from vlactl.launch.plan import Plan
from vlactl.launch.rundir import lock_run, read_run
from vlactl.launch.status import LiveFile, read_failures
from vlactl.launch.stops import StopRequests, stop_requests
from vlactl.launch.supervise import job_command, job_variables
from vlactl.launch.torchrun import WORKER_MODULE

Check = Callable[[RunConfig, Plan], None]


@dataclass(slots=True, kw_only=True)
class _Follower:
    run_dir: Path
    cluster: Cluster
    check: Check
    note: Callable[[str], None]
    worker_module: str
    stop: StopRequests
    seconds: float
    report: Report = field(init=False)
    file: LiveFile = field(init=False)
    pulse: Pulse = field(default_factory=Pulse)

    def run(self) -> int:
        """Take part until node 0 says that the job has ended."""
        self.report = Report(
            node=self.cluster.node_rank, id=uuid.uuid4().hex, host=socket.gethostname()
        )
        self.file = LiveFile(self._folder / NODE, lambda: asdict(self.report))
        self.file.write()
        try:
            return self._follow()
        finally:
            self.file.close()

    def _follow(self) -> int:
        started = time.monotonic()
        while True:
            said = self._listen()
            self._pass_on()
            if said is None:
                if (code := _asked_to_leave(self.stop)) is not None:
                    return code
                if time.monotonic() - started > self.seconds:
                    raise _no_leader(self.run_dir, self.seconds)
            elif said.state == "end" and said.end is not None:
                if error := said.end.error():
                    raise error
                return said.end.exit_code
            else:
                self._serve(said)
            if said is not None:
                started = time.monotonic()
            time.sleep(POLL_SECONDS)

    def _serve(self, said: Announcement) -> None:
        if said.session != self.report.session:
            self._prepare(said)
        if said.key == self.report.key:
            return
        if said.state == "running":
            self._attempt(said)
        elif said.state == "over":  # before this machine had heard of it
            self._say(key=said.key, is_running=False, exit_code=0, death=None)

    def _prepare(self, said: Announcement) -> None:
        """Check that this machine can do its part."""
        try:
            self.check(*read_run(self.run_dir))
        except UserError as error:
            self._say(session=said.session, refusal=Told.of(error))
            raise
        self._say(session=said.session)
        self.note(f"following node 0 on {said.host}")

    def _attempt(self, said: Announcement) -> None:
        """This machine's part of an attempt, until it ends or node 0 says that it is over."""
        config, plan = read_run(self.run_dir)
        log_dir = self.run_dir / said.log_dir
        command = job_command(
            plan,
            self.cluster,
            said.port,
            run_dir=self.run_dir,
            job="train",
            worker_module=self.worker_module,
        )
        variables = job_variables(plan, config, self.cluster, log_dir)
        log = log_dir / f"launcher-{self.cluster.node_rank}.log"
        first_rank = self.cluster.node_rank * (plan.world_size // self.cluster.nnodes)
        with local_job(command, variables, log, first_rank=first_rank) as local:
            self._say(key=said.key, is_running=True, exit_code=0, death=None)
            self._watch(local, said)
            death = local.death()
        self._say(is_running=False, exit_code=local.exit_code() or 0, death=death)

    def _watch(self, local: LocalJob, said: Announcement) -> None:
        while local.exit_code() is None:
            time.sleep(POLL_SECONDS)
            self._pass_on()
            if self.stop.terminated_at is not None:
                local.ask_to_stop()
            local.end_survivors(others_failed=bool(read_failures(self.run_dir)))
            now = self._listen()
            if now is None or (now.key, now.state) == (said.key, "running"):
                continue
            if now.dump:
                local.dump_stacks()
            local.end(now.grace)

    def _pass_on(self) -> None:
        """Tell node 0 what signals have asked for here."""
        if self.stop.at_once:
            self._say(stop="at once")
        elif self.stop.interrupted:
            self._say(stop="interrupt")
        elif self.stop.terminated_at is not None:
            self._say(stop="terminate")

    def _listen(self) -> Announcement | None:
        """What node 0 says to this launch; None as long as it does not know of it.

        Raises:
            TrainingError: it is not heard of any more.
        """
        value = read_fresh(self.run_dir / NODES / LEADER)
        if value is None:
            return None
        said = Announcement.read(value)
        if said.members.get(str(self.cluster.node_rank)) != self.report.id:
            return None
        self.pulse.look(value["alive"])
        if self.pulse.is_lost and said.state != "end":
            raise TrainingError(
                f"node 0 ({said.host}) is not heard of any more",
                hint=f"go on with the run: vlactl train --resume {self.run_dir} on all nodes",
            )
        return said

    def _say(self, **changes: Any) -> None:
        changed = replace(self.report, **changes)
        if changed != self.report:
            self.report = changed
            self.file.write()

    @property
    def _folder(self) -> Path:
        return self.run_dir / NODES / str(self.cluster.node_rank)


def follow(
    run_dir: Path,
    cluster: Cluster,
    *,
    check: Check,
    note: Callable[[str], None],
    worker_module: str = WORKER_MODULE,
    seconds: float = ARRIVAL_SECONDS,
) -> int:
    """Take part in a job that node 0 leads; returns the exit code that node 0 leaves with.

    Args:
        run_dir: of node 0, which makes it.
        cluster: this machine's place.
        check: raises a `UserError` where this machine cannot do its part of a plan.
        note: says something to a person.
        worker_module: what torchrun starts.
        seconds: to wait for node 0.

    Raises:
        UserError: the job failed, node 0 is not there or not any more, or `check` raised it.
    """
    with stop_requests() as stop:
        if (code := _await_folder(run_dir, cluster, stop, note, seconds)) is not None:
            return code
        follower = _Follower(
            run_dir=run_dir,
            cluster=cluster,
            check=check,
            note=note,
            worker_module=worker_module,
            stop=stop,
            seconds=seconds,
        )
        with lock_run(run_dir / NODES / str(cluster.node_rank)):
            return follower.run()


def _await_folder(
    run_dir: Path,
    cluster: Cluster,
    stop: StopRequests,
    note: Callable[[str], None],
    seconds: float,
) -> int | None:
    """Wait until node 0 has made this node's folder; an exit code when it is not to be waited for.

    Raises:
        ConfigError: it does not come.
    """
    folder = run_dir / NODES / str(cluster.node_rank)
    deadline = time.monotonic() + seconds
    note(f"node {cluster.node_rank} of {cluster.nnodes}: waiting for node 0 in {run_dir}")
    while not _is_there(folder):
        if (code := _asked_to_leave(stop)) is not None:
            return code
        if time.monotonic() > deadline:
            raise _no_leader(run_dir, seconds)
        time.sleep(POLL_SECONDS)
    return None


def _is_there(folder: Path) -> bool:
    """Whether a folder exists, asking a network disk about what was not there before."""
    try:
        return folder.name in os.listdir(folder.parent)
    except OSError:
        return False


def _asked_to_leave(stop: StopRequests) -> int | None:
    """What to leave with after a signal, as long as there is no node 0 to ask."""
    if stop.interrupted:
        return EXIT_INTERRUPTED
    return None if stop.terminated_at is None else EXIT_PREEMPTED


def _no_leader(run_dir: Path, seconds: float) -> ConfigError:
    return ConfigError(
        f"node 0 has not come to {run_dir} within {seconds:g} s",
        hint="start the same command there with --node-rank 0; the run directory has to be on a "
        "disk that all nodes share",
    )
