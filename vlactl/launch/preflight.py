"""The last look at this machine before a job is started on it."""

from __future__ import annotations

from vlactl.api import registry
from vlactl.config.run import RunConfig


def check_machine(config: RunConfig) -> None:
    """Check that what the configured plugins need is installed.

    Raises:
        EnvironmentNotReadyError: something is missing; names the command that gets it.
    """
    for kind, name in (
        ("environment", config.env.name),
        ("model", config.model.name),
        ("algorithm", config.algorithm.name),
    ):
        registry.require(registry.find(kind, name))
