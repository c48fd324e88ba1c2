"""Simulators that share a process: each plays as it would alone, whatever its neighbours do.

What one of them could change for another: fixture poses, what glows, the generator that draws
poses, tasks that come and go, and a simulation that blows up. What each does on its own then is
compared with stock LIBERO.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from vlactl_libero.environment import make_environment
from vlactl_libero.init_states import read_state
from vlactl_libero.plugin import LiberoConfig
from vlactl_libero.tasks import suite_tasks

from vlactl.api.contracts import EnvContext, Episode

pytestmark = [pytest.mark.sim, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

CAMERAS = ("agentview", "wrist")
CHUNK = 4
SUITE = "libero_90"
MOKA_POT, STOVE = 38, 39  # their stoves glow at the start, by a joint that is drawn
TRIAL = 2
TASK = suite_tasks(SUITE)[STOVE]
INIT_STATE = read_state(TASK.init_file, TRIAL)
FAULT_STEP = 4


def _episode(task, trial, seed):
    return Episode(task=task, trial=trial, group=0, member=0, seed=seed)


# --------------------------------------------------------------------------------------------
# Slots of one process
# --------------------------------------------------------------------------------------------
def test_slots_of_one_process_play_as_each_alone():
    stove, other_stove, pot = _episode(STOVE, 0, 1), _episode(STOVE, 1, 2), _episode(MOKA_POT, 2, 3)
    alone = dict(_play(1, [[stove, other_stove, pot]]))
    together = _play(3, [[stove, pot, stove], [other_stove, stove], [pot, pot]])
    assert len(together) == 7
    for episode, results in together:
        _assert_same(results, alone[episode])


def _play(slots_per_process, queues):
    """Every slot plays its queue, all at the same time: pairs of an episode and its results."""
    config = LiberoConfig(
        suite=SUITE,
        image_size=32,
        wait_steps=3,
        max_episode_steps=2 * CHUNK + 1,
        shaping_coef=1.0,
        slots_per_process=slots_per_process,
        task_cache=1,
    )
    context = EnvContext(num_slots=len(queues), cameras=CAMERAS, render_every_step=True)
    environment = make_environment(config, context)
    try:
        return _drive(environment, [iter(queue) for queue in queues], slots_per_process)
    finally:
        environment.close()


def _drive(environment, queues, slots_per_process):
    played, playing = [], {}

    def begin(slot):
        episode = next(queues[slot], None)
        if episode is not None:
            environment.begin(slot, episode)
            playing[slot] = (episode, [])

    for slot in range(len(queues)):
        begin(slot)
    assert len(set(environment.process_ids.values())) == len(queues) / slots_per_process
    while playing:
        for event in environment.wait(1, timeout=150):
            assert event.failure == ""
            episode, results = playing[event.slot]
            results.append(event.result)
            if event.result.outcome is None:
                environment.advance(event.slot, _chunk(episode, len(results) - 1))
            else:
                played.append(playing.pop(event.slot))
                begin(event.slot)
    return played


def _chunk(episode, index):
    return np.random.default_rng((episode.seed, index)).uniform(-1, 1, (CHUNK, 7))


def _assert_same(results, expected):
    for result, other in zip(results, expected, strict=True):
        assert result.outcome == other.outcome
        np.testing.assert_array_equal(result.rewards, other.rewards)
        np.testing.assert_array_equal(result.frames, other.frames)
        assert len(result.frames) == len(result.rewards)
        if result.observation is not None:
            _assert_same_sight(result.observation, other.observation)


def _assert_same_sight(observation, other):
    assert observation.instruction == other.instruction
    np.testing.assert_array_equal(observation.state, other.state)
    assert list(observation.images) == list(other.images) == list(CAMERAS)
    for camera, picture in observation.images.items():
        assert picture.std() > 10
        np.testing.assert_array_equal(picture, other.images[camera])


# --------------------------------------------------------------------------------------------
# Fixture poses
# --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def workshop():
    """Of this process, without pictures."""
    from vlactl_libero.workshop import Workshop

    return Workshop(64, has_pictures=False, task_cache=1)


@pytest.fixture(scope="module")
def stock():
    """The task in the unmodified LIBERO environment."""
    from vlactl_libero.stock import StockStage

    stage = StockStage(TASK.bddl_file, 64, cameras=())
    yield stage
    stage.close()


@pytest.fixture
def pair(workshop):
    """Two simulators of the task."""
    stages = [workshop.open(TASK) for _ in range(2)]
    yield stages
    for stage in stages:
        stage.close()


def test_sampled_fixture_poses_are_those_of_stock(workshop, stock):
    seeds = (1, 2**40 + 7)
    poses = _episode_poses(workshop, seeds, fixture_poses="sampled")
    assert (poses[0] != poses[1]).any()
    for seed, pose in zip(seeds, poses, strict=True):
        np.testing.assert_array_equal(pose, _stock_poses(stock, seed))


def test_fixed_fixture_poses_are_those_of_their_own_seed(workshop, stock):
    for fixture_seed in (0, 3):
        poses = _episode_poses(
            workshop, (1, 2**40 + 7), fixture_poses="fixed", fixture_seed=fixture_seed
        )
        for pose in poses:
            np.testing.assert_array_equal(pose, _stock_poses(stock, fixture_seed))
    assert (_stock_poses(stock, 0) != _stock_poses(stock, 3)).any()


@pytest.mark.parametrize("num_failures", [1, 2])
def test_poses_after_failed_placements_are_those_of_stock(pair, stock, monkeypatch, num_failures):
    poses = []
    for place, stage in ((_fast_poses, pair[0]), (_stock_poses, stock)):
        with monkeypatch.context() as patch:
            failures = _fail(patch, num_failures)
            poses.append(place(stage, 5))
            assert next(failures, None) is None
    np.testing.assert_array_equal(*poses)
    assert (poses[0] != _fast_poses(pair[0], 5)).any()


def _episode_poses(workshop, seeds, **options):
    """Where the bodies are attached in episodes of these seeds, one after the other."""
    from vlactl_libero.simulator import LiberoSimulator

    config = LiberoConfig(suite=SUITE, wait_steps=0, **options)
    simulator = LiberoSimulator(config, EnvContext(num_slots=1, cameras=()), workshop.open)
    poses = []
    for seed in seeds:
        simulator.begin(_episode(STOVE, TRIAL, seed))
        poses.append(_poses(simulator._stage._posed))
    simulator.close()
    return poses


def _fast_poses(stage, seed):
    stage.restore(INIT_STATE, seed)
    return _poses(stage._posed)


def _stock_poses(stage, seed):
    stage.restore(INIT_STATE, seed)
    return _poses(stage._env.sim.model)


def _poses(model):
    return np.hstack([model.body_pos, model.body_quat])


def _fail(patch, num_times):
    """Let robosuite find no place for the objects, after it has drawn, so many times."""
    from robosuite.utils.errors import RandomizationError
    from robosuite.utils.placement_samplers import SequentialCompositeSampler

    failures, draw = iter(range(num_times)), SequentialCompositeSampler.sample

    def sample(sampler, *arguments):
        placements = draw(sampler, *arguments)
        if sampler.name == "ObjectSampler" and next(failures, None) is not None:
            raise RandomizationError
        return placements

    patch.setattr(SequentialCompositeSampler, "sample", sample)
    return failures


# --------------------------------------------------------------------------------------------
# Numerical faults
# --------------------------------------------------------------------------------------------
def test_neighbour_of_a_simulation_that_blows_up_notices_nothing(pair, caplog):
    steady, faulty = pair
    alone = _run(steady)
    with ThreadPoolExecutor(2) as threads, caplog.at_level(logging.WARNING):
        beside, blown = threads.submit(_run, steady), threads.submit(_run, faulty, speed=1e12)
    np.testing.assert_array_equal(beside.result(), alone)
    assert (blown.result()[FAULT_STEP:, 0] < alone[FAULT_STEP:, 0]).all()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "MuJoCo" in record.message
    assert "unstable" in record.message


# MuJoCo starts anew for accelerations out of all bounds, and for velocities that are.
def test_simulation_that_blew_up_goes_on_as_stock_does(pair, stock):
    speed = 1e6  # as far as physics can get: MuJoCo resets what accelerates more
    fast = _run(pair[0], speed)
    assert np.isfinite(fast).all()
    assert (np.diff(fast[:, 0]) < 0).sum() == 1
    np.testing.assert_array_equal(fast, _run(stock, speed))


def _run(stage, speed=None):
    """Time, positions, velocities and what is sampled, after each control step.

    All velocities become `speed` before one of the steps.
    """
    stage.restore(INIT_STATE, 1, ())
    data = _data(stage)
    played = []
    for step, action in enumerate(np.random.default_rng(0).uniform(-1, 1, (12, 7))):
        if step == FAULT_STEP and speed is not None:
            data.qvel[:] = speed
        stage.step(action, ())
        played.append([data.time, *data.qpos, *data.qvel, *stage.state, stage.reach()])
    return np.array(played)


def _data(stage):
    from vlactl_libero.core import FastStage

    return stage._data if isinstance(stage, FastStage) else stage._env.sim.data
