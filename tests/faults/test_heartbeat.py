"""What a worker's heartbeat says by itself: that it lives, waits, has left."""

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vlactl.launch.status import (
    ALIVE_SECONDS,
    STATUS,
    Beat,
    Heartbeat,
    clear_status,
    read_failures,
    read_heartbeats,
    write_failure,
)

OTHER_PROCESS = """
import os, signal, sys, time
from pathlib import Path
from vlactl.launch.status import Heartbeat
heartbeat = Heartbeat(Path(sys.argv[1]), 0)
heartbeat.beat("rollout", 4)
{ending}
"""


def next_beat(run_dir: Path) -> Beat:
    """The first one that is written from now on."""
    (before,) = read_heartbeats(run_dir)
    deadline = time.monotonic() + 5 * ALIVE_SECONDS
    while time.monotonic() < deadline:
        (beat,) = read_heartbeats(run_dir)
        if beat.alive != before.alive:
            return beat
        time.sleep(0.05)
    raise AssertionError("no sign of life")


def test_life_goes_on_without_progress(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 0)
    heartbeat.beat("update", 3, 5, 9)
    (before,) = read_heartbeats(tmp_path)
    after = next_beat(tmp_path)
    assert after.alive > before.alive
    assert (after.count, after.phase, after.done) == (before.count, "update", 5)


def test_progress_between_writings_is_told_by_the_next_one(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 0)
    heartbeat.beat("update", 3, 1, 9)
    heartbeat.beat("update", 3, 2, 9)
    assert next_beat(tmp_path).done == 2


def test_waiting_counts_blocks_of_all_threads(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 0)
    release = threading.Event()

    def wait() -> None:
        with heartbeat.waiting():
            release.wait()

    def is_waiting() -> bool:
        heartbeat.beat(f"phase {time.monotonic()}", 0)  # a new phase is written at once
        return read_heartbeats(tmp_path)[0].waiting

    assert not is_waiting()
    with heartbeat.waiting():
        with heartbeat.waiting():
            assert is_waiting()
        assert is_waiting()
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
    assert is_waiting()
    release.set()
    thread.join()
    assert not is_waiting()
    with pytest.raises(ZeroDivisionError), heartbeat.waiting():
        raise ZeroDivisionError
    assert not is_waiting()


def test_waiting_writes_nothing_and_is_cheap(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 0)
    assert read_heartbeats(tmp_path) == []
    started = time.perf_counter()
    for _ in range(10_000):
        with heartbeat.waiting():
            pass
    assert time.perf_counter() - started < 1.0  # 0.1 ms each would be too much


@pytest.mark.parametrize(
    ("ending", "left"),
    [
        ("", True),
        ("sys.exit(3)", True),
        ("raise ValueError", True),
        ("os.kill(os.getpid(), signal.SIGKILL)", False),
        ("if os.fork() == 0: sys.exit(0)\nos.wait(); os.kill(os.getpid(), signal.SIGKILL)", False),
    ],
)
def test_a_rank_tells_when_it_leaves_in_an_orderly_way(
    tmp_path: Path, ending: str, left: bool
) -> None:
    program = OTHER_PROCESS.format(ending=ending)
    subprocess.run([sys.executable, "-c", program, tmp_path], check=False, capture_output=True)
    (beat,) = read_heartbeats(tmp_path)
    assert (beat.phase, beat.step, beat.left) == ("rollout", 4, left)


def test_a_disk_that_is_away_costs_news_and_nothing_else(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 0)
    (tmp_path / STATUS).rmdir()
    heartbeat.beat("rollout", 0)
    assert read_heartbeats(tmp_path) == []
    clear_status(tmp_path)
    deadline = time.monotonic() + 5 * ALIVE_SECONDS
    while not read_heartbeats(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_without_gpu_has_no_peak(tmp_path: Path) -> None:
    write_failure(tmp_path, 0, "update", 0, MemoryError("no room"))
    (failure,) = read_failures(tmp_path)
    assert failure.peak_gib == 0


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs a GPU")
def test_a_full_gpu_is_told_with_what_was_on_it(tmp_path: Path) -> None:
    """Row 35."""
    program = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from vlactl.launch.status import write_failure\n"
        "kept = torch.empty(2**30, dtype=torch.uint8, device='cuda')\n"
        "try:\n"
        "    torch.empty(2**50, dtype=torch.uint8, device='cuda')\n"
        "except Exception as error:\n"
        "    write_failure(Path(sys.argv[1]), 0, 'update', 0, error)\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True)
    (failure,) = read_failures(tmp_path)
    assert failure.kind == "OutOfMemoryError"
    assert 1.0 <= failure.peak_gib < 1.1
