"""Pick an object up and put it on something, or into it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlactl_libero.expert.geometry import about_z, rotation_vector
from vlactl_libero.expert.grasp import FINGERTIP, Grasp, plan
from vlactl_libero.expert.motion import CLOSE, OPEN
from vlactl_libero.expert.scene import Hand, Scene
from vlactl_libero.expert.skill import ABOVE, Skill, obstacle_height

EMPTY = 0.074
"""Opening of a gripper that holds nothing, metres."""
STEPS_TO_CLOSE, STEPS_TO_GIVE_UP, STEPS_TO_REACH, STEPS_TO_LOWER = 5, 14, 90, 30
STEPS_TO_RELEASE, STEPS_TO_RETREAT = 7, 6
CLEARANCE = 0.03
"""Metres between a carried object and what is below its path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """Where the object goes: its body's [2], the surface it stands on, the wall around it."""

    target: np.ndarray
    floor: float
    rim: float
    inside: bool


class PickPlace(Skill):
    """Makes `(on name destination)` or `(in name destination)` true."""

    def __init__(
        self, scene: Scene, upright: np.ndarray, name: str, destination: str, *, inside: bool
    ) -> None:
        super().__init__(scene, upright)
        self.name, self._destination, self._inside = name, destination, inside
        self._grasp: _Attempt | None = None
        self._failed: list[Grasp] = []
        self._closing = self._releasing = self._retreating = self._lowering = 0
        self._held_at = np.zeros(3)
        self._yaw = 0.0
        self._last_height = np.inf

    @property
    def holds(self) -> bool:
        """The object is in the hand."""
        return self.scene.holds(self.name)

    def act(self) -> np.ndarray:
        hand = self.scene.hand()
        if self._releasing:
            return self._release(hand)
        if self._retreating:
            return self._retreat(hand)
        if self.holds and hand.opening < EMPTY and self._closing >= STEPS_TO_CLOSE:
            return self._carry(hand)
        return self._fetch(hand)

    # ------------------------------------------------------------------------------ grasping
    def _fetch(self, hand: Hand) -> np.ndarray:
        attempt = self._attempt()
        point, self._yaw = attempt.point(self.scene), attempt.grasp.yaw
        if self._closing:
            return self._close(hand)
        error = float(np.linalg.norm((point - hand.position)[:2]))
        height = hand.position[2] - point[2]
        turn = abs(rotation_vector(about_z(self._yaw) @ self._upright @ hand.rotation.T)[2])
        sinking = abs(hand.position[2] - self._last_height)
        self._last_height = hand.position[2]
        if error < 0.010 and abs(height) < 0.008 and turn < 0.12 and sinking < 0.005:
            self._held_at = point
            return self._close(hand)
        attempt.steps += 1
        if attempt.steps > STEPS_TO_REACH:
            self._give_up(attempt)
            return self._reach(hand, hand.position, self._yaw, OPEN)
        if error > 0.03:
            return self._approach(hand, point)
        return self._descend(hand, point, error, turn)

    def _attempt(self) -> _Attempt:
        """The grasp that is being tried; a new one if the object has moved since it was planned."""
        attempt, scene, name = self._grasp, self.scene, self.name
        if attempt is None or (not self._closing and attempt.is_stale(scene)):
            grasp = plan(scene.points(name), scene.obstacles(name), self._failed)
            attempt = _Attempt(name, grasp, scene.position(name), scene.rotation(name))
            self._grasp = attempt
        return attempt

    def _approach(self, hand: Hand, point: np.ndarray) -> np.ndarray:
        """Move to above the grasp, over everything on the way."""
        self.phase = "approach"
        top = obstacle_height(self.scene.obstacles(coarse=True), hand.position, point, margin=0.05)
        hover = max(point[2] + 0.05, top + FINGERTIP + 0.02)
        target = _over(hand.position, point, hover)
        return self._reach(hand, target, self._yaw, OPEN)

    def _descend(self, hand: Hand, point: np.ndarray, error: float, turn: float) -> np.ndarray:
        """Sink in a funnel; slowly at the end, where a stretched arm would overshoot."""
        self.phase = "descend"
        hover = np.clip((error - 0.008) * 3.0 + max(0.0, turn - 0.15) * 0.3, 0.0, 0.06)
        target = point + hover * ABOVE
        sink = target[2] - hand.position[2]
        if sink < 0:
            is_close = hand.position[2] - point[2] < 0.035
            target[2] = hand.position[2] + max(sink * 0.5, -0.012 if is_close else -0.03)
        return self._reach(hand, target, self._yaw, OPEN)

    def _close(self, hand: Hand) -> np.ndarray:
        """Hold the point: each action starts from where the hand has drifted to."""
        self.phase = "close"
        self._closing += 1
        if self._closing > STEPS_TO_GIVE_UP and self._grasp is not None:
            self._give_up(self._grasp)
        return self._reach(hand, self._held_at, self._yaw, CLOSE)

    def _give_up(self, attempt: _Attempt) -> None:
        point = attempt.point(self.scene)
        self._failed.append(Grasp(point=point, yaw=attempt.grasp.yaw, cost=np.inf))
        self._grasp, self._closing, self._retreating = None, 0, 8

    # ------------------------------------------------------------------------------- placing
    def _carry(self, hand: Hand) -> np.ndarray:
        self._closing = STEPS_TO_CLOSE
        spot = self._spot()
        body = self.scene.position(self.name)
        bottom = float(self.scene.points(self.name)[:, 2].min())
        error = float(np.linalg.norm(body[:2] - spot.target))
        obstacles = self.scene.obstacles(self.name, coarse=True)
        top = obstacle_height(obstacles, body, spot.target, margin=0.075)
        travel = max(top + CLEARANCE, spot.floor + 0.05)
        tolerance = 0.025 if spot.inside else 0.012
        shift = spot.target - body[:2]
        if error < 2 * tolerance or (error < 0.05 and bottom < travel - 0.03):
            return self._lower(hand, spot, shift, bottom, tolerance)
        share = np.clip((bottom - travel + 0.05) / 0.04, 0.0, 1.0)
        self.phase = "lift" if share < 0.5 else "move"
        move = np.array([*(share * shift), travel - bottom])
        return self._reach(hand, hand.position + move, self._yaw, CLOSE)

    def _lower(
        self, hand: Hand, spot: Spot, shift: np.ndarray, bottom: float, tolerance: float
    ) -> np.ndarray:
        """Sink in a funnel and let go; the hand stays above the wall of what the object goes in."""
        drop = spot.floor + 0.008
        if spot.inside:
            drop = spot.floor + 0.02
            if spot.rim - spot.floor > 0.05:
                drop = max(drop, bottom + spot.rim + 0.01 - hand.position[2])
        error = float(np.linalg.norm(shift))
        self._lowering = self._lowering + 1 if self.phase == "lower" else 0
        arrived = error < 1.6 * tolerance and bottom < drop + 0.012
        if arrived or self._lowering > STEPS_TO_LOWER:
            self._releasing, self._closing, self.busy = STEPS_TO_RELEASE, 0, True
            self._held_at = hand.position
            return self._release(hand)
        self.phase = "lower"
        hover = np.clip((error - tolerance) * 1.5, 0.0, 0.05)
        move = np.array([*shift, drop + hover - bottom])
        return self._reach(hand, hand.position + move, self._yaw, CLOSE, speed=0.8)

    def _release(self, hand: Hand) -> np.ndarray:
        self.phase = "release"
        self._releasing -= 1
        if not self._releasing:
            self._grasp, self._failed, self._retreating = None, [], STEPS_TO_RETREAT
        rise = 0.0 if self._releasing > 3 else 0.05
        return self._reach(hand, self._held_at + rise * ABOVE, self._yaw, OPEN)

    def _retreat(self, hand: Hand) -> np.ndarray:
        self.phase = "retreat"
        self._retreating -= 1
        self.busy = self.busy and self._retreating > 0
        return self._rise(hand, self._yaw)

    def _spot(self) -> Spot:
        scene, name = self.scene, self._destination
        if scene.has(name):
            target = scene.position(name)[:2]
            return Spot(target=target, floor=_floor(scene, name), rim=-np.inf, inside=False)
        region = scene.region(name)
        floor = region.position[2] - region.half_height
        around = scene.points(region.parent) if self._inside and region.parent else np.zeros((0, 3))
        rim = float(around[:, 2].max(initial=floor))
        return Spot(target=region.position[:2], floor=floor, rim=rim, inside=self._inside)


