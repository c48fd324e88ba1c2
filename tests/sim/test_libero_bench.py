"""`vlactl bench env` on real LIBERO: a run of the smallest size, and one that is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from vlactl_libero.bench.expected import costs, ratios
from vlactl_libero.bench.memory import weigh
from vlactl_libero.bench.progress import about, count, phase
from vlactl_libero.bench.table import make_notes, make_rows
from vlactl_libero.bench.workload import (
    Script,
    deal,
    lend,
    random_actions,
    read_scripts,
    scripted_actions,
    spread_tasks,
)
from vlactl_libero.plugin import LiberoConfig

from vlactl.cli.app import main
from vlactl.errors import EXIT_INTERRUPTED

pytestmark = pytest.mark.sim

SMALLEST = (
    *("bench", "env", "--num-envs", "1", "--cameras", "1", "--image-size", "16"),
    *("--renderer", "osmesa", "--rounds", "1", "--seconds", "0.1", "--no-memory"),
)


def _script(task):
    return Script(task=task, trial=0, actions_TA=np.ones((2, 7), np.float32))


@pytest.mark.timeout(600)
def test_both_sides_play_and_are_compared(tmp_path, capsys):
    file = tmp_path / "bench.json"
    arguments = ["--episodes", "1", "--horizon", "80", "--wave-seconds", "0.1", "--json", str(file)]
    assert main([*SMALLEST, *arguments]) == 0
    record = json.loads(file.read_text())
    assert set(record["ratios"]) == {"steps_per_second", "reset", "episodes_per_hour"}
    assert all(ratio > 0 for ratio in record["ratios"].values())
    assert record["identical"] == {"steps": 16, "simulators": 1, "states": 1, "pictures": 1}
    assert record["rounds"]["ours"][0]["episodes"]["successes"] == 1
    assert record["rounds"]["stock"][0]["episodes"]["extrapolated"] is True
    for side in ("stock", "ours"):
        assert record[side]["steps_per_second"] > 0
        assert len(record[side]["samples"]["reset_seconds"]) == 1
        assert record["start"][side]["memory"]["pss"] > 2**28
    output = capsys.readouterr().out
    for text in (
        *("steps/s", "reset, s", "episodes/h", ", extrapolated", "mujoco 3.3", "osmesa"),
        *("about", "nothing shared", "1 process, 1 task)", "ratio of episodes/h: ", "1 camera of"),
    ):
        assert text in output
    assert output.isascii()
    assert make_rows(record)
    assert make_notes(record)


def test_an_interrupted_run_leaves_no_process():
    environment = {**os.environ, "VLACTL_TEST_MARK": f"bench-{os.getpid()}"}
    command = [sys.executable, "-m", "vlactl.cli.app", *SMALLEST, "--episodes", "0"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert "about" in process.stderr.readline()
        while "building" not in process.stderr.readline():
            assert process.poll() is None
        while len(_marked(environment)) < 4:  # the command, its two sides, a simulator
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == EXIT_INTERRUPTED
        assert "interrupted" in process.stderr.read()
    assert _marked(environment) == []


def _marked(environment):
    found = []
    for process in psutil.process_iter():
        try:
            mark = process.environ().get("VLACTL_TEST_MARK")
            if mark == environment["VLACTL_TEST_MARK"] and process.status() != "zombie":
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_both_sides_get_the_same_actions():
    first, second = random_actions(3, 1), random_actions(3, 1)
    for _ in range(20):
        action = next(first)
        assert (action == next(second)).all()
        assert np.abs(action[:-1]).max() <= 0.5
        assert abs(action[-1]) == 1
    assert (next(random_actions(3, 1)) != next(random_actions(4, 1))).any()


def test_a_script_is_followed_by_nothing():
    actions = scripted_actions(_script(0))
    assert [next(actions).sum() for _ in range(4)] == [7, 7, 0, 0]
    assert next(scripted_actions(None)).sum() == 0


def test_tasks_with_scripts_come_first_and_neighbours_share_one():
    config = LiberoConfig(num_envs=5)
    assert spread_tasks(config, [_script(7), _script(4)]) == (0, 1, 2, 4, 7)
    assert spread_tasks(LiberoConfig(num_envs=12), []) == (0, 0, 1, 1, *range(2, 10))


def test_who_has_no_script_gets_another():
    hands = deal([_script(1)], (0, 1))
    assert [len(hand) for hand in hands] == [0, 1]
    assert [hand[0].task for hand in lend(hands)] == [1, 1]


@pytest.mark.parametrize("suite", ["libero_spatial", "libero_130"])
def test_recorded_scripts_belong_to_tasks(suite):
    scripts = read_scripts(suite)
    assert scripts
    assert all(script.actions_TA.shape[1] == 7 for script in scripts)


@pytest.mark.parametrize("gpu", [False, True])
def test_expected_ratios_follow_the_options(gpu):
    def expect(num_cameras=2, chunk_length=8, horizon=512, length=100):
        sides = costs(gpu=gpu, num_cameras=num_cameras, chunk_length=chunk_length, wait_steps=15)
        return ratios(sides, horizon, length)

    usual = expect()
    assert 9 < usual["steps_per_second"] < 13
    assert 20 < usual["reset"] < 30
    assert expect(num_cameras=0)["steps_per_second"] < 7
    assert expect(chunk_length=1)["steps_per_second"] < 4
    assert expect(horizon=256)["episodes_per_hour"] < usual["episodes_per_hour"]
    assert expect(length=200)["episodes_per_hour"] < usual["episodes_per_hour"]
    assert "episodes_per_hour" not in expect(length=None)


def test_progress_tells_what_was_found_and_how_long_it_took():
    said = []
    with phase(said.append, "stock: building", 17) as findings:
        findings.append("2 steps/s")
    assert said == ["stock: building, about 15 s", "  2 steps/s, after 0 s"]
    assert [count(1, "round"), count(2, "process")] == ["1 round", "2 processes"]
    assert [about(1), about(100)] == ["about 5 s", "about 2 minutes"]


def test_memory_of_processes():
    found = weigh([psutil.Process()])
    assert found.num_processes == 1
    assert 0 < found.pss <= found.rss
