"""The part of a report that compares two evaluations, task by task."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlactl.cli.report_charts import Rate
from vlactl.config.explain import render
from vlactl.errors import ConfigError, IntegrityError
from vlactl.evaluate.paired import Paired, pair
from vlactl.evaluate.results import EVAL_SUMMARY, EpisodeResult, read_results
from vlactl.report.html import Bar, Cell, Section, Table, Tile

_HEADER_KEYS = ("mode", "temperature", "top_k", "env", "model", "versions")
"""Of eval.json, that should be equal where two evaluations are compared; see results.py."""
RATE_HEADER = "% (95 % interval)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A finished evaluation: its folder, eval.json and episodes.

    `done` is the number of finished steps where it is one of a run's own, else None.
    """

    folder: Path
    summary: Mapping[str, Any]
    results: Sequence[EpisodeResult]
    done: int | None = None

    @property
    def mode(self) -> str:
        """How the policy chose its actions."""
        temperature = self.summary.get("temperature")
        mode = str(self.summary["mode"])
        return mode if temperature is None else f"{mode} at temperature {temperature:g}"

    @property
    def label(self) -> str:
        """For people."""
        if self.done is None:
            return self.folder.name
        return "after 1 step" if self.done == 1 else f"after {self.done} steps"

    @property
    def instructions(self) -> dict[int, str]:
        """Of the tasks."""
        return {task["task"]: str(task["instruction"]) for task in self.summary["tasks"]}

    @property
    def total(self) -> Rate | None:
        """Over all tasks."""
        return rate_of(self.summary["total"])


def read_evaluation(folder: Path, done: int | None = None) -> Evaluation:
    """An evaluation that has finished.

    Raises:
        ConfigError: there is none.
        IntegrityError: a file is damaged.
    """
    path = folder / EVAL_SUMMARY
    if not path.is_file():
        raise ConfigError(
            f"{folder} is not a finished evaluation: it has no {EVAL_SUMMARY}",
            hint="make one: vlactl eval --checkpoint RUN --out DIR",
        )
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        evaluation = Evaluation(
            folder=folder, summary=summary, results=read_results(folder), done=done
        )
        evaluation.mode, evaluation.total, summary["tasks"]
    except (ValueError, LookupError, TypeError) as error:
        raise IntegrityError(f"{path} is damaged: {error}") from error
    return evaluation


def evaluations_of(run: Path) -> list[Evaluation]:
    """What a run measured while it trained, in order."""
    folders = sorted(path.parent for path in run.glob(f"evals/step-*/{EVAL_SUMMARY}"))
    return [read_evaluation(folder, int(folder.name.rpartition("-")[2])) for folder in folders]


def rate_of(counts: Mapping[str, Any]) -> Rate | None:
    """The rate in a row of eval.json; None without episodes."""
    if not counts["trials"]:
        return None
    return Rate(successes=counts["successes"], episodes=counts["trials"])


def before_after(before: Evaluation | None, after: Evaluation | None) -> Section:
    """Success per task, of one evaluation or of two and what changed between them."""
    title = "Before and after"
    if after is None:
        text = "There is no evaluation: set eval.every, or measure with vlactl eval and add "
        return Section(title=title, text=[f"{text}--before DIR --after DIR."])
    if before is None:
        text = "There is one evaluation only; add another with --before DIR or --after DIR."
        return Section(title="Success per task", text=[text], tables=[_single(after)])
    return Section(title=title, text=_about(before, after), tables=[_comparison(before, after)])


