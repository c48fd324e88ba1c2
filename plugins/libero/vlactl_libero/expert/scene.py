"""What the expert reads in a simulator: the hand, objects as point clouds, contacts and joints.

Everything comes from the simulator's data: the compiled model is shared by simulators whose
fixtures stand in different places. Metres, in the world's frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np

from vlactl_libero.expert.geometry import sample_geom
from vlactl_libero.task_model import TaskModel

SPACING = 0.006
COARSE_SPACING = 0.014
MOVED = 5e-4
"""Metres, or 50 times as many radians, by which a geom may move before points are recomputed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hand:
    """The gripper: where its fingertips meet, how it is turned, how far it is open."""

    position: np.ndarray
    rotation: np.ndarray
    opening: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A site of LIBERO's: a box [3] of half extents in its own frame, on or in `parent`."""

    position: np.ndarray
    rotation: np.ndarray
    half: np.ndarray
    parent: str | None

    @property
    def half_height(self) -> float:
        """Half of its extent along the vertical."""
        return float(np.abs(self.rotation[2]) @ self.half)


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint:
    """A joint of a fixture now: `axis` and `anchor` [3] in the world's frame."""

    body: int
    position: float
    axis: np.ndarray
    anchor: np.ndarray
    slides: bool


class Scene:
    """One simulator of a task.

    Args:
        task: what is simulated.
        data: of the simulator.
    """

    def __init__(self, task: TaskModel, data: mujoco.MjData) -> None:
        self.domain = task.domain
        self._model, self._data = task.model, data
        self._site, self._finger_joints = task.arm.site, task.finger_joints
        self._shoulder = task.model.body("robot0_link1").id
        self._bodies: dict[str, int] = task.domain.obj_body_id
        self._clouds = _clouds(task.model, self._bodies)
        self._fingers = [
            _geom_ids(task.model, task.domain.robots[0].gripper.important_geoms[finger])
            for finger in ("left_finger", "right_finger")
        ]

    def forget(self) -> None:
        """A new episode begins: nothing may be left of the last one, however close it was."""
        for cloud in self._clouds.values():
            cloud.forget()

    def hand(self) -> Hand:
        """The gripper now."""
        fingers = self._data.qpos[self._finger_joints]
        return Hand(
            position=self._data.site_xpos[self._site].copy(),
            rotation=self._data.site_xmat[self._site].reshape(3, 3).copy(),
            opening=float(fingers[0] - fingers[1]),
        )

    def shoulder(self) -> np.ndarray:
        """Where the arm starts."""
        position: np.ndarray = self._data.xpos[self._shoulder]
        return position.copy()

    def has(self, name: str) -> bool:
        """It is an object or a fixture, not a region."""
        return name in self._bodies

    def position(self, name: str) -> np.ndarray:
        """Where an object's or fixture's body is."""
        position: np.ndarray = self._data.xpos[self._bodies[name]]
        return position.copy()

    def rotation(self, name: str) -> np.ndarray:
        """How an object's or fixture's body is turned."""
        rotation: np.ndarray = self._data.xmat[self._bodies[name]]
        return rotation.reshape(3, 3).copy()

    def region(self, name: str) -> Region:
        """A region now."""
        site = self.domain.object_sites_dict[name]
        index = self.domain.sim.model.site_name2id(name)
        return Region(
            position=self._data.site_xpos[index].copy(),
            rotation=self._data.site_xmat[index].reshape(3, 3).copy(),
            half=np.asarray(site.size, np.float64),
            parent=site.parent_name,
        )

    def is_plate(self, name: str) -> bool:
        """An object that the gripper cannot lift: its rim is low, and slopes."""
        return type(self.domain.get_object(name)).__name__ == "Plate"

    def is_on_table(self, name: str) -> bool:
        """A region of the table or floor, which no object or fixture carries."""
        return not self.has(name) and self.region(name).parent is None

    def joint(self, name: str) -> Joint | None:
        """What moves a region (a drawer's) or a fixture; None if nothing does."""
        site = self.domain.object_sites_dict.get(name)
        owner = self.domain.get_object(name) if site is None else site
        if not owner.joints:
            return None
        index = self.domain.sim.model.joint_name2id(owner.joints[0])
        model, data = self._model, self._data
        return Joint(
            body=int(model.jnt_bodyid[index]),
            position=float(data.qpos[model.jnt_qposadr[index]]),
            axis=data.xaxis[index].copy(),
            anchor=data.xanchor[index].copy(),
            slides=model.jnt_type[index] == mujoco.mjtJoint.mjJNT_SLIDE,
        )

    def points(self, name: str) -> np.ndarray:
        """Points [N, 3] on an object's or fixture's collision geoms; none if it has none."""
        cloud = self._clouds.get(name)
        return np.zeros((0, 3)) if cloud is None else cloud.points(self._data)

    def body_points(self, body: int) -> dict[int, np.ndarray]:
        """Collision geom -> points [N, 3] of one moving part of a fixture."""
        for cloud in self._clouds.values():
            parts = cloud.parts(self._data, self._model.geom_bodyid, body)
            if parts:
                return parts
        return {}

    def obstacles(self, *names: str, coarse: bool = False) -> np.ndarray:
        """Points [N, 3] of everything but the named objects."""
        clouds = [cloud for name, cloud in self._clouds.items() if name not in names]
        points = [c.coarse(self._data) if coarse else c.points(self._data) for c in clouds]
        return np.concatenate([np.zeros((0, 3)), *points])

    def holds(self, name: str) -> bool:
        """Both fingers touch an object."""
        pairs = self._data.contact.geom
        touched = self._clouds[name].geoms
        for finger in self._fingers:
            forth = np.isin(pairs[:, 0], finger) & np.isin(pairs[:, 1], touched)
            back = np.isin(pairs[:, 1], finger) & np.isin(pairs[:, 0], touched)
            if not (forth | back).any():
                return False
        return True


