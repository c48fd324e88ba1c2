"""Where to grasp an object from above: a search over point clouds, the same for every object.

A candidate is a point between the fingertips and the yaw of the hand. The fingers must enclose
material that fits between them: a rim, a handle, a whole can. Costs grow with collisions of fingers
and hand, with turning the hand, and with the distance from the object's middle, which makes it tip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

FINGERTIP = 0.013
"""Metres from the grip site down to the fingertips."""
HAND_BOTTOM = 0.030
"""Metres from the grip site up to the hand."""
HALF_GAP, FINGER_THICKNESS, FINGER_HALF_WIDTH = 0.038, 0.020, 0.011
ARM_BOTTOM, ARM_RADIUS = 0.13, 0.07
HAND_HALF_LENGTH, HAND_HALF_WIDTH = 0.105, 0.038
WRIST = 0.103
"""Metres from the grip site up to the flange."""
COMFORTABLE_REACH = 0.72
"""Metres from the shoulder to the flange, of 0.86."""
MAX_WIDTH = 0.066
MIN_MARGIN = 0.006
"""Metres that enclosed material should reach to either side: a finger slips off an edge."""
YAWS = np.deg2rad(np.arange(-90, 90, 15))
MAX_CENTRES = 36
NEAR = 0.18
TOLERATED = 3
"""Points inside the hand's boxes that may be noise of the sampling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grasp:
    """Point [3] between the fingertips, yaw of the hand, and its cost."""

    point: np.ndarray
    yaw: float
    cost: float

    def dearer(self, cost: float) -> Grasp:
        """The same grasp at a higher cost."""
        return replace(self, cost=float(self.cost + cost))


def plan(
    points: np.ndarray,
    obstacles: np.ndarray,
    shoulder: np.ndarray,
    failed: Sequence[Grasp] = (),
    shift: Callable[[float, float], np.ndarray] | None = None,
) -> Grasp:
    """The cheapest grasp.

    Args:
        points: [N, 3], on the object.
        obstacles: [M, 3], on everything else but the table.
        shoulder: [3], of the robot; a stretched arm moves badly.
        failed: grasps that were tried in vain.
        shift: from the height of the grip site and the yaw of the hand to how far [3] the object is
            moved before it is let go; the hand must fit there, too.
    """
    top, bottom = points[:, 2].max(), points[:, 2].min()
    lowest = bottom + FINGERTIP + 0.003
    heights = [max(top - 0.019, lowest)]
    if top - bottom > 0.09:
        heights.append(max(top - 0.026, lowest))
    middle = (points.max(axis=0) + points.min(axis=0))[:2] / 2
    near = _near(obstacles, middle)
    rng = np.random.default_rng(1)
    candidates = []
    for index, height in enumerate(heights):
        grasps = _at_height(points, near, middle, height, failed, rng)
        if shift is not None:
            moves = {yaw: shift(height, yaw) for yaw in map(float, YAWS)}
            goal = _near(obstacles, middle + next(iter(moves.values()))[:2])
            lowest_drop = min(move[2] for move in moves.values())
            grasps = [
                grasp.dearer(
                    0.6 * _collision_cost(goal - moves[grasp.yaw], grasp)
                    + 5.0 * (moves[grasp.yaw][2] - lowest_drop)
                )
                for grasp in grasps
            ]
        candidates += [g.dearer(0.02 * index + _stretch_cost(g, shoulder)) for g in grasps]
    if not candidates:
        point = np.array([*middle, max(top - 0.02, bottom + FINGERTIP)])
        return Grasp(point=point, yaw=0.0, cost=np.inf)
    return min(candidates, key=lambda grasp: grasp.cost)


def _at_height(
    points: np.ndarray,
    near: np.ndarray,
    middle: np.ndarray,
    height: float,
    failed: Sequence[Grasp],
    rng: np.random.Generator,
) -> list[Grasp]:
    """Candidates whose grip site is at `height`."""
    band = points[(points[:, 2] > height - FINGERTIP) & (points[:, 2] < height + 0.012)]
    if len(band) < 3:
        return []
    chosen = rng.choice(len(band), min(MAX_CENTRES, len(band)), replace=False)
    centres = np.concatenate([middle[None], band[chosen, :2]])
    near = near[near[:, 2] > height - FINGERTIP - 0.003]
    solids = np.concatenate([points[points[:, 2] > height - FINGERTIP - 0.003], near])
    found = []
    for yaw in YAWS:
        across, along = hand_axes(yaw)
        for centre in centres:
            enclosed = _enclosed(band, centre, across, along)
            if enclosed is None:
                continue
            low, high, margin = enclosed
            centre = centre + across * (low + high) / 2
            point = np.array([*centre, height])
            grasp = Grasp(point=point, yaw=float(yaw), cost=0.0)
            offset = point[:2] - middle
            cost = (
                _collision_cost(solids, grasp)
                + _crowding_cost(near, grasp)
                + 3.0 * any(same(grasp, other) for other in failed)
                + 0.30 * abs(yaw) / (np.pi / 2)
                + 4.0 * abs(offset @ along)
                + 1.2 * abs(offset @ across)
                + 0.6 * (high - low)
                + 60.0 * max(0.0, MIN_MARGIN - margin)
                + 10.0 * _taper(band, point, across, along)
            )
            found.append(grasp.dearer(cost))
    return found


