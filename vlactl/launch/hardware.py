"""What this machine has: cores, memory and GPUs, found without importing torch."""

from __future__ import annotations

import csv
import os
import platform
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

GIB = 2**30
ASSUMED_GPU_GIB = 80
ASSUMED_HOST_GIB = 200
"""Host memory per GPU of a machine that is only supposed; usual servers have 128 to 256."""
ASSUMED_CORES = 16
_QUERY = ("--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits")
_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU, numbered as `nvidia-smi` does."""

    index: int
    name: str
    memory_bytes: int
    uuid: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What a run can use.

    Attributes:
        cores: CPU cores that this process may run on.
        ram_bytes: host memory.
        gpus: visible ones, in the order CUDA numbers them.
        cpu: its name.
        assumption: what is not measured but supposed, for plans of other machines; "" = nothing.
    """

    cores: int
    ram_bytes: int
    gpus: tuple[Gpu, ...] = field(default=())
    cpu: str = ""
    assumption: str = ""

    @property
    def device_name(self) -> str:
        """Of what ranks compute on."""
        return self.gpus[0].name if self.gpus else self.cpu


def detect() -> Hardware:
    """The machine this runs on; GPUs as `CUDA_VISIBLE_DEVICES` leaves them."""
    gpus = _visible(_installed_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    memory = psutil.virtual_memory().total
    return Hardware(cores=_usable_cores(), ram_bytes=memory, gpus=gpus, cpu=_cpu_model())


def suppose_gpus(hardware: Hardware, count: int) -> Hardware:
    """A machine with `count` GPUs, supposed where there are fewer: for dry runs only.

    Memory and cores grow with the GPUs: by what this machine has per GPU, or usual servers have.
    """
    have = hardware.gpus[:count]
    if len(have) == count:
        return hardware
    model = have[0] if have else Gpu(index=0, name="supposed", memory_bytes=ASSUMED_GPU_GIB * GIB)
    supposed = tuple(replace(model, index=index, uuid="") for index in range(count))
    memory, cores = ASSUMED_HOST_GIB * GIB, ASSUMED_CORES
    if have:
        memory, cores = hardware.ram_bytes // len(have), hardware.cores // len(have)
    memory, cores = max(hardware.ram_bytes, count * memory), max(hardware.cores, count * cores)
    text = (
        f"{count} x {model.memory_bytes / GIB:.0f} GiB GPU, {cores} cores and "
        f"{memory / GIB:.0f} GiB; this machine has {len(have)} GPUs, {hardware.cores} cores and "
        f"{hardware.ram_bytes / GIB:.0f} GiB"
    )
    return replace(hardware, gpus=supposed, cores=cores, ram_bytes=memory, assumption=text)


def readable(size: int) -> str:
    """Bytes for people."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def parse_gpus(listing: str) -> tuple[Gpu, ...]:
    """GPUs from the CSV of `nvidia-smi`; lines that are not GPUs (driver messages) are skipped."""
    rows = csv.reader(listing.splitlines(), skipinitialspace=True)
    return tuple(
        Gpu(index=int(row[0]), uuid=row[1], name=row[2], memory_bytes=_mebibytes(row[3]))
        for row in rows
        if len(row) == 4 and row[0].isdigit()
    )


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _mebibytes(text: str) -> int:
    # Integrated GPUs share the host's memory and report "[N/A]".
    return int(text) * 2**20 if text.isdigit() else psutil.virtual_memory().total


def _installed_gpus() -> tuple[Gpu, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        done = subprocess.run(
            [program, *_QUERY], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_gpus(done.stdout)


def _visible(gpus: tuple[Gpu, ...], setting: str | None) -> tuple[Gpu, ...]:
    """Apply CUDA's rule: the list stops at the first entry that names no GPU."""
    if setting is None:
        return gpus
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in setting.split(",")):
        match = [gpu for gpu in gpus if _names(entry, gpu)]
        if len(match) != 1:
            break
        chosen.append(match[0])
    return tuple(chosen)


def _names(entry: str, gpu: Gpu) -> bool:
    if entry.isdigit():
        return int(entry) == gpu.index
    return entry.startswith("GPU-") and gpu.uuid.startswith(entry)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
