"""Pick an object up and put it on something, or into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vlactl_libero.expert.geometry import about_z, rotation_vector
from vlactl_libero.expert.grasp import (
    FINGERTIP,
    HAND_BOTTOM,
    Grasp,
    hand_obstacle,
    in_hand_column,
    plan,
)
from vlactl_libero.expert.motion import CLOSE, OPEN
from vlactl_libero.expert.scene import Hand, Region, Scene
from vlactl_libero.expert.skill import ABOVE, Skill, obstacle_height

EMPTY = 0.074
"""Opening of a gripper that holds nothing, metres."""
MAX_OFFSET = 0.04
"""Metres by which the hand may be off the object's middle in the direction in which it closes."""
DEEP = 0.03
"""Height of a wall that the hand does not reach over, metres."""
STEPS_TO_CLOSE, STEPS_TO_GIVE_UP, STEPS_TO_REACH, STEPS_TO_LOWER = 5, 14, 90, 30
STEPS_TO_RELEASE, STEPS_TO_RETREAT, STEPS_TO_BACK_OUT = 7, 6, 8
STEPS_TO_LOSE, STEPS_TO_CARRY, STEPS_TO_STALL = 6, 120, 14
STALLED = 0.0008
"""Metres per step of a hand that something blocks, or a joint at its limit."""
NOTHING = np.zeros((0, 3))
RAISED = 0.03
"""Metres by which an object is lifted before it is put down, even if it is where it shall go."""
CLEARANCE = 0.03
"""Metres between a carried object and what is below its path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """Where the object goes: its body's [2], the surface it stands on, what is around [N, 3]."""

    target: np.ndarray
    floor: float
    around: np.ndarray
    inside: bool

    def drop(self, grip: float, yaw: float) -> float:
        """Height of the object's bottom when it is let go; the hand stays above walls.

        Args:
            grip: height of the grip site above the object's bottom.
            yaw: of the hand.
        """
        drop = self.floor + (0.02 if self.inside else 0.008)
        rim = hand_obstacle(self.around, self.target, self.target, yaw, reach=MAX_OFFSET)
        return max(drop, rim + 0.01 - grip) if rim - self.floor > DEEP else drop


