"""Descriptor and configuration. Imports nothing heavy: `vlactl --help` may load it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vlactl.api.plugins import EnvironmentConfig, EnvironmentPlugin


class ReachConfig(EnvironmentConfig):
    """Section `env` of a preset."""

    name: Literal["example-reach"] = "example-reach"
    suite: str = Field("reach", pattern="^reach$", description="There is one.")
    max_episode_steps: int = Field(32, ge=1, description="Control steps before truncation.")
    image_size: int = Field(8, ge=4, le=64, description="Height and width of pictures.")


PLUGIN = EnvironmentPlugin(
    name="example-reach",
    summary="a hand on a table is to reach a corner",
    config=ReachConfig,
    factory="vlactl_example_env.environment:make_environment",
    spec="vlactl_example_env.environment:make_spec",
    api_version=1,
)