class _Cloud:
    """Points of one object, moved along with its geoms."""

    def __init__(self, local: dict[int, np.ndarray]) -> None:
        self.geoms = np.array(list(local))
        self._local = list(local.values())
        self._seen: np.ndarray | None = None
        self._points = np.zeros((0, 3))
        # In frames of geoms: a choice that depended on a pose would make episodes depend on others.
        self._thinned = _thin(self._local)

    def forget(self) -> None:
        self._seen = None

    def points(self, data: mujoco.MjData) -> np.ndarray:
        pose = self._pose(data)
        if self._seen is None or np.abs(pose - self._seen).max() > MOVED:
            self._seen = pose
            self._points = np.concatenate(
                [_moved(data, *item) for item in zip(self.geoms, self._local, strict=True)]
            )
        return self._points

    def coarse(self, data: mujoco.MjData) -> np.ndarray:
        points: np.ndarray = self.points(data)[self._thinned]
        return points

    def parts(
        self, data: mujoco.MjData, body_of_geom: np.ndarray, body: int
    ) -> dict[int, np.ndarray]:
        return {
            int(geom): _moved(data, geom, local)
            for geom, local in zip(self.geoms, self._local, strict=True)
            if body_of_geom[geom] == body
        }

    def _pose(self, data: mujoco.MjData) -> np.ndarray:
        rotations = data.geom_xmat[self.geoms].ravel() / 20
        return np.concatenate([data.geom_xpos[self.geoms].ravel(), rotations])


def _thin(local: list[np.ndarray]) -> np.ndarray:
    """Indices of points of all geoms, one per cell of a coarser grid."""
    cells = [
        np.column_stack([np.full(len(points), index), np.round(points / COARSE_SPACING)])
        for index, points in enumerate(local)
    ]
    _, chosen = np.unique(np.concatenate(cells).astype(np.int64), axis=0, return_index=True)
    return chosen


def _moved(data: mujoco.MjData, geom: int, local: np.ndarray) -> np.ndarray:
    rotation = data.geom_xmat[geom].reshape(3, 3)
    points: np.ndarray = local @ rotation.T + data.geom_xpos[geom]
    return points


def _clouds(model: mujoco.MjModel, bodies: dict[str, int]) -> dict[str, _Cloud]:
    rng = np.random.default_rng(0)
    owners = {body: name for name, body in bodies.items()}
    local: dict[str, dict[int, np.ndarray]] = {}
    for geom in np.flatnonzero(model.geom_contype | model.geom_conaffinity):
        name = _owner(model, owners, model.geom_bodyid[geom])
        if name is not None:
            local.setdefault(name, {})[int(geom)] = sample_geom(model, int(geom), SPACING, rng)
    return {name: _Cloud(geoms) for name, geoms in local.items()}


def _owner(model: mujoco.MjModel, owners: dict[int, str], body: int) -> str | None:
    """The object that a body is a part of."""
    while body > 0 and body not in owners:
        body = model.body_parentid[body]
    return owners.get(body)


def _geom_ids(model: mujoco.MjModel, names: list[str]) -> np.ndarray:
    return np.array([model.geom(name).id for name in names])
