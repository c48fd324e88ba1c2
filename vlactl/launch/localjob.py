"""The part of a job that runs on this machine: one torchrun and the workers that it starts."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from vlactl.launch.processes import ProcessTree, process_tree, send_signal
from vlactl.launch.torchrun import Death, ends_workers, first_death

GRACE_SECONDS = 10.0
_SETTLING_SECONDS = 5.0
_DUMP_SECONDS = 2.0


class LocalJob:
    """Started by `local_job`; `first_rank` is the lowest rank on this machine."""

    def __init__(self, tree: ProcessTree, log: Path, first_rank: int) -> None:
        self._tree = tree
        self._log = log
        self._first_rank = first_rank
        self._told: set[int] = set()
        self._troubled_at: float | None = None
        self._failed_at: float | None = None
        self._is_ended = False

    def exit_code(self) -> int | None:
        """Of torchrun; None while it runs."""
        return self._tree.exit_code()

    def ask_to_stop(self) -> None:
        """Forward SIGTERM to workers, once each: not to torchrun, which would fail the job."""
        for worker in self._tree.children():
            if worker.pid not in self._told:
                self._told.add(worker.pid)
                send_signal(worker, signal.SIGTERM)

    def dump_stacks(self) -> None:
        """Have all workers write their stacks to their logs."""
        for worker in self._tree.children():
            send_signal(worker, signal.SIGUSR1)
        time.sleep(_DUMP_SECONDS)

    def end_survivors(self, *, others_failed: bool) -> None:
        """Called again and again: end workers when another one was lost, after seconds by force.

        They may wait for it for hours. torchrun stays, to say which one was the first.
        """
        now = time.monotonic()
        if self._troubled_at is None:
            if others_failed or ends_workers(self._text()):
                self._troubled_at = now
                self.ask_to_stop()
        elif now - self._troubled_at > _SETTLING_SECONDS and self.exit_code() is None:
            self._is_ended = self._is_ended or not ends_workers(self._text())
            for worker in self._tree.children():
                send_signal(worker, signal.SIGKILL)
            if now - self._troubled_at > 2 * _SETTLING_SECONDS:
                self.end(0.0)

    def has_failed_long_ago(self) -> bool:
        """Whether torchrun failed, and what depends on it has had time to end."""
        if self._failed_at is None and self.exit_code():
            self._failed_at = time.monotonic()
        return (
            self._failed_at is not None and time.monotonic() - self._failed_at > _SETTLING_SECONDS
        )

    def death(self) -> Death | None:
        """The first rank of this machine that died by itself."""
        return None if self._is_ended else first_death(self._text(), self._first_rank)

    def end(self, grace: float) -> None:
        """End all processes: politely, and after `grace` seconds by force."""
        self._is_ended = self._is_ended or self.exit_code() is None
        self._tree.end(grace)

    def _text(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")


@contextmanager
def local_job(
    command: Sequence[str], variables: Mapping[str, str], log: Path, *, first_rank: int = 0
) -> Iterator[LocalJob]:
    """A running job; whatever is left of it when the block ends is ended."""
    with process_tree(command, variables, log, grace=GRACE_SECONDS) as tree:
        yield LocalJob(tree, log, first_rank)
