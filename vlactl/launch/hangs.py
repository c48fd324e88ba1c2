"""Which ranks are hung: rules over heartbeats, without processes and without a clock of their own.

A rank is hung when its process gives no sign of life, or when it neither makes progress nor waits
for other ranks. Ranks that wait for a hung one are not to blame. Where all wait, they wait for each
other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlactl.launch.status import Beat

START = "start"
LIFE_SECONDS = 45.0
"""Without a sign of life; a process that can run at all gives one every other second."""
_SLOW_PHASES = (START, "checkpoint")
_SLOW_SECONDS = 600.0
_LONGEST_LOOK = 5.0
_STOPPED = "stopped by hand or a debugger, or held by a disk or a driver?"
_TOO_SLOW = "raise train.hang_timeout if a part of a step takes longer than that"


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Seconds without progress that are no reason to worry, by phase."""

    hang_timeout: float
    saving: float

    def of(self, phase: str) -> float:
        """Starting and saving report no progress while they go on."""
        if phase in _SLOW_PHASES:
            return max(self.hang_timeout, self.saving, _SLOW_SECONDS)
        return self.hang_timeout


@dataclass(frozen=True, slots=True, kw_only=True)
class Hang:
    """Ranks to blame, what is wrong with them, and what a person can do about it."""

    ranks: tuple[int, ...]
    reason: str
    advice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """A rank's last beat, and when its counters moved."""

    beat: Beat
    lived: float
    moved: float
    busy: float


class HangWatch:
    """Looks at heartbeats again and again, and tells when some rank has not moved for too long."""

    def __init__(self, num_ranks: int, patience: Patience) -> None:
        self._num_ranks = num_ranks
        self._patience = patience
        self._seen: dict[int, _Seen] = {}
        self._now = 0.0
        self._looked: float | None = None

    def look(self, beats: Sequence[Beat], now: float) -> Hang | None:
        """Take note of the newest beats at the time `now`, in seconds."""
        # What has frozen this process for a while has probably frozen the ranks as well.
        passed = 0.0 if self._looked is None else now - self._looked
        self._looked = now
        self._now += min(passed, _LONGEST_LOOK)
        for beat in beats:
            self._note(beat)
        return self._lifeless() or self._stuck() or self._deadlocked() or self._missing()

    def _note(self, beat: Beat) -> None:
        before = self._seen.get(beat.rank)
        if before is None:
            self._seen[beat.rank] = _Seen(
                beat=beat, lived=self._now, moved=self._now, busy=self._now
            )
            return
        has_moved = (beat.count, beat.left) != (before.beat.count, before.beat.left)
        self._seen[beat.rank] = replace(
            before,
            beat=beat,
            lived=self._now if beat.alive != before.beat.alive else before.lived,
            moved=self._now if has_moved else before.moved,
            busy=self._now if has_moved or beat.waiting else before.busy,
        )

    def _lifeless(self) -> Hang | None:
        return self._hang(
            [s for s in self._seen.values() if not s.beat.left and self._is_over(s.lived)],
            f"no sign of life for {LIFE_SECONDS:g} s",
            _STOPPED,
        )

    def _is_over(self, lived: float) -> bool:
        return self._now - lived > LIFE_SECONDS

    def _stuck(self) -> Hang | None:
        stuck = [
            s
            for s in self._seen.values()
            if not (s.beat.left or s.beat.waiting)
            and self._now - s.busy > self._patience.of(s.beat.phase)
        ]
        return self._hang(stuck, "no progress for {seconds:g} s", _TOO_SLOW)

    def _deadlocked(self) -> Hang | None:
        everyone = list(self._seen.values())
        if len(everyone) < self._num_ranks or not all(
            s.beat.waiting or s.beat.left for s in everyone
        ):
            return None
        longest = max(self._patience.of(s.beat.phase) for s in everyone)
        if self._now - max(s.moved for s in everyone) <= longest:
            return None
        if all(s.beat.left for s in everyone):
            return self._hang(everyone, "the processes do not end")
        waiting = [s for s in everyone if s.beat.waiting]
        return self._hang(waiting, "all ranks wait for each other since {seconds:g} s")

    def _missing(self) -> Hang | None:
        seconds = self._patience.of(START)
        if self._now <= seconds or len(self._seen) == self._num_ranks:
            return None
        missing = sorted(set(range(self._num_ranks)) - set(self._seen))
        return Hang(ranks=tuple(missing), reason=f"not started after {seconds:g} s")

    def _hang(self, those: Sequence[_Seen], reason: str, advice: str = "") -> Hang | None:
        if not those:
            return None
        seconds = max(self._patience.of(s.beat.phase) for s in those)
        ranks = sorted(s.beat.rank for s in those)
        return Hang(ranks=tuple(ranks), reason=reason.format(seconds=seconds), advice=advice)
