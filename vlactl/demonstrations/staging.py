"""Attempts at a demonstration, kept until the data set is put together.

    request.json                         what was asked for
    task-003_attempt-00012/
      attempt.json                       how it ended
      steps.npz                          of successes: what was seen and done, but for pictures
      CAMERA.mp4                         of successes: pictures

An attempt is there completely or not at all. Nothing but `Attempt`s enters the data set, in their
order, so it does not matter who made them, and when.

Shapes: T control steps, P state, A action.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlactl.api.contracts import Demonstration
from vlactl.errors import IntegrityError
from vlactl.report.atomic import atomic_path, write_json
from vlactl.report.video import RECORDING, write_video

HISTOGRAM_STRIDE = 8
"""Every how many pictures one is counted: neighbours hardly differ."""
MADE_AGAIN = "delete the folder of this attempt: the same command makes it again"
_OUTCOME, _STEPS, _PREFIX = "attempt.json", "steps.npz", "task-"
_ARRAYS = ("states_TP", "actions_TA", "perturbed_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt at a demonstration.

    Attributes:
        task: index of the task.
        number: of the attempt at this task: 0, 1, ...
        seed: of everything random in it.
        success: the task was solved.
        num_steps: control steps executed.
        failure: why there is no result: what became of the simulator; "" = there is one.
    """

    task: int
    number: int
    seed: int
    success: bool
    num_steps: int
    failure: str = ""

    @property
    def folder_name(self) -> str:
        """Under which it is kept."""
        return f"{_PREFIX}{self.task:03d}_attempt-{self.number:05d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What was seen and done in a successful attempt, but for the pictures."""

    states_TP: np.ndarray
    """float32."""
    actions_TA: np.ndarray
    """float32."""
    perturbed_T: np.ndarray
    """bool."""
    histograms: Mapping[str, np.ndarray]
    """Camera -> int64 [3, 256], how often each value occurs in the pictures that are counted."""

    def __len__(self) -> int:
        return len(self.actions_TA)


def stage(folder: Path, attempt: Attempt, demonstration: Demonstration, fps: float) -> None:
    """Keep an attempt, and its demonstration where it has succeeded."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{os.getpid()}-{attempt.folder_name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    if attempt.success:
        _write_steps(temporary / _STEPS, demonstration)
        for camera, frames in demonstration.images.items():
            write_video(temporary / f"{camera}.mp4", frames, fps, RECORDING)
    write_json(temporary / _OUTCOME, asdict(attempt))
    os.replace(temporary, folder / attempt.folder_name)


def read_attempts(folder: Path) -> list[Attempt]:
    """All attempts that are kept, by task and number; removes what was never finished.

    Raises:
        IntegrityError: one is damaged.
    """
    for unfinished in folder.glob(f".*-{_PREFIX}*"):
        shutil.rmtree(unfinished)
    return [_read_attempt(path) for path in sorted(folder.glob(f"{_PREFIX}*"))]


def read_steps(folder: Path, attempt: Attempt) -> Steps:
    """What was seen and done.

    Raises:
        IntegrityError: it is not there, or damaged.
    """
    path = folder / attempt.folder_name / _STEPS
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            stored = dict(arrays)
        states_TP, actions_TA, perturbed_T = (stored.pop(name) for name in _ARRAYS)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error
    return Steps(
        states_TP=states_TP, actions_TA=actions_TA, perturbed_T=perturbed_T, histograms=stored
    )


def recording(folder: Path, attempt: Attempt, camera: str) -> Path:
    """The pictures of a camera."""
    return folder / attempt.folder_name / f"{camera}.mp4"


def _write_steps(path: Path, demonstration: Demonstration) -> None:
    arrays: dict[str, Any] = {
        "states_TP": demonstration.states_TP.astype(np.float32),
        "actions_TA": demonstration.actions_TA.astype(np.float32),
        "perturbed_T": demonstration.perturbed_T.astype(bool),
        **{camera: _histogram(frames) for camera, frames in demonstration.images.items()},
    }
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays)


def _histogram(frames: np.ndarray) -> np.ndarray:
    counted = frames[::HISTOGRAM_STRIDE]
    channels = [np.bincount(counted[..., channel].ravel(), minlength=256) for channel in range(3)]
    return np.stack(channels)


def _read_attempt(path: Path) -> Attempt:
    try:
        return Attempt(**json.loads((path / _OUTCOME).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> IntegrityError:
    return IntegrityError(f"{path} is damaged: {error}", hint=MADE_AGAIN)
