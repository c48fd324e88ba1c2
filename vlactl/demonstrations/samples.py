"""Reads demonstrations as samples for supervised training; needs no torch.

A sample is a frame and the chunk of actions that the demonstrator took from there on. A chunk ends
where a perturbation burst begins: nobody should learn that. At the end of an episode it is filled
with actions that stand still and leave the gripper as it is, which count as labels, too.

Shapes: N samples, K actions of a chunk, A dimensions of an action, P of a state, T steps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from vlactl.api.contracts import EnvSpec
from vlactl.demonstrations.dataset import (
    ACTION,
    EPISODES,
    GRIPPER,
    INFO,
    PERTURBED,
    STATE,
    STATISTICS,
    STEPS,
    SUITE_TASK,
    VERSION,
    picture_key,
    video_path,
)
from vlactl.demonstrations.statistics import openvla_statistics
from vlactl.errors import ConfigError, IntegrityError
from vlactl.report.video import read_video

IN_MEMORY = 0.25
"""Of the memory that is free, for all processes of a machine: more pictures than this go to a
temporary file (see TMPDIR)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What supervised training learns from."""

    pictures: Mapping[str, np.ndarray]
    """Camera -> uint8 [N, H, W, 3], in memory or mapped from an unnamed file."""
    states_NP: np.ndarray
    """float32."""
    actions_NKA: np.ndarray
    """float32, as the simulator takes them."""
    valid_NK: np.ndarray
    """bool, actions that are labels."""
    instructions: tuple[str, ...]
    instruction_N: np.ndarray
    """int64, index into `instructions`."""
    task_N: np.ndarray
    """int64, index of the task within its suite."""
    episode_N: np.ndarray
    """int64, index of the episode within the data set."""

    def __len__(self) -> int:
        return len(self.states_NP)


def load_dataset(folder: Path, **options: Any) -> Samples:
    """The samples of one data set, see `load_datasets`."""
    return load_datasets([folder], **options)


def _load(
    folder: Path,
    episodes: list[dict[str, Any]],
    cameras: Sequence[str],
    chunk_length: int,
    image_size: int | None,
    every: int,
) -> Samples:
    info = read_info(folder)
    steps = _read_table(folder / STEPS)
    states, actions = (_matrix(steps, name, folder) for name in (STATE, ACTION))
    perturbed = _column(steps, PERTURBED, folder)
    gripper = _gripper(info)
    starts: list[np.ndarray] = []
    labels: list[tuple[np.ndarray, np.ndarray]] = []
    for episode in episodes:
        begin, end = episode["dataset_from_index"], episode["dataset_to_index"]
        starts.append(chunk_starts(perturbed[begin:end], every))
        labels.append(
            chunk_labels(
                actions[begin:end], perturbed[begin:end], starts[-1], chunk_length, gripper
            )
        )
    frames = np.concatenate(
        [begin["dataset_from_index"] + part for begin, part in zip(episodes, starts, strict=True)]
    )
    instructions = tuple(dict.fromkeys(episode["tasks"][0] for episode in episodes))
    repeats = list(map(len, starts))
    return Samples(
        pictures={
            camera: _pictures(folder, info, camera, image_size, episodes, frames)
            for camera in cameras
        },
        states_NP=states[frames],
        actions_NKA=np.concatenate([chunk for chunk, _ in labels]),
        valid_NK=np.concatenate([valid for _, valid in labels]),
        instructions=instructions,
        instruction_N=np.repeat(
            [instructions.index(episode["tasks"][0]) for episode in episodes], repeats
        ),
        task_N=np.repeat([episode[SUITE_TASK] for episode in episodes], repeats),
        episode_N=np.repeat([episode["episode_index"] for episode in episodes], repeats),
    )


def load_datasets(
    folders: Sequence[Path],
    *,
    cameras: Sequence[str],
    chunk_length: int,
    image_size: int | None = None,
    every: int = 1,
    demos_per_task: int | Sequence[int] | None = None,
) -> Samples:
    """Read samples of data sets that `vlactl demos` has made, one data set after the other.

    Tasks of different data sets are different tasks, whatever their numbers.

    Args:
        folders: of the data sets.
        cameras: whose pictures are wanted.
        chunk_length: K.
        image_size: height and width; None = as recorded. Smaller pictures are averages of larger
            ones, which is not quite what a simulator renders at that size.
        every: take only every so many-th frame, counted from the beginning of the episode and from
            the end of each burst.
        demos_per_task: see `chosen_episodes`.

    Raises:
        ConfigError: there is no data set, no such camera, or not as many episodes or tasks.
        IntegrityError: a file is damaged.
    """
    parts = [
        _load(folder, episodes, cameras, chunk_length, image_size, every)
        for folder, episodes in zip(folders, chosen_episodes(folders, demos_per_task), strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    instructions = tuple(dict.fromkeys(words for part in parts for words in part.instructions))
    numbers = [
        np.array([instructions.index(words) for words in part.instructions]) for part in parts
    ]
    first_task = [0, *accumulate(int(part.task_N.max()) + 1 for part in parts)]
    first_episode = [0, *accumulate(int(part.episode_N.max()) + 1 for part in parts)]
    together = list(zip(parts, numbers, first_task, first_episode, strict=False))
    return Samples(
        pictures={
            camera: _joined([part.pictures[camera] for part in parts])
            for camera in parts[0].pictures
        },
        states_NP=np.concatenate([part.states_NP for part in parts]),
        actions_NKA=np.concatenate([part.actions_NKA for part in parts]),
        valid_NK=np.concatenate([part.valid_NK for part in parts]),
        instructions=instructions,
        instruction_N=np.concatenate([new[part.instruction_N] for part, new, _, _ in together]),
        task_N=np.concatenate([part.task_N + first for part, _, first, _ in together]),
        episode_N=np.concatenate([part.episode_N + first for part, _, _, first in together]),
    )


def merged_statistics(folders: Sequence[Path]) -> dict[str, Any]:
    """What OpenVLA normalises with, over all data sets together, under their joined names.

    Raises:
        IntegrityError: a file is damaged.
    """
    stated = [_read_statistics(folder / STATISTICS) for folder in folders]
    if len(stated) == 1:
        return stated[0]
    steps = [_read_table(folder / STEPS) for folder in folders]
    kept = [
        ~_column(table, PERTURBED, folder) for table, folder in zip(steps, folders, strict=True)
    ]
    actions, states = (
        np.concatenate(
            [
                _matrix(table, name, folder)[rows]
                for table, rows, folder in zip(steps, kept, folders, strict=True)
            ]
        )
        for name in (ACTION, STATE)
    )
    num_episodes = sum(read_info(folder)["total_episodes"] for folder in folders)
    gripper = _gripper(read_info(folders[0]))
    name = "+".join(name for each in stated for name in each)
    return {name: openvla_statistics(actions, states, gripper, num_episodes)}


def _read_statistics(path: Path) -> dict[str, Any]:
    try:
        stated = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} is damaged: {error}", hint="make the data set anew") from None
    if not isinstance(stated, dict) or len(stated) != 1:
        raise IntegrityError(f"{path} is not of one data set", hint="make the data set anew")
    return stated


def check_fits(folder: Path, spec: EnvSpec, cameras: Sequence[str]) -> None:
    """Check that a policy for an environment can learn from a data set, without reading it.

    Args:
        folder: of the data set.
        spec: of the environment.
        cameras: of the policy.

    Raises:
        ConfigError: it is no data set, of another kind of robot, or lacks a camera or pixels.
        IntegrityError: it is damaged.
    """
    info = read_info(folder)
    for key, wanted in ((ACTION, spec.action_dim), (STATE, spec.state_dim)):
        found = math.prod(info["features"][key]["shape"])
        if found != wanted:
            raise ConfigError(
                f"{folder} has {key} of {found} numbers, the environment {wanted}",
                hint="demonstrations must be of the preset's kind of environment",
            )
    for camera in cameras:
        _shape(folder, info, camera, max(spec.cameras.get(camera, (0,))))


def read_info(folder: Path) -> dict[str, Any]:
    """What `meta/info.json` says.

    Raises:
        ConfigError: there is no data set.
        IntegrityError: it is damaged, or of another version.
    """
    path = folder / INFO
    try:
        info: dict[str, Any] = json.loads(path.read_text())
        version = info.get("codebase_version")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"{folder} holds no demonstrations",
            hint="make some: vlactl demos --suite SUITE --per-task 50 --out FOLDER",
        ) from error
    except (OSError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{path} is damaged: {error}") from error
    if version != VERSION:
        raise IntegrityError(f"{folder} is a data set of version {version}, not {VERSION}")
    if not _is_complete(info):
        raise IntegrityError(
            f"{path} does not describe demonstrations: vlactl did not write it",
            hint="make the data set with `vlactl demos`",
        )
    return info


def _is_complete(info: Mapping[str, Any]) -> bool:
    """Whether there is all that is read from `meta/info.json` later."""
    try:
        features = info["features"]
        dimensions = {name: len(list(map(int, each["shape"]))) for name, each in features.items()}
        pictures = [name for name in features if name.startswith(picture_key(""))]
        return (
            dimensions[ACTION] == dimensions[STATE] == 1
            and all(dimensions[name] == 3 for name in pictures)
            and isinstance(features[ACTION]["names"], list)
            and min(info["fps"], info["total_episodes"]) > 0
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def fingerprint(folder: Path) -> str:
    """SHA-256 of all that a data set holds but for its films, which show the same episodes.

    Raises:
        IntegrityError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in (folder / EPISODES, folder / STEPS, folder / STATISTICS):
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            raise _unreadable(path, error) from error
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------
# Labels
# --------------------------------------------------------------------------------------------
def chunk_starts(perturbed_T: np.ndarray, every: int) -> np.ndarray:
    """Frames of an episode at which a chunk may start: int64, ascending."""
    frames = np.arange(len(perturbed_T))
    # The last disturbed step up to each frame, or the step before the first.
    latest = np.maximum.accumulate(np.where(perturbed_T, frames, -1))
    starts: np.ndarray = frames[~perturbed_T & ((frames - latest - 1) % every == 0)]
    return starts


