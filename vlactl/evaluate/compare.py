"""Two evaluations of the same episodes: how much better the second policy is.

Episodes are paired by (task, trial, pass): both policies faced the same initial state, and where
the evaluations have the same seed also the same draws of the simulator. What only one of them has
played is counted and left out. Evaluations are refused where an equal index does not mean the same
problem: another suite, perturbation, horizon, ... Keys of `env` that an environment calls
incidental may differ, as may everything that is part of the policy. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlactl.api import registry
from vlactl.api.plugins import EnvironmentConfig
from vlactl.errors import ConfigError, IntegrityError, UserError
from vlactl.evaluate.results import (
    EPISODES,
    EVAL_REQUEST,
    EVAL_SUMMARY,
    EpisodeResult,
    read_results,
    read_summary,
)
from vlactl.evaluate.statistics import clustered_wilson, exact_paired_p, paired_difference

COMPARISON_HEADER = (
    "task", "instruction", "pairs", "A", "B", "B - A", "95 % interval", "A only", "B only",
)  # fmt: skip
_NO_SETTINGS = {
    "command", "horizon", "machine", "policy", "redone_episodes", "tasks", "total", "versions",
}  # fmt: skip
"""Parts of eval.json that say who, where and what came out; and the horizon, a key of env here."""
_HORIZON = "max_episode_steps"

Key = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A finished evaluation: where it lies, its eval.json, and the outcome of every episode."""

    path: Path
    summary: Mapping[str, Any]
    successes: Mapping[Key, bool]


def read_evaluation(path: Path) -> Evaluation:
    """Read a finished evaluation: its directory, or an eval.json with the episodes beside it.

    Raises:
        ConfigError: there is none, or it is not finished.
        IntegrityError: a file is damaged, or the files do not belong together.
    """
    folder, file = (path.parent, path) if path.is_file() else (path, path / EVAL_SUMMARY)
    if not file.is_file():
        is_begun = (folder / EVAL_REQUEST).is_file()
        raise ConfigError(
            f"{path} is not finished" if is_begun else f"{path} is no evaluation: no {file}",
            hint="continue it: the command it was started with, and --out"
            if is_begun
            else "name the folder that vlactl eval has written, or the eval.json in it",
        )
    summary = read_summary(file)
    results = read_results(folder)
    if not results:
        raise ConfigError(
            f"there are no episodes beside {file}: an evaluation is compared episode by episode",
            hint=f"keep {EPISODES} together with {EVAL_SUMMARY}",
        )
    _check_counts(file, summary, results)
    return Evaluation(
        path=path, summary=summary, successes={each.key: each.success for each in results}
    )


def _check_counts(file: Path, summary: Mapping[str, Any], results: Sequence[EpisodeResult]) -> None:
    """Refuse a summary of other episodes."""
    trials = Counter(result.task for result in results)
    successes = Counter(result.task for result in results if result.success)
    rows = {task["task"]: task for task in summary["tasks"]}
    for task in sorted({*rows, *trials}):
        row = rows.get(task, {"successes": 0, "trials": 0})
        _check_count(file, f" of task {task}", row, successes[task], trials[task])
    _check_count(file, "", summary["total"], successes.total(), trials.total())


def _check_count(
    file: Path, of_what: str, row: Mapping[str, Any], successes: int, trials: int
) -> None:
    if (row["successes"], row["trials"]) != (successes, trials):
        raise IntegrityError(
            f"{file} does not belong to the episodes beside it: it counts {row['successes']} "
            f"successes in {row['trials']} episodes{of_what}, and there are {successes} in {trials}"
        )


# --------------------------------------------------------------------------------------------
# What differs
# --------------------------------------------------------------------------------------------
def check_pairable(first: Evaluation, second: Evaluation) -> None:
    """Refuse evaluations in which an equal (task, trial) is not the same problem.

    Raises:
        ConfigError: names what differs.
    """
    env, other = _env(first.summary), _env(second.summary)
    incidental = _incidental_keys(env["name"])
    lines = [
        f"env.{key}: {env.get(key)} and {other.get(key)}"
        for key in sorted({*env, *other} - incidental)
        if env.get(key) != other.get(key)
    ]
    if not lines:
        names, others = _task_names(first), _task_names(second)
        lines = [
            f"task {task}: {names[task]} and {others[task]}"
            for task in sorted(names.keys() & others.keys())
            if names[task] != others[task]
        ]
    if lines:
        raise ConfigError(
            f"{first.path} and {second.path} cannot be paired, their episodes differ:\n"
            + "\n".join(lines),
            hint="compare evaluations of the same suite and settings",
        )


