"""Descriptors: the cheap objects that entry points load.

A plugin's entry point names a module-level descriptor. Loading it must not import torch, mujoco or
any other heavy library: the implementation is named as "module:function" and imported inside a
worker.

    [project.entry-points."vlactl.environments"]
    mine = "my_package.plugin:PLUGIN"
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from vlactl.api.contracts import Needs, Recomputation, ValueLevel
from vlactl.errors import UserError

__all__ = [
    "AlgorithmConfig",
    "AlgorithmPlugin",
    "BenchOptions",
    "BenchReport",
    "Descriptor",
    "EnvironmentConfig",
    "EnvironmentFootprint",
    "EnvironmentPlugin",
    "Finding",
    "Footprint",
    "FootprintContext",
    "ModelConfig",
    "ModelPlugin",
    "PluginConfig",
    "Requirement",
    "SinkPlugin",
    "load_object",
]


class PluginConfig(BaseModel):
    """Base of every section that a plugin defines: frozen, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="Which plugin: see `vlactl plugins list`.")

    def blockers(self) -> list[str]:
        """Reasons why a run with this section can be planned but not started, one line each."""
        return []


class EnvironmentConfig(PluginConfig):
    """Keys that every environment has, because the engine reads them."""

    incidental_keys: ClassVar[frozenset[str]] = frozenset(
        {"num_envs", "step_timeout", "recycle_after", "allow_untested_versions"}
    )
    """Keys that change neither what a (task, trial) asks for nor what counts as success: two
    evaluations that differ in no other key can be compared. A plugin adds its own."""

    picture_keys: ClassVar[frozenset[str]] = frozenset()
    """Those of the incidental keys that change pictures: demonstrations depend on them, too."""

    num_envs: int = Field(8, ge=1, description="Simulators alive at the same time, over all ranks.")
    step_timeout: float = Field(
        300.0,
        gt=0,
        description="Seconds after which the process of a silent simulator is killed.",
    )
    recycle_after: int = Field(
        0, ge=0, description="Episodes per simulator after which its process is renewed; 0 = never."
    )
    allow_untested_versions: bool = Field(
        False, description="Run with simulator versions whose physics is known to differ."
    )


class ModelConfig(PluginConfig):
    """Keys that every model has, because the engine reads them."""

    cameras: tuple[str, ...] = Field((), description="Cameras the policy sees, primary first.")
    chunk_length: int = Field(8, ge=1, description="Actions per inference call (K).")

    def built_in(self) -> str:
        """Name of weights that come with the plugin and are chosen here; "" = none are."""
        return ""

    def training_blockers(self, *, has_adapters: bool) -> list[str]:
        """Reasons why such a policy can be evaluated but not trained, one line each."""
        return []

    def imitation_blockers(self, *, label_width: float, whole_chunks: bool) -> list[str]:
        """Reasons why such a policy cannot imitate like this (section `sft`), one line each."""
        return []


