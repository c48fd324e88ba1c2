"""The parts of a report that come from `metrics.jsonl`: success, update and time, step by step.

Steps are counted as the console does: a line of index 0 is step 1. Runs of many steps are averaged
in equal shares of steps; then successes and episodes of a share are added up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlactl.config.run import RunConfig
from vlactl.evaluate.statistics import wilson
from vlactl.report.curves import MAX_BARS, MAX_POINTS, NUM_COLOURS, Series, curve, shares, stack
from vlactl.report.html import Chart, Section, Table

Line = Mapping[str, Any]

SUCCESS, EPISODES = "env/success_once", "env/num_trajectories"
STEP_SECONDS = "time/step"
OTHER = "other"
_CURVES = {
    "train/actor/approx_kl": (
        "KL divergence",
        "Estimated from the actions of the step: how far the update moved the policy away from the "
        "one that acted.",
    ),
    "train/mismatch_kl": (
        "KL between acting and training",
        "The same weights before the update: what differs is how they are computed.",
    ),
    "train/actor/kl_loss": ("KL to the initial policy", "As the loss counts it."),
    "train/actor/entropy_loss": ("Entropy", "Of the policy's choices; 0 means always the same."),
    "train/actor/clip_fraction": ("Clip fraction", "Share of ratios that the objective clipped."),
    "train/actor/grad_norm": ("Gradient norm", "Over all trained weights, before clipping."),
    "train/actor/lr": ("Learning rate", "Of the policy."),
    "train/critic/value_loss": ("Value loss", "Of the critic."),
    "train/critic/explained_variance": ("Explained variance", "Of returns, by the critic."),
    "env/return": ("Return", "Mean sum of rewards of an episode."),
    "env/episode_len": ("Episode length", "Mean control steps of an episode."),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Successes among episodes, with the 95 % interval of their rate."""

    successes: int
    episodes: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The success rate."""
        return self.successes / self.episodes

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


def wilson_rate(successes: int, episodes: int) -> Rate:
    """A rate with Wilson's interval, as if its episodes were independent."""
    low, high = wilson(successes, episodes)
    return Rate(successes=successes, episodes=episodes, low=low, high=high)


def steps_of(lines: Sequence[Line]) -> list[Line]:
    """Lines of training steps, without those of evaluations."""
    return [line for line in lines if STEP_SECONDS in line]


def training_rate(line: Line, config: RunConfig) -> Rate | None:
    """Success among the measured episodes of a step; None where there were none."""
    if line.get(SUCCESS) is None:
        return None
    episodes = round(line[EPISODES])
    if config.rollout.auto_reset:  # only the first episode of a trajectory is measured
        episodes = min(episodes, config.rollout.episodes_per_step)
    return wilson_rate(round(line[SUCCESS] * episodes), episodes)


def success_section(
    steps: Sequence[Line], evaluations: Sequence[tuple[int, str, Rate]], config: RunConfig
) -> Section:
    """Success of training episodes, and of evaluations: (finished steps, mode, rate) of each."""
    charts = [_training_chart(steps, config)] if _pooled(steps, config) else []
    for colour, mode in enumerate(dict.fromkeys(mode for _, mode, _ in evaluations), start=1):
        charts.append(_evaluation_chart([e for e in evaluations if e[1] == mode], mode, colour))
    if not evaluations:
        text = ["The run was not evaluated while it trained: eval.every is 0, or no step was due."]
    else:
        text = []
    return Section(title="Success", text=text, charts=charts, folded=_success_tables(evaluations))


def update_section(steps: Sequence[Line], config: RunConfig) -> Section:
    """What the update did: a curve per metric, and all the numbers that the curves show."""
    charts = []
    for name in _names(steps):
        series, (title, caption) = _averaged(steps, name), _CURVES[name]
        caption += _gap_note(steps, name) + _shares_note(steps)
        charts.append(Chart(title=title, svg=curve(series), caption=caption, alt=_in_words(series)))
    return Section(title="Update", charts=charts, folded=[_numbers(steps, config)])


