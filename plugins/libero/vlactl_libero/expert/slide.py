"""Slide an object over the table that is too flat to be picked up."""

from __future__ import annotations

import numpy as np

from vlactl_libero.expert.grasp import FINGERTIP
from vlactl_libero.expert.motion import CLOSE
from vlactl_libero.expert.scene import Hand, Scene
from vlactl_libero.expert.skill import Skill, obstacle_height

PRESS = 0.012
"""Metres below the plate's upper side that the fingertips aim at."""


class Slide(Skill):
    """Makes `(on name region)` true: press a fist onto a plate and drag it along.

    A finger sticks better to the plate than the plate to the table. Where it slips, it meets the
    rim from inside, ahead of the plate's middle, and pulls.
    """

    def __init__(self, scene: Scene, upright: np.ndarray, name: str, region: str) -> None:
        super().__init__(scene, upright)
        self._name, self._region = name, region

    def act(self) -> np.ndarray:
        hand, middle = self.scene.hand(), self.scene.position(self._name)
        points = self.scene.points(self._name)
        radius = float(np.ptp(points[:, :2], axis=0).min()) / 2
        low = _bottom(points, middle) + FINGERTIP - PRESS
        way = (self.scene.region(self._region).position - middle) * [1.0, 1.0, 0.0]
        offset = hand.position - middle
        is_above = np.linalg.norm(offset[:2]) < 0.75 * radius
        if is_above and hand.position[2] < low + PRESS + 0.005:
            self.phase = "slide"
            step = 0.035 * way / max(float(np.linalg.norm(way)), 0.035)
            target = np.array([*(hand.position + step)[:2], low])
            return self._reach(hand, target, 0.0, CLOSE, speed=0.6)
        return self._enter(hand, middle, low)

    def _enter(self, hand: Hand, middle: np.ndarray, low: float) -> np.ndarray:
        error = float(np.linalg.norm((middle - hand.position)[:2]))
        if error > 0.02:
            self.phase = "approach"
            obstacles = self.scene.obstacles(coarse=True)
            top = obstacle_height(obstacles, hand.position, middle, margin=0.05)
            height = max(low + 0.05, top + FINGERTIP + 0.02)
            share = np.clip((hand.position[2] - height + 0.05) / 0.04, 0.0, 1.0)
            move = share * (middle - hand.position)[:2]
            target = np.array([*(hand.position[:2] + move), height])
        else:
            self.phase = "descend"
            target = np.array([*middle[:2], max(low, hand.position[2] - 0.02)])
        return self._reach(hand, target, 0.0, CLOSE)


def _bottom(points: np.ndarray, middle: np.ndarray) -> float:
    """Height of the plate's upper side in its middle."""
    core = np.linalg.norm(points[:, :2] - middle[:2], axis=1) < 0.025
    return float((points[core] if core.any() else points)[:, 2].max())
