"""Makes demonstrations with several processes, or measures how often the demonstrator succeeds.

A task's attempts are numbered, and everything random in one comes from the seed, the task and its
number. An attempt is begun only if the task would lack a success even if all that are under way
succeeded. So exactly the first attempts that are needed are made, however many processes there are
and however often the work is interrupted.

A process that dies or hangs costs its attempt, which is made again once. A process stays with a
task as long as that needs attempts: another task has to be compiled first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from vlactl.api.contracts import (
    DemonstrationContext,
    EnvContext,
    EnvSpec,
    Episode,
    Outcome,
    SlotEvent,
)
from vlactl.api.noise import make_key
from vlactl.api.plugins import EnvironmentConfig, EnvironmentPlugin, load_object
from vlactl.api.simulators import SimulatorPool
from vlactl.demonstrations.player import PlayerConfig
from vlactl.demonstrations.staging import Attempt, read_attempts
from vlactl.errors import EnvironmentNotReadyError
from vlactl.evaluate.results import EpisodeResult
from vlactl.launch.hardware import Hardware

FIRST_ATTEMPTS, ATTEMPTS_PER_SUCCESS = 10, 4
"""A task is given up after this many attempts: 10, and 4 more for each success."""
MAX_FAILURES, ELSEWHERE = 8, 3
"""Tries in a row that end without a result before all is given up, and how many of them have to be
of other tasks than the one that fails most: else that task is to blame."""
WAIT_SECONDS = 1.0
USABLE_MEMORY = 0.8
"""Of the machine's, for simulators."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where demonstrations are made.

    Attributes:
        plugin: the environment.
        config: its section.
        spec: what it offers.
        context: of its demonstrators.
        num_workers: processes.
    """

    plugin: EnvironmentPlugin
    config: EnvironmentConfig
    spec: EnvSpec
    context: DemonstrationContext
    num_workers: int


class Watch(Protocol):
    """Who follows the work."""

    def count(self, done: int, total: int) -> None:
        """So many of the wanted demonstrations or episodes are there."""

    def note(self, text: str) -> None:
        """Something happened that a person should know."""


# --------------------------------------------------------------------------------------------
# Two kinds of work
# --------------------------------------------------------------------------------------------
def make_demonstrations(
    setting: Setting, tasks: Sequence[int], per_task: int, seed: int, folder: Path, watch: Watch
) -> list[Attempt]:
    """Make the attempts that `folder` does not hold yet; returns all that are needed.

    Attempts that were given up without a result are not kept: another call makes them again.

    Raises:
        UserError: the environment cannot be run, or its simulators fail again and again.
    """
    known: dict[int, dict[int, bool]] = {task: {} for task in tasks}
    for attempt in read_attempts(folder):
        known[attempt.task][attempt.number] = attempt.success
    plans = [Demonstrations(task, per_task, known[task]) for task in tasks]

    def episode(task: int, number: int) -> Episode:
        key = make_key("demonstration", seed, task, number)
        return Episode(task=task, trial=0, group=0, member=number, seed=key)

    lost: list[Attempt] = []

    def lose(given_up: Episode, failure: str) -> None:
        attempt = Attempt(
            task=given_up.task,
            number=given_up.member,
            seed=given_up.seed,
            success=False,
            num_steps=0,
            failure=failure,
        )
        lost.append(attempt)

    _Crew(setting, plans, episode, folder, watch).work(lose=lose)
    attempts = [*read_attempts(folder), *lost]
    return sorted(attempts, key=lambda attempt: (attempt.task, attempt.number))


def measure(
    setting: Setting, tasks: Sequence[int], trials: int, watch: Watch
) -> list[EpisodeResult]:
    """Play the first official initial states of every task, without perturbations or pictures.

    Raises:
        UserError: the environment cannot be run, or its simulators fail again and again.
    """
    results: list[EpisodeResult] = []

    def episode(task: int, trial: int) -> Episode:
        key = make_key("demonstration", "trial", task, trial)
        return Episode(task=task, trial=trial, group=0, member=trial, seed=key)

    def keep(played: Episode, outcome: Outcome) -> None:
        results.append(
            EpisodeResult(
                task=played.task,
                trial=played.trial,
                repeat=0,
                success=outcome.success,
                num_steps=outcome.num_steps,
                episode_return=float(outcome.success),
                seed=played.seed,
            )
        )

    def lose(lost: Episode, failure: str) -> None:
        keep(
            lost,
            Outcome(success_step=None, success_at_end=False, terminated=False, num_steps=0),
        )

    context = replace(setting.context, cameras=(), bursts=0.0)
    setting = replace(setting, context=context)
    plans = [Trials(task, trials) for task in tasks]
    _Crew(setting, plans, episode, None, watch).work(keep=keep, lose=lose)
    return sorted(results, key=lambda result: result.key)


def usable_workers(setting: Setting, hardware: Hardware, num_tasks: int, num_episodes: int) -> int:
    """Processes that cores and memory allow, and that have something to do."""
    limits = [hardware.cores, num_episodes]
    if setting.plugin.footprint:
        footprint = load_object(setting.plugin.footprint)
        context = EnvContext(
            num_slots=1, cameras=setting.context.cameras, device_index=setting.context.device_index
        )
        needed = footprint(setting.config, context, num_tasks).host_bytes
        limits.append(int(USABLE_MEMORY * hardware.ram_bytes / needed))
    return max(1, min(limits))


# --------------------------------------------------------------------------------------------
# What is to be done
# --------------------------------------------------------------------------------------------
class Plan(Protocol):
    """The attempts at one task."""

    task: int
    under_way: set[int]

    @property
    def done(self) -> int:
        """Attempts that count."""

    @property
    def total(self) -> int:
        """Attempts that count, in the end."""

    def next(self) -> int | None:
        """The attempt to begin now; None = none, for now."""

    def finish(self, number: int, success: bool) -> None:
        """An attempt under way has ended."""


@dataclass(slots=True)
class Demonstrations:
    """As many attempts as there have to be for the successes that are wanted.

    Args:
        task: index of the task.
        wanted: successes.
        known: attempts that have ended, and whether they succeeded.
    """

    task: int
    wanted: int
    known: dict[int, bool] = field(default_factory=dict)
    under_way: set[int] = field(default_factory=set)

    @property
    def done(self) -> int:
        """Successes."""
        return sum(self.known.values())

    @property
    def total(self) -> int:
        """Successes that are wanted."""
        return self.wanted

    def next(self) -> int | None:
        """The first attempt that nobody has begun, if it is needed."""
        number = 0
        while number in self.known or number in self.under_way:
            number += 1
        is_needed = self.done + len(self.under_way) < self.wanted
        is_worthwhile = number < FIRST_ATTEMPTS + ATTEMPTS_PER_SUCCESS * self.done
        return number if is_needed and is_worthwhile else None

    def finish(self, number: int, success: bool) -> None:
        """Note how it ended."""
        self.under_way.discard(number)
        self.known[number] = success


@dataclass(slots=True)
class Trials:
    """Each of the first trials once."""

    task: int
    total: int
    done: int = 0
    under_way: set[int] = field(default_factory=set)
    _next: int = 0

    def next(self) -> int | None:
        """The next trial."""
        if self._next == self.total:
            return None
        self._next += 1
        return self._next - 1

    def finish(self, number: int, success: bool) -> None:
        """Count it."""
        self.under_way.discard(number)
        self.done += 1


# --------------------------------------------------------------------------------------------
# Who does it
# --------------------------------------------------------------------------------------------
def _ignore(episode: Episode, outcome: Outcome) -> None:
    """The process has kept what is wanted."""


class _Crew:
    """The processes, and which episode each of them plays."""

    def __init__(
        self,
        setting: Setting,
        plans: Sequence[Plan],
        episode: Callable[[int, int], Episode],
        folder: Path | None,
        watch: Watch,
    ) -> None:
        self._plans = {plan.task: plan for plan in plans}
        self._episode, self._watch = episode, watch
        self._playing: dict[int, Episode] = {}
        self._last_task: dict[int, int] = {}
        self._again: list[Episode] = []
        self._tries: Counter[Episode] = Counter()
        self._failing_tasks: list[int] = []
        self._num_workers = setting.num_workers
        self._pool = SimulatorPool(
            "vlactl.demonstrations.player:make_player",
            _player_config(setting, folder),
            EnvContext(num_slots=setting.num_workers, cameras=()),
            setting.spec,
            env=_variables(setting),
        )

    def work(
        self,
        *,
        keep: Callable[[Episode, Outcome], None] = _ignore,
        lose: Callable[[Episode, str], None],
    ) -> None:
        """Play until nothing is left to play; `lose` hears of attempts that are given up."""
        try:
            self._report()
            while self._send() or self._playing:
                for event in self._pool.wait(1, WAIT_SECONDS):
                    self._receive(event, keep, lose)
        finally:
            self._pool.close()

    def _send(self) -> bool:
        """Give idle processes something to do; whether any got it."""
        idle = [slot for slot in range(self._num_workers) if slot not in self._playing]
        given = 0
        for slot in idle:
            episode = self._take(slot)
            if episode is None:
                break
            self._playing[slot] = episode
            self._last_task[slot] = episode.task
            self._pool.begin(slot, episode)
            given += 1
        return given > 0

    def _take(self, slot: int) -> Episode | None:
        if self._again:
            return self._again.pop()
        for plan in self._by_preference(slot):
            number = plan.next()
            if number is not None:
                plan.under_way.add(number)
                return self._episode(plan.task, number)
        return None

    def _by_preference(self, slot: int) -> Iterable[Plan]:
        """The task that the process knows, then those that the fewest others are at."""
        busy = Counter(episode.task for episode in self._playing.values())
        known = self._last_task.get(slot)
        return sorted(
            self._plans.values(), key=lambda plan: (plan.task != known, busy[plan.task], plan.task)
        )

    def _receive(
        self,
        event: SlotEvent,
        keep: Callable[[Episode, Outcome], None],
        lose: Callable[[Episode, str], None],
    ) -> None:
        episode = self._playing.pop(event.slot)
        if event.result is None:
            self._fail(episode, event.failure, lose)
            return
        outcome = event.result.outcome
        assert outcome is not None
        self._failing_tasks = []
        keep(episode, outcome)
        self._finish(episode, outcome.success)

    def _fail(self, episode: Episode, failure: str, lose: Callable[[Episode, str], None]) -> None:
        reason = failure.strip().splitlines()[-1]
        self._failing_tasks.append(episode.task)
        [(_, most)] = Counter(self._failing_tasks).most_common(1)
        elsewhere = len(self._failing_tasks) - most
        is_general = elsewhere >= ELSEWHERE or len(self._plans) == 1
        if is_general and len(self._failing_tasks) >= MAX_FAILURES:
            raise EnvironmentNotReadyError(
                f"simulators failed {len(self._failing_tasks)} times in a row, the last one in "
                f"task {episode.task}: {failure.strip()}",
                hint="the same command goes on when the cause is gone; `vlactl doctor` may know it",
            )
        self._tries[episode] += 1
        if self._tries[episode] == 1:
            self._watch.note(f"task {episode.task}: attempt {episode.member} again: {reason}")
            self._again.append(episode)
            return
        self._watch.note(f"task {episode.task}: attempt {episode.member} given up: {reason}")
        lose(episode, reason)
        self._finish(episode, success=False)

    def _finish(self, episode: Episode, success: bool) -> None:
        self._plans[episode.task].finish(episode.member, success)
        self._report()

    def _report(self) -> None:
        plans = self._plans.values()
        self._watch.count(sum(plan.done for plan in plans), sum(plan.total for plan in plans))


def _player_config(setting: Setting, folder: Path | None) -> PlayerConfig:
    return PlayerConfig(
        env=setting.config,
        demonstrator=setting.plugin.demonstrator,
        context=setting.context,
        folder=folder,
        fps=setting.spec.control_hz,
        step_timeout=setting.config.step_timeout,
        recycle_after=setting.config.recycle_after,
    )


def _variables(setting: Setting) -> Mapping[str, str]:
    if not setting.plugin.variables:
        return {}
    variables: Mapping[str, str] = load_object(setting.plugin.variables)(
        setting.config, setting.context.device_index
    )
    return variables
