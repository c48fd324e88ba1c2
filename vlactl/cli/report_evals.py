"""The part of a report that compares two evaluations, task by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlactl.cli.report_charts import Rate
from vlactl.config.explain import render
from vlactl.config.run import RunConfig
from vlactl.errors import ConfigError
from vlactl.evaluate.compare import Evaluation, compare, describe_p, read_evaluation
from vlactl.evaluate.results import EVAL_SUMMARY, SHORT_HASH, describe_mode
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
        return describe_mode(self.evaluation.summary)

    @property
    def label(self) -> str:
        """For people."""
        if self.done is None:
            return self.folder.name
        return "after 1 step" if self.done == 1 else f"after {self.done} steps"

    @property
    def described(self) -> str:
        """What was measured, and how."""
        policy = self.evaluation.summary["policy"]
        weights = policy.get("sha256")
        of_weights = f", weights {weights[:SHORT_HASH]}" if weights else ""
        return f"{self.label}, {self.mode}, policy {policy['label']}{of_weights}"

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """The evaluations that a page is about.

    Attributes:
        before: None = there is nothing to compare with.
        after: None = there is no evaluation.
        comparison: of both, where there are both.
        left_out: why another one is not shown; "" = there is none.
    """

    before: Measured | None = None
    after: Measured | None = None
    comparison: Mapping[str, Any] | None = None
    left_out: str = ""


def choose(own: Sequence[Measured], before: Measured | None, after: Measured | None) -> Shown:
    """Those that were named, or else the run's first and last where they are two.

    One of the run that cannot be compared with the other is left out.

    Raises:
        ConfigError: both were named, and cannot be compared.
    """
    last = after or (own[-1] if own else None)
    first = before or (own[0] if own else None)
    if first is None or last is None or first.folder == last.folder:
        return Shown(after=last or first)
    try:
        comparison = compare(first.evaluation, last.evaluation)
    except ConfigError as error:
        if before and after:
            raise
        kept, other = (first, last) if before else (last, first)
        reason = "; ".join(error.message.splitlines())
        why = f"The run's own evaluation {other.label} is left out: {reason}."
        return Shown(after=kept, left_out=why)
    return Shown(before=first, after=last, comparison=comparison)


def rate_of(counts: Mapping[str, Any]) -> Rate | None:
    """The rate in a row of eval.json; None without episodes."""
    if not counts["trials"]:
        return None
    low, high = counts["interval"]
    return Rate(successes=counts["successes"], episodes=counts["trials"], low=low, high=high)


def before_after(shown: Shown, config: RunConfig) -> tuple[list[Tile], Section]:
    """The total at the top of the page, and success per task with what changed."""
    title, before, after = "Before and after", shown.before, shown.after
    if after is None:
        text = "There is no evaluation: set eval.every, or measure with vlactl eval and add "
        return [], Section(title=title, text=[f"{text}--before DIR --after DIR."])
    if before is None or shown.comparison is None:
        only = "There is one evaluation only; add another with --before DIR or --after DIR."
        about = [f"Measured: {after.described}.", *_of_another(after, config)]
        return _tiles([("Success", after.total)]), Section(
            title="Success per task", text=[shown.left_out or only, *about], tables=[_single(after)]
        )
    total = shown.comparison["total"]
    tiles = _tiles([("Success before", _side(total, "a")), ("Success after", _side(total, "b"))])
    return (
        [*tiles, _difference_tile(total)],
        Section(
            title=title,
            text=[
                *_about(before, after, shown.comparison),
                *_of_another(before, config),
                *_of_another(after, config),
            ],
            tables=[_comparison(shown.comparison)],
        ),
    )


def _tiles(named: Sequence[tuple[str, Rate | None]]) -> list[Tile]:
    return [
        Tile(
            label=label,
            value=f"{rate.value:.1%}",
            note=f"{rate.successes}/{rate.episodes} episodes, "
            f"95 %: {rate.low:.1%} to {rate.high:.1%}",
        )
        for label, rate in named
        if rate
    ]


def _difference_tile(total: Mapping[str, Any]) -> Tile:
    low, high = map(_points, total["interval"])
    return Tile(
        label="Paired difference",
        value=f"{_points(total['difference'])} points",
        note=f"{total['pairs']} pairs, 95 %: {low} to {high}, {describe_p(total['p'])}",
    )


def _about(before: Measured, after: Measured, comparison: Mapping[str, Any]) -> list[str]:
    text = [
        f"Before: {before.described}. After: {after.described}.",
        "Episodes of the same task, trial and pass are compared in pairs: gained are those that "
        "failed before and succeed after, lost the others that differ. Intervals are 95 %: Wilson "
        "for rates, Newcombe's from paired Wilson intervals for differences.",
    ]
    unpaired = [
        f"{count} of {len(each.evaluation.successes)} episodes {each.label}"
        for side, each in (("a", before), ("b", after))
        if (count := comparison[side]["unpaired"])
    ]
    if unpaired:
        text.append(f"Without a pair, and left out of all rates: {' and '.join(unpaired)}.")
    if differs := comparison["differs"]:
        changes = [f"{key} {render(a)}, then {render(b)}" for key, (a, b) in differs.items()]
        text.append(f"Not measured alike: {'; '.join(changes)}.")
    return text


def _of_another(each: Measured, config: RunConfig) -> list[str]:
    """That an evaluation cannot be of this run, where that is plain."""
    summary = each.evaluation.summary
    names = (("environment", "env", config.env.name), ("model", "model", config.model.name))
    return [
        f"{each.label} is no evaluation of this run: "
        f"its {kind} is {summary[section]['name']}, the run's {name}."
        for kind, section, name in names
        if summary[section]["name"] != name
    ]


def _single(evaluation: Measured) -> Table:
    rows: list[Sequence[Cell]] = [
        (str(index), str(task["instruction"]), *_rate_cells(rate_of(task)))
        for index, task in evaluation.tasks.items()
    ]
    rows.append(("all", "", *_rate_cells(evaluation.total)))
    return Table(
        caption=f"Success per task {evaluation.label}, {evaluation.mode}",
        header=("task", "instruction", "successes", RATE_HEADER),
        rows=rows,
        words=frozenset({0, 1}),
        total=True,
    )


def _comparison(comparison: Mapping[str, Any]) -> Table:
    rows: list[Sequence[Cell]] = [
        (str(task["task"]), str(task["instruction"]), *_paired_cells(task))
        for task in comparison["tasks"]
    ]
    rows.append(("all", "", *_paired_cells(comparison["total"])))
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


def _rate_cells(rate: Rate | None) -> tuple[Cell, Cell]:
    if rate is None:
        return "-", "-"
    text = f"{100 * rate.value:.1f} ({100 * rate.low:.1f} to {100 * rate.high:.1f})"
    bar = Bar(text=text, rate=rate.value, low=rate.low, high=rate.high)
    return f"{rate.successes}/{rate.episodes}", bar


def _paired_cells(row: Mapping[str, Any]) -> tuple[Cell, ...]:
    low, high = map(_points, row["interval"])
    difference = f"{_points(row['difference'])} ({low} to {high})"
    sides = (*_rate_cells(_side(row, "a")), *_rate_cells(_side(row, "b")))
    return (*sides, str(row["only_b"]), str(row["only_a"]), difference)


def _side(row: Mapping[str, Any], side: str) -> Rate:
    """The rate of one evaluation over the episodes that both have played."""
    low, high = row[f"interval_{side}"]
    return Rate(successes=row[f"successes_{side}"], episodes=row["pairs"], low=low, high=high)


def _points(difference: float) -> str:
    """A difference of rates in percentage points, with its sign."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text
