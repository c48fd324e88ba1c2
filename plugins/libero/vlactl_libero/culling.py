"""Which geoms a picture can do without, exactly: no pixel depends on it.

Drawing costs what its vertices cost, whatever the size of the picture. Left out is what bounding
boxes, several to a large mesh, show to be out of view. A mirror doubles the vertices, as MuJoCo
draws everything once more to be reflected: where that pays, the mirror's pixels are drawn on their
own, with what can be seen there, and the rest of the picture without a reflection.

Lines are in pixels, a x + b y + c, planes in metres, a x + b y + c z + d: positive inside.

Shapes: N geoms that may be left out, M their boxes, L lines, P planes, K corners.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import mujoco
import numpy as np
from numba import njit

_BOUNDED = (
    mujoco.mjtGeom.mjGEOM_SPHERE,
    mujoco.mjtGeom.mjGEOM_CAPSULE,
    mujoco.mjtGeom.mjGEOM_ELLIPSOID,
    mujoco.mjtGeom.mjGEOM_CYLINDER,
    mujoco.mjtGeom.mjGEOM_BOX,
    mujoco.mjtGeom.mjGEOM_MESH,
)
_MARGIN = 1e-3
"""Metres by which a box may miss the view and still be drawn: far more than GL's rounding."""
_MASK_MARGIN = 1.5
"""Distance from a mirror, in pixels, of the centres of pixels that count as its own."""
_VIEW_MARGIN = 2.5
"""Distance from a mirror, in pixels, of what is drawn with it: all that its pixels may show."""
_BOX_TRIANGLES = 1000
"""Triangles of a mesh that share a box."""
_PRIMITIVE_TRIANGLES = 500
_PASS_TRIANGLES = 40_000
"""What a second pass costs even if it draws nothing, as triangles."""


class Part(NamedTuple):
    """How to draw some pixels of a picture.

    Attributes:
        hidden: ids of geoms to leave out.
        reflects: whether there may be reflections.
        corner: left and bottom pixel of the mask.
        mask: bool [H, W], bottom row first, the pixels to take; None for the whole picture.
    """

    hidden: np.ndarray
    reflects: bool
    corner: tuple[int, int] = (0, 0)
    mask: np.ndarray | None = None


class Boxes(NamedTuple):
    """Boxes at one moment; an edge goes from the centre to a side."""

    centers_M3: np.ndarray
    edges_M33: np.ndarray


@dataclass(frozen=True, slots=True)
class Eye:
    """A camera: its position, its field of view, and how many pixels the picture has.

    Attributes:
        axes_33: rows right, up, forward.
        pixels_33: from right, up, forward to pixels times the distance forward.
    """

    position: np.ndarray
    axes_33: np.ndarray
    pixels_33: np.ndarray
    near: float
    size: int

    @classmethod
    def of(cls, scene: mujoco.MjvScene, size: int) -> Eye:
        """The camera of a scene as the renderer reads it."""
        camera = mujoco.mjv_averageCamera(scene.camera[0], scene.camera[1])
        forward, up = np.array(camera.forward, float), np.array(camera.up, float)
        bottom, top, near = camera.frustum_bottom, camera.frustum_top, camera.frustum_near
        half = camera.frustum_width or 0.5 * (top - bottom)
        left = camera.frustum_center - half
        across, along = size * near / (2 * half), size * near / (top - bottom)
        return cls(
            position=np.array(camera.pos, float),
            axes_33=np.stack([np.cross(forward, up), up, forward]),
            pixels_33=np.array(
                [[across, 0, -across * left / near], [0, along, -along * bottom / near], [0, 0, 1]]
            ),
            near=near,
            size=size,
        )

    @property
    def corners(self) -> np.ndarray:
        """Of the picture, [4, 2], counter-clockwise."""
        return _rectangle(np.zeros(2), np.full(2, float(self.size)))

    def planes(self, lines_L3: np.ndarray) -> np.ndarray:
        """Planes [L + 1, 4] around all that is seen between lines."""
        normals_P3 = np.vstack([lines_L3 @ self.pixels_33, [0, 0, 1]]) @ self.axes_33
        normals_P3 /= np.sqrt((normals_P3**2).sum(axis=1))[:, None]
        offsets_P = -normals_P3 @ self.position
        offsets_P[-1] -= self.near
        return np.column_stack([normals_P3, offsets_P])

    def project(self, points_K3: np.ndarray) -> np.ndarray | None:
        """Where points are in the picture, [K, 2]; None if any is behind the camera."""
        seen_K3 = (points_K3 - self.position) @ self.axes_33.T
        if seen_K3[:, 2].min() < self.near:
            return None
        pixels_K3 = seen_K3 @ self.pixels_33.T
        points_K2: np.ndarray = pixels_K3[:, :2] / pixels_K3[:, 2:]
        return points_K2