def time_section(lines: Sequence[Line]) -> Section:
    """Where the seconds of a step went."""
    steps = steps_of(lines)
    names = sorted({name for line in steps for name in line if name.startswith("time/")})
    names.remove(STEP_SECONDS)
    names.sort(key=lambda name: -_mean(steps, name))
    shown = names[: NUM_COLOURS - 1]
    groups = [steps[share] for share in shares(len(steps), MAX_BARS)]
    layers = [[_mean(group, name) for group in groups] for name in shown]
    totals = [_mean(group, STEP_SECONDS) for group in groups]
    rest = [max(0.0, total - sum(layer[i] for layer in layers)) for i, total in enumerate(totals)]
    words = [name.removeprefix("time/").replace("_", " ") for name in shown]
    step = _mean(steps, STEP_SECONDS)
    chart = Chart(
        title="Seconds of a step, by phase",
        svg=stack([_middle(group) for group in groups], [*layers, rest]),
        caption="Each phase as its slowest rank saw it. Phases of ranks with different roles run "
        "at the same time: their sum may exceed the step." + _shares_note(steps, MAX_BARS),
        alt=", ".join(
            f"{word} {_mean(steps, name):.3g} s" for word, name in zip(words, shown, strict=True)
        )
        + f"; a step takes {step:.3g} s on average",
        key=[*words, OTHER],
    )
    return Section(title="Time", charts=[chart], tables=[_time_table(lines, steps, names)])


# --------------------------------------------------------------------------------------------
# Success
# --------------------------------------------------------------------------------------------
def _pooled(steps: Sequence[Line], config: RunConfig) -> list[tuple[float, Rate]]:
    """Successes and episodes of each share of the steps."""
    groups = [steps[share] for share in shares(len(steps), MAX_POINTS)]
    pooled = [(_middle(group), _pool(group, config)) for group in groups]
    return [(step, rate) for step, rate in pooled if rate]


def _pool(group: Sequence[Line], config: RunConfig) -> Rate | None:
    rates = [rate for line in group if (rate := training_rate(line, config))]
    if not rates:
        return None
    return wilson_rate(sum(rate.successes for rate in rates), sum(rate.episodes for rate in rates))


def _series(points: Sequence[tuple[float, Rate]]) -> Series:
    return Series(
        steps=[step for step, _ in points],
        values=[rate.value for _, rate in points],
        low=[rate.low for _, rate in points],
        high=[rate.high for _, rate in points],
    )


def _training_chart(steps: Sequence[Line], config: RunConfig) -> Chart:
    points = _pooled(steps, config)
    if config.algorithm.group_size > 1:
        warning = (
            f" Groups of {config.algorithm.group_size} episodes start from one state, so they are "
            "less independent than the interval supposes."
        )
    else:
        warning = ""
    return Chart(
        title="Training episodes",
        svg=curve(_series(points), percent=True),
        caption="Success rate among the episodes of a step, with 95 % Wilson intervals."
        + warning
        + _shares_note(steps),
        alt=f"{points[0][1]} at step {points[0][0]:g}, {points[-1][1]} at step {points[-1][0]:g}",
    )


def _evaluation_chart(
    evaluations: Sequence[tuple[int, str, Rate]], mode: str, colour: int
) -> Chart:
    points: list[tuple[float, Rate]] = [(done, rate) for done, _, rate in evaluations]
    return Chart(
        title=f"Evaluations, {mode}",
        svg=curve(_series(points), percent=True, marks=True, colour=colour),
        caption="Every (task, trial) of the evaluation, with 95 % Wilson intervals.",
        alt="; ".join(f"{rate} after {done:g} steps" for done, rate in points),
    )


def _success_tables(evaluations: Sequence[tuple[int, str, Rate]]) -> list[Table]:
    if not evaluations:
        return []
    return [
        Table(
            caption="All evaluations of the run",
            header=("finished steps", "mode", "successes", "rate", "95 % interval"),
            rows=[
                (
                    str(done),
                    mode,
                    f"{rate.successes}/{rate.episodes}",
                    f"{rate.value:.1%}",
                    f"{rate.low:.1%} to {rate.high:.1%}",
                )
                for done, mode, rate in evaluations
            ],
            words=frozenset({1}),
        )
    ]