def _near(obstacles: np.ndarray, middle: np.ndarray) -> np.ndarray:
    near: np.ndarray = obstacles[np.linalg.norm(obstacles[:, :2] - middle, axis=1) < NEAR]
    return near


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
) -> tuple[float, float, float] | None:
    """From where to where along the closing direction there is material between the fingers.

    And how far it reaches to both sides of their middle.
    """
    relative = band[:, :2] - centre
    offsets, sides = relative @ across, relative @ along
    inside = (np.abs(sides) < FINGER_HALF_WIDTH) & (np.abs(offsets) < HALF_GAP)
    if inside.sum() < 2:
        return None
    low, high = float(offsets[inside].min()), float(offsets[inside].max())
    margin = float(min(sides[inside].max(), -sides[inside].min()))
    return (low, high, margin) if high - low <= MAX_WIDTH else None


def in_hand_column(points: np.ndarray, hand: np.ndarray, yaw: float) -> np.ndarray:
    """Which points [N, 3] are in the hand, in the arm over it or above, bool [N]."""
    across, along, up = _in_hand_frame(points, hand, yaw)
    in_hand = (across < HAND_HALF_LENGTH) & (along < HAND_HALF_WIDTH) & (up > HAND_BOTTOM - 0.002)
    in_arm = (np.hypot(across, along) < ARM_RADIUS) & (up > ARM_BOTTOM)
    inside: np.ndarray = in_hand | in_arm
    return inside


def _taper(band: np.ndarray, point: np.ndarray, across: np.ndarray, along: np.ndarray) -> float:
    """Metres by which what is between the fingers gets narrower upwards: it slips out."""
    relative = band[:, :2] - point[:2]
    offsets = np.abs(relative @ across)
    inside = (np.abs(relative @ along) < FINGER_HALF_WIDTH) & (offsets < HALF_GAP)
    is_above = band[:, 2] > point[2]
    above = offsets[inside & is_above].max(initial=0.0)
    below = offsets[inside & ~is_above].max(initial=0.0)
    return 2.0 * max(0.0, float(below - above))


def _in_hand_frame(
    points: np.ndarray, hand: np.ndarray, yaw: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    across, along = hand_axes(yaw)
    relative = points - hand
    return (
        np.abs(relative[:, :2] @ across),
        np.abs(relative[:, :2] @ along),
        relative[:, 2],
    )


def _collision_cost(solids: np.ndarray, grasp: Grasp) -> float:
    across, along, up = _in_hand_frame(solids, grasp.point, grasp.yaw)
    in_finger = (
        (across > HALF_GAP - 0.004)
        & (across < HALF_GAP + FINGER_THICKNESS)
        & (along < FINGER_HALF_WIDTH + 0.004)
        & (up > -FINGERTIP - 0.002)
        & (up < HAND_BOTTOM + 0.02)
    )
    count = int(in_finger.sum() + in_hand_column(solids, grasp.point, grasp.yaw).sum())
    return 0.05 * count if count <= TOLERATED else 1.0 + 0.002 * count


def _stretch_cost(grasp: Grasp, shoulder: np.ndarray) -> float:
    wrist = grasp.point + np.array([0.0, 0.0, WRIST])
    return 4.0 * max(0.0, float(np.linalg.norm(wrist - shoulder)) - COMFORTABLE_REACH)


def _crowding_cost(near: np.ndarray, grasp: Grasp) -> float:
    """Other objects close to where the fingers go."""
    across, along, up = _in_hand_frame(near, grasp.point, grasp.yaw)
    close = (
        (across > HALF_GAP - 0.005)
        & (across < HALF_GAP + FINGER_THICKNESS + 0.015)
        & (along < FINGER_HALF_WIDTH + 0.012)
        & (up > -FINGERTIP)
        & (up < 0.06)
    )
    return 0.01 * min(int(close.sum()), 20)


def hand_obstacle(
    points: np.ndarray, start: np.ndarray, end: np.ndarray, yaw: float, reach: float = 0.0
) -> float:
    """Top of what is in the way of a hand that moves horizontally; -inf if nothing is.

    Args:
        points: [N, 3].
        start: [2] or [3].
        end: [2] or [3].
        yaw: of the hand.
        reach: metres by which the hand may be off to either side.
    """
    axes = np.stack(hand_axes(yaw))
    half = np.array([HAND_HALF_LENGTH + 0.01 + reach, HAND_HALF_WIDTH + 0.01])
    relative = (points[:, :2] - start[:2]) @ axes.T
    path = (end[:2] - start[:2]) @ axes.T
    shares = np.linspace(0.0, 1.0, 12)[:, None, None]
    met = (np.abs(relative - shares * path) < half).all(axis=-1).any(axis=0)
    return float(points[met, 2].max(initial=-np.inf))
