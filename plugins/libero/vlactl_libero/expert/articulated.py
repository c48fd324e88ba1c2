"""Drawers, doors and knobs."""

from __future__ import annotations

import numpy as np

from vlactl_libero.expert.geometry import about_axis, about_z, half_turn, rotation_vector
from vlactl_libero.expert.grasp import FINGERTIP
from vlactl_libero.expert.motion import CLOSE, OPEN, reach
from vlactl_libero.expert.scene import Hand, Joint, Scene
from vlactl_libero.expert.skill import Skill

FACING = np.deg2rad(80)
"""How far the hand is turned from pointing down to face a drawer: all of 90 degrees is hard to
reach for the arm, and not needed."""

PULLED = -0.145
"""Joint position of a drawer, metres, at which it is let go."""
LEANING = np.deg2rad(50)
"""How far a hand that pushes a drawer in is turned in the end, so as not to hit what is above."""
START_TO_LEAN = 0.12
"""Metres by which the drawer is open when the hand starts to turn: it needs room behind it."""


class Part(Skill):
    """Moves a part of a fixture by its joint, in stages."""

    def __init__(self, scene: Scene, upright: np.ndarray, name: str) -> None:
        super().__init__(scene, upright)
        self._name = name
        self._stage = self._steps = 0

    def _next(self, stage: int) -> None:
        self._stage, self._steps = stage, 0

    def _joint(self) -> Joint:
        joint = self.scene.joint(self._name)
        assert joint is not None, f"{self._name} has no joint"
        return joint


class TurnKnob(Part):
    """Makes `(turnon name)` or `(turnoff name)` true: pinch the bar on the knob and twist."""

    def __init__(self, scene: Scene, upright: np.ndarray, name: str, *, on: bool) -> None:
        super().__init__(scene, upright, name)
        self._sign = 1.0 if on else -1.0

    def act(self) -> np.ndarray:
        hand = self.scene.hand()
        centre, yaw = self._bar()
        self._steps += 1
        if self._stage == 0:
            return self._grasp(hand, centre, yaw)
        if self._stage == 1:
            self.phase = "pinch"
            if self._steps > 8:
                self._next(2)
            return self._reach(hand, centre, yaw, CLOSE)
        self.phase = "twist"
        if self._steps > 60:
            self._next(0)
        action = self._reach(hand, centre, yaw, CLOSE)
        action[3:6] = 0.0, 0.0, self._sign * 0.6
        return action

    def _grasp(self, hand: Hand, centre: np.ndarray, yaw: float) -> np.ndarray:
        self.phase = "reach"
        error = np.linalg.norm((centre - hand.position)[:2])
        turn = abs(rotation_vector(about_z(yaw) @ self._upright @ hand.rotation.T)[2])
        target = centre.copy()
        if error > 0.02 or turn > 0.15:
            target[2] += 0.06
        target[2] = max(target[2], hand.position[2] - 0.02)
        if error < 0.008 and turn < 0.12 and abs(hand.position[2] - centre[2]) < 0.01:
            self._next(1)
        return self._reach(hand, target, yaw, OPEN)

    def _bar(self) -> tuple[np.ndarray, float]:
        """Where to pinch the bar, and the yaw of a hand that closes across it."""
        points = np.concatenate(list(self.scene.body_points(self._joint().body).values()))
        top = points[points[:, 2] > points[:, 2].max() - 0.012, :2]
        _, axes = np.linalg.eigh(np.cov(top.T))
        along = axes[:, 1]
        centre = np.array([*top.mean(axis=0), points[:, 2].max() - 0.008])
        return centre, half_turn(np.arctan2(along[1], along[0]))


class OpenDrawer(Part):
    """Makes `(open name)` true: face the drawer, pinch its handle and pull."""

    @property
    def busy(self) -> bool:
        return self._stage > 2

    def act(self) -> np.ndarray:
        hand, joint = self.scene.hand(), self._joint()
        outwards = _outwards(joint)
        handle = _handle(self.scene, joint, outwards)
        rotation = about_axis(np.cross([0.0, 0.0, -1.0], -outwards), FACING) @ self._upright
        grip_point = handle + 0.004 * outwards
        self._steps += 1
        target, grip, speed = grip_point, OPEN, 1.0
        if self._stage == 0:
            self.phase, target = "reach", grip_point + 0.08 * outwards
            turn = np.linalg.norm(rotation_vector(rotation @ hand.rotation.T))
            if np.linalg.norm(target - hand.position) < 0.015 and turn < 0.12:
                self._next(1)
        elif self._stage == 1:
            self.phase, speed = "advance", 0.5
            if np.linalg.norm(grip_point - hand.position) < 0.012 or self._steps > 40:
                self._next(2)
        elif self._stage == 2:
            self.phase, grip = "pinch", CLOSE
            if self._steps > 8:
                self._next(3)
        elif self._stage == 3:
            self.phase, grip = "pull", CLOSE
            aside = grip_point - hand.position
            target = hand.position + aside + (0.05 - aside @ outwards) * outwards
            is_lost = np.linalg.norm(hand.position - handle) > 0.05
            if joint.position < PULLED or is_lost or self._steps > 80:
                self._next(4)
        else:
            self.phase, target = "back off", hand.position + 0.05 * outwards
            if self._steps > 8:
                self._next(0)
        return reach(hand, target, rotation, grip, speed=speed, tilt_deadband=0.02)


