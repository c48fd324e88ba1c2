"""The SwanLab sink; what is not sent yet lies in `swanlab/` below the run directory.

The library's own environment variables apply: SWANLAB_MODE=offline keeps everything on the disk for
`swanlab sync`, SWANLAB_MODE=local for a dashboard of one's own. Who is not logged in gets a warning
and no mirror: nobody is asked while a run is going on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from vlactl.api.contracts import Sink
from vlactl.api.plugins import PluginConfig, Requirement, SinkPlugin
from vlactl.report.identity import PROJECT, RunSink, identify


class SwanlabConfig(PluginConfig):
    """The sink has no settings."""

    name: Literal["swanlab"] = "swanlab"


PLUGIN = SinkPlugin(
    name="swanlab",
    summary="SwanLab; SWANLAB_MODE=offline or local for this disk",
    config=SwanlabConfig,
    factory="vlactl.report.swanlab:make_sink",
    api_version=1,
    requirements=(
        Requirement(
            distribution="swanlab", specifier=">=0.10", install='pip install "vlactl[swanlab]"'
        ),
    ),
)


def make_sink(config: SwanlabConfig, run_dir: Path) -> Sink:
    """A sink for a run, which goes on if it was there before."""
    import swanlab

    who = identify(run_dir)
    known = swanlab.Settings()
    run = swanlab.init(
        project=known.project.name or PROJECT,
        id=who.id,
        name=who.name,
        config=who.config,
        resume="allow",
        log_dir=str(run_dir / config.name),
        settings=swanlab.Settings(
            interactive=False,
            # A rank's output is in its log, and may hold more than is to be shared.
            terminal=swanlab.Settings.Terminal(proxy_type="none"),
        ),
    )
    return RunSink(run)
