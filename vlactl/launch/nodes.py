"""What the machines of a job tell each other, through small files in `run_dir/nodes/`.

`leader.json`  by node 0: which attempt runs, where torchruns meet; at the end, how it ended
`R/node.json`  by node R: what it runs, how that ended, and what its own person asked for

Both are rewritten every other second, so that a machine that is gone is noticed, and files of an
earlier launch are not taken for news: node 0 believes a file that changes, and others believe node
0 when it names the id that they have written.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vlactl.errors import EXIT_BUG, EXIT_CLASSES, EXIT_OK, ConfigError, TrainingError, UserError
from vlactl.launch.hangs import LIFE_SECONDS
from vlactl.launch.network import Cluster
from vlactl.launch.status import LiveFile, read_small
from vlactl.launch.stops import StopRequests
from vlactl.launch.torchrun import Death

NODES, LEADER, NODE = "nodes", "leader.json", "node.json"
ARRIVAL_SECONDS = 600.0
"""For all nodes to be there."""
POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A `UserError` as it is handed from machine to machine; or an exit code, without a message."""

    exit_code: int
    message: str = ""
    hint: str = ""

    @classmethod
    def of(cls, error: UserError) -> Told:
        """What another machine needs to raise the same error."""
        return cls(exit_code=error.exit_code, message=error.message, hint=error.hint)

    def error(self, message: str = "") -> UserError | None:
        """The error to raise; None where the code is not one of an error."""
        kind = EXIT_CLASSES.get(self.exit_code)
        return kind(message or self.message, hint=self.hint) if kind else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What node 0 says.

    Attributes:
        session: id of this launch of node 0.
        host: its name.
        members: ids that the other nodes have written, by node rank as text.
        state: "gathering" nodes, an attempt is "running" or "over", or the job is at its "end".
        attempt: counted from 0 in a session.
        port: where torchruns meet.
        log_dir: of the attempt, below the run directory.
        dump: stacks are wanted before processes end.
        grace: seconds that processes have to end by themselves.
        end: how the job ended.
    """

    session: str
    host: str
    members: Mapping[str, str] = field(default_factory=dict)
    state: Literal["gathering", "running", "over", "end"] = "gathering"
    attempt: int = 0
    port: int = 0
    log_dir: str = ""
    dump: bool = False
    grace: float = 0.0
    end: Told | None = None

    @property
    def key(self) -> str:
        """Names the attempt."""
        return f"{self.session}/{self.attempt}"

    @classmethod
    def read(cls, value: dict[str, Any]) -> Announcement:
        """From the content of the file."""
        known = {name: value[name] for name in cls.__dataclass_fields__}
        return cls(**{**known, "end": value["end"] and Told(**value["end"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What another node says.

    Attributes:
        node: its rank.
        id: of this launch of it.
        host: its name.
        session: of node 0 whose plan it has read and can carry out.
        key: of the attempt that it has started last.
        is_running: that attempt goes on here.
        exit_code: of the attempt, when it has ended.
        death: of a rank, the first here that died by itself.
        stop: what this node was asked for.
        refusal: why it cannot take part.
    """

    node: int
    id: str
    host: str
    session: str = ""
    key: str = ""
    is_running: bool = False
    exit_code: int = 0
    death: Death | None = None
    stop: Literal["", "terminate", "interrupt", "at once"] = ""
    refusal: Told | None = None

    @classmethod
    def read(cls, value: dict[str, Any]) -> Report:
        """From the content of the file."""
        known = {name: value[name] for name in cls.__dataclass_fields__}
        known["death"] = value["death"] and Death(**value["death"])
        known["refusal"] = value["refusal"] and Told(**value["refusal"])
        return cls(**known)


class Pulse:
    """Whether what another machine writes still changes."""

    def __init__(self) -> None:
        self.has_changed = False
        self._alive: int | None = None
        self._at = time.monotonic()

    def look(self, alive: int) -> None:
        """Take note of a file's counter."""
        if alive != self._alive:
            self.has_changed = self._alive is not None
            self._alive, self._at = alive, time.monotonic()

    @property
    def is_lost(self) -> bool:
        """Nothing has changed for too long."""
        return time.monotonic() - self._at > LIFE_SECONDS


