"""Action tokens <-> normalised actions <-> what the simulator executes; float64 numpy throughout.

A normalised action lies in [-1, 1] and falls into one of 255 bins between 256 equally spaced
edges; the last 256 ids of the vocabulary name the edges in falling order, so the highest id is the
lowest bin and the two lowest ids both decode to the highest bin. States enter in [-1, 1], too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlactl_openvla_oft.architecture import NUM_BINS

EDGES = np.linspace(-1.0, 1.0, NUM_BINS)
CENTERS = (EDGES[:-1] + EDGES[1:]) / 2
GRIPPER = -1
"""Index of the gripper within an action."""


def encode(normalized: np.ndarray, action_end: int) -> np.ndarray:
    """Token ids of normalised actions; `action_end` is one past the last action token."""
    return action_end - np.digitize(np.clip(normalized, -1.0, 1.0), EDGES)


def decode(tokens: np.ndarray, action_end: int) -> np.ndarray:
    """Normalised actions of token ids; ids outside the action range count as the nearest bin."""
    return CENTERS[np.clip(action_end - 1 - tokens, 0, len(CENTERS) - 1)]


def to_simulator(actions: np.ndarray) -> np.ndarray:
    """Turn the gripper from the data's 0 closed .. 1 open into the simulator's 1 close, -1 open."""
    actions = actions.copy()
    actions[..., GRIPPER] = -np.sign(2.0 * actions[..., GRIPPER] - 1.0)
    return actions


def from_simulator(actions: np.ndarray) -> np.ndarray:
    """Turn the simulator's gripper, 1 close, -1 open, into the data's 0 closed .. 1 open."""
    actions = actions.astype(np.float64)
    actions[..., GRIPPER] = (1.0 - np.sign(actions[..., GRIPPER])) / 2.0
    return actions


@dataclass(frozen=True, slots=True, eq=False)
class Range:
    """Range of each number in a data set; those outside `mask` stay as they are."""

    q01: np.ndarray
    q99: np.ndarray
    mask: np.ndarray

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """To [-1, 1]; what lies outside the range is cut off."""
        scaled = 2.0 * (values - self.q01) / (self.q99 - self.q01 + 1e-8) - 1.0
        return np.clip(np.where(self.mask, scaled, values), -1.0, 1.0)

    def unnormalize(self, normalized: np.ndarray) -> np.ndarray:
        """From [-1, 1] to the units of the data set."""
        scale = self.q99 - self.q01 + 1e-8
        return np.where(self.mask, 0.5 * (normalized + 1.0) * scale + self.q01, normalized)
