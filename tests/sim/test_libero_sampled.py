"""Initial states from a task's own sampler: LIBERO's own, on both backends, in every process."""

from __future__ import annotations

import numpy as np
import pytest
from vlactl_libero.init_states import count_states, read_states
from vlactl_libero.plugin import LiberoConfig, base_suite
from vlactl_libero.tasks import suite_tasks

from vlactl.api.contracts import EnvContext, Episode
from vlactl.errors import IntegrityError

pytestmark = [pytest.mark.sim, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

NUM_JOINTS = 7
ARM_NOISE = 0.02
NUM_ROBOT = 9  # with the fingers
NUM_DRAWS = 60
# Objects on the table, in a drawer, on a stove; open drawers; a stove that may be on at the start.
TASKS = [
    ("libero_spatial", 0, 0),
    ("libero_spatial", 4, 1),
    ("libero_spatial", 7, 2),
    ("libero_goal", 7, 3),
    ("libero_object", 2, 2**40 + 4),
    ("libero_10", 2, 5),
    ("libero_10", 3, 6),
    ("libero_90", 39, 7),
    ("libero_goal_swap", 7, 8),
]


@pytest.fixture(params=TASKS, ids=lambda param: f"{param[0]}-{param[1]}")
def case(request):
    """A task, a seed, and the task's model."""
    from vlactl_libero.task_model import TaskModel

    suite, index, seed = request.param
    task = suite_tasks(suite)[index]
    return task, seed, TaskModel(task.bddl_file)


def _stock_reset(task, seed):
    """State and fixture poses of a new LIBERO environment after `seed` and `reset`."""
    from libero.libero.envs.env_wrapper import ControlEnv

    env = ControlEnv(
        bddl_file_name=str(task.bddl_file), use_camera_obs=False, has_offscreen_renderer=False
    )
    env.seed(seed % 2**32)
    env.reset()
    bodies = [env.env.obj_body_id[name] for name in env.env.fixtures_dict]
    fixtures = env.sim.model.body_pos[bodies].copy()
    state = env.get_sim_state()
    env.close()
    return state, fixtures


def test_a_drawn_state_is_that_of_a_new_stock_environment(case):
    task, seed, model = case
    model.draw_state(seed + 1)  # what was drawn before leaves nothing behind
    drawn = model.draw_state(seed)
    expected, fixtures = _stock_reset(task, seed)
    is_arm = np.isin(np.arange(len(drawn)), 1 + np.arange(NUM_JOINTS))
    np.testing.assert_array_equal(drawn[~is_arm], expected[~is_arm])
    noise = drawn[is_arm] - expected[is_arm]
    assert (np.abs(noise) > 0).all()
    assert np.abs(noise).max() < 5 * ARM_NOISE
    np.testing.assert_array_equal(model.draw_fixtures(seed)[0], fixtures)
    np.testing.assert_array_equal(model.draw_state(seed), drawn)


def test_drawn_states_are_distributed_as_the_official_ones(case):
    task, _, model = case
    official = read_states(task.init_file)
    drawn = np.array([model.draw_state(seed) for seed in range(NUM_DRAWS)])
    assert len(np.unique(drawn, axis=0)) == NUM_DRAWS
    np.testing.assert_array_equal(drawn[:, 0], 0)
    np.testing.assert_array_equal(drawn[:, 1 + model.model.nq :], 0)
    arm = slice(1, 1 + NUM_JOINTS)
    is_perturbed = base_suite(task.suite) != task.suite  # LIBERO-PRO's states carry no noise
    for states in (drawn,) if is_perturbed else (official, drawn):
        assert states[:, arm].std(0) == pytest.approx(np.full(NUM_JOINTS, ARM_NOISE), rel=0.4)
    rest = slice(1 + NUM_ROBOT, 1 + model.model.nq)
    spread = official[:, rest].std(0) / np.sqrt(len(official)) + drawn[:, rest].std(0) / 7
    away = np.abs(drawn[:, rest].mean(0) - official[:, rest].mean(0))
    assert (away <= 5 * spread + 1e-6).all()


# --------------------------------------------------------------------------------------------
# Episodes on them
# --------------------------------------------------------------------------------------------
@pytest.fixture
def make():
    """A factory of simulators in this process."""
    from vlactl_libero.simulator import make_simulator

    simulators = []

    def build(**options):
        config = LiberoConfig(image_size=32, wait_steps=10, sampled_trials=3, **options)
        context = EnvContext(num_slots=1, cameras=())
        simulators.append(make_simulator(config, context))
        return simulators[-1]

    yield build
    for simulator in simulators:
        simulator.close()


def _data(simulator):
    stage = simulator._stage
    return getattr(stage, "_data", None) or stage._env.sim.data


def _height_addresses(simulator):
    """Of all objects that can be moved, in qpos."""
    import mujoco

    model = simulator._stage._task.model
    return model.jnt_qposadr[model.jnt_type == mujoco.mjtJoint.mjJNT_FREE] + 2


def _begin(simulator, task, trial, seed=0):
    """Where everything is when the scene has settled."""
    simulator.begin(Episode(task=task, trial=trial, group=0, member=0, seed=seed))
    return _data(simulator).qpos.copy()


@pytest.mark.parametrize(
    ("suite", "task"), [("libero_spatial", 4), ("libero_spatial", 7), ("libero_90", 39)]
)
def test_both_backends_play_the_same_sampled_state_and_nothing_falls(make, suite, task):
    fast, stock = make(suite=suite), make(suite=suite, backend="stock")
    official = _begin(fast, task, 0)
    trial = count_states(suite_tasks(suite)[task].init_file) + 1
    settled = _begin(fast, task, trial)
    np.testing.assert_array_equal(settled, _begin(stock, task, trial))
    heights = _height_addresses(fast)
    assert len(heights) >= 2
    assert settled[heights] == pytest.approx(official[heights], abs=0.005)
    for action in np.random.default_rng(0).uniform(-1, 1, (3, 4, 7)):
        played, expected = fast.advance(action), stock.advance(action)
        np.testing.assert_array_equal(played.observation.state, expected.observation.state)
        np.testing.assert_array_equal(_data(fast).qpos, _data(stock).qpos)


def test_a_trial_is_the_same_state_whatever_the_episode_and_the_fixture_option(make):
    sampled, fixed = make(), make(fixture_poses="fixed")
    first = _begin(sampled, 7, 50, seed=1)
    np.testing.assert_array_equal(_begin(sampled, 7, 50, seed=2), first)
    np.testing.assert_array_equal(_begin(fixed, 7, 50, seed=3), first)
    assert (_begin(sampled, 7, 52, seed=1) != first).any()


def test_official_trials_stay_what_they_are_and_the_last_one_is_known(make):
    plain, more = make(), make()
    plain._config = plain._config.model_copy(update={"sampled_trials": 0})
    np.testing.assert_array_equal(_begin(plain, 7, 49, seed=5), _begin(more, 7, 49, seed=5))
    with pytest.raises(IntegrityError, match="no trial 53"):
        _begin(more, 7, 53)
    with pytest.raises(IntegrityError, match="no trial 50"):
        _begin(plain, 7, 50)
