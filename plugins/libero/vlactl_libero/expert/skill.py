"""What all skills share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from vlactl_libero.expert.geometry import about_z
from vlactl_libero.expert.motion import OPEN, TILT_DEADBAND, reach
from vlactl_libero.expert.scene import Hand, Scene

ABOVE = np.array([0.0, 0.0, 1.0])


class Skill(ABC):
    """Makes one term of a goal true.

    What it does follows from the simulator's state wherever that is possible, so that it goes on
    from wherever the hand and the objects have been pushed to.

    Args:
        scene: the simulator.
        upright: [3, 3], the rotation of a hand that points down and has yaw 0.

    Attributes:
        phase: what it is doing.
    """

    def __init__(self, scene: Scene, upright: np.ndarray) -> None:
        self.scene = scene
        self.phase = ""
        self._upright = upright

    @property
    def busy(self) -> bool:
        """It may not be left now, even if its goal is reached: something is in the hand."""
        return False

    @abstractmethod
    def act(self) -> np.ndarray:
        """The action [7] for the present state."""

    def _reach(
        self,
        hand: Hand,
        position: np.ndarray,
        yaw: float,
        grip: float,
        *,
        speed: float = 1.0,
        tilt_deadband: float = TILT_DEADBAND,
    ) -> np.ndarray:
        """Move to a pose in which the hand points down."""
        rotation = about_z(yaw) @ self._upright
        return reach(hand, position, rotation, grip, speed=speed, tilt_deadband=tilt_deadband)

    def _rise(self, hand: Hand, yaw: float, height: float = 0.06) -> np.ndarray:
        return self._reach(hand, hand.position + height * ABOVE, yaw, OPEN)


def obstacle_height(points: np.ndarray, start: np.ndarray, end: np.ndarray, margin: float) -> float:
    """Top of what is less than `margin` metres from a horizontal path; -inf if nothing is.

    Args:
        points: [N, 3].
        start: [2] or [3].
        end: [2] or [3].
        margin: metres.
    """
    path = end[:2] - start[:2]
    relative = points[:, :2] - start[:2]
    share = np.clip(relative @ path / max(path @ path, 1e-9), 0.0, 1.0)
    distance = np.linalg.norm(relative - share[:, None] * path, axis=1)
    return float(points[distance < margin, 2].max(initial=-np.inf))
