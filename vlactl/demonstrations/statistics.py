"""Statistics of demonstrations: those that LeRobot keeps, and those that OpenVLA normalises with.

Shapes: N steps, D numbers, A action, P state.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


def describe(values_ND: np.ndarray) -> dict[str, Any]:
    """LeRobot's statistics of vectors, per number."""
    values_ND = values_ND.astype(np.float64)
    return {
        **_moments(values_ND),
        **{name: np.quantile(values_ND, q, axis=0).tolist() for name, q in _QUANTILES.items()},
        "count": [len(values_ND)],
    }


def describe_pictures(histogram: np.ndarray, num_pictures: int) -> dict[str, Any]:
    """LeRobot's statistics of pictures, per channel, with values from 0 to 1.

    Args:
        histogram: int64 [3, 256], how often each value occurs.
        num_pictures: that were counted.
    """
    levels = np.arange(256) / 255
    share = histogram / histogram.sum(axis=1, keepdims=True)
    mean = share @ levels
    std = np.sqrt(np.maximum(share @ levels**2 - mean**2, 0.0))
    cumulated = share.cumsum(axis=1)
    rows = {
        "min": levels[(histogram > 0).argmax(axis=1)],
        "max": levels[255 - (histogram > 0)[:, ::-1].argmax(axis=1)],
        "mean": mean,
        "std": std,
        **{name: levels[(cumulated >= q).argmax(axis=1)] for name, q in _QUANTILES.items()},
    }
    return {name: row.reshape(3, 1, 1).tolist() for name, row in rows.items()} | {
        "count": [num_pictures]
    }


def openvla_statistics(
    actions_NA: np.ndarray, states_NP: np.ndarray, gripper: int | None, num_episodes: int
) -> dict[str, Any]:
    """Ranges as OpenVLA's `dataset_statistics.json` has them for one data set.

    Args:
        actions_NA: as the simulator takes them, of steps that are learned from. The gripper becomes
            0 closed .. 1 open and is not normalised.
        states_NP: of the same steps.
        gripper: dimension of the action; None = none.
        num_episodes: that they come from.
    """
    actions_NA = actions_NA.astype(np.float64)
    mask = [index != gripper for index in range(actions_NA.shape[1])]
    if gripper is not None:
        actions_NA[:, gripper] = (1.0 - actions_NA[:, gripper]) / 2.0
    return {
        "action": _ranges(actions_NA) | {"mask": mask},
        "proprio": _ranges(states_NP.astype(np.float64)),
        "num_transitions": len(actions_NA),
        "num_trajectories": num_episodes,
    }


def _ranges(values_ND: np.ndarray) -> dict[str, list[float]]:
    ends = {name: np.quantile(values_ND, _QUANTILES[name], axis=0) for name in ("q01", "q99")}
    return _moments(values_ND) | {name: row.tolist() for name, row in ends.items()}


def _moments(values_ND: np.ndarray) -> dict[str, list[float]]:
    return {
        "mean": values_ND.mean(axis=0).tolist(),
        "std": values_ND.std(axis=0).tolist(),
        "min": values_ND.min(axis=0).tolist(),
        "max": values_ND.max(axis=0).tolist(),
    }
