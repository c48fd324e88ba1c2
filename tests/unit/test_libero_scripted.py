"""Recorded LIBERO episodes: what replays rely on, without a simulator."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from vlactl_libero import scripted
from vlactl_libero.init_states import count_states
from vlactl_libero.plugin import DEFAULT_MAX_EPISODE_STEPS
from vlactl_libero.tasks import ACTION_DIM, suite_tasks

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_90", "libero_10")
EPISODES = scripted.episodes()


def names(episode):
    return f"{episode.suite}-{episode.task_name}-{episode.trial}"


def test_every_suite_has_episodes_of_several_tasks():
    tasks = {(episode.suite, episode.task_name) for episode in EPISODES}
    assert {suite for suite, _ in tasks} == set(SUITES)
    assert len(tasks) >= 12


def test_episodes_are_distinct():
    assert len({names(episode) for episode in EPISODES}) == len(EPISODES)


def test_some_spatial_tasks_have_several_trials_of_different_lengths():
    lengths = {}
    for episode in scripted.episodes("libero_spatial"):
        lengths.setdefault(episode.task_name, []).append(len(episode.actions))
    several = [values for values in lengths.values() if len(values) > 1]
    assert len(several) >= 2
    assert all(len(set(values)) > 1 for values in several)


def test_suites_share_the_episodes_out():
    parts = [names(episode) for suite in SUITES for episode in scripted.episodes(suite)]
    assert parts == [names(episode) for episode in EPISODES]


def test_a_suite_without_episodes_has_none():
    assert scripted.episodes("libero") == []


@pytest.mark.parametrize("episode", EPISODES, ids=names)
def test_an_episode_fits_its_task(episode):
    tasks = {task.name: task for task in suite_tasks(episode.suite)}
    assert 0 <= episode.trial < count_states(tasks[episode.task_name].init_file)
    assert 0 < len(episode.actions) <= DEFAULT_MAX_EPISODE_STEPS[episode.suite]


@pytest.mark.parametrize("episode", EPISODES, ids=names)
def test_actions_are_valid(episode):
    actions = episode.actions
    assert actions.dtype == np.float32
    assert actions.shape[1:] == (ACTION_DIM,)
    assert np.abs(actions).max() <= 1  # false for nan as well
    assert not actions.flags.writeable


def test_no_simulator_is_imported():
    program = (
        "import sys; from vlactl_libero import scripted; scripted.episodes();"
        "sys.exit(bool({'mujoco', 'robosuite', 'libero'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
