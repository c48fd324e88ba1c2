"""Films of recorded episodes, made by playing them again.

An evaluation and a training rollout record what the policy did, not what it saw. The same actions
on the same initial state give the same episode, so a film costs nothing until somebody wants it,
and shows every control step although the policy saw one picture per chunk. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlactl.api.contracts import Environment, EnvSpec, Episode, Outcome
from vlactl.errors import ConfigError, EnvironmentNotReadyError
from vlactl.evaluate.results import EpisodeResult, load_actions, read_results
from vlactl.report.video import film_name, grid, upscale, write_video

GRID_NAME = "grid.mp4"
GRID_PIXELS = 640
STEPS_PER_REQUEST = 8
WAIT_SECONDS = 1.0
MAX_FAILURES = 8
Frame = np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Film:
    """One episode on film; `faithful` is False when playing it again ended differently."""

    result: EpisodeResult
    path: Path
    faithful: bool


def find_recordings(source: Path) -> Path:
    """The folder with recorded episodes that a person means by a run or an evaluation.

    Of a run it is the newest evaluation, or else the newest training rollout.

    Raises:
        ConfigError: nothing has been recorded there.
    """
    if any(source.glob("episodes*.jsonl")):
        return source
    for folder in ("evals", "rollouts"):
        steps = sorted(path for path in (source / folder).glob("step-*") if read_results(path))
        if steps:
            return steps[-1]
    raise ConfigError(
        f"{source} holds no recorded episodes",
        hint="name a run or an evaluation, or record one: vlactl eval --suite SUITE --trials 2",
    )


def choose(
    results: Iterable[EpisodeResult],
    *,
    tasks: Sequence[int] | None,
    success: bool | None,
    limit: int,
) -> list[EpisodeResult]:
    """The first episodes of the wanted tasks and outcome."""
    wanted = [
        result
        for result in results
        if (tasks is None or result.task in tasks)
        and (success is None or result.success == success)
    ]
    return wanted[:limit]


def make_films(
    env: Environment,
    num_slots: int,
    recordings: Path,
    results: Sequence[EpisodeResult],
    folder: Path,
    progress: Callable[[int, int], None],
) -> list[Film]:
    """Play episodes again and write one MP4 each, and a grid of all where there are several.

    Args:
        env: renders every step.
        num_slots: of `env`.
        recordings: where the actions are.
        results: which episodes.
        folder: where the films go.
        progress: called with (films finished, films in all).
    """
    films: list[Film] = []
    clips: list[list[Frame]] = []
    for result, frames, outcome in _replays(env, num_slots, recordings, results):
        film = _write(env.spec, folder, result, frames, outcome)
        films.append(film)
        clips.append([_thumbnail(frame, len(results)) for frame in frames])
        progress(len(films), len(results))
    if len(films) > 1:
        outcomes = [film.result.success for film in films]
        write_video(folder / GRID_NAME, grid(clips, outcomes), env.spec.control_hz)
    return films


def _write(
    spec: EnvSpec, folder: Path, result: EpisodeResult, frames: Sequence[Frame], outcome: Outcome
) -> Film:
    instruction = spec.tasks[result.task].instruction
    path = folder / film_name(result.task, instruction, result.trial, result.success)
    if result.repeat:
        path = path.with_stem(f"{path.stem}_{result.repeat}")
    write_video(path, map(upscale, frames), spec.control_hz)
    same = (outcome.success, outcome.num_steps) == (result.success, result.num_steps)
    return Film(result=result, path=path, faithful=same)


def _thumbnail(frame: Frame, num_clips: int) -> Frame:
    """A frame small enough for a grid of so many."""
    columns = int(np.ceil(np.sqrt(num_clips)))
    stride = max(1, frame.shape[1] * columns // GRID_PIXELS)
    return frame[::stride, ::stride].copy()


@dataclass(slots=True)
class _Replay:
    result: EpisodeResult
    actions_TA: np.ndarray
    frames: list[Frame]
    position: int = 0

    def next_actions(self) -> np.ndarray:
        chunk = self.actions_TA[self.position : self.position + STEPS_PER_REQUEST]
        self.position += len(chunk)
        return chunk


def _replays(
    env: Environment, num_slots: int, recordings: Path, results: Sequence[EpisodeResult]
) -> Iterable[tuple[EpisodeResult, list[Frame], Outcome]]:
    waiting, playing, failures = list(results), dict[int, _Replay](), 0
    while waiting or playing:
        for slot in range(num_slots):
            if slot not in playing and waiting:
                result = waiting.pop(0)
                playing[slot] = _Replay(result, load_actions(recordings, result), [])
                env.begin(slot, _episode(result))
        for event in env.wait(1, WAIT_SECONDS):
            replay = playing[event.slot]
            if event.result is None:
                failures += 1
                if failures > MAX_FAILURES:
                    raise EnvironmentNotReadyError(f"simulators keep failing: {event.failure}")
                waiting.insert(0, playing.pop(event.slot).result)
                continue
            replay.frames.extend(event.result.frames)
            if event.result.outcome is not None:
                del playing[event.slot]
                yield replay.result, replay.frames, event.result.outcome
            elif replay.position < len(replay.actions_TA):
                env.advance(event.slot, replay.next_actions())
            else:  # recorded under a shorter horizon, or the simulator has changed
                del playing[event.slot]
                yield replay.result, replay.frames, _unfinished(replay)


def _episode(result: EpisodeResult) -> Episode:
    return Episode(
        task=result.task, trial=result.trial, group=0, member=result.repeat, seed=result.seed
    )


def _unfinished(replay: _Replay) -> Outcome:
    return Outcome(
        success_step=None, success_at_end=False, terminated=False, num_steps=replay.position
    )