@dataclass(slots=True)
class _Attempt:
    """A grasp, and the object as it was when the grasp was planned."""

    name: str
    grasp: Grasp
    position: np.ndarray
    rotation: np.ndarray
    steps: int = 0

    def point(self, scene: Scene) -> np.ndarray:
        """The grasp's point, moved along with the object."""
        point: np.ndarray = scene.position(self.name) - self.position + self.grasp.point
        return point

    def is_stale(self, scene: Scene) -> bool:
        moved = np.linalg.norm(scene.position(self.name) - self.position)
        turned = np.linalg.norm(rotation_vector(scene.rotation(self.name) @ self.rotation.T))
        return bool(moved > 0.02 or turned > 0.25)


def _floor(scene: Scene, name: str) -> float:
    """Height of what an object offers to stand on: its middle, as a plate's rim is higher."""
    points = scene.points(name)
    core = np.linalg.norm(points[:, :2] - scene.position(name)[:2], axis=1) < 0.035
    return float((points[core] if core.any() else points)[:, 2].max())


def _over(position: np.ndarray, point: np.ndarray, height: float) -> np.ndarray:
    """Go up to `height` first, then there."""
    share = np.clip((position[2] - height + 0.05) / 0.04, 0.0, 1.0)
    return np.array([*(position[:2] + share * (point - position)[:2]), height])
