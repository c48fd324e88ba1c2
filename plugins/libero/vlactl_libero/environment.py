"""Builds the environment of a rank: checks the machine, then hands over to `SimulatorPool`."""

from __future__ import annotations

import functools
import math
import os
import tempfile
from importlib import metadata
from pathlib import Path

from vlactl.api.contracts import EnvContext, Environment
from vlactl.api.registry import unmet
from vlactl.api.simulators import SimulatorPool
from vlactl.errors import ConfigError, EnvironmentNotReadyError
from vlactl_libero import rendering
from vlactl_libero.plugin import CAMERAS, CONSEQUENCES, PLUGIN, LiberoConfig
from vlactl_libero.tasks import make_spec

SLOTS_PER_GL_CONTEXT = 4
MAX_GL_CONTEXTS = 8


def make_environment(config: LiberoConfig, context: EnvContext) -> Environment:
    """LIBERO on this rank; simulators start with their first episode.

    Raises:
        EnvironmentNotReadyError: LIBERO, its versions or a renderer are not as they should be.
        ConfigError: a camera that LIBERO does not have.
    """
    spec = make_spec(config)
    check_versions(config)
    _check_cameras(context)
    return SimulatorPool(
        "vlactl_libero.simulator:make_simulator",
        config,
        context,
        spec,
        env=simulator_variables(config, context.device_index),
        num_processes=num_processes(config, context),
    )


def process_variables(config: LiberoConfig, device_index: int) -> dict[str, str]:
    """Environment variables of other processes with simulators, on a machine fit for them.

    Raises:
        EnvironmentNotReadyError: LIBERO, its versions or a renderer are not as they should be.
    """
    check_versions(config)
    return simulator_variables(config, device_index)


def num_processes(config: LiberoConfig, context: EnvContext) -> int:
    """Processes for the simulators of a rank.

    A GPU draws as much for one process as for many, each of which costs it half a gigabyte, and
    threads of one process share models. On a CPU every core can draw, in a process of its own:
    one process draws one picture at a time.
    """
    slots = context.num_slots
    if config.slots_per_process is not None:
        return math.ceil(slots / config.slots_per_process)
    if config.backend == "stock":
        return slots
    if draws_on_gpu(config, context.device_index):
        return min(MAX_GL_CONTEXTS, math.ceil(slots / SLOTS_PER_GL_CONTEXT))
    return min(slots, len(os.sched_getaffinity(0)))


def draws_on_gpu(config: LiberoConfig, device_index: int) -> bool:
    """Whether pictures are drawn by a GPU: there is one, and nothing else is asked for."""
    return device_index >= 0 and config.renderer != "osmesa"


def check_versions(config: LiberoConfig) -> None:
    """Refuse versions that simulate something else.

    Raises:
        EnvironmentNotReadyError: one is installed and the configuration does not allow it.
    """
    if config.allow_untested_versions:
        return
    for requirement in PLUGIN.requirements:
        problem = unmet(requirement)
        if problem:
            reason = CONSEQUENCES.get(requirement.distribution, "")
            raise EnvironmentNotReadyError(
                f"{problem}{reason and ': '}{reason}",
                hint=f"{requirement.install}\nor run it anyway: env.allow_untested_versions = true",
            )


def simulator_variables(config: LiberoConfig, device_index: int) -> dict[str, str]:
    """Environment variables of simulator processes.

    Raises:
        EnvironmentNotReadyError: there is no renderer.
    """
    graphics = rendering.probe()
    renderer = rendering.choose(config, device_index, graphics)
    return {
        **rendering.variables(renderer, device_index, graphics),
        # A folder without LIBERO's config.yaml: the user's may point anywhere.
        "LIBERO_CONFIG_PATH": str(Path(__file__).parent),
        # One simulator, one core: the numerical libraries would start a thread per core each.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "LP_NUM_THREADS": "1",
        "NUMBA_CACHE_DIR": os.environ.get("NUMBA_CACHE_DIR") or _cache_folder(),
    }


@functools.cache
def _cache_folder() -> str:
    """Where compiled functions are kept; a new folder for this process if there is no home.

    Functions of robosuite are compiled into ours, and numba does not notice that they have changed.
    """
    versions = "-".join(f"{name}-{metadata.version(name)}" for name in ("robosuite", "numba"))
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home, "vlactl", versions)
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError):  # not writable; no home at all
        return _temporary_folder().name
    return str(folder)


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Deleted when this process ends."""
    return tempfile.TemporaryDirectory(prefix="vlactl-compiled-")


def _check_cameras(context: EnvContext) -> None:
    unknown = [camera for camera in context.cameras if camera not in CAMERAS]
    if unknown:
        raise ConfigError(
            f'LIBERO has no camera "{unknown[0]}"', hint=f"cameras: {', '.join(CAMERAS)}"
        )
