"""What people and batch systems ask of a launcher, by signals."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_IMPATIENCE_SECONDS = 5.0
_ECHO_SECONDS = 1.0


@dataclass(slots=True)
class StopRequests:
    """What signals have asked for."""

    terminated_at: float | None = None
    interrupted: bool = False
    at_once: bool = False

    def terminate(self) -> None:
        """Ask for a checkpoint and an end."""
        if self.terminated_at is None:
            self.terminated_at = time.monotonic()

    def on_terminate(self, _number: int, _frame: FrameType | None) -> None:
        """Ask for a checkpoint and an end; once more within seconds, for an end.

        Batch systems may send one request twice, to a process and to its group: an echo, no hurry.
        """
        passed = 0.0 if self.terminated_at is None else time.monotonic() - self.terminated_at
        self.terminate()
        if _ECHO_SECONDS < passed < _IMPATIENCE_SECONDS:
            self.at_once = True

    def on_interrupt(self, _number: int, _frame: FrameType | None) -> None:
        """Ask for an end."""
        self.interrupted = True


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
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