def _env(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The section `env`, with the horizon that was played where "as usual" was asked for."""
    env = dict(summary["env"])
    if _HORIZON in env:
        env[_HORIZON] = summary.get("horizon", env[_HORIZON])
    return env


def _incidental_keys(environment: str) -> frozenset[str]:
    try:
        plugin = registry.find("environment", environment)
    except UserError:  # results can be read where the simulator is not installed
        return EnvironmentConfig.incidental_keys
    assert issubclass(plugin.config, EnvironmentConfig)
    return plugin.config.incidental_keys


def _task_names(evaluation: Evaluation) -> dict[int, str]:
    return {
        int(task["task"]): f"{task['name']} ({task['instruction']})"
        for task in evaluation.summary["tasks"]
    }


def differing(first: Evaluation, second: Evaluation) -> dict[str, tuple[Any, Any]]:
    """Settings that differ between evaluations that can be paired, by dotted key."""
    one, other = (dict(_settings(each.summary)) for each in (first, second))
    return {
        key: (one.get(key), other.get(key))
        for key in {**one, **other}
        if one.get(key) != other.get(key)
    }


def _settings(summary: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in {**summary, "env": _env(summary)}.items():
        if name in _NO_SETTINGS:
            continue
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", item) for key, item in value.items())
        else:
            yield name, value
    for name in ("mujoco", "robosuite", "torch", "vlactl"):
        yield f"versions.{name}", summary["versions"].get(name)
    yield "machine.device", summary["machine"].get("device")


# --------------------------------------------------------------------------------------------
# Comparison
# --------------------------------------------------------------------------------------------
def compare(first: Evaluation, second: Evaluation) -> dict[str, Any]:
    """The comparison as JSON: per task and in total over the pairs that both have played.

    Raises:
        ConfigError: they cannot be paired, or have no episode in common.
    """
    check_pairable(first, second)
    common = sorted(first.successes.keys() & second.successes.keys())
    if not common:
        raise ConfigError(
            f"{first.path} and {second.path} have no (task, trial) in common",
            hint="evaluate the same tasks and trials",
        )
    by_task: dict[int, list[Key]] = {}
    for key in common:
        by_task.setdefault(key[0], []).append(key)
    named = {int(task["task"]): task for task in first.summary["tasks"]}
    return {
        "a": _described(first, len(common)),
        "b": _described(second, len(common)),
        "differs": {key: list(values) for key, values in differing(first, second).items()},
        "tasks": [
            {name: named[task][name] for name in ("task", "name", "instruction")}
            | _difference(first, second, keys)
            for task, keys in by_task.items()
        ],
        "total": _difference(first, second, common),
    }


def _described(evaluation: Evaluation, num_common: int) -> dict[str, Any]:
    summary = evaluation.summary
    return {
        "path": str(evaluation.path),
        **{key: summary[key] for key in ("policy", "mode", "temperature", "top_k", "passes")},
        "unpaired": len(evaluation.successes) - num_common,
    }


def _difference(first: Evaluation, second: Evaluation, keys: Sequence[Key]) -> dict[str, Any]:
    """Both rates over these episodes and what lies between them."""
    clusters: dict[tuple[int, int], list[tuple[bool, bool]]] = {}
    for key in keys:
        clusters.setdefault(key[:2], []).append((first.successes[key], second.successes[key]))
    first_K = [sum(a for a, _ in episodes) for episodes in clusters.values()]
    second_K = [sum(b for _, b in episodes) for episodes in clusters.values()]
    sizes_K = [len(episodes) for episodes in clusters.values()]
    outcomes = [outcome for episodes in clusters.values() for outcome in episodes]
    interval = paired_difference(first_K, second_K, sizes_K)
    return {
        "pairs": len(keys),
        "initial_states": len(clusters),
        "successes_a": sum(first_K),
        "successes_b": sum(second_K),
        "rate_a": sum(first_K) / len(keys),
        "rate_b": sum(second_K) / len(keys),
        "interval_a": list(clustered_wilson(first_K, sizes_K)),
        "interval_b": list(clustered_wilson(second_K, sizes_K)),
        "difference": (sum(second_K) - sum(first_K)) / len(keys),
        "interval": list(interval),
        "only_a": sum(a and not b for a, b in outcomes),
        "only_b": sum(b and not a for a, b in outcomes),
        "p": exact_paired_p([b - a for a, b in zip(first_K, second_K, strict=True)]),
    }


def describe_p(p: float) -> str:
    """With what it is called; an exact p may be smaller than a number can be."""
    return f"p = {p:.2g}" if p else "p < 1e-300"


def comparison_table(comparison: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows below `COMPARISON_HEADER`: one per task, then the total."""
    rows = [
        (str(task["task"]), str(task["instruction"]), *_cells(task)) for task in comparison["tasks"]
    ]
    return [*rows, ("all", "", *_cells(comparison["total"]))]


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    lower, upper = row["interval"]
    return (
        str(row["pairs"]),
        f"{row['rate_a']:.1%}",
        f"{row['rate_b']:.1%}",
        f"{row['difference']:+.1%}",
        f"{lower:+.1%} to {upper:+.1%}",
        str(row["only_a"]),
        str(row["only_b"]),
    )
