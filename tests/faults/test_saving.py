"""Rows 27 and 28: kills at any moment of saving, and disks without room.

Run as a script, this file saves in forked processes and kills them: torch is imported once for all.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from vlactl.config.run import CheckpointConfig, OptimConfig
from vlactl.distributed.roles import World
from vlactl.errors import EXIT_INTEGRITY, IntegrityError
from vlactl.hub.manifest import (
    CHECKPOINTS,
    MANIFEST,
    list_checkpoints,
    newest_checkpoint,
    step_of,
)
from vlactl.train import saving
from vlactl.train.checkpoint import load_checkpoint
from vlactl.train.optim import make_optimizer
from vlactl.train.saving import Checkpoints

pytestmark = [
    pytest.mark.faults,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
WORLD = World.alone(torch.device("cpu"))
Parts = tuple[nn.Module, torch.optim.Optimizer]
KILLS = 50
WIDTH = 512
"""Of a layer whose checkpoint has 3 MiB: enough to be killed while it is written."""


def make() -> Parts:
    module = nn.Linear(WIDTH, WIDTH, bias=False)
    return module, make_optimizer(module.named_parameters(), OptimConfig())


def checkpoints(run_dir: Path, parts: Parts, **config) -> Checkpoints:
    return Checkpoints(run_dir, *parts, WORLD, CheckpointConfig(**config), trained_only=False)


def fill(parts: Parts, step: int) -> None:
    """Every number of the state tells the step."""
    module, optimizer = parts
    with torch.no_grad():
        for tensor in (module.weight, *optimizer.state[module.weight].values()):
            tensor.fill_(step)


def steps_in(parts: Parts) -> set[float]:
    module, optimizer = parts
    tensors = (module.weight, *optimizer.state[module.weight].values())
    return {number for tensor in tensors for number in tensor.detach().unique().tolist()}


# --------------------------------------------------------------------------------------------
# Kills
# --------------------------------------------------------------------------------------------
def save_for_ever(run_dir: Path, ready: int, *, background: bool) -> None:
    """What is killed: goes on from the newest checkpoint and saves every step."""
    parts = make()
    saved = checkpoints(run_dir, parts, keep=2, background=background)
    step = saved.resume()
    os.write(ready, b".")
    while True:
        step += 1
        fill(parts, step)
        saved.save(step)
        fill(parts, -step)  # what training does while the thread writes; nobody may see it


def kill_once(run_dir: Path, delay: float, *, background: bool) -> str:
    """Kill a process some time after it began to save; where it was."""
    ready, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        save_for_ever(run_dir, write_end, background=background)
    os.close(write_end)
    assert select.select([ready], [], [], 60)[0], "it did not start"
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(ready)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    return place(run_dir)


def place(run_dir: Path) -> str:
    """How far the save had come."""
    for temporary in (run_dir / CHECKPOINTS).glob("*.tmp"):
        names = {path.name for path in temporary.iterdir()}
        for mark, name in ((MANIFEST, "manifest"), (".metadata", "metadata")):
            if mark in names:
                return name
        return "shards" if any(temporary.glob("*.distcp")) else "directory"
    return "pruning" if len(list_checkpoints(run_dir)) > 2 else "between"


def main() -> None:
    run_dir, seed = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)  # its threads would not survive the fork
    random_ = random.Random(seed)
    places, newest_step = Counter(), 1
    parts = make()
    fill(parts, newest_step)
    checkpoints(run_dir, parts).save(newest_step, now=True)
    for number in range(KILLS):
        delay = random_.uniform(0, 0.15)
        places[kill_once(run_dir, delay, background=number % 2 == 0)] += 1
        path, skipped = newest_checkpoint(run_dir)
        assert path is not None
        assert not skipped, skipped
        parts = make()
        assert load_checkpoint(path, *parts) == step_of(path) >= newest_step
        newest_step = step_of(path)
        assert steps_in(parts) == {newest_step}
    sys.stdout.write(json.dumps({"places": places, "steps": newest_step}))


def test_a_kill_at_any_moment_leaves_the_newest_complete_checkpoint(tmp_path):
    """P2 and row 27, with processes that go on where the one before was killed."""
    seed = random.randrange(10**6)
    command = [sys.executable, __file__, str(tmp_path), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, f"seed {seed}\n{done.stderr}"
    found = json.loads(done.stdout)
    assert sum(found["places"].values()) == KILLS
    assert len(found["places"].keys() - {"between"}) >= 3, found
    assert found["steps"] > 1  # some were completed between the kills


# --------------------------------------------------------------------------------------------
# Full disks
# --------------------------------------------------------------------------------------------
@pytest.fixture
def small_disk(tmp_path):
    """A disk with room for two checkpoints and a half."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def occupy(disk: Path, leaving: int) -> Path:
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - leaving))
    return ballast