class PickPlace(Skill):
    """Makes `(on name destination)` or `(in name destination)` true.

    Args:
        scene: the simulator.
        upright: [3, 3], the rotation of a hand that points down and has yaw 0.
        name: the object.
        destination: an object or a region.
        inside: it is put into the region rather than onto it.
        place: from -1 to 1, where in a region that it shares with other objects.
    """

    def __init__(
        self,
        scene: Scene,
        upright: np.ndarray,
        name: str,
        destination: str,
        *,
        inside: bool,
        place: float = 0.0,
    ) -> None:
        super().__init__(scene, upright)
        self.name, self._destination = name, destination
        self._inside, self._place = inside, place
        self._grasp: _Attempt | None = None
        self._failed: list[Grasp] = []
        self._closing = self._releasing = self._retreating = self._lowering = 0
        self._is_carrying = False
        self._untouched = self._carrying_steps = 0
        self._held_at = np.zeros(3)
        self._raised_from = np.inf
        self._yaw = 0.0
        self._last_height = self._last_opening = np.inf

    @property
    def busy(self) -> bool:
        return self._is_carrying or self._releasing > 0 or self._retreating > 0

    def act(self) -> np.ndarray:
        hand = self.scene.hand()
        if self._releasing:
            return self._release(hand)
        if self._retreating:
            return self._retreat(hand)
        if self._in_hand(hand):
            return self._carry(hand)
        return self._fetch(hand)

    def _in_hand(self, hand: Hand) -> bool:
        """Whether the object is carried; a finger may lose it for a moment."""
        holds = self.scene.holds(self.name)
        self._untouched = 0 if holds else self._untouched + 1
        if self._is_carrying and self._untouched > STEPS_TO_LOSE:
            self._is_carrying, self._carrying_steps = False, 0
            if self._grasp is not None:
                self._give_up(self._grasp)
        elif not self._is_carrying and self._closing >= STEPS_TO_CLOSE:
            is_firm = abs(hand.opening - self._last_opening) < 0.0015
            self._is_carrying = holds and is_firm and hand.opening < EMPTY
            self._raised_from = float(self.scene.position(self.name)[2])
        self._last_opening = hand.opening
        return self._is_carrying

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
        attempt.follow(hand.position)
        if attempt.steps > STEPS_TO_REACH or attempt.stalled > STEPS_TO_STALL:
            self._give_up(attempt)
            return self._reach(hand, hand.position, self._yaw, OPEN)
        if error > 0.03:
            return self._approach(hand, point)
        return self._descend(hand, point, error, turn)

    def _attempt(self) -> _Attempt:
        """The grasp that is being tried; a new one if the object has moved since it was planned."""
        attempt, scene, name = self._grasp, self.scene, self.name
        if attempt is None or (not self._closing and attempt.is_stale(scene)):
            points = scene.points(name)
            obstacles, delivery = scene.obstacles(name), self._delivery(points)
            grasp = plan(points, obstacles, scene.shoulder(), self._failed, delivery)
            attempt = _Attempt(name, grasp, scene.position(name), scene.rotation(name))
            self._grasp = attempt
        return attempt

    def _approach(self, hand: Hand, point: np.ndarray) -> np.ndarray:
        """Move to above the grasp, over everything on the way."""
        self.phase = "approach"
        top = obstacle_height(self.scene.obstacles(coarse=True), hand.position, point, margin=0.05)
        hover = max(point[2] + 0.05, top + FINGERTIP + 0.02)
        target = _over(hand.position, point, hover)
        return self._reach(hand, target, self._yaw, OPEN, tilt_deadband=0.15)

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
        self._grasp, self._closing, self._retreating = None, 0, STEPS_TO_BACK_OUT

    # ------------------------------------------------------------------------------- placing
    def _delivery(self, points: np.ndarray) -> Callable[[float, float], np.ndarray]:
        """From the height and yaw of a grasp to how far the object goes until it is let go."""
        spot, bottom = self._spot(), float(points[:, 2].min())
        shift = spot.target - self.scene.position(self.name)[:2]
        return lambda height, yaw: np.array([*shift, spot.drop(height - bottom, yaw) - bottom])

    def _carry(self, hand: Hand) -> np.ndarray:
        self._closing = 0
        self._carrying_steps += 1
        spot = self._spot()
        body = self.scene.position(self.name)
        bottom = float(self.scene.points(self.name)[:, 2].min())
        error = float(np.linalg.norm(body[:2] - spot.target))
        obstacles = self.scene.obstacles(self.name, coarse=True)
        top = obstacle_height(obstacles, body, spot.target, margin=0.075)
        travel = max(top + CLEARANCE, spot.floor + 0.05)
        above = hand.position[2] + HAND_BOTTOM - bottom
        end = hand.position[:2] + spot.target - body[:2]
        travel = max(travel, hand_obstacle(obstacles, hand.position, end, self._yaw) - above)
        tolerance = 0.025 if spot.inside else 0.012
        shift = spot.target - body[:2]
        if self._carrying_steps > STEPS_TO_CARRY:
            return self._let_go(hand)
        if body[2] > self._raised_from + RAISED:
            self._raised_from = -np.inf
        is_near = error < 2 * tolerance or (error < 0.05 and bottom < travel - 0.03)
        if is_near and self._raised_from == -np.inf:
            return self._lower(hand, spot, shift, bottom, tolerance)
        if bottom < travel - 0.05 and (way := self._way_out(hand, obstacles)) is not None:
            self.phase = "pull out"
            return self._reach(hand, hand.position + 0.04 * way, self._yaw, CLOSE)
        share = np.clip((bottom - travel + 0.05) / 0.04, 0.0, 1.0)
        self.phase = "lift" if share < 0.5 else "move"
        move = np.array([*(share * shift), travel - bottom])
        return self._reach(hand, hand.position + move, self._yaw, CLOSE)

    def _way_out(self, hand: Hand, obstacles: np.ndarray) -> np.ndarray | None:
        """Direction [3] away from what is above the object or the hand; None if nothing is."""
        points = self.scene.points(self.name)
        low, high = points.min(axis=0), points.max(axis=0)
        inside = ((obstacles > low) & (obstacles < high))[:, :2].all(axis=1)
        over_object = inside & (obstacles[:, 2] > high[2])
        over_hand = in_hand_column(obstacles, hand.position, self._yaw)
        over = obstacles[over_object | over_hand]
        if not len(over):
            return None
        away = (hand.position - over.mean(axis=0)) * [1.0, 1.0, 0.0]
        way: np.ndarray = away / max(float(np.linalg.norm(away)), 1e-6)
        return way

    def _lower(
        self, hand: Hand, spot: Spot, shift: np.ndarray, bottom: float, tolerance: float
    ) -> np.ndarray:
        """Sink in a funnel and let go."""
        drop = spot.drop(hand.position[2] - bottom, self._yaw)
        error = float(np.linalg.norm(shift))
        self._lowering = self._lowering + 1 if self.phase == "lower" else 0
        arrived = error < 1.6 * tolerance and bottom < drop + 0.012
        if arrived or self._lowering > STEPS_TO_LOWER:
            self._failed = []
            return self._let_go(hand)
        self.phase = "lower"
        hover = np.clip((error - tolerance) * 1.5, 0.0, 0.05)
        move = np.array([*shift, drop + hover - bottom])
        return self._reach(hand, hand.position + move, self._yaw, CLOSE, speed=0.8)

    def _let_go(self, hand: Hand) -> np.ndarray:
        self._releasing, self._is_carrying = STEPS_TO_RELEASE, False
        self._carrying_steps = 0
        self._held_at = hand.position
        return self._release(hand)

    def _release(self, hand: Hand) -> np.ndarray:
        self.phase = "release"
        self._releasing -= 1
        if not self._releasing:
            self._grasp, self._retreating = None, STEPS_TO_RETREAT
        rise = 0.0 if self._releasing > 3 else 0.05
        return self._reach(hand, self._held_at + rise * ABOVE, self._yaw, OPEN)

    def _retreat(self, hand: Hand) -> np.ndarray:
        self.phase = "retreat"
        self._retreating -= 1
        return self._rise(hand, self._yaw)

    def _spot(self) -> Spot:
        scene, name = self.scene, self._destination
        if scene.has(name):
            target = scene.position(name)[:2]
            return Spot(
                target=target,
                floor=_floor(scene, name),
                around=scene.points(name),
                inside=False,
            )
        region = scene.region(name)
        return Spot(
            target=region.position[:2] + self._share(region),
            floor=float(region.position[2] - region.half_height),
            around=scene.points(region.parent) if self._inside and region.parent else NOTHING,
            inside=self._inside,
        )

    def _share(self, region: Region) -> np.ndarray:
        """Offset [2] from the middle of a region: side by side along the object's shorter side."""
        points = self.scene.points(self.name)
        shorter = int(np.argmin(np.ptp(points[:, :2], axis=0)))
        offset = np.zeros(2)
        offset[shorter] = self._place * 0.6 * region.half[shorter]
        return offset


@dataclass(slots=True)
class _Attempt:
    """A grasp, and the object as it was when the grasp was planned."""

    name: str
    grasp: Grasp
    position: np.ndarray
    rotation: np.ndarray
    steps: int = 0
    stalled: int = 0
    last_hand: np.ndarray | None = None

    def follow(self, hand: np.ndarray) -> None:
        """Count steps, and those since the hand has last moved."""
        self.steps += 1
        moves = self.last_hand is None or np.linalg.norm(hand - self.last_hand) > STALLED
        self.stalled = 0 if moves else self.stalled + 1
        self.last_hand = hand

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
