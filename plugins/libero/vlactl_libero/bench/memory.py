"""What a tree of processes weighs, in host memory and on the GPU."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_QUERY = ("--query-gpu=memory.used", "--format=csv,noheader,nounits")
_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Host memory of a process tree in bytes.

    Attributes:
        pss: every page counted once, however many processes share it.
        rss: shared pages counted in each of them.
        num_processes: of the tree.
    """

    pss: int
    rss: int
    num_processes: int


def weigh(processes: Iterable[psutil.Process]) -> Memory:
    """The memory of processes; one that ends meanwhile counts nothing."""
    weights = [weight for process in processes if (weight := _rollup(process.pid))]
    return Memory(
        pss=sum(weight["Pss"] for weight in weights),
        rss=sum(weight["Rss"] for weight in weights),
        num_processes=len(weights),
    )


def used_gpu_memory() -> int | None:
    """Bytes in use on all GPUs by anybody, or None without `nvidia-smi`."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *_QUERY], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return sum(int(line) * 2**20 for line in done.stdout.split() if line.isdigit())


def _rollup(pid: int) -> dict[str, int]:
    """Rss and Pss in bytes; empty for a process that is gone."""
    found = {}
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, _, rest = line.partition(":")
            if name in {"Rss", "Pss"}:
                found[name] = int(rest.split()[0]) * 1024
    return found
