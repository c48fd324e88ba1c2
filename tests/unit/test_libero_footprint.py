"""How much memory LIBERO's simulators take, as plans and `doctor` estimate it: no simulator."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest
from vlactl_libero import checks
from vlactl_libero.footprint import (
    GPU_CONTEXT,
    GPU_TASK,
    MIB,
    PROCESS,
    SIMULATOR,
    STOCK,
    STOCK_GPU,
    STOCK_PICTURES,
    TASK,
    TASK_PICTURES,
    footprint,
    most_simulators,
)
from vlactl_libero.plugin import CAMERAS, LiberoConfig

from vlactl.api.contracts import EnvContext
from vlactl.api.plugins import EnvironmentFootprint

GIB = 1024 * MIB


def measure(
    config: LiberoConfig, slots: int, *, device: int = -1, cameras: tuple[str, ...] = CAMERAS
) -> EnvironmentFootprint:
    context = EnvContext(num_slots=slots, cameras=cameras, device_index=device)
    return footprint(config, context, 10)


def test_processes_on_a_gpu_share_its_context() -> None:
    found = measure(LiberoConfig(), 16, device=0)
    assert found.num_processes == 4
    assert found.host_bytes == 4 * (PROCESS + 4 * TASK + 4 * SIMULATOR)
    assert found.device_bytes == 4 * (GPU_CONTEXT + 4 * GPU_TASK)


def test_pictures_on_the_cpu_are_kept_per_task() -> None:
    config = LiberoConfig(slots_per_process=1, task_cache=3)
    found = measure(config, 2)
    assert found.host_bytes == 2 * (PROCESS + 3 * (TASK + TASK_PICTURES) + SIMULATOR)
    assert found.device_bytes == 0
    assert found.ways_out == ("raise env.slots_per_process", "lower env.task_cache")
    blind = measure(config, 2, cameras=())
    assert blind.host_bytes == 2 * (PROCESS + 3 * TASK + SIMULATOR)


def test_a_renderer_on_the_cpu_leaves_the_gpu_alone() -> None:
    found = measure(LiberoConfig(renderer="osmesa"), 64, device=0)
    assert found.device_bytes == 0
    assert found.num_processes == min(64, len(os.sched_getaffinity(0)))


def test_tasks_in_use_are_kept_but_no_more_than_there_are() -> None:
    config = LiberoConfig(slots_per_process=8)
    context = EnvContext(num_slots=8, cameras=())
    assert footprint(config, context, 1).host_bytes == PROCESS + TASK + 8 * SIMULATOR
    assert footprint(config, context, 90).host_bytes == PROCESS + 8 * TASK + 8 * SIMULATOR


@pytest.mark.parametrize(
    ("device", "cameras", "host", "on_gpu"),
    [(-1, (), STOCK, 0), (-1, CAMERAS, STOCK + STOCK_PICTURES, 0), (0, CAMERAS, STOCK, STOCK_GPU)],
)
def test_stock_shares_nothing(
    device: int, cameras: tuple[str, ...], host: int, on_gpu: int
) -> None:
    found = measure(LiberoConfig(backend="stock"), 5, device=device, cameras=cameras)
    assert (found.num_processes, found.host_bytes, found.device_bytes) == (5, 5 * host, 5 * on_gpu)
    assert found.ways_out == ('env.backend = "fast"',)


def test_how_many_fit() -> None:
    stock = LiberoConfig(backend="stock")
    assert most_simulators(stock, -1, 10 * GIB) == 5
    assert most_simulators(LiberoConfig(), 0, GIB) == 0
    assert most_simulators(LiberoConfig(), 0, 1024 * GIB) == 1000


@pytest.mark.parametrize(("has_gpu", "word"), [(True, "on a GPU"), (False, "0.8 GiB per task")])
def test_doctor_tells(has_gpu: bool, word: str) -> None:
    finding = checks._memory(has_gpu=has_gpu)
    assert finding.subject == "simulator memory"
    assert word in finding.detail
    assert f"{psutil.virtual_memory().total / GIB:.1f} GiB hold " in finding.detail


def test_nothing_heavy_is_imported() -> None:
    program = (
        "import sys, vlactl_libero.footprint;"
        "heavy = {'torch', 'mujoco', 'robosuite', 'libero', 'numba'} & set(sys.modules);"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