class Culling:
    """Decides what need not be drawn of a model.

    Args:
        model: compiled.
        option: which groups of geoms are drawn at all.
    """

    def __init__(self, model: mujoco.MjModel, option: mujoco.MjvOption) -> None:
        shown = np.isin(model.geom_group, np.flatnonzero(option.geomgroup))
        mirrors = np.flatnonzero(shown & _is_reflective(model))
        self._is_possible = _is_simple(model, mirrors)
        self._mirror = _Mirror(model, mirrors[0]) if len(mirrors) else None
        may_go = shown & np.isin(model.geom_type, _BOUNDED)
        may_go[mirrors] = False
        self._ids_N = np.flatnonzero(may_go)
        self._triangles_N = _count_triangles(model)[self._ids_N]
        bounds = [_bounds(model, geom) for geom in self._ids_N]
        self._owners_M = np.repeat(np.arange(len(bounds)), [len(bound) for bound in bounds])
        self._ids_M = self._ids_N[self._owners_M]
        self._bounds_M23 = np.concatenate(bounds)

    def boxes(self, data: mujoco.MjData) -> Boxes:
        """The bounding boxes now."""
        return Boxes(*_place(data.geom_xpos, data.geom_xmat, self._ids_M, self._bounds_M23))

    def parts(self, data: mujoco.MjData, eye: Eye, boxes: Boxes) -> list[Part]:
        """How to draw a picture; a second part goes on top of the first."""
        if not self._is_possible:
            return [Part(self._ids_N[:0], True)]
        frame_P4 = eye.planes(_lines(eye.corners, 0.0))
        seen_N = self._touching(boxes, frame_P4)
        outline_K2 = self._mirror.outline(data, eye) if self._mirror else None
        if self._mirror is None or outline_K2 is None:
            return [Part(self._ids_N[~seen_N], False)]
        planes_P4 = np.vstack([frame_P4, eye.planes(_lines(outline_K2, _VIEW_MARGIN))])
        reflected_N = self._touching(boxes, self._mirror.reflect(data, planes_P4))
        around_N = reflected_N | self._touching(boxes, planes_P4)
        apart = self._cost(seen_N) + 2 * self._cost(around_N) + _PASS_TRIANGLES
        if apart < 2 * self._cost(seen_N | reflected_N):
            rest = Part(self._ids_N[~seen_N], False)
            return [rest, _patch(self._ids_N[~around_N], outline_K2, eye.size)]
        return [Part(self._ids_N[~(seen_N | reflected_N)], True)]

    def _touching(self, boxes: Boxes, planes_P4: np.ndarray) -> np.ndarray:
        touching_N = np.zeros(len(self._ids_N), bool)
        _mark(*boxes, self._owners_M, planes_P4, touching_N)
        return touching_N

    def _cost(self, drawn_N: np.ndarray) -> int:
        return int(self._triangles_N @ drawn_N)


class _Mirror:
    """A box whose upper side reflects."""

    def __init__(self, model: mujoco.MjModel, geom: int) -> None:
        self._geom = geom
        self._corners_K2 = _rectangle(-model.geom_size[geom, :2], model.geom_size[geom, :2])
        self._height = model.geom_size[geom, 2]

    def outline(self, data: mujoco.MjData, eye: Eye) -> np.ndarray | None:
        """The corners in the picture of where it may be seen; None if it cannot be."""
        center, rotation = self._plane(data)
        if (eye.position - center) @ rotation[:, 2] < -_MARGIN:
            return None
        outline_K2 = eye.project(center + self._corners_K2 @ rotation[:, :2].T)
        if outline_K2 is None:
            return eye.corners
        inside = (outline_K2.min(axis=0) < eye.size + 1) & (outline_K2.max(axis=0) > -1)
        return outline_K2 if inside.all() else None

    def reflect(self, data: mujoco.MjData, planes_P4: np.ndarray) -> np.ndarray:
        """Planes around what is seen in it where `planes` are around what is seen directly."""
        center, rotation = self._plane(data)
        normal = rotation[:, 2]
        height = normal @ center
        slants_P1 = 2 * planes_P4[:, :3] @ normal[:, None]
        images_P4 = planes_P4 + slants_P1 * np.append(-normal, height)
        return np.vstack([images_P4, np.append(normal, -height)])

    def _plane(self, data: mujoco.MjData) -> tuple[np.ndarray, np.ndarray]:
        rotation = data.geom_xmat[self._geom].reshape(3, 3)
        return data.geom_xpos[self._geom] + rotation[:, 2] * self._height, rotation


