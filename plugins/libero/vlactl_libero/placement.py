"""Drawing the poses of a scene from a seed, as LIBERO draws them, and of the arm.

LIBERO draws from numpy's global generator, of which a process has one, and robosuite gives up when
objects overlap. So one scene is placed at a time, whatever thread asks, and an attempt that failed
is followed by one that goes on drawing where it stopped.

Importing this module imports the simulator: only simulator processes do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from vlactl.api.noise import generator
from vlactl.errors import EnvironmentNotReadyError
from vlactl_libero import quiet

with quiet.imports():
    from robosuite.utils.errors import RandomizationError

MAX_PLACEMENTS = 100
"""Attempts to place objects without overlap; one or two are usual."""
ARM_NOISE = 0.02
"""Radians, standard deviation at each joint of the arm in LIBERO's official initial states."""
SEEDS = 2**32
"""numpy's global generator takes seeds below this."""

_GENERATOR = threading.Lock()
_Result = TypeVar("_Result")


def place(seed: int, attempt: Callable[[int], _Result]) -> _Result:
    """Seed numpy's global generator and repeat what draws poses until no two objects overlap.

    Args:
        seed: of any size; its last 32 bits count.
        attempt: builds, resets or places a scene; called with 0, 1, ...

    Raises:
        EnvironmentNotReadyError: the objects always overlap.
    """
    with _GENERATOR, quiet.stdout():
        np.random.seed(seed % SEEDS)
        for index in range(MAX_PLACEMENTS):
            try:
                return attempt(index)
            except RandomizationError:
                continue
    raise EnvironmentNotReadyError(
        f"no placement of the objects without overlap in {MAX_PLACEMENTS} attempts",
        hint='keep fixtures where they are: env.fixture_poses = "fixed"',
    )


def with_arm_noise(state: np.ndarray, joints: np.ndarray, seed: int) -> np.ndarray:
    """A copy of a state with noise on the arm, which official states carry and resets do not.

    Args:
        state: float64 [1 + nq + nv], time first.
        joints: addresses of the arm's joints in qpos.
        seed: of the noise; of any size.
    """
    noisy = state.copy()
    noisy[1 + joints] += generator("arm", seed).normal(0.0, ARM_NOISE, len(joints))
    return noisy
