"""Numbers recorded from reference implementations: the shipped set, or VLACTL_GOLDENS."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vlactl.api.contracts import Episode
from vlactl.rollout.collect import Trajectory
from vlactl.train.batch import Grid, pack


@pytest.fixture(scope="session")
def goldens() -> Path:
    folder = Path(os.environ.get("VLACTL_GOLDENS") or Path(__file__).parent / "data")
    if not folder.is_dir():
        pytest.fail(f"{folder} is not a folder of goldens")
    return folder


@pytest.fixture(scope="session")
def algorithm_case(goldens: Path) -> Callable[[str, str], SimpleNamespace]:
    """Reads a case of a topic: its parameters, and its inputs and outputs as tensors."""
    folder = goldens / "algorithms"

    def read(topic: str, case_id: str) -> SimpleNamespace:
        cases = json.loads((folder / f"{topic}.json").read_text())
        case = next(case for case in cases if case["id"] == case_id)
        with np.load(folder / f"{topic}.npz") as arrays:
            given = {name: torch.tensor(arrays[f"{case_id}/in/{name}"]) for name in case["inputs"]}
            want = {name: torch.tensor(arrays[f"{case_id}/out/{name}"]) for name in case["outputs"]}
        return SimpleNamespace(params=case["params"], given=given, want=want)

    return read


@pytest.fixture(scope="session")
def valid_actions() -> Callable[[torch.Tensor], torch.Tensor]:
    """What our batches mark as valid, bool [B, C, K], where recorded episodes are done [B, C+1, K].

    Row 0 tells of the states before the first chunk. Ours end with the first action after which an
    episode is done, while the recorded simulators went on.
    """

    def packed(dones_BLK: torch.Tensor) -> torch.Tensor:
        num_rows, num_actions = dones_BLK.shape[1:]
        grid = Grid(
            group_size=1,
            num_trajectories=len(dones_BLK),
            chunks_per_episode=num_rows - 1,
            chunk_length=num_actions,
            max_episode_steps=(num_rows - 1) * num_actions,
            global_batch_size=1,
        )
        return pack(
            [_played(row, done_LK) for row, done_LK in enumerate(dones_BLK)], grid
        ).valid_BCK

    return packed


def _played(row: int, done_LK: torch.Tensor) -> Trajectory:
    done_T = done_LK[1:].flatten()
    num_steps = int(done_T.int().argmax()) + 1 if done_T.any() else len(done_T)
    num_actions = done_LK.shape[1]
    episode = Episode(task=0, trial=0, group=row, member=0, seed=0)
    rewards = np.array_split(
        np.zeros(num_steps, np.float32), range(num_actions, num_steps, num_actions)
    )
    return Trajectory(episode=episode, rewards=rewards)