def save_and_finish(saved: Checkpoints, step: int) -> None:
    saved.save(step)
    saved.finish()


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("checked", [True, False])
def test_a_full_disk_stops_neither_training_nor_what_is_saved(
    small_disk, monkeypatch, caplog, checked, background
):
    """The check before the first byte, and without it the system's refusal in the middle."""
    if not checked:
        monkeypatch.setattr(saving, "SPACE_FACTOR", 0)
    reason = "a checkpoint needs 3.8 MB" if checked else "No space left on device"
    parts = make()
    saved = checkpoints(small_disk, parts, keep=1, max_failures=2, background=background)
    fill(parts, 1)
    saved.save(1, now=True)
    ballast = occupy(small_disk, leaving=2_000_000)
    for step in (2, 3):
        caplog.clear()
        save_and_finish(saved, step)
        assert f"the checkpoint after step {step} could not be saved: " in caplog.text
        assert reason in caplog.text
        assert "training goes on" in caplog.text
        assert [path.name for path in (small_disk / CHECKPOINTS).iterdir()] == ["step-000001"]
    with pytest.raises(IntegrityError, match="3 in a row failed") as ended:
        save_and_finish(saved, 4)
    assert ended.value.exit_code == EXIT_INTEGRITY
    assert reason in ended.value.message
    assert f"vlactl train --resume {small_disk}" in ended.value.hint
    ballast.unlink()
    fill(parts, 5)
    saved.save(5, now=True)
    again = make()
    assert checkpoints(small_disk, again).resume() == 5
    assert steps_in(again) == {5}
    assert len(list_checkpoints(small_disk)) == 1


def test_what_is_wanted_now_may_not_fail_quietly(small_disk):
    parts = make()
    saved = checkpoints(small_disk, parts)
    saved.save(1, now=True)
    occupy(small_disk, leaving=2_000_000)
    with pytest.raises(IntegrityError, match="the checkpoint after step 2 could not be saved"):
        saved.save(2, status="preempted", now=True)
    assert [step for step, _ in list_checkpoints(small_disk)] == [1]


def test_a_success_ends_the_row_of_failures(small_disk):
    parts = make()
    saved = checkpoints(small_disk, parts, keep=1, max_failures=1)
    for step in (1, 3, 5):
        saved.save(step, now=True)
        ballast = occupy(small_disk, leaving=2_000_000)
        save_and_finish(saved, step + 1)
        ballast.unlink()
    assert [step for step, _ in list_checkpoints(small_disk)] == [5]


def test_leftovers_of_a_kill_take_no_room(small_disk):
    parts = make()
    leftover = small_disk / CHECKPOINTS / "step-000007.tmp"
    leftover.mkdir(parents=True)
    (leftover / "__0_0.distcp").write_bytes(bytes(6_000_000))
    checkpoints(small_disk, parts).save(1, now=True)
    assert [path.name for path in (small_disk / CHECKPOINTS).iterdir()] == ["step-000001"]


if __name__ == "__main__":
    main()
