"""Descriptors and configurations of the toy environment and policy. Imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from vlactl.api.plugins import (
    EnvironmentConfig,
    EnvironmentPlugin,
    Footprint,
    FootprintContext,
    ModelConfig,
    ModelPlugin,
)


class ToyEnvConfig(EnvironmentConfig):
    """Section `env`: a point on a line is to be brought to a goal that the picture shows."""

    incidental_keys: ClassVar[frozenset[str]] = EnvironmentConfig.incidental_keys | {
        *("image_size", "faults", "fault_dir"),
    }
    picture_keys: ClassVar[frozenset[str]] = frozenset({"image_size"})
    name: Literal["toy"] = "toy"
    suite: Literal["toy"] = Field("toy", description="There is one.")
    num_tasks: int = Field(4, ge=1, le=64, description="Goals along the line.")
    num_trials: int = Field(8, ge=1, le=1000, description="Starts per task.")
    max_episode_steps: int = Field(16, ge=1, description="Steps before truncation.")
    image_size: int = Field(8, ge=4, le=64, description="Height and width of pictures.")
    faults: dict[str, Literal["die", "hang", "nan", "raise"]] = Field(
        default_factory=dict,
        description='Faults to inject once each: "task/trial/member", or "task/demonstration" -> '
        "what its simulator does.",
    )
    fault_dir: str = Field("", description="Where simulators note the faults they have injected.")


class ToyModelConfig(ModelConfig):
    """Section `model`: a two-layer network on picture and state."""

    name: Literal["toy"] = "toy"
    path: str = Field("", description="Directory that `vlactl export` wrote; empty = random.")
    cameras: tuple[str, ...] = ("front",)
    chunk_length: int = Field(4, ge=1)
    hidden: int = Field(32, ge=1, description="Width of the hidden layer.")
    num_bins: int = Field(9, ge=2, le=256, description="Values an action can take.")


def footprint(config: ToyModelConfig, context: FootprintContext) -> Footprint:
    """Size of the network for pictures of 8 x 8 pixels."""
    num_values = {"none": 0, "chunk": 1, "action": config.chunk_length}[context.values]
    inputs = 3 * 8 * 8 * len(config.cameras) + 1
    outputs = config.chunk_length * config.num_bins + num_values
    parameters = (inputs + 1) * config.hidden + (config.hidden + 1) * outputs
    return Footprint(
        parameters=parameters,
        trainable=parameters,
        bytes_per_parameter=context.bytes_per_value,
        activation_bytes=context.bytes_per_value * (config.hidden + outputs),
        largest_unit=parameters,
    )


ENVIRONMENT = EnvironmentPlugin(
    name="toy",
    summary="a point on a line, for tests and as an example",
    config=ToyEnvConfig,
    factory="vlactl_toy.environment:make_environment",
    spec="vlactl_toy.environment:make_spec",
    demonstrator="vlactl_toy.demonstrator:make_demonstrator",
    api_version=1,
)
MODEL = ModelPlugin(
    name="toy",
    summary="a small network for the toy environment",
    config=ToyModelConfig,
    factory="vlactl_toy.policy:make_policy",
    footprint="vlactl_toy.plugin:footprint",
    api_version=1,
)