class CloseDrawer(Part):
    """Makes `(close name)` true: push the handle with a fist that leans away from the front."""

    def act(self) -> np.ndarray:
        hand, joint = self.scene.hand(), self._joint()
        outwards = _outwards(joint)
        handle = _handle(self.scene, joint, outwards)
        shut = np.clip(1.0 - abs(joint.position) / START_TO_LEAN, 0.0, 1.0)
        rotation, tip = _leaning(-outwards, shut * LEANING, self._upright)
        contact = handle - FINGERTIP * tip
        self._steps += 1
        if self._stage:
            self.phase = "push"
            if self._steps > 90:
                self._next(0)
            target = contact - 0.05 * outwards
        else:
            self.phase = "reach"
            before = contact + 0.08 * outwards
            turn = np.linalg.norm(rotation_vector(rotation @ hand.rotation.T))
            if np.linalg.norm(before - hand.position) < 0.02 and turn < 0.2:
                self._next(1)
            target = _around(hand, before, before[2], handle[2] + 0.16)
        return reach(hand, target, rotation, CLOSE, tilt_deadband=0.02)


class PushDoor(Part):
    """Makes `(open name)` or `(close name)` true: push the door's free edge with a fist."""

    def __init__(self, scene: Scene, upright: np.ndarray, name: str, *, closes: bool) -> None:
        super().__init__(scene, upright, name)
        self._sign = 1.0 if closes else -1.0

    def act(self) -> np.ndarray:
        hand, joint = self.scene.hand(), self._joint()
        parts = [points.mean(axis=0) for points in self.scene.body_points(joint.body).values()]
        edge = max(parts, key=lambda middle: np.linalg.norm((middle - joint.anchor)[:2]))
        arm = edge - joint.anchor
        way = self._sign * np.array([-arm[1], arm[0], 0.0]) / np.linalg.norm(arm[:2])
        push = np.array([*(0.8 * edge + 0.2 * joint.anchor)[:2], edge[2] + 0.02])
        self._steps += 1
        if self._stage:
            self.phase = "push"
            if self._steps > 120:
                self._next(0)
            return self._reach(hand, push + 0.05 * way, 0.0, CLOSE)
        self.phase = "reach"
        before = push - 0.09 * way
        if np.linalg.norm(before - hand.position) < 0.025:
            self._next(1)
        return self._reach(hand, _around(hand, before, before[2], edge[2] + 0.16), 0.0, CLOSE)


def _leaning(
    forwards: np.ndarray, angle: float, upright: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A hand whose fingers point down and `forwards` [3], and close across that direction.

    Returns:
        Its rotation [3, 3] and the direction [3] in which the fingers point.
    """
    tilt = about_axis(np.cross([0.0, 0.0, -1.0], forwards), angle)
    yaw = half_turn(np.arctan2(forwards[1], forwards[0]))
    return tilt @ about_z(yaw) @ upright, tilt @ [0.0, 0.0, -1.0]


def _outwards(joint: Joint) -> np.ndarray:
    """The horizontal direction [3] in which a drawer opens: its joint's position falls."""
    outwards = -joint.axis * [1.0, 1.0, 0.0]
    unit: np.ndarray = outwards / np.linalg.norm(outwards)
    return unit


def _handle(scene: Scene, joint: Joint, outwards: np.ndarray) -> np.ndarray:
    """Middle [3] of the geom that sticks out farthest."""
    parts = [_middle(points) for points in scene.body_points(joint.body).values()]
    return max(parts, key=lambda middle: float(middle @ outwards))


def _middle(points: np.ndarray) -> np.ndarray:
    middle: np.ndarray = (points.min(axis=0) + points.max(axis=0)) / 2
    return middle


def _around(hand: Hand, target: np.ndarray, height: float, top: float) -> np.ndarray:
    """The next waypoint towards `target` at `height`: up to `top`, across, down."""
    if np.linalg.norm((target - hand.position)[:2]) < 0.04:
        return np.array([*target[:2], height])
    share = np.clip((hand.position[2] - top + 0.06) / 0.04, 0.0, 1.0)
    return np.array([*(hand.position + share * (target - hand.position))[:2], top])
