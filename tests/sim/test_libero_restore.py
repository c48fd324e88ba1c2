"""A restored scene against stock LIBERO: the same numbers and the same pixels, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from vlactl_libero.init_states import read_state
from vlactl_libero.tasks import suite_tasks

pytestmark = [pytest.mark.sim, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

SIZE = 64
FIXTURE_SEED = 3
NUM_STEPS = 20
CAMERAS = {"agentview": "agentview_image", "wrist": "robot0_eye_in_hand_image"}
LOOK_EVERY = 5  # the scene is asked less often than stock renders, which may not matter
# The second one starts with a glowing stove, drawn at random and kept outside of MuJoCo's state.
TASKS = [("libero_spatial", 5, 7), ("libero_90", 39, 2)]


@pytest.fixture(scope="module", params=TASKS, ids=lambda param: f"{param[0]}-{param[1]}")
def case(request):
    suite, index, trial = request.param
    task = suite_tasks(suite)[index]
    actions = np.random.default_rng(index).uniform(-1, 1, (NUM_STEPS, 7))
    actions[:4] = 0.0  # settling: the target orientation stays that of the reset
    return task, read_state(task.init_file, trial), actions, _play_stock(task, trial, actions)


def _play_stock(task, trial, actions):
    """Stock's hard reset, then the actions: what is seen and known at the start and after each."""
    from libero.libero.envs import OffScreenRenderEnv

    stock = OffScreenRenderEnv(
        bddl_file_name=str(task.bddl_file), camera_heights=SIZE, camera_widths=SIZE
    )
    stock.seed(FIXTURE_SEED)
    stock.reset()
    observations = [stock.set_init_state(read_state(task.init_file, trial))]
    simulated = [stock.get_sim_state()]
    solved = [stock.check_success()]
    for action in actions:
        observation, _, done, _ = stock.step(action)
        observations.append(observation)
        simulated.append(stock.get_sim_state())
        solved.append(done)
    stock.close()
    return observations, np.array(simulated), solved


def _play_scene(scene, init_state, actions):
    """The same on a scene; what is seen is None where it was not asked to look."""
    scene.restore(init_state, tuple(CAMERAS))
    seen = [(scene.state, scene.pictures)]
    simulated = [scene._sim.get_state().flatten()]
    solved = [scene._wrapper.check_success()]
    for step, action in enumerate(actions, start=1):
        asked = step % LOOK_EVERY == 0
        solved.append(scene.step(action, tuple(CAMERAS) if asked else None))
        seen.append((scene.state, scene.pictures) if asked else None)
        simulated.append(scene._sim.get_state().flatten())
    return seen, np.array(simulated), solved


def _assert_equal(played, expected):
    seen, simulated, solved = played
    observations, expected_simulated, expected_solved = expected
    np.testing.assert_array_equal(simulated, expected_simulated)
    assert solved == expected_solved
    for sight, observation in zip(seen, observations, strict=True):
        if sight is not None:
            _assert_same_sight(*sight, observation)


def _assert_same_sight(state, pictures, observation):
    from robosuite.utils.transform_utils import quat2axisangle

    for camera, key in CAMERAS.items():
        np.testing.assert_array_equal(pictures[camera], observation[key][::-1, ::-1])
    expected_state = [
        observation["robot0_eef_pos"],
        quat2axisangle(observation["robot0_eef_quat"].copy()),
        observation["robot0_gripper_qpos"],
    ]
    np.testing.assert_array_equal(state, np.concatenate(expected_state).astype(np.float32))


def _disturb(scene, task):
    """Play a bit of another episode that leaves nothing as it was, the stove's glow included."""
    scene.restore(read_state(task.init_file, 0))
    scene._domain.object_states_dict["flat_stove_1"].set_joint(0.0)
    for action in np.random.default_rng(99).uniform(-1, 1, (7, 7)):
        scene.step(action)


def test_restored_scene_equals_stock_hard_reset_also_after_an_episode(case):
    from vlactl_libero.scene import Scene

    task, init_state, actions, expected = case
    scene = Scene(task.bddl_file, SIZE, FIXTURE_SEED)
    try:
        _assert_equal(_play_scene(scene, init_state, actions), expected)
        _disturb(scene, task)
        _assert_equal(_play_scene(scene, init_state, actions), expected)
    finally:
        scene.close()
