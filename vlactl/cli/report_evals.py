"""The part of a report that compares two evaluations, task by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlactl.cli.report_charts import Rate
from vlactl.config.explain import render
from vlactl.evaluate.compare import Evaluation, compare, read_evaluation
from vlactl.evaluate.results import EVAL_SUMMARY
from vlactl.report.html import Bar, Cell, Section, Table, Tile

RATE_HEADER = "% (95 % interval)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A finished evaluation; `done` is the number of finished steps where it is a run's own."""

    evaluation: Evaluation
    done: int | None = None

    @property
    def folder(self) -> Path:
        """Where its episodes are."""
        path = self.evaluation.path
        return path.parent if path.is_file() else path

    @property
    def mode(self) -> str:
        """How the policy chose its actions."""
        mode, temperature = (self.evaluation.summary[key] for key in ("mode", "temperature"))
        return str(mode) if temperature is None else f"{mode} at temperature {temperature:g}"

    @property
    def label(self) -> str:
        """For people."""
        if self.done is None:
            return self.folder.name
        return "after 1 step" if self.done == 1 else f"after {self.done} steps"

    @property
    def total(self) -> Rate | None:
        """Over all tasks."""
        return rate_of(self.evaluation.summary["total"])

    @property
    def tasks(self) -> dict[int, Mapping[str, Any]]:
        """Rows of eval.json by index of the task."""
        return {int(task["task"]): task for task in self.evaluation.summary["tasks"]}

    @property
    def instructions(self) -> dict[int, str]:
        """Of the tasks."""
        return {index: str(task["instruction"]) for index, task in self.tasks.items()}


def measured(path: Path) -> Measured:
    """An evaluation that a person has named.

    Raises:
        ConfigError: there is none, or it is not finished.
        IntegrityError: a file is damaged.
    """
    return Measured(evaluation=read_evaluation(path))


def measured_by(run: Path) -> list[Measured]:
    """What a run measured while it trained, in order.

    Raises:
        IntegrityError: a file is damaged.
    """
    folders = sorted(path.parent for path in run.glob(f"evals/step-*/{EVAL_SUMMARY}"))
    return [
        Measured(evaluation=read_evaluation(folder), done=int(folder.name.rpartition("-")[2]))
        for folder in folders
    ]


def rate_of(counts: Mapping[str, Any]) -> Rate | None:
    """The rate in a row of eval.json; None without episodes."""
    if not counts["trials"]:
        return None
    low, high = counts["interval"]
    return Rate(successes=counts["successes"], episodes=counts["trials"], low=low, high=high)


def before_after(before: Measured | None, after: Measured | None) -> tuple[list[Tile], Section]:
    """The total at the top of the page, and success per task with what changed.

    Raises:
        ConfigError: the evaluations cannot be compared.
    """
    title = "Before and after"
    if after is None:
        text = "There is no evaluation: set eval.every, or measure with vlactl eval and add "
        return [], Section(title=title, text=[f"{text}--before DIR --after DIR."])
    if before is None:
        text = "There is one evaluation only; add another with --before DIR or --after DIR."
        section = Section(title="Success per task", text=[text], tables=[_single(after)])
        return _tiles([("Success", after)]), section
    comparison = compare(before.evaluation, after.evaluation)
    table = _comparison(before, after, comparison)
    tiles = _tiles([("Success before", before), ("Success after", after)])
    return (
        [*tiles, _difference_tile(comparison["total"])],
        Section(title=title, text=_about(before, after, comparison["differs"]), tables=[table]),
    )


def _tiles(named: Sequence[tuple[str, Measured]]) -> list[Tile]:
    return [
        Tile(
            label=label,
            value=f"{rate.value:.1%}",
            note=f"{rate.successes}/{rate.episodes} episodes, "
            f"95 %: {rate.low:.1%} to {rate.high:.1%}",
        )
        for label, each in named
        if (rate := each.total)
    ]


def _difference_tile(total: Mapping[str, Any]) -> Tile:
    low, high = map(_points, total["interval"])
    return Tile(
        label="Paired difference",
        value=f"{_points(total['difference'])} points",
        note=f"{total['pairs']} pairs, 95 %: {low} to {high}, p = {total['p']:.2g}",
    )


def _about(before: Measured, after: Measured, differs: Mapping[str, Sequence[Any]]) -> list[str]:
    text = [
        f"Before: {before.label}, {before.mode}. After: {after.label}, {after.mode}. "
        "Episodes of the same task, trial and pass are compared in pairs: gained are those that "
        "failed before and succeed after, lost the others that differ. Intervals are 95 %: Wilson "
        "for rates, Newcombe's from paired Wilson intervals for differences."
    ]
    if differs:
        changes = [f"{key} {render(a)}, then {render(b)}" for key, (a, b) in differs.items()]
        text.append(f"Not measured alike: {'; '.join(changes)}.")
    return text


def _single(evaluation: Measured) -> Table:
    rows: list[Sequence[Cell]] = [
        (str(index), str(task["instruction"]), *_rate_cells(task))
        for index, task in evaluation.tasks.items()
    ]
    rows.append(("all", "", *_rate_cells(evaluation.evaluation.summary["total"])))
    return Table(
        caption=f"Success per task {evaluation.label}, {evaluation.mode}",
        header=("task", "instruction", "successes", RATE_HEADER),
        rows=rows,
        words=frozenset({0, 1}),
        total=True,
    )


def _comparison(before: Measured, after: Measured, comparison: Mapping[str, Any]) -> Table:
    old, new = before.tasks, after.tasks
    paired = {task["task"]: task for task in comparison["tasks"]}
    rows: list[Sequence[Cell]] = [
        (
            str(index),
            str({**old, **new}[index]["instruction"]),
            *_rate_cells(old.get(index)),
            *_rate_cells(new.get(index)),
            *_paired_cells(paired.get(index)),
        )
        for index in sorted({**old, **new})
    ]
    totals = [_rate_cells(each.evaluation.summary["total"]) for each in (before, after)]
    rows.append(("all", "", *totals[0], *totals[1], *_paired_cells(comparison["total"])))
    return Table(
        caption="Success per task before and after",
        header=(
            *("task", "instruction", "before", RATE_HEADER, "after", RATE_HEADER),
            *("gained", "lost", "points (95 % interval)"),
        ),
        rows=rows,
        words=frozenset({0, 1}),
        total=True,
    )


def _rate_cells(counts: Mapping[str, Any] | None) -> tuple[Cell, Cell]:
    rate = rate_of(counts) if counts else None
    if rate is None:
        return "-", "-"
    text = f"{100 * rate.value:.1f} ({100 * rate.low:.1f} to {100 * rate.high:.1f})"
    bar = Bar(text=text, rate=rate.value, low=rate.low, high=rate.high)
    return f"{rate.successes}/{rate.episodes}", bar


def _paired_cells(row: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if row is None:
        return "-", "-", "no pairs"
    low, high = map(_points, row["interval"])
    difference = f"{_points(row['difference'])} ({low} to {high})"
    return str(row["only_b"]), str(row["only_a"]), difference


def _points(difference: float) -> str:
    """A difference of rates in percentage points, with its sign."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text
