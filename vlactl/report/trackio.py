"""The Trackio sink: a database on this machine, or a Space.

The library's own environment variables apply: TRACKIO_DIR says where the database is (by default
in the cache of Hugging Face), TRACKIO_SPACE_ID which Space a run goes to instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from vlactl.api.contracts import Sink
from vlactl.api.plugins import PluginConfig, Requirement, SinkPlugin
from vlactl.report.identity import PROJECT, RunSink, identify


class TrackioConfig(PluginConfig):
    """The sink has no settings."""

    name: Literal["trackio"] = "trackio"


PLUGIN = SinkPlugin(
    name="trackio",
    summary="Trackio, on this machine or in a Space",
    config=TrackioConfig,
    factory="vlactl.report.trackio:make_sink",
    api_version=1,
    requirements=(
        Requirement(
            distribution="trackio", specifier=">=0.40", install='pip install "vlactl[trackio]"'
        ),
    ),
)


def make_sink(config: TrackioConfig, run_dir: Path) -> Sink:
    """A sink for a run, which goes on if it was there before."""
    import trackio

    who = identify(run_dir)
    run = trackio.init(
        project=PROJECT,
        name=f"{who.name}-{who.id[:6]}",  # the library knows runs by their names
        config=who.config,
        resume="allow",
        embed=False,
    )
    return RunSink(run)
