"""LIBERO's expert in the simulator: it solves tasks, whatever was before, even if it is pushed."""

from __future__ import annotations

import numpy as np
import pytest
from vlactl_libero.init_states import read_state
from vlactl_libero.plugin import DEFAULT_MAX_EPISODE_STEPS
from vlactl_libero.tasks import suite_tasks

pytestmark = [pytest.mark.sim, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

SETTLING_STEPS = 15
WAIT = np.array([0.0] * 6 + [-1.0])
SOLVED = {
    "bowl onto a plate": ("libero_spatial", 0),
    "can into a basket": ("libero_object", 0),
    "drawer opened": ("libero_goal", 0),
    "plate slid": ("libero_goal", 5),
    "knob turned": ("libero_goal", 7),
    "bowl into a drawer, which is closed": ("libero_10", 3),
    "two mugs onto two plates": ("libero_10", 4),
    "microwave closed": ("libero_90", 33),
}


@pytest.fixture(scope="module")
def open_task():
    """A factory of (task, stage, expert)."""
    from vlactl_libero.workshop import Workshop

    shop, opened = Workshop(64, has_pictures=False, task_cache=1), []

    def make(suite, index):
        task = suite_tasks(suite)[index]
        opened.append(shop.open(task))
        return task, opened[-1], opened[-1].expert()

    yield make
    for stage in opened:
        stage.close()


def _begin(task, stage, expert, trial=0):
    stage.restore(read_state(task.init_file, trial), fixture_seed=trial)
    for _ in range(SETTLING_STEPS):
        stage.step(WAIT)
    expert.reset()


def _finish(task, stage, expert, push=None):
    """Play to the end; returns the expert's actions and phases, and whether it succeeded."""
    actions, phases = [], []
    for _ in range(DEFAULT_MAX_EPISODE_STEPS[task.suite]):
        actions.append(expert.act())
        phases.append(expert.phase)
        solved = stage.step(actions[-1])
        if push is not None and not solved:
            push(expert, actions[-1][-1])
        if solved:
            return np.array(actions), phases, True
    return np.array(actions), phases, False


@pytest.mark.parametrize("name", SOLVED)
def test_it_solves_tasks_of_every_kind(open_task, name):
    task, stage, expert = open_task(*SOLVED[name])
    _begin(task, stage, expert)
    actions, phases, solved = _finish(task, stage, expert)
    assert solved, phases
    assert actions.dtype == np.float64
    assert np.abs(actions).max() <= 1.0


def test_an_episode_depends_on_no_other(open_task):
    """The same state, first and after an episode that began in another one."""
    task, stage, expert = open_task("libero_spatial", 5)
    played = []
    for trial in (0, 1, 0):
        _begin(task, stage, expert, trial)
        played.append(_finish(task, stage, expert)[0])
    np.testing.assert_array_equal(played[0], played[2])
    assert not np.array_equal(played[0][:10], played[1][:10])


def test_it_only_reads(open_task):
    task, stage, expert = open_task("libero_goal", 3)
    _begin(task, stage, expert)
    before = stage._data.qpos.copy(), stage._data.qvel.copy(), stage._data.xpos.copy()
    expert.act()
    after = stage._data.qpos, stage._data.qvel, stage._data.xpos
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("phase", ["approach", "descend", "move"])
def test_it_recovers_from_pushes(open_task, phase):
    task, stage, expert = open_task("libero_spatial", 0)
    _begin(task, stage, expert)
    assert expert.can_be_disturbed
    pushed = []

    def push(expert, grip):
        if expert.phase == phase and not pushed:
            assert expert.can_be_disturbed
            before = stage.state[:3].copy()
            for _ in range(8):
                stage.step(np.array([-0.7, 0.9, 0.5, 0.1, -0.1, 0.4, grip]), ())
            pushed.append(np.linalg.norm(stage.state[:3] - before))

    _, phases, solved = _finish(task, stage, expert, push)
    assert pushed
    assert pushed[0] > 0.1, "metres that the hand was pushed away"
    assert solved, phases


def test_hands_that_grip_are_left_alone(open_task):
    task, stage, expert = open_task("libero_spatial", 0)
    _begin(task, stage, expert)
    phases = {}

    def look(expert, grip):
        phases[expert.phase] = expert.can_be_disturbed

    _finish(task, stage, expert, look)
    assert phases["approach"]
    assert phases["descend"]
    assert not phases["close"]
