"""The torchrun command line of a job, and what its log says about ranks that died."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Job = Literal["train", "eval"]
WORKER_MODULE = "vlactl.worker"
_FIRST_FAILURE = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+) \(pid: (\d+)\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """The first rank that ended badly; a negative `exit_code` is the signal that killed it."""

    rank: int
    exit_code: int


def torchrun_command(
    num_processes: int, run_dir: Path, job: Job, *, worker_module: str = WORKER_MODULE
) -> list[str]:
    """Arguments that start `num_processes` workers on this machine.

    `--standalone` lets the system pick a free port, so that jobs never meet. Restarts are the
    supervisor's: it knows checkpoints, torchrun does not.
    """
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(num_processes), "--max-restarts", "0"),
        *(
            "--log-dir",
            os.devnull,
        ),  # workers write their own logs; the default leaves folders in /tmp
        *("-m", worker_module, "--run-dir", str(run_dir), "--job", job),
    ]


def first_death(log: str) -> Death | None:
    """Which rank torchrun saw fail first, if its log says so."""
    found = _FIRST_FAILURE.search(log)
    return Death(rank=int(found[2]), exit_code=int(found[1])) if found else None
