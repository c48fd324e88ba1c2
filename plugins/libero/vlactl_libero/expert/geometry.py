"""Rotations, and point clouds of collision geoms. Metres and radians."""

from __future__ import annotations

import mujoco
import numpy as np
from scipy.spatial import ConvexHull, QhullError

MAX_POINTS = 1500


def about_z(angle: float) -> np.ndarray:
    """Rotation matrix [3, 3] about the vertical."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])


def about_axis(axis: np.ndarray, angle: float) -> np.ndarray:
    """Rotation matrix [3, 3] about `axis` [3], of any length."""
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    result: np.ndarray = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return result


def rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """Axis times angle [3] of a rotation matrix; the angle is at most pi."""
    quaternion, vector = np.zeros(4), np.zeros(3)
    mujoco.mju_mat2Quat(quaternion, np.ascontiguousarray(rotation, np.float64).ravel())
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    angle = np.linalg.norm(vector)
    if angle > np.pi:
        vector *= (angle - 2 * np.pi) / angle
    return vector


def half_turn(angle: float) -> float:
    """The angle in [-pi/2, pi/2) that a gripper of two equal fingers cannot tell from `angle`."""
    return float((angle + np.pi / 2) % np.pi - np.pi / 2)


def sample_geom(
    model: mujoco.MjModel, geom: int, spacing: float, rng: np.random.Generator
) -> np.ndarray:
    """Points [N, 3] in a geom's frame, about `spacing` metres apart.

    They cover the convex hull of a mesh, which is what MuJoCo collides, the faces of a box, and
    fill everything else.
    """
    kind, size = model.geom_type[geom], model.geom_size[geom]
    if kind == mujoco.mjtGeom.mjGEOM_MESH:
        return _sample_hull(_mesh_vertices(model, geom), spacing, rng)
    half = _half_extents(kind, size)
    counts = np.clip(np.ceil(2 * half / spacing).astype(int), 1, 40) + 1
    axes = [np.linspace(-extent, extent, count) for extent, count in zip(half, counts, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    kept = _in_geom(grid, kind, size, half)
    points: np.ndarray = grid[kept]
    return points


def _in_geom(grid: np.ndarray, kind: int, size: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Which points [N, 3] of a grid belong to a geom, bool [N]."""
    if kind in (mujoco.mjtGeom.mjGEOM_CYLINDER, mujoco.mjtGeom.mjGEOM_CAPSULE):
        inside: np.ndarray = np.hypot(grid[:, 0], grid[:, 1]) <= size[0] * 1.001
    elif kind == mujoco.mjtGeom.mjGEOM_SPHERE:
        inside = np.linalg.norm(grid, axis=1) <= size[0] * 1.001
    else:
        inside = (np.abs(np.abs(grid) - half) < 1e-9).any(axis=1)
    return inside


def _mesh_vertices(model: mujoco.MjModel, geom: int) -> np.ndarray:
    mesh = model.geom_dataid[geom]
    start = model.mesh_vertadr[mesh]
    vertices: np.ndarray = model.mesh_vert[start : start + model.mesh_vertnum[mesh]]
    return vertices.astype(np.float64)


def _half_extents(kind: int, size: np.ndarray) -> np.ndarray:
    if kind == mujoco.mjtGeom.mjGEOM_SPHERE:
        return np.full(3, size[0])
    if kind == mujoco.mjtGeom.mjGEOM_CYLINDER:
        return np.array([size[0], size[0], size[1]])
    if kind == mujoco.mjtGeom.mjGEOM_CAPSULE:
        return np.array([size[0], size[0], size[1] + size[0]])
    return size.copy()


def _sample_hull(vertices: np.ndarray, spacing: float, rng: np.random.Generator) -> np.ndarray:
    try:
        hull = ConvexHull(vertices)
    except QhullError:  # flat
        return vertices
    corners = vertices[hull.simplices]
    edges = corners[:, 1:] - corners[:, :1]
    areas = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1) / 2
    count = int(np.clip(1.2 * areas.sum() / spacing**2, 20, MAX_POINTS))
    chosen = rng.choice(len(corners), count, p=areas / areas.sum())
    weights = rng.random((count, 2))
    outside = weights.sum(axis=1) > 1
    weights[outside] = 1 - weights[outside]
    points = corners[chosen, 0] + (weights[:, :, None] * edges[chosen]).sum(axis=1)
    return np.concatenate([vertices[hull.vertices], points])
