"""What the user is told meanwhile: what is being done, for about how long, and the true time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

from vlactl.api.plugins import BenchOptions
from vlactl_libero.bench.expected import Costs

Say = Callable[[str], None]
LABELS = {"stock": "stock", "ours": "vlactl"}
"""The sides as the user knows them."""
START_SECONDS = 8.0
"""Of a process that imports the simulator and builds its first scene on one core."""


@contextmanager
def phase(say: Say, text: str, seconds: float) -> Iterator[list[str]]:
    """Say what begins and about how long it takes, then what the block has found and its time."""
    say(f"{text}, {about(seconds)}")
    findings: list[str] = []
    start = perf_counter()
    yield findings
    say(f"  {', '.join(findings) or 'done'}, after {perf_counter() - start:.0f} s")


def about(seconds: float) -> str:
    """A rough duration; multiples of five seconds, then minutes."""
    if seconds >= 90:
        return f"about {round(seconds / 60)} minutes"
    return f"about {max(5, 5 * round(seconds / 5))} s"


def count(number: int, noun: str) -> str:
    """`1 task`, `2 tasks`, `2 processes`."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{ending * (number != 1)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """How long the phases of a benchmark take, in seconds and roughly.

    Attributes:
        sides: what their simulators cost, each with a core of its own.
        num_simulators: of each side.
        mean_length: control steps of a scripted episode; None = none are played.
        options: of the benchmark.
    """

    sides: Mapping[str, Costs]
    num_simulators: int
    mean_length: float | None
    options: BenchOptions

    def warm_up(self) -> float:
        """A simulator of each side, already compiled."""
        return 2 * START_SECONDS + sum(costs.reset for costs in self.sides.values())

    def build(self, side: str) -> float:
        """All simulators of a side, up to the first observations."""
        return self._load() * (START_SECONDS + self.sides[side].reset)

    def turn(self, side: str) -> float:
        """A side's part of a round."""
        load, costs = self._load(), self.sides[side]
        seconds = self.options.seconds + load * costs.reset
        if self.mean_length is None:
            return seconds
        if side == "stock":
            wave = min(self.options.wave_seconds, load * self.options.horizon * costs.step)
            return seconds + load * costs.reset + wave
        episodes = self.options.episodes / self.num_simulators
        return seconds + load * episodes * costs.episode(self.mean_length)

    def growth(self, num_simulators: int) -> float:
        """Simulators of vlactl in one process, with pictures and without."""
        return 2 * START_SECONDS + 2 * num_simulators * self.sides["ours"].reset

    def total(self, num_growing: int) -> float:
        """The whole benchmark."""
        growth = self.growth(num_growing) if self.options.memory else 0.0
        turns = sum(self.build(side) + self.options.rounds * self.turn(side) for side in self.sides)
        return self.warm_up() + turns + growth

    def _load(self) -> float:
        return max(1.0, self.num_simulators / len(os.sched_getaffinity(0)))
