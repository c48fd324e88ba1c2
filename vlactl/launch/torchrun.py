"""The torchrun command line of a job, and what its log says about ranks that died."""

from __future__ import annotations

import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Job = Literal["train", "sft", "eval"]
WORKER_MODULE = "vlactl.worker"
_MEETING_SECONDS = 300
_FIRST_FAILURE = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+) \(pid: (\d+)\)")
_FAILURES = re.compile(r"\(local_rank: (\d+)\)\s+exitcode\s+: (-?\d+)")
_ENDS_WORKERS = re.compile(r"Sending process \d+ closing signal")
_WAS_TOLD_TO = re.compile(r"Received .*death signal")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the torchruns of several machines meet: `host` is the machine of node rank 0."""

    nnodes: int
    node_rank: int
    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """The first rank that ended badly; a negative `exit_code` is the signal that killed it."""

    rank: int
    exit_code: int

    @property
    def is_kill(self) -> bool:
        """Whether a signal ended it that ranks are not sent when another one has failed."""
        return self.exit_code < 0 and self.exit_code != -signal.SIGTERM


def torchrun_command(
    num_processes: int,
    run_dir: Path,
    job: Job,
    *,
    worker_module: str = WORKER_MODULE,
    rendezvous: Rendezvous | None = None,
) -> list[str]:
    """Arguments that start `num_processes` workers on this machine.

    Restarts are the supervisor's: it knows checkpoints, torchrun does not.
    """
    return [
        *(sys.executable, "-m", "torch.distributed.run", *_meeting(rendezvous)),
        *("--nproc-per-node", str(num_processes), "--max-restarts", "0"),
        *(
            "--log-dir",
            os.devnull,
        ),  # workers write their own logs; the default leaves folders in /tmp
        *("-m", worker_module, "--run-dir", str(run_dir), "--job", job),
    ]


def _meeting(rendezvous: Rendezvous | None) -> list[str]:
    """One machine: a port that the system picks, so that jobs never meet. Several: a fixed one.

    Ranks follow node ranks, because the rendezvous of several machines is static.
    """
    if rendezvous is None:
        return ["--standalone"]
    return [
        *("--nnodes", str(rendezvous.nnodes), "--node-rank", str(rendezvous.node_rank)),
        *("--master-addr", rendezvous.host, "--master-port", str(rendezvous.port)),
        *("--rdzv-conf", f"timeout={_MEETING_SECONDS}"),
    ]


def first_death(log: str, first_rank: int = 0) -> Death | None:
    """Which rank torchrun saw fail first, if its log says so; `first_rank` is the machine's own."""
    found = _FIRST_FAILURE.search(log)
    if found is None:
        return None
    deaths = [Death(rank=first_rank + int(found[2]), exit_code=int(found[1]))]
    # Of ranks that die within one look torchrun takes any for the first: one that was killed is.
    for local_rank, code in _FAILURES.findall(log):
        deaths.append(Death(rank=first_rank + int(local_rank), exit_code=int(code)))
    return min(deaths, key=lambda death: not death.is_kill)


def ends_workers(log: str) -> bool:
    """Whether torchrun asks workers to leave because another one has failed."""
    return bool(_ENDS_WORKERS.search(log)) and not _WAS_TOLD_TO.search(log)
