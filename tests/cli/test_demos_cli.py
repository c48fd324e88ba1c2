"""`vlactl demos`, as typed: what it refuses, makes, continues and measures, with the toy world."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlactl.cli.app import main
from vlactl.demonstrations.samples import load_dataset
from vlactl.errors import EXIT_INTERRUPTED

SMALL = ("demos", "--suite", "toy", "--set", "env.num_tasks=2", "--per-task", "3", "--workers", "1")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--suite", "toy"), "where to? --out FOLDER"),
        (("--suite", "toy", "--rates", "2", "--out", "a"), "--rates records nothing"),
        (("--suite", "libero-spatail", "--out", "a"), 'did you mean "libero_spatial"'),
        (("--suite", "toy", "--env", "sim", "--out", "a"), 'unknown environment "sim"'),
        (("--suite", "toy", "--tasks", "9", "--out", "a"), "there is no task 9"),
        (("--suite", "toy", "--tasks", "x", "--out", "a"), "does not name indices"),
        (("--suite", "toy", "--tasks", "1,0,1", "--out", "a"), "indices must be distinct"),
        (("--suite", "toy", "--cameras", "wrist", "--out", "a"), 'there is no camera "wrist"'),
        (("--suite", "toy", "--image-size", "9", "--out", "a"), "H.264 needs even sizes"),
        (("--suite", "toy", "--rates", "9"), "has 8 initial states"),
        (("--suite", "toy", "--rates", "2", "--cameras", "front"), "leave out --out, --per-task"),
        (("--suite", "toy", "--perturbations", "inf", "--out", "a"), "less than or equal to 4"),
        (("--suite", "toy", "--rates", "2", "--json", "."), "cannot write .: it is a folder"),
        (("--suite", "toy", "--json", "table.json", "--tasks", "9", "--out", "a"), "no task 9"),
        (("--suite", "toy", "--device", "tpu", "--out", "a"), 'choose "auto" or "cpu"'),
        (("--suite", "toy", "--set", "train.seed=1", "--out", "a"), 'has no key "train"'),
    ],
)
def test_wrong_options_are_refused(capsys, options, message):
    assert main(["demos", *options]) == 2
    assert message in capsys.readouterr().err
    assert not any(Path.cwd().iterdir())


def test_a_data_set_is_made_once(capsys):
    assert main([*SMALL, "--out", "data", "--json", "table.json"]) == 0
    first = capsys.readouterr().out
    assert "3/3" in first
    assert "6/6 demonstrations" in first
    assert sorted(path.name for path in Path("data").iterdir()) == ["data", "meta", "videos"]
    record = json.loads(Path("table.json").read_text())
    assert record == json.loads(Path("data/meta/demonstrations.json").read_text())
    assert [task["demonstrations"] for task in record["tasks"]] == [3, 3]
    assert len(load_dataset(Path("data"), cameras=("front",), chunk_length=4)) > 6

    assert main([*SMALL, "--out", "data"]) == 0
    assert "data is complete" in capsys.readouterr().out
    assert main([*SMALL, "--out", "data", "--seed", "1"]) == 2
    assert "they differ in seed (was 0)" in capsys.readouterr().err
    assert main([*SMALL, "--out", "data", "--image-size", "4"]) == 2
    assert "they differ in env.image_size (was 8)" in capsys.readouterr().err
    assert main([*SMALL, "--out", "data", "--set", "env.fault_dir=elsewhere"]) == 0


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b'{"env": 3}', b'{"request": {}}'])
@pytest.mark.parametrize("name", [".staging/request.json", "meta/demonstrations.json"])
def test_damaged_notes_of_a_data_set_are_told(capsys, name, content):
    path = Path("data", name)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    if path.parent.name == "meta":
        Path("data/meta/info.json").touch()
    assert main([*SMALL, "--out", "data"]) == 5
    error = capsys.readouterr().err
    assert f"{path} is damaged" in error
    assert "choose another --out" in error
    assert path.read_bytes() == content


def test_foreign_folders_are_left_alone(capsys):
    Path("data").mkdir()
    Path("data/mine.txt").write_text("mine")
    assert main([*SMALL, "--out", "data"]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert Path("data/mine.txt").read_text() == "mine"


def test_an_interrupted_command_goes_on(capsys):
    """The last task's simulator hangs, so that there is time for Ctrl-C."""
    slow = [*SMALL, "--set", 'env.faults={"1/demonstration" = "hang"}', "--set", "env.fault_dir=."]
    command = [sys.executable, "-m", "vlactl.cli.app", *slow, "--out", "data"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(Path("1-demonstration"))
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED
    assert b"the same command continues" in text
    kept = sorted(path.name for path in Path("data/.staging").glob("task-*"))
    assert kept == [f"task-000_attempt-0000{number}" for number in range(len(kept))]
    assert len(kept) >= 3

    assert main([*slow, "--out", "data", "--perturbations", "1"]) == 2
    assert "they differ in bursts" in capsys.readouterr().err
    assert main([*slow, "--out", "data"]) == 0
    assert "4/6 demonstrations" in capsys.readouterr().out
    assert main([*SMALL, "--out", "undisturbed"]) == 0
    for name in ("data/chunk-000/file-000.parquet", "meta/stats.json"):
        assert Path("data", name).read_bytes() == Path("undisturbed", name).read_bytes()


def test_an_expert_that_never_succeeds_makes_no_data_set(capsys):
    hopeless = [*SMALL, "--set", "env.max_episode_steps=1", "--tasks", "0", "--seed", "12"]
    assert main([*hopeless, "--out", "data"]) == 2
    assert "never succeeded in 10 attempts" in capsys.readouterr().err
    assert not Path("data/meta").exists()


def test_rates_are_printed_and_kept(capsys):
    options = ("--rates", "4", "--workers", "1", "--tasks", "1,2", "--json", "kept/rates.json")
    assert main(["demos", "--suite", "toy", *options]) == 0
    out = capsys.readouterr().out
    assert "success rate of the scripted expert, toy" in out
    assert "8/8" in out
    kept = json.loads(Path("kept/rates.json").read_text())
    assert [(task["task"], task["successes"], task["trials"]) for task in kept["tasks"]] == [
        (1, 4, 4),
        (2, 4, 4),
    ]
    assert kept["total"]["interval"][0] == pytest.approx(0.676, abs=0.001)


def wait_for(path: Path, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not appear"
        time.sleep(0.05)
