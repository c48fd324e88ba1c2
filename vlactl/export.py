"""What `vlactl export` runs: `python -m vlactl.export --job-dir DIR --out DIR`.

The job directory holds the resolved configuration, and gets what a worker's run directory gets: the
phase that the process is in, and why it gave up. The policy is built on the CPU, without simulators
and without a process group; it knows itself how it is written.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from pathlib import Path

import torch
from torch import nn

from vlactl import logs
from vlactl.config.compose import load_resolved
from vlactl.errors import EXIT_BUG, EXIT_OK, ConfigError
from vlactl.launch.plan import environment_spec
from vlactl.launch.rundir import CONFIG
from vlactl.launch.status import Heartbeat, join_supervisor, write_failure
from vlactl.parts import build_policy
from vlactl.train.checkpoint import load_checkpoint

LOG = logging.getLogger(__name__)


def main() -> int:
    """Export one policy; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--adapter-only", action="store_true")
    arguments = parser.parse_args()
    join_supervisor(0)
    logs.setup(0)
    heartbeat = Heartbeat(arguments.job_dir, 0)
    try:
        _export(arguments, heartbeat)
    except Exception as error:
        LOG.exception("the export failed")
        write_failure(arguments.job_dir, 0, heartbeat.phase, 0, error)
        return int(getattr(error, "exit_code", EXIT_BUG))
    return EXIT_OK


def _export(arguments: argparse.Namespace, heartbeat: Heartbeat) -> None:
    heartbeat.beat("build", 0)
    config = load_resolved(arguments.job_dir / CONFIG)
    policy = build_policy(
        config,
        environment_spec(config),
        torch.device("cpu"),
        for_training=False,
        for_export=True,
    )
    size = num_bytes(policy.module, trained_only=arguments.adapter_only)
    check_space(arguments.out, size)
    if arguments.checkpoint is not None:
        heartbeat.beat("load", 0)
        load_checkpoint(arguments.checkpoint, policy.module)
    heartbeat.beat("write", 0)
    policy.export(arguments.out, adapter_only=arguments.adapter_only)


def num_bytes(module: nn.Module, *, trained_only: bool) -> int:
    """Size of the parameters, or of those that are trained."""
    parameters = (p for p in module.parameters() if p.requires_grad or not trained_only)
    return sum(parameter.nbytes for parameter in parameters)


def check_space(directory: Path, needed: int) -> None:
    """Check that a directory's disk has room for so many bytes.

    Raises:
        ConfigError: it has not.
    """
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise ConfigError(
            f"the policy takes {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free "
            f"on the disk of {directory.parent}",
            hint="make room, or choose a place on another disk with --out",
        )


if __name__ == "__main__":
    sys.exit(main())
