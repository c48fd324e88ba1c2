"""Geometry of LIBERO's expert: rotations, point clouds, where a gripper fits, and its actions."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlactl_libero.expert.geometry import (
    about_axis,
    about_z,
    half_turn,
    rotation_vector,
    sample_geom,
)
from vlactl_libero.expert.grasp import Grasp, hand_axes, hand_obstacle, plan, same
from vlactl_libero.expert.motion import CLOSE, OPEN, reach
from vlactl_libero.expert.scene import Hand
from vlactl_libero.expert.skill import obstacle_height

NOTHING = np.zeros((0, 3))
SHOULDER = np.array([-0.6, 0.0, 0.4])
SPACING = 0.006
DOWN = np.diag([1.0, -1.0, -1.0])

components = st.floats(-1.0, 1.0)
axes = st.tuples(components, components, components).filter(lambda a: np.linalg.norm(a) > 0.1)


# ---------------------------------------------------------------------------------- rotations
@given(axes, st.floats(-3.1, 3.1))
def test_a_rotation_vector_is_its_axis_times_its_angle(axis, angle):
    axis = np.array(axis)
    expected = angle * axis / np.linalg.norm(axis)
    np.testing.assert_allclose(rotation_vector(about_axis(axis, angle)), expected, atol=1e-6)


@given(st.floats(-10.0, 10.0))
def test_the_shorter_way_round(angle):
    vector = rotation_vector(about_z(angle))
    assert abs(vector[2]) <= np.pi + 1e-9
    np.testing.assert_allclose(about_z(vector[2]), about_z(angle), atol=1e-6)


@given(st.floats(-10.0, 10.0))
def test_half_a_turn_makes_no_difference_to_a_gripper(angle):
    turned = half_turn(angle)
    assert -np.pi / 2 <= turned < np.pi / 2
    assert np.isclose(np.sin(turned - angle), 0.0, atol=1e-9)


# ------------------------------------------------------------------------------- point clouds
def _points(geom):
    model = mujoco.MjModel.from_xml_string(
        f"""<mujoco>
          <asset><mesh name="tetrahedron" vertex="0 0 0  .1 0 0  0 .1 0  0 0 .1"/></asset>
          <worldbody><geom {geom}/></worldbody>
        </mujoco>"""
    )
    return model, sample_geom(model, 0, SPACING, np.random.default_rng(0))


def test_a_box_is_its_faces():
    _, points = _points('type="box" size=".02 .03 .04"')
    distance = np.abs(points) - [0.02, 0.03, 0.04]
    np.testing.assert_allclose(distance.max(axis=1), 0.0, atol=1e-9)
    assert (points.min(axis=0) < 0).all()
    assert (points.max(axis=0) > 0).all()


@pytest.mark.parametrize("kind", ["sphere", "cylinder", "capsule"])
def test_round_geoms_stay_within_their_radius(kind):
    size = ".03" if kind == "sphere" else ".03 .05"
    _, points = _points(f'type="{kind}" size="{size}"')
    radii = np.linalg.norm(points if kind == "sphere" else points[:, :2], axis=1)
    assert 0.025 < radii.max() <= 0.031


def test_a_mesh_is_its_convex_hull():
    model, points = _points('type="mesh" mesh="tetrahedron"')
    hull = model.mesh_vert.astype(float)
    assert (points >= hull.min(axis=0) - 1e-6).all()
    assert (points <= hull.max(axis=0) + 1e-6).all()
    assert len(points) > 100
    for corner in hull:
        assert np.linalg.norm(points - corner, axis=1).min() < 1e-6


# ------------------------------------------------------------------------------------ grasps
def _box(half, centre=(0.0, 0.0)):
    """Faces of a box that stands on the table."""
    grid = [np.linspace(-extent, extent, int(2 * extent / 0.005) + 2) for extent in half]
    points = np.stack(np.meshgrid(*grid, indexing="ij"), -1).reshape(-1, 3)
    points = points[(np.abs(np.abs(points) - half) < 1e-9).any(axis=1)]
    return points + np.array([*centre, half[2]])


def _bowl(radius=0.05, height=0.05):
    """A thin wall, as wide as a hand cannot grasp."""
    angles, heights = np.meshgrid(np.linspace(0, 2 * np.pi, 120), np.arange(0, height, 0.004))
    return np.stack(
        [radius * np.cos(angles).ravel(), radius * np.sin(angles).ravel(), heights.ravel()], -1
    )


@pytest.mark.parametrize(
    ("half", "direction"), [((0.08, 0.02, 0.03), [0, 1]), ((0.02, 0.08, 0.03), [1, 0])]
)
def test_a_long_box_is_grasped_across_its_middle(half, direction):
    grasp = plan(_box(half), NOTHING, SHOULDER)
    across, _ = hand_axes(grasp.yaw)
    assert abs(across @ direction) > 0.8
    assert np.linalg.norm(grasp.point[:2]) < 0.02
    assert grasp.cost < 0.5


def test_a_bowl_is_grasped_at_its_rim_and_across_it():
    grasp = plan(_bowl(), NOTHING, SHOULDER)
    outwards = grasp.point[:2] / np.linalg.norm(grasp.point[:2])
    assert np.linalg.norm(grasp.point[:2]) == pytest.approx(0.05, abs=0.008)
    assert abs(hand_axes(grasp.yaw)[0] @ outwards) > 0.9


def test_the_hand_keeps_away_from_a_wall():
    bowl, wall = _bowl(), _box((0.15, 0.01, 0.15), centre=(0.0, 0.075))
    free, beside = plan(bowl, NOTHING, SHOULDER), plan(bowl, wall, SHOULDER)
    across, _ = hand_axes(beside.yaw)
    assert same(free, free)
    assert beside.cost < 1.0, "there is a grasp that touches nothing"
    assert beside.point[1] + 0.105 * abs(across[1]) < 0.065, "the hand ends before the wall"


def test_the_hand_must_fit_at_the_destination():
    """Free where it is, but it goes in front of a wall."""
    bowl, wall = _bowl(), _box((0.15, 0.01, 0.15), centre=(0.5, 0.075))
    move = np.array([0.5, 0.0, 0.0])
    grasp = plan(bowl, wall, SHOULDER, shift=lambda height, yaw: move)
    across, _ = hand_axes(grasp.yaw)
    assert grasp.point[1] + 0.105 * abs(across[1]) < 0.065


def test_what_has_failed_is_not_tried_again():
    bowl = _bowl()
    first = plan(bowl, NOTHING, SHOULDER)
    second = plan(bowl, NOTHING, SHOULDER, failed=[first])
    assert not same(first, second)


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_a_stretched_arm_takes_the_near_side(side):
    grasp = plan(_bowl(), NOTHING, np.array([0.0, side * 0.85, 0.3]))
    assert side * grasp.point[1] > 0.03


def test_obstacles_on_the_way():
    points = np.array([[0.1, 0.0, 0.3], [0.1, 0.08, 0.5], [0.5, 0.0, 0.9]])
    start, end = np.zeros(2), np.array([0.2, 0.0])
    assert obstacle_height(points, start, end, margin=0.05) == 0.3
    assert obstacle_height(points, start, end, margin=0.1) == 0.5
    assert obstacle_height(points[2:], start, end, margin=0.05) == -np.inf
    assert hand_obstacle(points, start, end, yaw=0.0) == 0.5, "the hand is wide across x"
    assert hand_obstacle(points, start, end, yaw=np.pi / 2) == 0.3
    assert hand_obstacle(points[2:], start, end, yaw=0.0) == -np.inf


# ----------------------------------------------------------------------------------- actions
FAR = np.array([0.4, -0.2, 0.1])
HAND = Hand(position=np.array([0.1, 0.2, 0.3]), rotation=DOWN, opening=0.08)


def test_a_hand_that_is_there_stays():
    np.testing.assert_array_equal(reach(HAND, HAND.position, DOWN, CLOSE), [0, 0, 0, 0, 0, 0, 1])


def test_a_far_target_is_approached_in_a_straight_line_at_full_speed():
    move = reach(HAND, HAND.position + FAR, DOWN, OPEN)
    np.testing.assert_allclose(move, [1.0, -0.5, 0.25, 0, 0, 0, OPEN])
    slower = reach(HAND, HAND.position + FAR, DOWN, OPEN, speed=0.5)
    np.testing.assert_allclose(slower[:3], move[:3] / 2)


def test_a_hand_turns_about_the_vertical_but_small_tilts_are_left():
    turned = reach(HAND, HAND.position, about_z(0.2) @ DOWN, OPEN)
    np.testing.assert_allclose(turned[3:6], [0, 0, 0.48], atol=1e-9)
    tilted = about_axis(np.array([1.0, 0.0, 0.0]), 0.15) @ DOWN
    np.testing.assert_array_equal(reach(HAND, HAND.position, tilted, OPEN)[3:6], 0.0)
    strict = reach(HAND, HAND.position, tilted, OPEN, tilt_deadband=0.02)
    np.testing.assert_allclose(strict[3:6], [0.36, 0, 0], atol=1e-9)


def test_a_grasp_remembers_what_it_costs():
    grasp = Grasp(point=np.zeros(3), yaw=0.0, cost=1.0)
    assert grasp.dearer(0.5).cost == 1.5
    assert grasp.cost == 1.0
