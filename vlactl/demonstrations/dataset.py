"""Puts attempts together as a data set in LeRobot's layout, version 3.0.

    data/chunk-000/file-000.parquet                 all steps, one row each
    videos/observation.images.CAMERA/chunk-000/file-000.mp4
    meta/info.json, stats.json, tasks.parquet, episodes/chunk-000/file-000.parquet
    meta/dataset_statistics.json                    what OpenVLA normalises with
    meta/demonstrations.json                        how it was made, and how often that failed

A LeRobot "task" is an instruction: tasks of a suite that are told the same words share one. Which
task of the suite an episode solves is in the column `vlactl/task` of the episodes. `meta` appears
last: a folder with it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlactl.api.contracts import EnvSpec
from vlactl.demonstrations.staging import (
    HISTOGRAM_STRIDE,
    MADE_AGAIN,
    Attempt,
    Steps,
    read_steps,
    recording,
)
from vlactl.demonstrations.statistics import describe, describe_pictures, openvla_statistics
from vlactl.errors import IntegrityError
from vlactl.report.atomic import write_json
from vlactl.report.video import join_videos

VERSION = "v3.0"
STATE, ACTION, PERTURBED = "observation.state", "action", "perturbed"
GRIPPER = "gripper"
"""Name of the dimension of an action that commands a gripper, -1 open to 1 closed."""
META = Path("meta")
INFO, STATS, TASKS = META / "info.json", META / "stats.json", META / "tasks.parquet"
STATISTICS = META / "dataset_statistics.json"
RECORD = META / "demonstrations.json"
FILE = Path("chunk-000", "file-000")
EPISODES = META / "episodes" / FILE.with_suffix(".parquet")
STEPS = "data" / FILE.with_suffix(".parquet")
SUITE_TASK, SEED, NUMBER = "vlactl/task", "vlactl/seed", "vlactl/attempt"
_ASSEMBLY = "dataset"


def picture_key(camera: str) -> str:
    """The feature that holds a camera's pictures."""
    return f"observation.images.{camera}"


