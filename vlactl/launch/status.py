"""What workers and their supervisor tell each other, through small files in `run_dir/status/`.

Written by workers: `rank-N.json` (a heartbeat: phase, step, progress), `failure-N.json` (why a
rank gave up) and `result.json` (how the job ended). Read by the supervisor, which clears them
before each attempt. The other direction is signals: SIGTERM asks for a checkpoint and an end,
SIGUSR1 for the stacks of all threads.

Nobody compares clocks or times of files: a reader sees that a counter has moved on, or has not.
"""

from __future__ import annotations

import atexit
import errno
import faulthandler
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import psutil

from vlactl.errors import EXIT_CLASSES, EXIT_TRAINING, IntegrityError, UserError
from vlactl.launch.processes import is_alive, send_signal
from vlactl.report.atomic import write_json

T = TypeVar("T")
STATUS = "status"
RESULT = "result.json"
LOG_DIR_VARIABLE = "VLACTL_LOG_DIR"
SUPERVISOR_VARIABLE = "VLACTL_SUPERVISOR"
ALIVE_SECONDS = 2.0
"""Between two writings of a `LiveFile` by its thread."""
_BEAT_SECONDS = 0.5
_PARENT_CHECK_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """Where one rank is.

    Attributes:
        rank: of the job.
        pid: of its process, on its machine.
        phase: what it is doing.
        step: index of the step it is doing it for.
        done: finished units of the phase.
        total: all of them; 0 = unknown.
        count: goes up with the rank's progress.
        alive: goes up as long as the process can run at all.
        waiting: it waits for other ranks.
        left: it has ended in an orderly way.
    """

    rank: int
    pid: int
    phase: str
    step: int
    done: int
    total: int
    count: int
    alive: int = 0
    waiting: bool = False
    left: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a rank gave up.

    `exit_code` is that of a `UserError`, 0 for any other exception; `peak_gib` is the most that the
    rank has allocated on its GPU, 0 where it used none.
    """

    rank: int
    phase: str
    step: int
    time: float
    kind: str
    message: str
    hint: str
    exit_code: int
    peak_gib: float = 0.0

    def user_error(self) -> UserError | None:
        """The `UserError` that the worker raised, if it was one."""
        error = EXIT_CLASSES.get(self.exit_code)
        return error(self.message, hint=self.hint) if error else None


class LiveFile:
    """A small file that a thread rewrites every other second for as long as the process can run.

    Each time `alive` is another number. A stopped process, or one whose interpreter is stuck in
    native code, writes nothing.
    """

    def __init__(self, path: Path, content: Callable[[], dict[str, Any]]) -> None:
        self._path = path
        self._content = content
        self._alive = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        path.parent.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self._keep_alive, daemon=True).start()

    def write(self) -> None:
        """Write it now."""
        # A network disk may be away for a while; that costs news, not the run.
        with self._lock, suppress(OSError):
            self._alive += 1
            _write_volatile(self._path, {**self._content(), "alive": self._alive})

    def close(self) -> None:
        """Write it for the last time."""
        self._closed.set()
        self.write()

    def _keep_alive(self) -> None:
        while not self._closed.wait(ALIVE_SECONDS):
            self.write()


class Heartbeat:
    """Tells the supervisor where a rank is. Cheap: call it in every inner loop."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.phase = "start"
        self.step = 0
        self._rank = rank
        self._pid = os.getpid()
        self._done = self._total = self._count = self._waits = 0
        self._has_left = False
        self._written = -_BEAT_SECONDS
        self._lock = threading.Lock()
        self._file = LiveFile(run_dir / STATUS / f"rank-{rank}.json", self._state)
        atexit.register(self._leave)

    def beat(self, phase: str, step: int, done: int = 0, total: int = 0) -> None:
        """Say how far a phase is; written at once when it is new, else at most twice a second.

        Args:
            phase: what the rank is doing.
            step: index of the step it is doing it for, from 0.
            done: finished units of the phase.
            total: all of them; 0 = unknown.
        """
        changed = (phase, step) != (self.phase, self.step) or 0 < total == done
        self.phase, self.step = phase, step
        self._done, self._total = done, total
        self._count += 1
        now = time.monotonic()
        if changed or now - self._written >= _BEAT_SECONDS:
            self._written = now
            self._file.write()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block in which this rank waits for others, and is not hung if it makes no progress.

        Blocks may be nested, and entered by several threads. Not for a thread that waits for work
        all its life: it would excuse all others.
        """
        self._count_wait(1)
        try:
            yield
        finally:
            self._count_wait(-1)

    def _count_wait(self, change: int) -> None:
        with self._lock:
            self._waits += change

    def _leave(self) -> None:
        if os.getpid() == self._pid:  # not in a forked child
            self._has_left = True
            self._file.close()

    def _state(self) -> dict[str, Any]:
        beat = Beat(
            rank=self._rank,
            pid=self._pid,
            phase=self.phase,
            step=self.step,
            done=self._done,
            total=self._total,
            count=self._count,
            waiting=self._waits > 0,
            left=self._has_left,
        )
        return asdict(beat)


class StopFlag:
    """Set by SIGTERM and SIGINT, which then do nothing else: the loop decides when to stop."""

    def __init__(self) -> None:
        self.requested = False
        signal.signal(signal.SIGTERM, self._request)
        signal.signal(signal.SIGINT, self._request)

    def _request(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True


def join_supervisor(rank: int) -> None:
    """Make this worker one that can be watched; does nothing where nobody watches.

    Output, native libraries' included, goes to the attempt's `rank-N.log`; SIGUSR1 writes all
    stacks there; and the worker leaves, with its children, when torchrun or the supervisor is gone.
    """
    if log_dir := os.environ.get(LOG_DIR_VARIABLE):
        with (Path(log_dir) / f"rank-{rank}.log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR1, file=2)
    if supervisor := os.environ.get(SUPERVISOR_VARIABLE):
        processes = (psutil.Process(int(supervisor)), psutil.Process(os.getppid()))
        threading.Thread(target=_leave_with, args=processes, daemon=True).start()


def clear_status(run_dir: Path) -> None:
    """Forget what an earlier attempt said."""
    shutil.rmtree(run_dir / STATUS, ignore_errors=True)
    # Network disks keep a file, and so the folder, that is still open somewhere.
    (run_dir / STATUS).mkdir(parents=True, exist_ok=True)


def read_heartbeats(run_dir: Path) -> list[Beat]:
    """The newest beat of each rank that has given one, in order of rank."""
    beats = _read_all(run_dir, "rank-*.json", Beat)
    return sorted(beats, key=lambda beat: beat.rank)


def write_failure(run_dir: Path, rank: int, phase: str, step: int, error: BaseException) -> None:
    """Tell the supervisor why this rank gives up."""
    known = error if isinstance(error, UserError) else None
    failure = Failure(
        rank=rank,
        phase=phase,
        step=step,
        time=time.time(),
        kind=type(error).__name__,
        message=known.message if known else _first_line(error),
        hint=known.hint if known else "",
        exit_code=known.exit_code if known else 0,
        peak_gib=_peak_gib(),
    )
    write_json(run_dir / STATUS / f"failure-{rank}.json", asdict(failure))


def read_failures(run_dir: Path) -> list[Failure]:
    """What ranks said before they gave up: user errors first, then by time."""
    failures = _read_all(run_dir, "failure-*.json", Failure)
    return sorted(failures, key=lambda failure: (failure.exit_code == 0, failure.time))


def write_result(run_dir: Path, status: str) -> None:
    """Say how the job ended, "finished" or "preempted": rank 0, after everything is saved."""
    write_json(run_dir / STATUS / RESULT, {"status": status})


def read_result(run_dir: Path) -> str:
    """How the job ended, "" as long as nobody said."""
    result = read_small(run_dir / STATUS / RESULT) or {}
    return str(result.get("status", ""))


def read_small(path: Path) -> dict[str, Any] | None:
    """A small JSON file that others replace at any time; None where there is none just now.

    Raises:
        IntegrityError: it is no JSON object.
    """
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:  # always replaced as a whole, so that somebody else did this
        raise IntegrityError(f"{path} is damaged: {error}", hint="delete this file") from None
    except OSError as error:
        if error.errno != errno.ESTALE:  # replaced by another machine while it was read
            raise
        return None
    if not isinstance(value, dict):
        raise IntegrityError(f"{path} is damaged: no JSON object", hint="delete this file")
    return value


def _read_all(run_dir: Path, pattern: str, kind: Callable[..., T]) -> list[T]:
    found = []
    for path in (run_dir / STATUS).glob(pattern):
        value = read_small(path)
        try:
            found += [] if value is None else [kind(**value)]
        except TypeError as error:
            raise IntegrityError(f"{path} is damaged: {error}", hint="delete this file") from None
    return found


def _write_volatile(path: Path, value: dict[str, Any]) -> None:
    """Replace a file in one move, without waiting for the disk: it matters only while we live."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(value), encoding="utf-8")
    partial.replace(path)


def _leave_with(*parents: psutil.Process) -> None:
    while all(is_alive(parent) for parent in parents):
        time.sleep(_PARENT_CHECK_SECONDS)
    try:
        for child in psutil.Process().children(recursive=True):
            send_signal(child, signal.SIGKILL)
    finally:
        os._exit(EXIT_TRAINING)


def _peak_gib() -> float:
    """The most that this process has allocated on its GPU; launchers have no torch to ask."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0.0
    return float(torch.cuda.max_memory_allocated() / 2**30)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")
