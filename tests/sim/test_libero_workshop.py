"""Tasks of one process: who shares a model, how long it is kept, what failures leave behind."""

from __future__ import annotations

import ctypes
import dataclasses
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from vlactl_libero.init_states import read_state
from vlactl_libero.tasks import suite_tasks

from vlactl.errors import EnvironmentNotReadyError

pytestmark = [pytest.mark.sim, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

BOWL, STOVE, PLATE = (suite_tasks("libero_goal")[index] for index in (1, 7, 8))


@pytest.fixture
def make():
    """A factory of workshops without pictures."""
    from vlactl_libero.workshop import Workshop

    return lambda task_cache: Workshop(64, has_pictures=False, task_cache=task_cache)


@pytest.fixture
def custom(tmp_path):
    """The bowl's task with a definition of its own."""
    return dataclasses.replace(BOWL, bddl_file=tmp_path / BOWL.bddl_file.name)


def _define(task, before="", after=""):
    """Write the bowl's definition, one part of it replaced."""
    text = BOWL.bddl_file.read_text()
    assert before in text
    task.bddl_file.write_text(text.replace(before, after))


def _refuse(_model):
    raise MemoryError


def _references(stage):
    """To all that a task takes memory for; they keep nothing alive."""
    task = stage._task
    return [weakref.ref(thing) for thing in (task, task.model, task.domain)]


def _alive(references):
    return [reference() is not None for reference in references]


def _play(stage, task):
    """The state after some steps."""
    stage.restore(read_state(task.init_file, 0), 1, ())
    start = stage.state
    for _ in range(5):
        stage.step(np.ones(7), ())
    assert np.abs(stage.state - start).max() > 0.001
    return stage.state


def test_task_left_longest_ago_makes_room_and_is_freed(make):
    workshop = make(task_cache=2)
    bowl, stove = workshop.open(BOWL), workshop.open(STOVE)
    bowl_references, stove_references = _references(bowl), _references(stove)
    stove.close()
    bowl.close()
    del bowl, stove
    workshop.open(PLATE)
    assert _alive(stove_references) == [False] * 3
    assert workshop.open(BOWL)._task is bowl_references[0]()


def test_tasks_opened_at_once_all_work_and_are_kept_while_in_use(make):
    workshop, tasks = make(task_cache=1), (BOWL, STOVE, BOWL)
    start = threading.Barrier(len(tasks))

    def open_and_play(task):
        start.wait()
        stage = workshop.open(task)
        return stage, _play(stage, task)

    with ThreadPoolExecutor(len(tasks)) as threads:
        stages, states = zip(*threads.map(open_and_play, tasks), strict=True)
    assert stages[0]._task is stages[2]._task is not stages[1]._task
    np.testing.assert_array_equal(states[0], states[2])
    for stage, task in zip(stages, tasks, strict=True):
        assert workshop.open(task)._task is stage._task


def test_task_that_did_not_compile_is_compiled_later(make, custom):
    workshop = make(task_cache=1)
    _define(custom, "akita_black_bowl_1 - akita_black_bowl", "akita_black_bowl_1 - teapot")
    with pytest.raises(KeyError, match="teapot"):
        workshop.open(custom)
    _define(custom)
    stage = workshop.open(custom)
    references = _references(stage)
    stage.close()
    del stage
    workshop.open(STOVE)
    assert _alive(references) == [False] * 3


def test_task_that_got_no_simulation_gets_one_later_and_is_freed(make, monkeypatch, custom):
    import mujoco

    workshop = make(task_cache=1)
    stage = workshop.open(BOWL)
    with monkeypatch.context() as patch:
        patch.setattr(mujoco, "MjData", _refuse)
        with pytest.raises(MemoryError):
            workshop.open(BOWL)
    references, neighbour = _references(stage), workshop.open(BOWL)
    assert neighbour._task is stage._task
    np.testing.assert_array_equal(_play(stage, BOWL), _play(neighbour, BOWL))
    stage.close()
    neighbour.close()
    del stage, neighbour
    _define(custom, "(On akita_black_bowl_1 flat_stove_1_cook_region)", "(Up akita_black_bowl_1)")
    with pytest.raises(EnvironmentNotReadyError, match="does not know the goal"):
        workshop.open(custom)
    assert _alive(references) == [False] * 3


@pytest.fixture
def model():
    """A model of two bodies."""
    import mujoco

    xml = '<mujoco><worldbody><body/><body pos="0 0 2"/></worldbody></mujoco>'
    return mujoco.MjModel.from_xml_string(xml)


def test_poses_of_a_posed_model_are_its_own(model):
    import mujoco
    from vlactl_libero.control import library
    from vlactl_libero.task_model import PosedModel

    posed, data = PosedModel(model), mujoco.MjData(model)
    posed.body_pos[1] = [1, 2, 3]
    library().mj_kinematics(ctypes.c_void_p(posed.address), ctypes.c_void_p(data._address))
    np.testing.assert_array_equal(data.xpos, [[0, 0, 0], [1, 2, 3], [0, 0, 2]])
    mujoco.mj_kinematics(model, data)
    np.testing.assert_array_equal(data.xpos, [[0, 0, 0], [0, 0, 0], [0, 0, 2]])


def test_mujoco_that_lays_out_models_in_another_way_is_refused(model, monkeypatch):
    from vlactl_libero import task_model

    monkeypatch.setattr(task_model._LIBC, "malloc_usable_size", lambda _address: 64)
    with pytest.raises(EnvironmentNotReadyError, match="in an unknown way") as caught:
        task_model.PosedModel(model)
    assert caught.value.hint == 'env.backend = "stock"'
