"""What a person sees while a job runs: bars on a terminal, plain lines anywhere else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from vlactl.launch.status import Beat
from vlactl.report.sinks import FILE_NAME

EVALUATION = "evaluate"
"""Phase of heartbeats that report episodes of an evaluation."""
DEMONSTRATIONS = "demonstrate"
"""Phase of those that report demonstrations."""
_COUNTED = {
    EVALUATION: "evaluation {}/{} episodes",
    DEMONSTRATIONS: "{}/{} demonstrations",
}
_SHOWN = (
    ("loss", "train/loss"),
    ("success", "env/success_once"),
    ("return", "env/return"),
    ("approx_kl", "train/actor/approx_kl"),
    ("grad_norm", "train/actor/grad_norm"),
    ("eval success", "eval/success_once"),
)


class Progress(Protocol):
    """Follows a job."""

    def beats(self, beats: Sequence[Beat]) -> None:
        """Where the ranks are now."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """A step is finished and has these metrics."""

    def note(self, text: str) -> None:
        """Something happened that a person should know."""

    def close(self) -> None:
        """The job has ended."""


class PlainProgress:
    """One line per finished step, and per tenth of an evaluation or of demonstrations."""

    def __init__(self, write: Callable[[str], None], max_steps: int) -> None:
        self._write = write
        self._max_steps = max_steps
        self._tenths = 0

    def beats(self, beats: Sequence[Beat]) -> None:
        """Write a line when another tenth of what is counted is done."""
        phase, done, total = _counted(beats)
        tenths = 10 * done // total if total else 0
        if tenths > self._tenths:
            self._write(_COUNTED[phase].format(done, total))
        self._tenths = tenths

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Write the step's line."""
        self._write(describe_step(metrics, self._max_steps))

    def note(self, text: str) -> None:
        """Write it."""
        self._write(text)

    def close(self) -> None:
        """Nothing to do."""


class LiveProgress:
    """Bars that move: steps of the run, and progress within the current phase."""

    def __init__(self, console: Console, max_steps: int) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._max_steps = max_steps
        self._steps = self._bars.add_task("steps", total=max_steps)
        self._phase = self._bars.add_task("start", total=None)
        self._shown = ("start", 0)
        self._bars.start()

    def beats(self, beats: Sequence[Beat]) -> None:
        """Move the bars to where the ranks are."""
        if not beats:
            return
        current = (beats[0].phase, beats[0].step)
        if current != self._shown:
            self._bars.reset(self._phase, description=current[0])
            self._shown = current
        total = sum(beat.total for beat in beats)
        done = sum(beat.done for beat in beats)
        self._bars.update(self._phase, completed=done, total=total or None)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Print the step's line above the bars."""
        self._bars.update(self._steps, completed=metrics["step"] + 1)
        self.note(describe_step(metrics, self._max_steps))

    def note(self, text: str) -> None:
        """Print it above the bars."""
        self._bars.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Remove the bars."""
        self._bars.stop()


def make_progress(write: Callable[[str], None], max_steps: int, console: Console) -> Progress:
    """Bars where the console is a terminal, else lines."""
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveProgress(console, max_steps)
    return PlainProgress(write, max_steps)


def describe_step(metrics: Mapping[str, Any], max_steps: int) -> str:
    """A finished step in one line, without metrics that it does not have or that are not finite."""
    parts = [f"step {metrics['step'] + 1}/{max_steps}"]
    for label, name in _SHOWN:
        value = metrics.get(name)
        if value is not None:
            parts.append(f"{label} {value:.3g}")
    if metrics.get("train/actor/updates") == 0:
        parts.append("no update: nothing to learn from")
    seconds = metrics.get("time/step")
    return "  ".join(parts if seconds is None else [*parts, f"{seconds:.1f} s"])


class MetricsTail:
    """Lines that are added to a run's `metrics.jsonl` from now on.

    After a restart the worker cuts the file back to its checkpoint; steps that are then trained
    again are new lines, although the file may be longer than before by the time it is looked at.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE_NAME
        self._stamp: tuple[int, ...] = ()
        self._lines: list[bytes] = []
        self._look()

    def new(self) -> list[dict[str, Any]]:
        """Complete lines from the first on that is not as it was."""
        before = self._lines
        self._look()
        same = [old == new for old, new in zip(before, self._lines, strict=False)]
        first = same.index(False) if False in same else len(same)
        return [json.loads(line) for line in self._lines[first:]]

    def _look(self) -> None:
        if self._path.exists() and self._stamp != (stamp := _stamp(self._path)):
            whole, _, _ = self._path.read_bytes().rpartition(b"\n")
            self._lines, self._stamp = whole.splitlines(), stamp


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is written or replaced."""
    state = path.stat()
    return (state.st_ino, state.st_size, state.st_mtime_ns)


def _counted(beats: Sequence[Beat]) -> tuple[str, int, int]:
    """The phase that is counted, what is done of it, and all of it."""
    for phase in _COUNTED:
        counting = [beat for beat in beats if beat.phase == phase]
        if counting:
            return phase, sum(beat.done for beat in counting), sum(beat.total for beat in counting)
    return "", 0, 0