class Followers:
    """The other nodes, as node 0 sees them; a job on one machine has none, and no files."""

    def __init__(self, run_dir: Path, cluster: Cluster) -> None:
        self._folder = run_dir / NODES
        self._run_dir = run_dir
        self._ranks = range(1, cluster.nnodes)
        self._said = Announcement(session=uuid.uuid4().hex, host=socket.gethostname())
        self._reports: dict[int, Report] = {}
        self._pulses = {rank: Pulse() for rank in self._ranks}
        self._file: LiveFile | None = None
        for rank in self._ranks:
            (self._folder / str(rank)).mkdir(parents=True, exist_ok=True)
        if self._ranks:
            self._file = LiveFile(self._folder / LEADER, lambda: asdict(self._said))
            self._file.write()

    def gather(self, stop: StopRequests, *, seconds: float = ARRIVAL_SECONDS) -> None:
        """Wait until all are there and ready for an attempt, or a signal asks to stop.

        Raises:
            ConfigError: one has not come in time.
            UserError: one cannot take part.
        """
        deadline = time.monotonic() + seconds
        self._say(state="gathering")
        while missing := self._missing():
            time.sleep(POLL_SECONDS)
            self.look(stop)
            if stop.interrupted or stop.terminated_at is not None:
                return
            if time.monotonic() > deadline:
                raise self._never_came(missing, seconds)

    def start(self, attempt: int, port: int, log_dir: Path) -> None:
        """Have all of them start an attempt."""
        place = str(log_dir.relative_to(self._run_dir))
        self._say(state="running", attempt=attempt, port=port, log_dir=place, dump=False)

    def look(self, stop: StopRequests) -> None:
        """Read what they say; what one of them was asked for is asked of the whole job."""
        for report in self._read():
            if report.stop == "terminate":
                stop.terminate()
            stop.interrupted |= report.stop == "interrupt"
            stop.at_once |= report.stop == "at once"

    def are_running(self) -> bool:
        """Whether some have not ended the attempt."""
        return any(r.is_running or r.key != self._said.key for r in self._reports.values())

    def have_failed(self) -> bool:
        """Whether the attempt went wrong on some of them."""
        return any(r.exit_code != 0 or r.death for r in self._ended())

    def lost(self) -> list[Report]:
        """Those that are not heard of any more, or whose launcher is not the one it was."""
        return [
            r
            for r in self._reports.values()
            if self._pulses[r.node].is_lost or self._said.members.get(str(r.node)) != r.id
        ]

    def deaths(self) -> list[Death]:
        """Ranks that they saw die."""
        return [r.death for r in self._ended() if r.death]

    def exit_codes(self) -> list[int]:
        """Of those whose part has ended."""
        return [r.exit_code for r in self._ended()]

    def over(self, *, dump: bool = False, grace: float = 0.0) -> None:
        """Have all of them end the attempt."""
        if self._said.state == "running":
            self._say(state="over", dump=dump, grace=grace)

    def wait_for_all(self) -> list[Report]:
        """Wait until the attempt is over everywhere; returns nodes that were lost."""
        while self.are_running() and not self.lost():
            time.sleep(POLL_SECONDS)
            self._read()
        return self.lost()

    def end(self, told: Told) -> None:
        """Have all of them leave."""
        self._say(state="end", end=told)
        if self._file:
            self._file.close()

    def _say(self, **changes: Any) -> None:
        self._said = replace(self._said, **changes)
        if self._file:
            self._file.write()

    def _ended(self) -> list[Report]:
        """Those whose part of the attempt is over."""
        return [r for r in self._reports.values() if r.key == self._said.key and not r.is_running]

    def _read(self) -> list[Report]:
        """The newest reports of nodes that are alive, or were."""
        for rank in self._ranks:
            value = read_fresh(self._folder / str(rank) / NODE)
            if value is None:
                continue
            self._pulses[rank].look(value["alive"])
            if self._pulses[rank].has_changed:
                self._reports[rank] = Report.read(value)
        return list(self._reports.values())

    def _missing(self) -> list[int]:
        """Ranks of nodes that are not ready; accepts those that have just come."""
        reports = {r.node: r for r in self._reports.values() if not self._pulses[r.node].is_lost}
        members = {str(node): report.id for node, report in sorted(reports.items())}
        if members != self._said.members:
            self._say(members=members)
        for report in reports.values():
            if report.refusal and report.session == self._said.session:
                raise _refused(report)
        session = self._said.session
        ready = {r.node for r in reports.values() if r.session == session and not r.is_running}
        return [rank for rank in self._ranks if rank not in ready]

    def _never_came(self, missing: list[int], seconds: float) -> UserError:
        before = [self._reports[rank].host for rank in missing if rank in self._reports]
        if before:
            return TrainingError(f"{describe_nodes(missing)} ({', '.join(before)}) is gone")
        return ConfigError(
            f"{describe_nodes(missing)} has not come to {self._run_dir} within {seconds:g} s",
            hint="start the same command there with its --node-rank; the run directory has to be "
            "on a disk that all nodes share",
        )


@contextmanager
def leading(run_dir: Path, cluster: Cluster) -> Iterator[Followers]:
    """Followers that are told how the block ended; the block ends them itself when all is well."""
    followers = Followers(run_dir, cluster)
    try:
        yield followers
    except UserError as error:
        followers.end(Told.of(error))
        raise
    except BaseException:
        followers.end(Told(exit_code=EXIT_BUG, message="node 0 failed: its terminal says why"))
        raise


def send_home(run_dir: Path, cluster: Cluster, *, seconds: float = 60.0) -> None:
    """Let nodes that come within a minute leave in peace: there is nothing to do."""
    followers = Followers(run_dir, cluster)
    with suppress(UserError):
        followers.gather(StopRequests(), seconds=seconds)
    followers.end(Told(exit_code=EXIT_OK))


def describe_nodes(ranks: list[int]) -> str:
    """Node ranks for a message."""
    return f"node{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def read_fresh(path: Path) -> dict[str, Any] | None:
    """A small JSON file of another machine; None where there is none."""
    with suppress(FileNotFoundError):
        os.listdir(path.parent)  # makes a network disk look for files that were not there before
    return read_small(path)


def _refused(report: Report) -> UserError:
    assert report.refusal is not None
    text = f"node {report.node} ({report.host}): {report.refusal.message}"
    return report.refusal.error(text) or TrainingError(text, hint=report.refusal.hint)
