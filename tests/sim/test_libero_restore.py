"""A restored task against stock LIBERO: the same numbers and the same pixels, bit for bit."""

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
LOOK_EVERY = 5  # the fast core is asked less often than stock renders, which may not matter
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


def _play_fast(stage, init_state, actions):
    """The same on the fast core; what is seen is None where it was not asked to look."""
    stage.restore(init_state, FIXTURE_SEED, tuple(CAMERAS))
    seen = [(stage.state, stage.pictures)]
    simulated = [_simulated(stage)]
    solved = [stage._goal.reached()]
    for step, action in enumerate(actions, start=1):
        asked = step % LOOK_EVERY == 0
        solved.append(stage.step(action, tuple(CAMERAS) if asked else None))
        seen.append((stage.state, stage.pictures) if asked else None)
        simulated.append(_simulated(stage))
    return seen, np.array(simulated), solved


def _simulated(stage):
    data = stage._data
    return np.concatenate([[data.time], data.qpos, data.qvel])


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


def _disturb(stage, task):
    """Play a bit of another episode that leaves nothing as it was, the stove's glow included."""
    stage.restore(read_state(task.init_file, 0), FIXTURE_SEED + 1)
    domain = stage._task.domain
    (joint,) = domain.get_object("flat_stove_1").joints
    stage._data.qpos[domain.sim.model.get_joint_qpos_addr(joint)] = 0.0
    for action in np.random.default_rng(99).uniform(-1, 1, (7, 7)):
        stage.step(action)


def test_restored_task_equals_stock_hard_reset_also_beside_and_after_another_episode(case):
    from vlactl_libero.workshop import Workshop

    task, init_state, actions, expected = case
    workshop = Workshop(SIZE, has_pictures=True, task_cache=1)
    stage, neighbour = workshop.open(task), workshop.open(task)
    try:
        _assert_equal(_play_fast(stage, init_state, actions), expected)
        _disturb(neighbour, task)
        _disturb(stage, task)
        _assert_equal(_play_fast(stage, init_state, actions), expected)
    finally:
        stage.close()
        neighbour.close()
