"""A worker that does what `script.json` in the run directory says, one action per attempt.

Rank 1 acts; the other ranks wait until they are told to stop, as ranks in a collective would.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from vlactl.errors import EnvironmentNotReadyError, IntegrityError
from vlactl.hub.manifest import CHECKPOINTS, step_name, write_manifest
from vlactl.launch.status import (
    Heartbeat,
    StopFlag,
    join_supervisor,
    write_failure,
    write_result,
)

PATIENCE = 90.0
DEAF = {"deaf", "kill-deaf"}
"""SIGTERM does not reach them, as in a collective that never ends."""
ABANDONED = {"kill-deaf", "stop", "stall"}
"""Others than rank 1 wait for it."""


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--job", required=True)
    run_dir = parser.parse_args().run_dir
    rank = int(os.environ["RANK"])
    join_supervisor(rank)
    heartbeat, stop = Heartbeat(run_dir, rank), StopFlag()
    attempt = len(list((run_dir / "logs").glob("attempt-*")))
    action = json.loads((run_dir / "script.json").read_text())[attempt - 1]
    heartbeat.beat("rollout", 2)
    sys.stdout.write(f"rank {rank}: {action}\n")
    sys.stdout.flush()
    if action == "kill" and rank == 1:
        _save(run_dir, 2)
    simulator = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        code = _act(action, run_dir, rank, stop, heartbeat)
    except Exception as error:
        write_failure(run_dir, rank, heartbeat.phase, heartbeat.step, error)
        return 1
    simulator.kill()  # a worker that leaves in peace closes its environment; others leave orphans
    return code


def _act(action: str, run_dir: Path, rank: int, stop: StopFlag, heartbeat: Heartbeat) -> int:
    if action.startswith("finish"):
        if rank == 0:
            _log_steps(run_dir)
            write_result(run_dir, "finished")
        if action.endswith("linger"):
            time.sleep(PATIENCE)
        return 0
    if rank == 1:
        _misbehave(action)
    if action in DEAF:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if action in ABANDONED:
        with heartbeat.waiting():
            time.sleep(PATIENCE)
    return _wait(action, run_dir, rank, stop, heartbeat)


def _misbehave(action: str) -> None:
    if action in ("kill", "kill-deaf"):
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if action == "stall":
        time.sleep(PATIENCE)
    if action == "crash":
        raise RuntimeError("boom\nand more")
    if action == "refuse":
        raise EnvironmentNotReadyError("no renderer", hint="install one")
    if action == "memory":
        raise OutOfMemoryError("tried to allocate 2.00 GiB")
    if action == "term-one":
        os.kill(os.getpid(), signal.SIGTERM)


def _wait(action: str, run_dir: Path, rank: int, stop: StopFlag, heartbeat: Heartbeat) -> int:
    """Until any rank is asked to stop, as ranks do that ask each other in every step."""
    agreed = run_dir / "status" / "stop"
    deadline = time.monotonic() + PATIENCE
    while not agreed.exists() and time.monotonic() < deadline:
        if action != "hang":
            heartbeat.beat("rollout", 2, 1, 2)
        if stop.requested and action not in DEAF:
            agreed.touch()
        time.sleep(0.05)
    if rank == 0 and action == "full-disk":
        raise IntegrityError("the checkpoint could not be saved: no space", hint="make room")
    if rank == 0 and action in ("wait", "term-one"):
        write_result(run_dir, "preempted")
    return 0


def _save(run_dir: Path, step: int) -> None:
    folder = run_dir / CHECKPOINTS / step_name(step)
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, {"step": step})


def _log_steps(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step in range(2):
            values = {"step": step, "env/success_once": 0.25, "time/step": 1.5, "env/return": None}
            file.write(json.dumps(values) + "\n")


if __name__ == "__main__":
    sys.exit(main())