def chunk_labels(
    actions_TA: np.ndarray,
    perturbed_T: np.ndarray,
    starts: np.ndarray,
    chunk_length: int,
    gripper: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    """The chunks from `starts` on, float32 [N, K, A], and which of their actions are labels.

    Behind the end of the episode, or of what is to be learned, actions stand still and leave the
    gripper as it is.
    """
    assert not perturbed_T[starts].any(), "a chunk starts within a burst"
    still = np.zeros((chunk_length, actions_TA.shape[1]), np.float32)
    padded_TA = np.concatenate([actions_TA.astype(np.float32), still])
    if gripper is not None:
        padded_TA[len(actions_TA) :, gripper] = actions_TA[-1, gripper]
    is_over = np.concatenate([perturbed_T, np.zeros(chunk_length, bool)])
    steps_NK = starts[:, None] + np.arange(chunk_length)
    valid_NK = ~np.maximum.accumulate(is_over[steps_NK], axis=1)
    chunks_NKA = np.where(valid_NK[..., None], padded_TA[steps_NK], np.float32(0))
    if gripper is not None:
        last_N = steps_NK[:, 0] + valid_NK.sum(axis=1) - 1  # of the labels, which come first
        held_N1 = padded_TA[last_N, gripper][:, None]
        chunks_NKA[..., gripper] = np.where(valid_NK, chunks_NKA[..., gripper], held_N1)
    return chunks_NKA, valid_NK


# --------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------
def chosen_episodes(
    folders: Sequence[Path], demos_per_task: int | Sequence[int] | None
) -> list[list[dict[str, Any]]]:
    """Which episodes of each data set are learned from; reads no more than the list of episodes.

    Args:
        folders: of the data sets.
        demos_per_task: the first so many of each task: one number for all tasks, or one for each,
            those of the first data set before those of the next; None = all.

    Raises:
        ConfigError: there is no data set, or not as many episodes or tasks.
        IntegrityError: a list of episodes is damaged.
    """
    for folder in folders:
        read_info(folder)
    found = [_by_task(_read_episodes(folder)) for folder in folders]
    num_tasks = sum(map(len, found))
    wanted: Iterator[int | None]
    if demos_per_task is None:
        wanted = iter([None] * num_tasks)
    elif isinstance(demos_per_task, int):
        wanted = iter([demos_per_task] * num_tasks)
    elif len(demos_per_task) == num_tasks:
        wanted = iter(demos_per_task)
    else:
        there = ", ".join(f"{len(tasks)} in {at}" for tasks, at in zip(found, folders, strict=True))
        raise ConfigError(
            f"sft.demos_per_task has numbers for {len(demos_per_task)} tasks; the data is of "
            f"{num_tasks}: {there}",
            hint="one number for all tasks, or one for each in the order of the data",
        )
    return [
        [
            episode
            for task, episodes in tasks.items()
            for episode in _first(episodes, next(wanted), task, folder)
        ]
        for folder, tasks in zip(folders, found, strict=True)
    ]


def _by_task(episodes: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    tasks: dict[int, list[dict[str, Any]]] = {}
    for episode in sorted(episodes, key=lambda episode: int(episode[SUITE_TASK])):
        tasks.setdefault(episode[SUITE_TASK], []).append(episode)
    return tasks


def _first(
    episodes: list[dict[str, Any]], wanted: int | None, task: int, folder: Path
) -> list[dict[str, Any]]:
    if wanted is not None and len(episodes) < wanted:
        raise ConfigError(
            f"{wanted} demonstrations of task {task} are wanted; {folder} has {len(episodes)}",
            hint="ask for fewer (sft.demos_per_task), or make more with a larger --per-task in a "
            "new folder",
        )
    return episodes[:wanted]


def _gripper(info: Mapping[str, Any]) -> int | None:
    names: list[str] = info["features"][ACTION]["names"]
    return names.index(GRIPPER) if GRIPPER in names else None


def _read_episodes(folder: Path) -> list[dict[str, Any]]:
    table = _read_table(folder / EPISODES)
    if SUITE_TASK not in table.column_names:
        raise IntegrityError(
            f"{folder / EPISODES} has no column {SUITE_TASK}: vlactl did not write it"
        )
    episodes: list[dict[str, Any]] = table.to_pylist()
    return episodes


def _read_table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> IntegrityError:
    return IntegrityError(f"cannot read {path}: {error}", hint="make the data set anew")


def _column(table: pa.Table, name: str, folder: Path) -> np.ndarray:
    if name not in table.column_names:
        raise IntegrityError(f"{folder / STEPS} has no column {name}: vlactl did not write it")
    column: np.ndarray = table[name].combine_chunks().to_numpy(zero_copy_only=False)
    return column


def _matrix(table: pa.Table, name: str, folder: Path) -> np.ndarray:
    if name not in table.column_names:
        raise IntegrityError(f"{folder / STEPS} has no column {name}: vlactl did not write it")
    column = table[name].combine_chunks()
    numbers = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
    flat: np.ndarray = numbers.to_numpy()
    return flat.reshape(len(table), -1)


def _pictures(
    folder: Path,
    info: Mapping[str, Any],
    camera: str,
    image_size: int | None,
    episodes: Sequence[Mapping[str, Any]],
    frames: np.ndarray,
) -> np.ndarray:
    """The pictures of a camera at `frames`, which ascend."""
    shape = _shape(folder, info, camera, image_size)
    pictures = _room((len(frames), *shape, 3))
    filled = 0
    for begin, end in _runs(episodes):
        wanted = set(frames[(frames >= begin) & (frames < end)].tolist())
        path = folder / video_path(camera)
        decoded = read_video(path, shape, info["fps"], begin, end - begin)
        for frame, picture in enumerate(decoded, start=begin):
            if frame in wanted:
                pictures[filled] = picture
                filled += 1
    return pictures


def _shape(
    folder: Path, info: Mapping[str, Any], camera: str, image_size: int | None
) -> tuple[int, int]:
    """Of the pictures that are wanted, which are at most as large as those recorded."""
    recorded = _recorded_shape(folder, info, camera)
    if image_size is None:
        return recorded
    if image_size > min(recorded):
        raise ConfigError(
            f"pictures of {image_size} pixels are wanted; {folder} has {min(recorded)}",
            hint="make the demonstrations anew with --image-size, or set env.image_size",
        )
    return image_size, image_size


def _recorded_shape(folder: Path, info: Mapping[str, Any], camera: str) -> tuple[int, int]:
    features, prefix = info["features"], picture_key("")
    if picture_key(camera) not in features:
        known = [key.removeprefix(prefix) for key in features if key.startswith(prefix)]
        raise ConfigError(
            f'{folder} has no pictures of camera "{camera}"', hint=f"cameras: {', '.join(known)}"
        )
    height, width, _ = features[picture_key(camera)]["shape"]
    return height, width


def _runs(episodes: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, int]]:
    """First frame and end of each series of episodes that follow one another."""
    begin = end = 0
    for episode in episodes:
        if episode["dataset_from_index"] != end:
            if begin < end:
                yield begin, end
            begin = episode["dataset_from_index"]
        end = episode["dataset_to_index"]
    yield begin, end


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures one after the other, in memory if that is large enough."""
    together = _room((sum(map(len, parts)), *parts[0].shape[1:]))
    np.concatenate(parts, out=together)
    return together


def _room(shape: tuple[int, ...]) -> np.ndarray:
    """An array of bytes, in memory if that is large enough."""
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # from torchrun; all read now
    share = IN_MEMORY / num_processes
    if np.prod(shape, dtype=np.int64) <= share * psutil.virtual_memory().available:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile(prefix="vlactl-pictures-") as file:
        return np.memmap(file, np.uint8, "w+", shape=shape)  # keeps the file as long as it lives
