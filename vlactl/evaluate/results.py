"""What an evaluation leaves behind: journals of episodes, their actions, the table of success.

    episodes-0.jsonl                   journal of rank 0 while it plays: a line per finished episode
    episodes.jsonl                     all of them in the end, ordered by (task, trial, pass)
    actions/task-03_trial-07_0.npy     what the policy did in an episode, float64 [T, A]
    weights.json                       hash of the weights that play
    redone.json                        how often episodes were played again, where they were
    eval.json                          header and summary

The header says what was measured and how: the command, the policy with a hash of its weights, mode,
temperature, seed, passes, versions, machine, and the whole sections `env` (suite, perturbation,
simulator core, ...), `model` and `lora`. The same evaluation, interrupted or not, writes the same
files.

An episode's actions are on the disk before its line is, so whoever finds the line can replay the
episode. An interrupted evaluation continues with the episodes that have no line yet.

Shapes: T control steps, A action dimensions.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ValidationError, model_validator

from vlactl.api.contracts import Task
from vlactl.errors import IntegrityError
from vlactl.evaluate.statistics import clustered_wilson
from vlactl.report.atomic import atomic_path, write_json

EVAL_REQUEST = "eval_request.json"
EVAL_SUMMARY = "eval.json"
EPISODES = "episodes.jsonl"
WEIGHTS = "weights.json"
REDONE = "redone.json"
REDONE_EPISODES = "redone_episodes"
TABLE_HEADER = ("task", "instruction", "successes", "rate", "95 % interval", "steps")
SHORT_HASH = 12
"""Digits of a hash of weights that are enough for people."""
_JSON_TYPES = {"int": (int,), "bool": (bool,), "float": (float, int)}
_MOST_NAMED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeResult:
    """How one evaluated episode ended.

    Attributes:
        task: index of the task.
        trial: index of the initial state within the task.
        repeat: 0, 1, ... where the same (task, trial) is played several times: the pass.
        success: the task was solved at some step.
        num_steps: control steps executed.
        episode_return: sum of rewards.
        seed: of everything random in the episode.
    """

    task: int
    trial: int
    repeat: int
    success: bool
    num_steps: int
    episode_return: float
    seed: int

    @property
    def key(self) -> tuple[int, int, int]:
        """What makes an episode of an evaluation unique."""
        return self.task, self.trial, self.repeat

    def to_json(self) -> str:
        """One line of the journal, without its end."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> EpisodeResult:
        """The result that a line of the journal holds.

        Raises:
            ValueError: the line is not JSON, or not of an episode.
        """
        try:
            result = cls(**json.loads(line))
        except TypeError as error:
            raise ValueError(f"not an episode: {error}") from error
        for field in fields(cls):
            value = getattr(result, field.name)
            if type(value) not in _JSON_TYPES[str(field.type)]:
                raise ValueError(f"{field.name} is {value!r}, which is no {field.type}")
        return result