def video_path(camera: str) -> Path:
    """The file that holds them."""
    return "videos" / Path(picture_key(camera)) / FILE.with_suffix(".mp4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a data set is of.

    Attributes:
        environment: name of the plugin.
        suite: under which OpenVLA's statistics are found.
        spec: of the environment.
        cameras: that were recorded.
        record: for `meta/demonstrations.json`.
    """

    environment: str
    suite: str
    spec: EnvSpec
    cameras: tuple[str, ...]
    record: Mapping[str, Any]


def write_dataset(folder: Path, staging: Path, attempts: Sequence[Attempt], source: Source) -> None:
    """Put the successes among attempts together in `folder`; what is there is replaced.

    Raises:
        UserError: an attempt is damaged, or pictures cannot be joined.
    """
    chosen = [attempt for attempt in attempts if attempt.success]
    episodes = [read_steps(staging, attempt) for attempt in chosen]
    new = staging / _ASSEMBLY
    shutil.rmtree(new, ignore_errors=True)
    (new / EPISODES).parent.mkdir(parents=True)
    (new / STEPS).parent.mkdir(parents=True)
    instructions = [source.spec.tasks[attempt.task].instruction for attempt in chosen]
    words = list(dict.fromkeys(instructions))
    indices = [words.index(instruction) for instruction in instructions]
    for camera in source.cameras:
        parts = [recording(staging, attempt, camera) for attempt in chosen]
        try:
            join_videos(
                new / video_path(camera), parts, list(map(len, episodes)), source.spec.control_hz
            )
        except IntegrityError as error:
            raise IntegrityError(error.message, hint=MADE_AGAIN) from error
    pq.write_table(_steps_table(episodes, indices, source), new / STEPS)
    pq.write_table(_episodes_table(chosen, episodes, instructions, source), new / EPISODES)
    pq.write_table(_tasks_table(words), new / TASKS)
    write_json(new / STATS, _stats(episodes, source))
    write_json(new / STATISTICS, {source.suite: _openvla(episodes, source)})
    write_json(new / RECORD, source.record)
    write_json(new / INFO, _info(episodes, len(words), source))
    _move(new, folder)


def _move(new: Path, folder: Path) -> None:
    for path in sorted(new.iterdir(), key=lambda path: path.name == META.name):
        shutil.rmtree(folder / path.name, ignore_errors=True)
        os.replace(path, folder / path.name)


# --------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------
def _steps_table(episodes: Sequence[Steps], indices: Sequence[int], source: Source) -> pa.Table:
    lengths = np.array(list(map(len, episodes)))
    frames = np.concatenate([np.arange(length) for length in lengths])
    return pa.table(
        {
            STATE: _vectors(np.concatenate([steps.states_TP for steps in episodes])),
            ACTION: _vectors(np.concatenate([steps.actions_TA for steps in episodes])),
            PERTURBED: pa.array(np.concatenate([steps.perturbed_T for steps in episodes])),
            "timestamp": pa.array((frames / source.spec.control_hz).astype(np.float32)),
            "frame_index": pa.array(frames),
            "episode_index": pa.array(np.repeat(np.arange(len(episodes)), lengths)),
            "index": pa.array(np.arange(lengths.sum())),
            "task_index": pa.array(np.repeat(np.array(indices), lengths)),
        }
    )


def _vectors(values_ND: np.ndarray) -> pa.Array:
    flat = pa.array(values_ND.astype(np.float32).ravel())
    if values_ND.shape[1] == 1:
        return flat  # LeRobot has no vectors of one number
    return pa.FixedSizeListArray.from_arrays(flat, values_ND.shape[1])


def _episodes_table(
    attempts: Sequence[Attempt],
    episodes: Sequence[Steps],
    instructions: Sequence[str],
    source: Source,
) -> pa.Table:
    ends = list(accumulate(map(len, episodes)))
    begins = [0, *ends[:-1]]
    zeros = [0] * len(episodes)
    columns: dict[str, list[Any]] = {
        "episode_index": list(range(len(episodes))),
        "tasks": [[instruction] for instruction in instructions],
        "length": list(map(len, episodes)),
        "data/chunk_index": zeros,
        "data/file_index": zeros,
        "dataset_from_index": begins,
        "dataset_to_index": ends,
        "meta/episodes/chunk_index": zeros,
        "meta/episodes/file_index": zeros,
        SUITE_TASK: [attempt.task for attempt in attempts],
        NUMBER: [attempt.number for attempt in attempts],
        SEED: [attempt.seed for attempt in attempts],
    }
    for key in map(picture_key, source.cameras):
        columns |= {
            f"videos/{key}/chunk_index": zeros,
            f"videos/{key}/file_index": zeros,
            f"videos/{key}/from_timestamp": [begin / source.spec.control_hz for begin in begins],
            f"videos/{key}/to_timestamp": [end / source.spec.control_hz for end in ends],
        }
    described = [_stats([steps], source) for steps in episodes]
    for key, statistics in described[0].items():
        for name in statistics:
            columns[f"stats/{key}/{name}"] = [each[key][name] for each in described]
    return pa.table(columns)


def _tasks_table(instructions: Sequence[str]) -> pa.Table:
    """Instructions as the index of a pandas table, which is where LeRobot looks for them."""
    table = pa.table({"task_index": list(range(len(instructions))), "task": list(instructions)})
    columns = [
        {
            "name": name,
            "field_name": name,
            "pandas_type": kind,
            "numpy_type": numpy,
            "metadata": None,
        }
        for name, kind, numpy in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
    ]
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": columns}
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


# --------------------------------------------------------------------------------------------
# Metadata
# --------------------------------------------------------------------------------------------
def _info(episodes: Sequence[Steps], num_tasks: int, source: Source) -> dict[str, Any]:
    hz = source.spec.control_hz
    return {
        "codebase_version": VERSION,
        "robot_type": source.environment,
        "total_episodes": len(episodes),
        "total_frames": sum(map(len, episodes)),
        "total_tasks": num_tasks,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 500,
        "fps": int(hz) if float(hz).is_integer() else hz,
        "splits": {"train": f"0:{len(episodes)}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": _features(source),
    }


def _features(source: Source) -> dict[str, Any]:
    spec = source.spec
    actions = [
        GRIPPER if index == spec.gripper else f"a{index}" for index in range(spec.action_dim)
    ]
    states = [f"s{index}" for index in range(spec.state_dim)]
    scalars = dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")
    scalars |= {"timestamp": "float32", PERTURBED: "bool"}
    return {
        STATE: {"dtype": "float32", "shape": [spec.state_dim], "names": states},
        ACTION: {"dtype": "float32", "shape": [spec.action_dim], "names": actions},
        **{name: {"dtype": kind, "shape": [1], "names": None} for name, kind in scalars.items()},
        **{picture_key(name): _picture_feature(spec, name) for name in source.cameras},
    }


def _picture_feature(spec: EnvSpec, camera: str) -> dict[str, Any]:
    height, width = spec.cameras[camera]
    return {
        "dtype": "video",
        "shape": [height, width, 3],
        "names": ["height", "width", "channels"],
        "info": {
            "video.height": height,
            "video.width": width,
            "video.codec": "h264",
            "video.pix_fmt": "yuv420p",
            "video.is_depth_map": False,
            "video.fps": spec.control_hz,
            "video.channels": 3,
            "has_audio": False,
        },
    }


def _stats(episodes: Sequence[Steps], source: Source) -> dict[str, Any]:
    num_pictures = sum(-(-len(steps) // HISTOGRAM_STRIDE) for steps in episodes)
    return {
        STATE: describe(np.concatenate([steps.states_TP for steps in episodes])),
        ACTION: describe(np.concatenate([steps.actions_TA for steps in episodes])),
        **{
            picture_key(camera): describe_pictures(
                np.sum([steps.histograms[camera] for steps in episodes], axis=0), num_pictures
            )
            for camera in source.cameras
        },
    }


def _openvla(episodes: Sequence[Steps], source: Source) -> dict[str, Any]:
    learned = [~steps.perturbed_T for steps in episodes]
    actions = [steps.actions_TA[kept] for steps, kept in zip(episodes, learned, strict=True)]
    states = [steps.states_TP[kept] for steps, kept in zip(episodes, learned, strict=True)]
    return openvla_statistics(
        np.concatenate(actions), np.concatenate(states), source.spec.gripper, len(episodes)
    )
