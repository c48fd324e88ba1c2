"""Memory of LIBERO's simulators, estimated for plans and `vlactl doctor`. Imports no simulator.

Measured as anonymous memory of a simulator process on a CPU machine (Python 3.11, MuJoCo 3.3.7,
OSMesa, pictures of 256 pixels) that plays several tasks one after the other; a light task
(libero_90 77), a usual one (libero_spatial 0), a heavy one (libero_10 0):

    libraries                              0.1 GiB, and 0.13 GiB that all processes share
    first task                             1.0, 1.0, 1.3 GiB: the model, 0.5 GiB that MuJoCo's
                                           compiler keeps for the next task, its buffers
    each further task that is kept         0.22, 0.28, 0.33 GiB: textures are most of it
    pictures, for each kept task           0.34, 0.44, 0.64 GiB in the software renderer
    each further simulator of a task       2 to 3 MiB, with pictures 3 to 5 MiB
    stock, per simulator                   1.2, 1.3, 1.8 GiB, with pictures 1.6, 1.8, 2.3 GiB

The constants are those of the heavier tasks. What a GPU holds was measured on an H100: 553 to 567
MiB for a stock process with the context and the textures of one task, which has 1.6 GiB of host
memory, and 4.4 GiB for one that has kept all ten tasks of libero_object. A shadow map, which tasks
without shadows no longer have, was 64 MiB of each.
"""

from __future__ import annotations

import bisect
import math

from vlactl.api.contracts import EnvContext
from vlactl.api.plugins import EnvironmentFootprint
from vlactl_libero.environment import draws_on_gpu, num_processes
from vlactl_libero.plugin import CAMERAS, LiberoConfig

MIB = 2**20
PROCESS = 1200 * MIB
TASK = 300 * MIB
TASK_PICTURES = 540 * MIB
SIMULATOR = 5 * MIB
GPU_CONTEXT = 230 * MIB
GPU_TASK = 360 * MIB
STOCK = 1500 * MIB
STOCK_PICTURES = 500 * MIB
STOCK_GPU = 560 * MIB

TASKS_OF_A_SUITE = 10
_MANY = 1000


def footprint(config: LiberoConfig, context: EnvContext, num_tasks: int) -> EnvironmentFootprint:
    """What the simulators of a rank take.

    Args:
        config: the environment's section.
        context: slots, cameras and device of the rank.
        num_tasks: that its episodes are of.
    """
    processes = num_processes(config, context)
    draws = bool(context.cameras)
    on_gpu = draws and draws_on_gpu(config, context.device_index)
    on_cpu = draws and not on_gpu
    slots = math.ceil(context.num_slots / processes)
    kept = min(num_tasks, max(slots, config.task_cache))
    if config.backend == "stock":
        host, device = STOCK + on_cpu * STOCK_PICTURES, STOCK_GPU
    else:
        host = PROCESS + kept * (TASK + on_cpu * TASK_PICTURES) + slots * SIMULATOR
        device = GPU_CONTEXT + kept * GPU_TASK
    return EnvironmentFootprint(
        num_processes=processes,
        host_bytes=processes * host,
        device_bytes=on_gpu * processes * device,
        ways_out=_ways_out(config, processes, kept, slots),
    )


def most_simulators(config: LiberoConfig, device_index: int, memory: int) -> int:
    """Simulators with all cameras that memory holds, of a suite's tasks and on one rank."""

    def takes(num_slots: int) -> int:
        context = EnvContext(num_slots=num_slots, cameras=CAMERAS, device_index=device_index)
        return footprint(config, context, TASKS_OF_A_SUITE).host_bytes

    return bisect.bisect_right(range(1, _MANY + 1), memory, key=takes)


def _ways_out(config: LiberoConfig, processes: int, kept: int, slots: int) -> tuple[str, ...]:
    if config.backend == "stock":
        return ('env.backend = "fast"',)
    ways = {
        "raise env.slots_per_process": processes > 1,
        "lower env.task_cache": kept > slots,
    }
    return tuple(way for way, helps in ways.items() if helps)