# --------------------------------------------------------------------------------------------
# Journal
# --------------------------------------------------------------------------------------------
class EpisodeJournal:
    """The append-only file of finished episodes; `durable` waits for the disk at every line."""

    def __init__(self, path: Path, *, durable: bool = True) -> None:
        self.path = path
        self._durable = durable
        self._is_mended = False

    def append(self, result: EpisodeResult) -> None:
        """Add an episode."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if not self._is_mended:
                file.truncate(len(self._complete_lines()))
                self._is_mended = True
            file.write(result.to_json().encode() + b"\n")
            file.flush()
            if self._durable:
                os.fsync(file.fileno())

    def read(self) -> list[EpisodeResult]:
        """The unique episodes of this file, ordered by (task, trial, repeat).

        Raises:
            IntegrityError: a line is not what `append` writes. A last line without an end is what a
                crash leaves and is ignored.
        """
        lines = self._complete_lines().splitlines()
        return _unique(self._parse(line, number) for number, line in enumerate(lines, start=1))

    def _complete_lines(self) -> bytes:
        content = self.path.read_bytes() if self.path.exists() else b""
        return content[: content.rfind(b"\n") + 1]

    def _parse(self, line: bytes, number: int) -> EpisodeResult:
        try:
            return EpisodeResult.from_json(line.decode())
        except ValueError as error:
            raise IntegrityError(
                f"{self.path}:{number} is not an episode of an evaluation: {error}",
                hint="delete the line: its episode will be played again",
            ) from error


def read_results(folder: Path) -> list[EpisodeResult]:
    """The unique episodes that an evaluation has finished so far, on all ranks.

    Raises:
        IntegrityError: a journal is damaged.
    """
    journals = sorted(folder.glob("episodes*.jsonl"))
    return _unique(result for path in journals for result in EpisodeJournal(path).read())


def merge_journals(folder: Path) -> None:
    """Put all finished episodes into one file, in order; it takes the place of the journals.

    Whenever this is interrupted, `read_results` finds the same episodes.
    """
    results = read_results(folder)
    with atomic_path(folder / EPISODES) as temporary:
        temporary.write_text("".join(f"{result.to_json()}\n" for result in results))
    for journal in folder.glob("episodes-*.jsonl"):
        journal.unlink()


def _unique(results: Iterable[EpisodeResult]) -> list[EpisodeResult]:
    """Ordered by key; the last of several counts, because its actions are the ones on the disk."""
    by_key = {result.key: result for result in results}
    return [by_key[key] for key in sorted(by_key)]


def add_redone(folder: Path, count: int) -> int:
    """Count episodes that were played again after a simulator failed; returns those of all starts.

    Raises:
        IntegrityError: the file of the count is damaged.
    """
    path = folder / REDONE
    try:
        before = int(json.loads(path.read_text())[REDONE_EPISODES]) if path.exists() else 0
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} is damaged: {error}", hint="delete it") from error
    if count:
        write_json(path, {REDONE_EPISODES: before + count})
    return before + count


def read_request(folder: Path) -> dict[str, Any]:
    """What an evaluation was asked to play.

    Raises:
        IntegrityError: the file is damaged.
    """
    path = folder / EVAL_REQUEST
    try:
        request = json.loads(path.read_bytes())
    except ValueError as error:
        raise IntegrityError(f"{path} is damaged: {error}", hint="choose another --out") from error
    if not isinstance(request, dict) or not isinstance(request.get("policy"), dict):
        raise IntegrityError(f"{path} is damaged: it names no policy", hint="choose another --out")
    return request


def claim_weights(folder: Path, sha256: str) -> str:
    """Note the hash of the weights that play an evaluation; returns it.

    Raises:
        IntegrityError: other weights have played the first part of it.
    """
    path = folder / WEIGHTS
    try:
        before = str(json.loads(path.read_text())["sha256"]) if path.exists() else sha256
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} is damaged: {error}", hint="choose another --out") from error
    if before != sha256:
        raise IntegrityError(
            f"{folder} holds episodes of other weights: {before[:SHORT_HASH]}, and these are "
            f"{sha256[:SHORT_HASH]}",
            hint="the policy has changed since the evaluation began: choose another --out",
        )
    write_json(path, {"sha256": sha256})
    return sha256


# --------------------------------------------------------------------------------------------
# Actions
# --------------------------------------------------------------------------------------------
def save_actions(
    folder: Path, result: EpisodeResult, actions_TA: np.ndarray, *, durable: bool = True
) -> None:
    """Store what the policy did in an episode; call it before `EpisodeJournal.append`."""
    with atomic_path(_actions_path(folder, result), durable=durable) as temporary:
        np.save(temporary, actions_TA.astype(np.float64), allow_pickle=False)


def load_actions(folder: Path, result: EpisodeResult) -> np.ndarray:
    """The actions of an episode, float64 [T, A].

    Raises:
        IntegrityError: they are not there, or the file is damaged.
    """
    path = _actions_path(folder, result)
    try:
        actions_TA: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise IntegrityError(
            f"cannot read the actions of task {result.task}, trial {result.trial}: {error}",
            hint="run the evaluation again into a new folder",
        ) from error
    return actions_TA


def _actions_path(folder: Path, result: EpisodeResult) -> Path:
    name = f"task-{result.task:02d}_trial-{result.trial:02d}_{result.repeat}.npy"
    return folder / "actions" / name


# --------------------------------------------------------------------------------------------
# Summary
# --------------------------------------------------------------------------------------------
def summarise(results: Iterable[EpisodeResult], tasks: Sequence[Task]) -> dict[str, Any]:
    """Successes per task and in total, as they go into eval.json below its header.

    Intervals know that passes of the same (task, trial) are not independent.

    Args:
        results: unique episodes, see `read_results`.
        tasks: of the environment; those without an episode are left out.
    """
    by_task: dict[int, list[EpisodeResult]] = {}
    for result in results:
        by_task.setdefault(result.task, []).append(result)
    return {
        "tasks": [
            {"task": task.index, "name": task.name, "instruction": task.instruction}
            | _rates(by_task[task.index])
            for task in tasks
            if task.index in by_task
        ],
        "total": _rates([result for group in by_task.values() for result in group]),
    }


def _rates(results: Sequence[EpisodeResult]) -> dict[str, Any]:
    steps = [result.num_steps for result in results if result.success]
    pairs = [(result.task, result.trial) for result in results]
    solved = Counter(pair for pair, result in zip(pairs, results, strict=True) if result.success)
    played = Counter(pairs)
    interval = clustered_wilson([solved[pair] for pair in played], list(played.values()))
    return {
        "successes": len(steps),
        "trials": len(results),
        "rate": len(steps) / len(results) if results else None,
        "interval": list(interval),
        "mean_steps_of_successes": sum(steps) / len(steps) if steps else None,
    }


class _Rates(BaseModel):
    successes: int
    trials: int
    rate: float | None
    interval: tuple[float, float]
    mean_steps_of_successes: float | None


class _TaskRates(_Rates):
    task: int
    name: str
    instruction: str


class _Named(BaseModel):
    name: str


class _Policy(BaseModel):
    label: str
    sha256: str | None = None


class _Summary(BaseModel):
    """What readers of eval.json rely on; it says more."""

    policy: _Policy
    mode: Literal["greedy", "sampled"]
    temperature: float | None
    top_k: int | None
    passes: int
    machine: dict[str, Any]
    versions: dict[str, str]
    env: _Named
    model: _Named
    redone_episodes: int = 0
    tasks: list[_TaskRates]
    total: _Rates

    @model_validator(mode="after")
    def _has_temperature(self) -> _Summary:
        if self.mode == "sampled" and self.temperature is None:
            raise ValueError("it was sampled, and there is no temperature")
        return self


def read_summary(path: Path) -> dict[str, Any]:
    """What an eval.json says, after a check of what its readers rely on.

    Raises:
        IntegrityError: it is damaged, or another version of vlactl wrote it.
    """
    content = path.read_bytes()
    try:
        _Summary.model_validate_json(content, strict=True)
    except ValidationError as error:
        raise IntegrityError(f"{path} is not the result of an evaluation{_why(error)}") from error
    summary: dict[str, Any] = json.loads(content)
    return summary


def _why(error: ValidationError) -> str:
    """The first findings in words."""
    findings = [(".".join(map(str, each["loc"])), each) for each in error.errors()]
    missing = [key for key, finding in findings if finding["type"] == "missing"]
    if len(missing) == len(findings):
        names = ", ".join(missing[:_MOST_NAMED]) + ", ..." * (len(missing) > _MOST_NAMED)
        return f" by this version of vlactl: it lacks {names}"
    key, finding = next(each for each in findings if each[1]["type"] != "missing")
    return f": {key}: {finding['msg']}" if key else f": {finding['msg']}"


def describe_mode(summary: Mapping[str, Any]) -> str:
    """How the policy of an evaluation chose its tokens."""
    if summary["mode"] == "greedy":
        return "greedy"
    best = f" among the best {summary['top_k']}" if summary["top_k"] else ""
    return f"sampled at temperature {summary['temperature']:g}{best}"


def table(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows below `TABLE_HEADER`: one per task, then the total."""
    rows = [
        (str(task["task"]), str(task["instruction"]), *_rate_cells(task))
        for task in summary["tasks"]
    ]
    return [*rows, ("all", "", *_rate_cells(summary["total"]))]


def _rate_cells(rates: dict[str, Any]) -> tuple[str, ...]:
    if not rates["trials"]:
        return "0/0", "-", "-", "-"
    lower, upper = rates["interval"]
    steps = rates["mean_steps_of_successes"]
    return (
        f"{rates['successes']}/{rates['trials']}",
        f"{rates['rate']:.1%}",
        f"{lower:.1%} - {upper:.1%}",
        "-" if steps is None else f"{steps:.0f}",
    )
