"""The last look at this machine before a job is started on it."""

from __future__ import annotations

import shutil

from vlactl.api import registry
from vlactl.api.contracts import EnvContext
from vlactl.config.run import RunConfig
from vlactl.errors import EnvironmentNotReadyError
from vlactl.launch.doctor import SHARED_BYTES, SHARED_MEMORY
from vlactl.launch.hardware import readable
from vlactl.launch.plan import Plan


def check_machine(config: RunConfig, plan: Plan) -> None:
    """Check that what the configured plugins need is here, within seconds.

    An environment checks its machine when it is built, and starts no simulator before the first
    episode: building one and throwing it away tells what a worker would be told after a minute.

    Raises:
        EnvironmentNotReadyError: something is missing; names the command that gets it.
    """
    _check_shared_memory(plan)
    registry.require(registry.find("model", config.model.name))
    registry.require(registry.find("algorithm", config.algorithm.name))
    context = EnvContext(
        num_slots=1,
        cameras=config.model.cameras,
        device_index=0 if plan.device == "cuda" else -1,
    )
    environment = registry.find("environment", config.env.name)
    registry.load_factory(environment)(config.env, context).close()
    if not config.env.allow_untested_versions:
        registry.require(environment)


def _check_shared_memory(plan: Plan) -> None:
    """NCCL's ranks meet there; without room it fails with an error that does not say so."""
    if plan.device != "cuda" or plan.world_size == 1 or not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < SHARED_BYTES:
        raise EnvironmentNotReadyError(
            f"{SHARED_MEMORY} has {readable(free)} free, and ranks on several GPUs need "
            f"{readable(SHARED_BYTES)}",
            hint="docker run --shm-size=8g",
        )