class AlgorithmConfig(PluginConfig):
    """Keys that every algorithm has, because the engine reads them."""

    group_size: int = Field(1, ge=1, description="Episodes from the same initial state (G).")

    def needs(self) -> Needs:
        """What the algorithm asks the engine for."""
        return Needs()


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """A distribution that must be installed: name, version specifier, command that gets it."""

    distribution: str
    specifier: str = ""
    install: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of `vlactl doctor`: `level` is "ok", "warn" or "FAIL"."""

    level: str
    subject: str
    detail: str = ""
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FootprintContext:
    """How a model is going to be used, as far as that decides its size."""

    lora_rank: int = 0
    lora_targets: str = "effective"
    values: ValueLevel = "none"
    activation_checkpointing: Recomputation = "none"
    bytes_per_value: int = 2
    """Of what the policy computes in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Size of a model, for the plan.

    Attributes:
        parameters: all of them.
        trainable: those that get a gradient.
        bytes_per_parameter: of the stored weights.
        activation_bytes: of one sample's forward pass that the backward pass needs.
        largest_unit: parameters of the largest of `Policy.shard_units`, or of all that is in none
            of them; 0 = unknown, taken for all parameters.
    """

    parameters: int
    trainable: int
    bytes_per_parameter: float
    activation_bytes: int
    largest_unit: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """What all kinds of plugins declare.

    Attributes:
        name: unique within its kind; what `name = "..."` in a preset refers to.
        summary: one line for `vlactl plugins list`.
        config: Pydantic class of the plugin's section.
        factory: "module:function" that builds the implementation inside a worker.
        api_version: the `API_VERSION` the author wrote against: a literal, not an import.
        requirements: distributions that must be there before the factory is imported.
        checks: "module:function" () -> list[Finding] with more findings for `vlactl doctor`.
    """

    group: ClassVar[str] = ""

    name: str
    summary: str
    config: type[PluginConfig]
    factory: str
    api_version: int
    requirements: tuple[Requirement, ...] = field(default=())
    checks: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentPlugin(Descriptor):
    """factory(config, EnvContext) -> Environment; spec(config) -> EnvSpec without a simulator.

    `footprint`, where there is one, estimates memory without a simulator, installed or not:
    footprint(config, EnvContext, num_tasks) -> EnvironmentFootprint of one env rank.
    `bench`, where there is one, compares the environment with what others use:
    bench(config, BenchOptions, say) -> BenchReport, where say(text) reports progress.
    `demonstrator`, where there is one, shows how tasks are solved:
    demonstrator(config, DemonstrationContext) -> Demonstrator, called in a process of its own.
    `variables`, where there is one, checks that this machine can run the environment, and gives
    the environment variables of processes that the engine starts for it:
    variables(config, device_index) -> Mapping[str, str].
    """

    group: ClassVar[str] = "vlactl.environments"

    spec: str
    footprint: str = ""
    bench: str = ""
    demonstrator: str = ""
    variables: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentFootprint:
    """What the simulators of one env rank take when all its slots play, for the plan.

    Attributes:
        num_processes: that host them.
        host_bytes: of the machine's memory, all these processes together.
        device_bytes: of the GPU that they draw on; 0 = none.
        ways_out: what makes them smaller, besides fewer of them, such as "lower env.this".
    """

    num_processes: int
    host_bytes: int
    device_bytes: int = 0
    ways_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What `vlactl bench env` asks for; the number of simulators is the config's `num_envs`.

    Attributes:
        cameras: to render; may be none.
        device_index: GPU to render on, as numbered by CUDA; -1 = none.
        chunk_length: actions per observation.
        rounds: how often the contenders take turns.
        seconds: of stepping per contender and round.
        episodes: scripted episodes to replay; 0 = none.
        horizon: control steps to which lock-step plays every episode.
        wave_seconds: after which a wave of lock-step episodes is cut and extrapolated.
        memory: measure what a further simulator of the same task costs.
    """

    cameras: tuple[str, ...]
    device_index: int
    chunk_length: int
    rounds: int
    seconds: float
    episodes: int
    horizon: int
    wave_seconds: float
    memory: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """What a benchmark found.

    Attributes:
        header: of the table.
        rows: of the table.
        notes: for people, below the table.
        record: for machines (JSON).
        steps_per_second: control steps of all simulators together, for estimates; 0 = not measured.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    record: dict[str, Any]
    steps_per_second: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlugin(Descriptor):
    """factory(config, ModelContext) -> Policy; footprint(config, FootprintContext) -> Footprint."""

    group: ClassVar[str] = "vlactl.models"

    footprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmPlugin(Descriptor):
    """factory(config) -> Algorithm."""

    group: ClassVar[str] = "vlactl.algorithms"


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkPlugin(Descriptor):
    """factory(config, run_dir) -> Sink."""

    group: ClassVar[str] = "vlactl.sinks"


def load_object(reference: str) -> Any:
    """The object that "module:attribute" names.

    Raises:
        UserError: the reference is malformed or the attribute does not exist.
    """
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise UserError(f'"{reference}" is not of the form "module:function"')
    module = importlib.import_module(module_name)
    if not hasattr(module, attribute):
        raise UserError(f'module "{module_name}" has no "{attribute}"')
    return getattr(module, attribute)
