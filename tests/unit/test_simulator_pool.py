"""Simulator processes die, hang and return nonsense; the pool reports it and goes on (rows
17-20)."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from vlactl_toy.environment import make_environment, make_spec
from vlactl_toy.plugin import ToyEnvConfig

from vlactl.api.contracts import EnvContext, Episode
from vlactl.api.simulators import SimulatorPool
from vlactl.errors import IntegrityError

ACTIONS_KA = np.ones((4, 1))


def episode(task: int = 0, trial: int = 0, member: int = 0) -> Episode:
    return Episode(task=task, trial=trial, group=0, member=member, seed=1)


@pytest.fixture
def make_pool():
    pools = []

    def make(num_slots: int = 2, **keys) -> SimulatorPool:
        config = ToyEnvConfig(**{"step_timeout": 20.0} | keys)
        pools.append(make_environment(config, EnvContext(num_slots=num_slots, cameras=("front",))))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def one_event(pool: SimulatorPool):
    (event,) = pool.wait(1, 20.0)
    return event


def test_episode_runs_to_its_outcome_with_pictures_of_the_right_slot(make_pool):
    pool = make_pool()
    pool.begin(0, episode(task=0))
    pool.begin(1, episode(task=3))
    first = {event.slot: event.result.observation for event in pool.wait(2, 20.0)}
    goal_columns = [int(first[slot].images["front"][0, :, 0].argmax()) for slot in (0, 1)]
    assert goal_columns[0] < goal_columns[1]
    while (event := _advance(pool, 1)).result.outcome is None:
        assert event.result.rewards.shape == (4,)
    assert event.result.outcome.success
    assert event.result.rewards[-1] == 5.0


def _advance(pool, slot):
    pool.advance(slot, ACTIONS_KA)
    return one_event(pool)


def test_killed_process_is_reported_and_replaced(make_pool):
    pool = make_pool()
    pool.begin(0, episode())
    before = one_event(pool).result.observation
    os.kill(pool.process_ids[0], signal.SIGKILL)
    pool.advance(0, ACTIONS_KA)
    assert "SIGKILL" in one_event(pool).failure
    pool.begin(0, episode())
    after = one_event(pool).result.observation
    assert np.array_equal(before.state, after.state)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("die", "SIGKILL"),
        ("nan", "not finite"),
        ("raise", "injected"),
        ("hang", "no answer within"),
    ],
)
def test_faults_cost_one_episode(make_pool, tmp_path: Path, fault, text):
    pool = make_pool(faults={"1/2/3": fault}, fault_dir=str(tmp_path), step_timeout=3.0)
    pool.begin(0, episode(1, 2, 3))
    assert text in one_event(pool).failure
    pool.begin(0, episode(1, 2, 3))
    assert one_event(pool).result.observation is not None


def test_answer_to_an_abandoned_request_is_ignored(make_pool):
    pool = make_pool()
    pool.begin(0, episode(task=0))
    pool.begin(0, episode(task=3))
    assert one_event(pool).result.observation.instruction == "reach goal 3"
    assert pool.wait(1, 0.2) == []


def test_processes_are_recycled(make_pool):
    pool = make_pool(recycle_after=2)
    pids = []
    for _ in range(4):
        pool.begin(0, episode())
        one_event(pool)
        pids.append(pool.process_ids[0])
    assert pids[0] == pids[1] != pids[2] == pids[3]


def test_nothing_is_left_behind(make_pool):
    pool = make_pool()
    for slot in (0, 1):
        pool.begin(slot, episode())
    pool.wait(2, 20.0)
    pids = list(pool.process_ids.values())
    pool.close()
    pool.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_user_error_of_a_simulator_reaches_the_user(tmp_path: Path):
    (tmp_path / "refusing_simulator.py").write_text(
        "from vlactl.errors import IntegrityError\n"
        "def make(config, context):\n"
        "    raise IntegrityError('states.npz is damaged', hint='install it again')\n"
    )
    config = ToyEnvConfig()
    pool = SimulatorPool(
        "refusing_simulator:make",
        config,
        EnvContext(num_slots=1, cameras=()),
        make_spec(config),
        {"PYTHONPATH": str(tmp_path)},
    )
    pool.begin(0, episode())
    with pytest.raises(IntegrityError, match=r"states\.npz is damaged"):
        pool.wait(1, 20.0)
    pool.close()
