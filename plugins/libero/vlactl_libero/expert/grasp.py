"""Where to grasp an object from above: a search over point clouds, the same for every object.

A candidate is a point between the fingertips and the yaw of the hand. The fingers must enclose
material that fits between them: a rim, a handle, a whole can. Costs grow with collisions of fingers
and hand, with turning the hand, and with the distance from the object's middle, which makes it tip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FINGERTIP = 0.013
"""Metres from the grip site down to the fingertips."""
HAND_BOTTOM = 0.030
"""Metres from the grip site up to the hand."""
HALF_GAP, FINGER_THICKNESS, FINGER_HALF_WIDTH = 0.038, 0.020, 0.011
HAND_HALF_LENGTH, HAND_HALF_WIDTH = 0.105, 0.035
MAX_WIDTH = 0.066
YAWS = np.deg2rad(np.arange(-90, 90, 15))
MAX_CENTRES = 36
NEAR = 0.30
TOLERATED = 3
"""Points inside the hand's boxes that may be noise of the sampling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grasp:
    """Point [3] between the fingertips, yaw of the hand, and its cost."""

    point: np.ndarray
    yaw: float
    cost: float


def plan(points: np.ndarray, obstacles: np.ndarray, failed: Sequence[Grasp] = ()) -> Grasp:
    """The cheapest grasp.

    Args:
        points: [N, 3], on the object.
        obstacles: [M, 3], on everything else but the table.
        failed: grasps that were tried in vain.
    """
    top, bottom = points[:, 2].max(), points[:, 2].min()
    lowest = bottom + FINGERTIP + 0.003
    heights = [max(top - 0.019, lowest)]
    if top - bottom > 0.09:
        heights.append(max(top - 0.026, lowest))
    middle = (points.max(axis=0) + points.min(axis=0))[:2] / 2
    near = obstacles[np.linalg.norm(obstacles[:, :2] - middle, axis=1) < NEAR]
    rng = np.random.default_rng(1)
    candidates = [
        grasp
        for index, height in enumerate(heights)
        for grasp in _at_height(points, near, middle, height, 0.02 * index, failed, rng)
    ]
    if not candidates:
        point = np.array([*middle, max(top - 0.02, bottom + FINGERTIP)])
        return Grasp(point=point, yaw=0.0, cost=np.inf)
    return min(candidates, key=lambda grasp: grasp.cost)


def _at_height(
    points: np.ndarray,
    near: np.ndarray,
    middle: np.ndarray,
    height: float,
    extra: float,
    failed: Sequence[Grasp],
    rng: np.random.Generator,
) -> list[Grasp]:
    """Candidates whose grip site is at `height`."""
    band = points[(points[:, 2] > height - FINGERTIP) & (points[:, 2] < height + 0.012)]
    if len(band) < 3:
        return []
    chosen = rng.choice(len(band), min(MAX_CENTRES, len(band)), replace=False)
    centres = np.concatenate([middle[None], band[chosen, :2]])
    solids = np.concatenate([points, near])
    solids = solids[solids[:, 2] > height - FINGERTIP - 0.003]
    found = []
    for yaw in YAWS:
        across, along = hand_axes(yaw)
        for centre in centres:
            enclosed = _enclosed(band, centre, across, along)
            if enclosed is None:
                continue
            low, high = enclosed
            point = np.array([*(centre + across * (low + high) / 2), height])
            grasp = Grasp(point=point, yaw=float(yaw), cost=0.0)
            offset = point[:2] - middle
            cost = (
                extra
                + _collision_cost(solids, grasp)
                + _crowding_cost(near, grasp)
                + 3.0 * any(same(grasp, other) for other in failed)
                + 0.30 * abs(yaw) / (np.pi / 2)
                + 4.0 * abs(offset @ along)
                + 1.2 * abs(offset @ across)
                + 0.6 * (high - low)
            )
            found.append(Grasp(point=point, yaw=float(yaw), cost=float(cost)))
    return found


def hand_axes(yaw: float) -> tuple[np.ndarray, np.ndarray]:
    """Horizontal directions [2]: along which the fingers close, and across it."""
    cosine, sine = np.cos(yaw), np.sin(yaw)
    return np.array([-sine, cosine]), np.array([cosine, sine])


def same(one: Grasp, other: Grasp) -> bool:
    """Hardly another grasp."""
    distance = np.linalg.norm((one.point - other.point)[:2])
    return bool(distance < 0.02 and abs(one.yaw - other.yaw) < 0.2)


def _enclosed(
    band: np.ndarray, centre: np.ndarray, across: np.ndarray, along: np.ndarray
) -> tuple[float, float] | None:
    """From where to where along the closing direction there is material between the fingers."""
    relative = band[:, :2] - centre
    offsets = relative @ across
    inside = (np.abs(relative @ along) < FINGER_HALF_WIDTH) & (np.abs(offsets) < HALF_GAP)
    if inside.sum() < 2:
        return None
    low, high = float(offsets[inside].min()), float(offsets[inside].max())
    return (low, high) if high - low <= MAX_WIDTH else None


def _in_hand_frame(points: np.ndarray, grasp: Grasp) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    across, along = hand_axes(grasp.yaw)
    relative = points - grasp.point
    return (
        np.abs(relative[:, :2] @ across),
        np.abs(relative[:, :2] @ along),
        relative[:, 2],
    )


def _collision_cost(solids: np.ndarray, grasp: Grasp) -> float:
    across, along, up = _in_hand_frame(solids, grasp)
    in_finger = (
        (across > HALF_GAP - 0.004)
        & (across < HALF_GAP + FINGER_THICKNESS)
        & (along < FINGER_HALF_WIDTH + 0.004)
        & (up > -FINGERTIP - 0.002)
        & (up < HAND_BOTTOM + 0.02)
    )
    in_hand = (across < HAND_HALF_LENGTH) & (along < HAND_HALF_WIDTH) & (up > HAND_BOTTOM - 0.002)
    count = int(in_finger.sum() + in_hand.sum())
    return 0.05 * count if count <= TOLERATED else 1.0 + 0.002 * count


def _crowding_cost(near: np.ndarray, grasp: Grasp) -> float:
    """Other objects close to where the fingers go."""
    across, along, up = _in_hand_frame(near, grasp)
    close = (
        (across > HALF_GAP - 0.005)
        & (across < HALF_GAP + FINGER_THICKNESS + 0.015)
        & (along < FINGER_HALF_WIDTH + 0.012)
        & (up > -FINGERTIP)
        & (up < 0.06)
    )
    return 0.01 * min(int(close.sum()), 20)
