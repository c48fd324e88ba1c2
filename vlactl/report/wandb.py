"""The Weights & Biases sink; what is not sent yet lies in `wandb/` below the run directory.

The library's own environment variables apply: WANDB_MODE=offline keeps everything on the disk for
`wandb sync`, WANDB_PROJECT and WANDB_ENTITY say where a run belongs. Who is not logged in gets a
warning and no mirror: nobody is asked while a run is going on.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from vlactl.api.contracts import Sink
from vlactl.api.plugins import PluginConfig, Requirement, SinkPlugin
from vlactl.report.identity import PROJECT, RunSink, identify

_FINISH_SECONDS = 60.0
"""A run that is over does not wait longer for a network that is away."""


class WandbConfig(PluginConfig):
    """The sink has no settings."""

    name: Literal["wandb"] = "wandb"


PLUGIN = SinkPlugin(
    name="wandb",
    summary="Weights & Biases; WANDB_MODE=offline for later",
    config=WandbConfig,
    factory="vlactl.report.wandb:make_sink",
    api_version=1,
    requirements=(
        Requirement(
            distribution="wandb", specifier=">=0.27", install='pip install "vlactl[wandb]"'
        ),
    ),
)


def make_sink(config: WandbConfig, run_dir: Path) -> Sink:
    """A sink for a run, which goes on if it was there before."""
    import wandb

    who = identify(run_dir)
    settings = wandb.Settings(
        console="off",  # a rank's output is in its log, and may hold more than is to be shared
        disable_git=True,  # as may the address of a repository
        finish_timeout=_FINISH_SECONDS,
    )
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or PROJECT,
        id=who.id,
        name=who.name,
        config=who.config,
        resume="allow",
        dir=run_dir,
        settings=settings,
    )
    return RunSink(run)
