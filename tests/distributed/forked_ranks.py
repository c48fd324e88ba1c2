"""Scenarios that several ranks play, for scripts: `python SCRIPT ROOT [NAME...]`.

Imports torch once and forks the ranks of each scenario, which join a process group over gloo.
Writes one line of JSON per scenario: its name and the traceback of every rank that failed.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from vlactl.distributed.roles import World, leave_world, start_world

CPU = torch.device("cpu")
PATIENCE = 60.0
Scenario = Callable[[World, Path], None]
SCENARIOS: dict[str, tuple[Scenario, list[dict]]] = {}


def scenario(*roles: dict):
    def register(run: Scenario) -> Scenario:
        SCENARIOS[run.__name__] = (run, list(roles))
        return run

    return register


def everywhere(size: int) -> dict:
    """Roles that all ranks play."""
    return dict.fromkeys(("env", "rollout", "actor"), range(size))


def run_rank(run: Scenario, roles: dict, rank: int, size: int, port: int, root: Path) -> int:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        run(start_world(roles, CPU), root)
    except BaseException:
        (root / f"traceback-{rank}").write_text(traceback.format_exc())
        return 1
    finally:
        leave_world()
    return 0


def run_all(run: Scenario, roles: dict, root: Path) -> dict[int, str]:
    """Fork the ranks; what was wrong with those that did not succeed."""
    size = 1 + max(max(ranks) for ranks in roles.values())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = {}
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            os._exit(run_rank(run, roles, rank, size, port, root))
        pids[rank] = pid
    problems = {}
    deadline = time.monotonic() + PATIENCE
    for rank, pid in pids.items():
        code = wait(pid, deadline)
        if code != 0:
            written = root / f"traceback-{rank}"
            text = written.read_text() if written.exists() else ""
            problems[rank] = f"exit code {code}\n{text}"
            written.unlink(missing_ok=True)
    return problems


def wait(pid: int, deadline: float) -> int | str:
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "none: it hung"


def main() -> None:
    root = Path(sys.argv[1])
    wanted = sys.argv[2:] or SCENARIOS
    for name in wanted:
        run, placements = SCENARIOS[name]
        started = time.monotonic()
        problems = [run_all(run, roles, root) for roles in placements]
        seconds = time.monotonic() - started
        sys.stdout.write(json.dumps({"name": name, "problems": problems, "s": seconds}) + "\n")
        sys.stdout.flush()
