"""Episodes of real LIBERO: rewards, ends, chunks, pictures, and the same results everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from vlactl_libero.environment import make_environment
from vlactl_libero.plugin import LiberoConfig

from vlactl.api.contracts import EnvContext, Episode
from vlactl.errors import IntegrityError

pytestmark = [pytest.mark.sim, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

STOVE = 7  # libero_goal: "turn on the stove", which a turned knob solves
SIZE = 32


def _config(**options):
    return LiberoConfig(suite="libero_goal", image_size=SIZE, wait_steps=2, **options)


def _context(**options):
    return EnvContext(num_slots=1, cameras=("agentview",), **options)


def _episode(task=STOVE, trial=0):
    return Episode(task=task, trial=trial, group=0, member=0, seed=0)


@pytest.fixture
def make():
    """A factory of simulators in this process."""
    from vlactl_libero.simulator import make_simulator

    simulators = []

    def build(config, context=None):
        simulators.append(make_simulator(config, context or _context()))
        return simulators[-1]

    yield build
    for simulator in simulators:
        simulator.close()


def _same(one, other):
    np.testing.assert_array_equal(one.state, other.state)
    np.testing.assert_array_equal(one.images["agentview"], other.images["agentview"])


@pytest.mark.parametrize("backend", ["fast", "stock"])
def test_the_end_is_observed_where_it_is_asked_for(make, backend):
    """At the horizon and after a success the state is seen as if the episode went on."""
    goes_on = make(_config(backend=backend))
    goes_on.begin(_episode())
    expected = goes_on.advance(np.full((3, 7), 0.2)).observation
    goes_on.close()
    cut = make(_config(backend=backend, max_episode_steps=3), _context(final_observations=True))
    cut.begin(_episode())
    last = cut.advance(np.full((5, 7), 0.2))
    assert not last.outcome.terminated
    _same(last.observation, expected)


def test_the_state_after_a_success_is_observed(make):
    context = _context(final_observations=True)
    ends, goes_on = make(_config(), context), make(_config(ignore_terminations=True), context)
    seen = []
    for simulator, num_actions in ((ends, 8), (goes_on, 1)):
        simulator.begin(_episode())
        simulator.advance(_idle(3))
        _turn_knob(simulator, 1.0)
        seen.append(simulator.advance(_idle(num_actions)))
    assert seen[0].outcome.terminated
    assert seen[1].outcome is None
    _same(seen[0].observation, seen[1].observation)


def _turn_knob(simulator, angle):
    stage = simulator._stage
    domain = stage._task.domain
    (joint,) = domain.get_object("flat_stove_1").joints
    stage._data.qpos[domain.sim.model.get_joint_qpos_addr(joint)] = angle


def _idle(num):
    return np.zeros((num, 7))


def test_success_ends_the_episode_within_a_chunk(make):
    simulator = make(_config())
    begun = simulator.begin(_episode())
    assert begun.rewards.shape == (0,)
    assert begun.outcome is None
    assert begun.observation.instruction == "turn on the stove"
    assert begun.observation.state.dtype == np.float32
    assert begun.observation.images["agentview"].shape == (SIZE, SIZE, 3)
    assert list(begun.observation.images) == ["agentview"]

    first = simulator.advance(_idle(3))
    np.testing.assert_array_equal(first.rewards, [0, 0, 0])
    _turn_knob(simulator, 1.0)
    last = simulator.advance(_idle(8))
    np.testing.assert_array_equal(last.rewards, [5])
    assert last.rewards.dtype == np.float32
    assert last.observation is None
    assert last.frames == []
    outcome = last.outcome
    assert (outcome.success, outcome.success_at_end, outcome.terminated) == (True, True, True)
    assert outcome.num_steps == 4

    again = simulator.begin(_episode())  # the knob is back where it was
    np.testing.assert_array_equal(
        again.observation.images["agentview"], begun.observation.images["agentview"]
    )
    np.testing.assert_array_equal(again.observation.state, begun.observation.state)


def test_horizon_cuts_and_success_may_be_lost_again(make):
    simulator = make(
        _config(max_episode_steps=6, ignore_terminations=True, shaping_coef=2.0),
        _context(render_every_step=True),
    )
    simulator.begin(_episode())
    before = simulator._stage.reach()
    _turn_knob(simulator, 1.0)
    middle = simulator.advance(_idle(3))
    assert len(middle.frames) == 3
    assert middle.frames[0].shape == (SIZE, SIZE, 3)
    np.testing.assert_array_equal(middle.frames[-1], middle.observation.images["agentview"])
    _turn_knob(simulator, 0.0)
    last = simulator.advance(_idle(8))
    assert len(last.frames) == len(last.rewards) == 3
    outcome = last.outcome
    assert (outcome.success, outcome.success_at_end, outcome.terminated) == (True, False, False)
    assert outcome.num_steps == 6
    rewards = np.concatenate([middle.rewards, last.rewards])
    # Success came and went: what remains of the sum is the way that the gripper covered.
    assert rewards.sum() == pytest.approx(2.0 * (before - simulator._stage.reach()), abs=1e-5)
    assert rewards[0] == pytest.approx(5.0, abs=0.1)
    assert rewards[3] == pytest.approx(-5.0, abs=0.1)


def test_another_task_and_the_way_back_leads_to_the_same(make):
    simulator = make(_config())
    there = simulator.begin(_episode(STOVE))
    other = simulator.begin(_episode(task=0))
    back = simulator.begin(_episode(STOVE))
    assert other.observation.instruction == "open the middle drawer of the cabinet"
    np.testing.assert_array_equal(back.observation.state, there.observation.state)
    np.testing.assert_array_equal(
        back.observation.images["agentview"], there.observation.images["agentview"]
    )


def test_open_gripper_while_settling(make):
    fingers = []
    for is_open in (False, True):
        begun = make(_config(reset_gripper_open=is_open)).begin(_episode())
        fingers.append(begun.observation.state[6] - begun.observation.state[7])
    assert fingers[1] > fingers[0]


def test_two_processes_play_the_same_episode_alike_and_silently(capfd):
    config = _config(max_episode_steps=10, slots_per_process=1)
    environment = make_environment(config, EnvContext(num_slots=2, cameras=("agentview", "wrist")))
    actions = np.random.default_rng(0).uniform(-1, 1, (8, 7))
    try:
        for slot in (0, 1):
            environment.begin(slot, _episode(trial=3))
        assert len(set(environment.process_ids.values())) == 2
        begun = environment.wait(2, timeout=150)
        for slot in (0, 1):
            environment.advance(slot, actions)
        played = environment.wait(2, timeout=150)
        for slot in (0, 1):
            environment.advance(slot, actions)
        ended = environment.wait(2, timeout=150)
    finally:
        environment.close()
    for left, right in (begun, played):
        assert left.failure == right.failure == ""
        _assert_same(left.result.observation, right.result.observation)
        np.testing.assert_array_equal(left.result.rewards, right.result.rewards)
    assert [event.result.outcome.num_steps for event in ended] == [10, 10]
    assert not any(event.result.outcome.success for event in ended)
    assert capfd.readouterr().out == ""


def _assert_same(left, right):
    np.testing.assert_array_equal(left.state, right.state)
    assert list(left.images) == list(right.images) == ["agentview", "wrist"]
    for camera, picture in left.images.items():
        assert picture.std() > 10
        np.testing.assert_array_equal(picture, right.images[camera])


def test_trial_that_does_not_exist_ends_the_run():
    environment = make_environment(_config(), _context())
    try:
        environment.begin(0, _episode(trial=50))
        with pytest.raises(IntegrityError, match="has 50 initial states: there is no trial 50"):
            environment.wait(1, timeout=150)
    finally:
        environment.close()
