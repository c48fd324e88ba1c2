"""The Weights & Biases sink; what is not sent yet lies in `wandb/` below the run directory.

The library's own environment variables apply: WANDB_MODE=offline keeps everything on the disk for
`wandb sync`, WANDB_PROJECT and WANDB_ENTITY say where a run belongs. Who is not logged in gets a
warning and no mirror: nobody is asked while a run is going on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlactl.api.contracts import Sink
from vlactl.api.plugins import PluginConfig, Requirement, SinkPlugin
from vlactl.report.identity import PROJECT, identify

if TYPE_CHECKING:
    from wandb import Run

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
    return WandbSink(run)


class WandbSink:
    """Metrics by step; of steps that a resumed run plays again, the service keeps the first."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand the metrics of a step to the library, which sends them in the background."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Send what is left, for a minute at most."""
        self._run.finish()