def tiles(before: Evaluation | None, after: Evaluation | None) -> list[Tile]:
    """The numbers of both evaluations in total."""
    named = [("Success before", before), ("Success after", after)]
    found = [
        Tile(
            label=label,
            value=f"{rate.value:.1%}",
            note="{}/{} episodes, 95 %: {:.1%} to {:.1%}".format(
                rate.successes, rate.episodes, *rate.interval
            ),
        )
        for label, evaluation in named
        if evaluation is not None and (rate := evaluation.total)
    ]
    if before is not None and after is not None:
        paired = pair(before.results, after.results)
        if paired.difference is not None:
            low, high = paired.interval()
            note = f"{paired.pairs} pairs, 95 %: {_points(low)} to {_points(high)} points"
            value = f"{_points(paired.difference)} points"
            found.append(Tile(label="Paired difference", value=value, note=note))
    return found


def _about(before: Evaluation, after: Evaluation) -> list[str]:
    text = [
        f"Before: {before.label}, {before.mode}. After: {after.label}, {after.mode}. "
        "Episodes of the same task, trial and pass are compared in pairs: gained are those that "
        "failed before and succeed after, lost the others that differ. Intervals are 95 %: Wilson "
        "for rates, Bonett and Price's adjusted Wald for paired differences."
    ]
    differing = _differing(before, after)
    if differing:
        text.append(f"Not measured alike: {'; '.join(differing)}.")
    return text


def _differing(before: Evaluation, after: Evaluation) -> list[str]:
    """What the headers of two evaluations say differently."""
    old, new = (
        {f"{k}.{n}" if n else k: v for k in _HEADER_KEYS for n, v in _entries(each.summary.get(k))}
        for each in (before, after)
    )
    return [
        f"{key} {render(old.get(key))} before, {render(new.get(key))} after"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]


def _entries(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else [("", value)]


def _single(evaluation: Evaluation) -> Table:
    rows: list[Sequence[Cell]] = [
        (str(task["task"]), str(task["instruction"]), *_rate_cells(task))
        for task in evaluation.summary["tasks"]
    ]
    rows.append(("all", "", *_rate_cells(evaluation.summary["total"])))
    return Table(
        caption=f"Success per task {evaluation.label}, {evaluation.mode}",
        header=("task", "instruction", "successes", RATE_HEADER),
        rows=rows,
        words=frozenset({0, 1}),
        total=True,
    )


def _comparison(before: Evaluation, after: Evaluation) -> Table:
    old, new = (
        {(task["task"], str(task["instruction"])): task for task in each.summary["tasks"]}
        for each in (before, after)
    )
    rows: list[Sequence[Cell]] = []
    for index, instruction in sorted({**old, **new}):
        key = (index, instruction)
        cells = (*_rate_cells(old.get(key)), *_rate_cells(new.get(key)))
        both = key in old and key in new
        rows.append(
            (str(index), instruction, *cells, *_paired_cells(_pair(before, after, index, both)))
        )
    total = (*_rate_cells(before.summary["total"]), *_rate_cells(after.summary["total"]))
    rows.append(("all", "", *total, *_paired_cells(pair(before.results, after.results))))
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


def _pair(before: Evaluation, after: Evaluation, task: int, both: bool) -> Paired:
    if not both:
        return pair((), ())
    old, new = (
        [result for result in each.results if result.task == task] for each in (before, after)
    )
    return pair(old, new)


def _rate_cells(counts: Mapping[str, Any] | None) -> tuple[Cell, Cell]:
    rate = rate_of(counts) if counts else None
    if rate is None:
        return "-", "-"
    low, high = rate.interval
    text = f"{100 * rate.value:.1f} ({100 * low:.1f} to {100 * high:.1f})"
    bar = Bar(text=text, rate=rate.value, low=low, high=high)
    return f"{rate.successes}/{rate.episodes}", bar


def _paired_cells(paired: Paired) -> tuple[str, str, str]:
    if paired.difference is None:
        return "-", "-", "no pairs"
    low, high = paired.interval()
    difference = f"{_points(paired.difference)} ({_points(low)} to {_points(high)})"
    return str(paired.gained), str(paired.lost), difference


def _points(difference: float) -> str:
    """A difference of rates in percentage points, with its sign."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text
