"""The stock backend against LIBERO driven by hand: the same numbers and the same pixels."""

from __future__ import annotations

import numpy as np
import pytest
from vlactl_libero.init_states import read_state
from vlactl_libero.tasks import suite_tasks

pytestmark = [pytest.mark.sim, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

SIZE = 64
SEED = 3
NUM_STEPS = 5
CAMERAS = {"agentview": "agentview_image", "wrist": "robot0_eye_in_hand_image"}
# Its stove glows at the start: drawn by a sampler that LIBERO appends again at every rebuild.
TASK = suite_tasks("libero_90")[39]
INIT_STATE = read_state(TASK.init_file, 2)
ACTIONS = np.random.default_rng(0).uniform(-1, 1, (NUM_STEPS, 7))


def test_a_stage_that_has_played_equals_a_new_environment():
    from vlactl_libero.stock import StockStage

    expected = _play_by_hand()
    stage = StockStage(TASK.bddl_file, SIZE, tuple(CAMERAS))
    try:
        stage.restore(read_state(TASK.init_file, 0), SEED + 1)
        stage.step(np.ones(7))
        played = _play_stage(stage)
    finally:
        stage.close()
    for (observation, simulated, solved), (state, pictures, *ours) in zip(
        expected, played, strict=True
    ):
        np.testing.assert_array_equal(ours[0], simulated)
        assert ours[1] == solved
        np.testing.assert_array_equal(state, _expected_state(observation))
        assert state.dtype == np.float32
        for camera, key in CAMERAS.items():
            np.testing.assert_array_equal(pictures[camera], observation[key][::-1, ::-1])


def test_fixtures_stand_where_the_seed_says():
    from vlactl_libero.stock import StockStage

    task = suite_tasks("libero_spatial")[5]
    init_state = read_state(task.init_file, 0)
    stage = StockStage(task.bddl_file, SIZE, ())
    try:
        assert stage.state_length == len(init_state)
        placed = []
        for seed in (SEED, SEED + 1, SEED):
            stage.restore(init_state, seed, ())
            placed.append((stage._env.sim.model.body_pos.copy(), stage.state, stage.reach()))
        assert stage.pictures == {}
    finally:
        stage.close()
    (first, first_state, first_reach), (other, *_), (again, again_state, again_reach) = placed
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(again_state, first_state)
    assert again_reach == first_reach > 0
    assert 0.001 < np.abs(other - first).max() < 0.1


def _play_by_hand():
    """LIBERO's hard reset, then the actions: observation, simulator state, solved, each time."""
    from libero.libero.envs import OffScreenRenderEnv

    env = OffScreenRenderEnv(
        bddl_file_name=str(TASK.bddl_file), camera_heights=SIZE, camera_widths=SIZE
    )
    env.seed(SEED)
    env.reset()
    played = [(env.set_init_state(INIT_STATE), env.get_sim_state(), False)]
    for action in ACTIONS:
        observation, _, solved, _ = env.step(action)
        played.append((observation, env.get_sim_state(), solved))
    env.close()
    return played


def _play_stage(stage):
    cameras = tuple(CAMERAS)
    stage.restore(INIT_STATE, SEED, cameras)
    played = [(stage.state, stage.pictures, stage._env.get_sim_state(), False)]
    for action in ACTIONS:
        solved = stage.step(action, cameras)
        played.append((stage.state, stage.pictures, stage._env.get_sim_state(), solved))
    return played


def _expected_state(observation):
    from robosuite.utils.transform_utils import quat2axisangle

    parts = [
        observation["robot0_eef_pos"],
        quat2axisangle(observation["robot0_eef_quat"].copy()),
        observation["robot0_gripper_qpos"],
    ]
    return np.concatenate(parts).astype(np.float32)