# --------------------------------------------------------------------------------------------
# Update
# --------------------------------------------------------------------------------------------
def _averaged(steps: Sequence[Line], name: str) -> Series:
    """Means of a metric over shares of the steps; NaN where none of a share has it."""
    groups = [steps[share] for share in shares(len(steps), MAX_POINTS)]
    return Series(
        steps=[_middle(group) for group in groups],
        values=[
            math.nan if (mean := _known_mean(group, name)) is None else mean for group in groups
        ],
    )


def _names(steps: Sequence[Line]) -> list[str]:
    """Of the metrics that some step has."""
    return [name for name in _CURVES if any(line.get(name) is not None for line in steps)]


def _gap_note(steps: Sequence[Line], name: str) -> str:
    missing = sum(line.get(name) is None for line in steps)
    return f" Without a value: {missing} of {len(steps)} steps." if missing else ""


def _numbers(steps: Sequence[Line], config: RunConfig) -> Table:
    names = _names(steps)
    rows = []
    for share in shares(len(steps), MAX_POINTS):
        group = steps[share]
        rate = _pool(group, config)
        first, last = group[0]["step"] + 1, group[-1]["step"] + 1
        rows.append(
            (
                str(last) if first == last else f"{first}-{last}",
                f"{rate.successes}/{rate.episodes}" if rate else "-",
                str(rate) if rate else "-",
                *(_number(group, name) for name in names),
            )
        )
    header = ("step", "successes", "rate (95 % interval)", *(_CURVES[name][0] for name in names))
    return Table(caption="The numbers of the curves, step by step", header=header, rows=rows)


def _number(group: Sequence[Line], name: str) -> str:
    mean = _known_mean(group, name)
    return "-" if mean is None else f"{mean:.4g}"


def _known_mean(group: Sequence[Line], name: str) -> float | None:
    """Over the steps that have the metric: one without an update has none of the update's."""
    known = [float(line[name]) for line in group if line.get(name) is not None]
    return sum(known) / len(known) if known else None


def _in_words(series: Series) -> str:
    points = [(s, v) for s, v in zip(series.steps, series.values, strict=True) if v == v]
    (first, begin), (last, end) = points[0], points[-1]
    values = [value for _, value in points]
    return (
        f"{begin:.3g} at step {first:g}, {end:.3g} at step {last:g}; "
        f"lowest {min(values):.3g}, highest {max(values):.3g}"
    )


# --------------------------------------------------------------------------------------------
# Time
# --------------------------------------------------------------------------------------------
def _time_table(lines: Sequence[Line], steps: Sequence[Line], names: Sequence[str]) -> Table:
    whole = sum(line[STEP_SECONDS] for line in steps)
    rows = [
        _time_row(name.removeprefix("time/").replace("_", " "), steps, name, whole)
        for name in names
    ]
    rows.append(_time_row("step", steps, STEP_SECONDS, whole))
    evaluations = [line for line in lines if "time/eval" in line]
    if evaluations:
        rows.insert(-1, _time_row("evaluation (between steps)", evaluations, "time/eval", 0.0))
    return Table(
        caption="Seconds by phase",
        header=("phase", "times", "mean", "sum", "share of steps"),
        rows=rows,
        words=frozenset({0}),
        total=True,
    )


def _time_row(word: str, lines: Sequence[Line], name: str, whole: float) -> tuple[str, ...]:
    having = [line[name] for line in lines if name in line]
    total = sum(having)
    share = f"{total / whole:.1%}" if whole else "-"
    return word, str(len(having)), f"{total / len(having):.3g}", f"{total:.4g}", share


# --------------------------------------------------------------------------------------------
# Shares of steps
# --------------------------------------------------------------------------------------------
def _mean(lines: Sequence[Line], name: str) -> float:
    """Mean of a metric; seconds of a phase that a step did not have are 0."""
    return sum(line.get(name) or 0.0 for line in lines) / len(lines) if lines else 0.0


def _middle(lines: Sequence[Line]) -> float:
    """The step in the middle of a share, counted from 1."""
    return float(lines[0]["step"] + lines[-1]["step"]) / 2 + 1


def _shares_note(steps: Sequence[Line], most: int = MAX_POINTS) -> str:
    size = next(iter(shares(len(steps), most)), slice(0, 1)).stop
    return f" Each point stands for {size} steps." if size > 1 else ""