@njit(nogil=True, cache=True)
def _place(
    positions: np.ndarray, rotations: np.ndarray, ids_M: np.ndarray, bounds_M23: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes in the frames of geoms -> centres and edges in the world's."""
    centers_M3 = np.empty((len(ids_M), 3))
    edges_M33 = np.empty((len(ids_M), 3, 3))
    for box, geom in enumerate(ids_M):
        centers_M3[box] = positions[geom]
        for row in range(3):
            for axis in range(3):
                direction = rotations[geom, 3 * row + axis]
                centers_M3[box, row] += direction * bounds_M23[box, 0, axis]
                edges_M33[box, axis, row] = direction * bounds_M23[box, 1, axis]
    return centers_M3, edges_M33


@njit(nogil=True, cache=True)
def _mark(
    centers_M3: np.ndarray,
    edges_M33: np.ndarray,
    owners_M: np.ndarray,
    planes_P4: np.ndarray,
    touching_N: np.ndarray,
) -> None:
    """Mark geoms with a box that may in part be on the inner side of all planes."""
    for box, owner in enumerate(owners_M):
        if touching_N[owner]:
            continue
        touching = True
        for a, b, c, d in planes_P4:
            center, edges = centers_M3[box], edges_M33[box]
            distance = a * center[0] + b * center[1] + c * center[2] + d
            for axis in range(3):
                distance += abs(a * edges[axis, 0] + b * edges[axis, 1] + c * edges[axis, 2])
            if distance < -_MARGIN:
                touching = False
                break
        touching_N[owner] = touching


def _rectangle(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Corners [4, 2], counter-clockwise."""
    return np.array([low, [high[0], low[1]], high, [low[0], high[1]]])


def _patch(hidden: np.ndarray, outline_K2: np.ndarray, size: int) -> Part:
    """The pixels that a mirror touches."""
    low = np.clip(np.floor(outline_K2.min(axis=0)).astype(int) - 2, 0, size)
    high = np.clip(np.ceil(outline_K2.max(axis=0)).astype(int) + 2, 0, size)
    mask = _mask(low, high, _lines(outline_K2, _MASK_MARGIN))
    return Part(hidden, True, (int(low[0]), int(low[1])), mask)


@njit(nogil=True, cache=True)
def _lines(outline_K2: np.ndarray, margin: float) -> np.ndarray:
    """Lines [K, 3] around a convex polygon, so many pixels away."""
    num = len(outline_K2)
    lines_K3 = np.empty((num, 3))
    for corner in range(num):
        x, y = outline_K2[corner]
        across, along = outline_K2[(corner + 1) % num] - outline_K2[corner]
        length = max(np.hypot(across, along), 1e-9)
        a, b = -along / length, across / length
        middle_x, middle_y = outline_K2[:, 0].mean() - x, outline_K2[:, 1].mean() - y
        if a * middle_x + b * middle_y < 0:
            a, b = -a, -b
        lines_K3[corner] = a, b, margin - a * x - b * y
    return lines_K3


@njit(nogil=True, cache=True)
def _mask(low_2: np.ndarray, high_2: np.ndarray, lines_L3: np.ndarray) -> np.ndarray:
    """Which pixels from one corner to another, bottom row first, have their centres inside."""
    width, height = high_2 - low_2
    mask = np.ones((height, width), np.bool_)
    for row in range(height):
        for column in range(width):
            x, y = low_2[0] + column + 0.5, low_2[1] + row + 0.5
            for a, b, c in lines_L3:
                mask[row, column] &= a * x + b * y + c > 0
    return mask


def _is_reflective(model: mujoco.MjModel) -> np.ndarray:
    """Whether MuJoCo may draw reflections in a geom, [ngeom]."""
    flat = np.isin(model.geom_type, (mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_BOX))
    return flat & (np.append(model.mat_reflectance, 0)[model.geom_matid] > 0)


def _is_simple(model: mujoco.MjModel, mirrors: np.ndarray) -> bool:
    """Whether geoms out of view leave no trace but in at most one mirror, a box."""
    return (
        not model.light_castshadow.any()
        and len(mirrors) <= 1
        and all(model.geom_type[mirrors] == mujoco.mjtGeom.mjGEOM_BOX)
    )


def _count_triangles(model: mujoco.MjModel) -> np.ndarray:
    """Triangles that each geom is drawn with, roughly if it is no mesh."""
    meshes = np.append(model.mesh_facenum, _PRIMITIVE_TRIANGLES)
    is_mesh = model.geom_type == mujoco.mjtGeom.mjGEOM_MESH
    return meshes[np.where(is_mesh, model.geom_dataid, -1)]


def _bounds(model: mujoco.MjModel, geom: int) -> np.ndarray:
    """Boxes [B, 2, 3] around a geom in its own frame, each a centre and half a size."""
    if model.geom_type[geom] != mujoco.mjtGeom.mjGEOM_MESH:
        return model.geom_aabb[geom].reshape(1, 2, 3)
    mesh = model.geom_dataid[geom]
    first, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
    vertices = model.mesh_vert[first : first + count].astype(np.float64)
    first, count = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
    groups = _split(vertices[model.mesh_face[first : first + count]])
    lows = np.array([group.min(axis=(0, 1)) for group in groups])
    highs = np.array([group.max(axis=(0, 1)) for group in groups])
    return np.stack([lows + highs, highs - lows], axis=1) / 2


def _split(triangles_T33: np.ndarray) -> list[np.ndarray]:
    """Neighbouring triangles, few enough to share a box."""
    if len(triangles_T33) <= _BOX_TRIANGLES:
        return [triangles_T33]
    centers_T3 = triangles_T33.mean(axis=1)
    order = np.argsort(centers_T3[:, np.ptp(centers_T3, axis=0).argmax()])
    half = len(order) // 2
    return _split(triangles_T33[order[:half]]) + _split(triangles_T33[order[half:]])
