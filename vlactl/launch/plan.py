"""From configuration and hardware to a plan: who does what, how much of it, and whether it fits.

Everything that depends on the number of devices is computed here once, checked before any process
starts, shown by `--dry-run` and read by the workers. A number that does not work out is a
`ConfigError`. What can be planned but not started yet is a blocker: one line that says what is
missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypedDict

from pydantic import TypeAdapter

from vlactl.api import registry
from vlactl.api.contracts import EnvContext, EnvSpec
from vlactl.api.plugins import (
    EnvironmentFootprint,
    EnvironmentPlugin,
    Footprint,
    FootprintContext,
    ModelPlugin,
    load_object,
)
from vlactl.config.run import RunConfig
from vlactl.errors import ConfigError, EnvironmentNotReadyError
from vlactl.launch.arithmetic import check_batches
from vlactl.launch.describe import describe as describe
from vlactl.launch.estimate import BOUNDS, estimate
from vlactl.launch.fitting import memory_blockers
from vlactl.launch.hardware import Hardware, readable
from vlactl.launch.layout import Layout, everywhere, make_layout
from vlactl.launch.memory import (
    BYTES,
    TIGHT,
    Budget,
    Demand,
    choose_offload,
    choose_spill,
    is_sharded,
    observation_bytes,
    policy_memory,
    saved_bytes,
)
from vlactl.launch.notes import idle_keys, shares_states
from vlactl.launch.placement import join_ranges
from vlactl.launch.rates import Rates, measured, model_key

BATCH_ROWS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run in numbers.

    Attributes:
        world_size: worker processes, one per device in use.
        device: what the workers compute on.
        roles: ranks of "actor", "rollout" and "env"; a rank is repeated where it holds several
            processes of a role.
        devices: of each rank, as numbered by CUDA on its own machine.
        nodes: machines; they have equal numbers of ranks, in order.
        sharded: actors share parameters, gradients and optimizer (FSDP2); each holds all else.
        offload: what moves to host memory while episodes are played: "optimizer", "weights" (the
            actors' shards of them).
        spill: the pictures of a step go through files, because host memory cannot hold them.
        slots_per_env_rank: simulators of each env process; a rank that is repeated in
            `roles["env"]` has that many for each time.
        num_groups: groups of episodes in a step, over all ranks.
        group_size: episodes of a group (G).
        episodes_per_step: trajectories of a step, over all ranks.
        chunks_per_episode: inference calls up to the horizon (C), the last one maybe cut short.
        chunk_length: actions per inference call (K).
        max_episode_steps: horizon in control steps.
        samples_per_step: chunks of a step over all ranks, padding included.
        optimizer_steps: of one RL step, all `optim.update_epochs` passes together.
        global_batch_size: samples of one optimizer step, over all ranks.
        inference_batch_size: rows of every inference call.
        micro_batches: backward passes of an actor in one optimizer step, at most: samples that
            cannot change the gradient are left out.
        threads_per_rank: CPU threads of a worker's own computations.
        memory: estimates, one line each.
        seconds: how long a step takes, one line each.
        notes: what the plan had to suppose.
        blockers: why the plan cannot be started, one line each; empty = it can.
        environment: variables set for the workers.
    """

    world_size: int
    device: Literal["cpu", "cuda"]
    roles: dict[str, tuple[int, ...]]
    devices: tuple[int, ...]
    nodes: int
    sharded: bool
    offload: tuple[Literal["optimizer", "weights"], ...]
    spill: bool
    slots_per_env_rank: int
    num_groups: int
    group_size: int
    episodes_per_step: int
    chunks_per_episode: int
    chunk_length: int
    max_episode_steps: int
    samples_per_step: int
    optimizer_steps: int
    global_batch_size: int
    inference_batch_size: int
    micro_batches: int = 0
    seconds: tuple[str, ...] = ()
    threads_per_rank: int
    memory: tuple[str, ...]
    notes: tuple[str, ...]
    blockers: tuple[str, ...]
    environment: dict[str, str]

    def to_json(self) -> str:
        """The plan as text, for the workers and for people."""
        return _ADAPTER.dump_json(self, indent=2).decode()

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote."""
        return _ADAPTER.validate_json(text)


_ADAPTER = TypeAdapter(Plan)


class _Common(TypedDict):
    world_size: int
    device: Literal["cpu", "cuda"]
    roles: dict[str, tuple[int, ...]]
    devices: tuple[int, ...]
    nodes: int
    chunk_length: int
    inference_batch_size: int
    threads_per_rank: int
    memory: tuple[str, ...]
    environment: dict[str, str]


def make_plan(
    config: RunConfig,
    hardware: Hardware,
    *,
    gpus: int | None,
    nodes: int = 1,
    simulators: bool = True,
) -> Plan:
    """Plan a run on `gpus` devices of each machine: GPUs where there are some, else CPU ranks.

    Args:
        config: of the run.
        hardware: of this machine; the others are taken to be like it.
        gpus: devices; None = all GPUs, or one CPU rank.
        nodes: machines.
        simulators: False = none is started: supervised training that nobody evaluates.

    Raises:
        ConfigError: a number that does not work out, naming the nearest ones that do.
        EnvironmentNotReadyError: the horizon is unknown because the environment is not installed.
    """
    for sink in config.sinks:
        registry.find("sink", sink)
    _check_keys(config)
    layout = make_layout(config.placement, _num_devices(hardware, gpus), nodes)
    _check_staleness(config, layout)
    spec = _spec_if_installed(config)
    if spec is not None:
        _check_against_spec(config, spec)
    horizon = _horizon(config, spec)
    chunks = math.ceil(horizon / config.model.chunk_length)
    check_batches(config, layout.roles, chunks)
    samples, optim = config.rollout.episodes_per_step * chunks, config.optim
    actors = len(layout.roles["actor"])

    def budget_of(changed: RunConfig, layout: Layout) -> Budget:
        held: EnvironmentFootprint | None = EnvironmentFootprint(num_processes=0, host_bytes=0)
        if simulators:
            held = _training_simulators(changed, hardware, spec, layout, samples)
        return _training_budget(changed, hardware, spec, layout, samples, held)

    budget = budget_of(config, layout)
    plan = Plan(
        **_common(config, hardware, layout, budget),
        sharded=is_sharded(config, actors),
        offload=budget.offload,
        spill=budget.spill,
        slots_per_env_rank=config.env.num_envs // len(layout.roles["env"]),
        num_groups=config.rollout.episodes_per_step // config.algorithm.group_size,
        group_size=config.algorithm.group_size,
        episodes_per_step=config.rollout.episodes_per_step,
        chunks_per_episode=chunks,
        max_episode_steps=horizon,
        samples_per_step=samples,
        optimizer_steps=samples // optim.global_batch_size * optim.update_epochs,
        global_batch_size=optim.global_batch_size,
        micro_batches=math.ceil(optim.global_batch_size / actors / optim.micro_batch_size),
        notes=_notes(config, hardware, spec, layout, budget),
        blockers=(*_blockers(config), *memory_blockers(config, budget, budget_of)),
    )
    return replace(plan, seconds=_seconds(plan, config, hardware))


def plan_evaluation(
    config: RunConfig, hardware: Hardware, *, gpus: int | None, num_episodes: int
) -> Plan:
    """Plan an evaluation: ranks share episodes and learn nothing, so nothing must come out even.

    Raises:
        ConfigError: devices that are not there.
        EnvironmentNotReadyError: the environment is not installed.
    """
    layout = everywhere(min(_num_devices(hardware, gpus), num_episodes))
    spec = environment_spec(config)
    _check_cameras(config, spec)
    slots = max(1, min(config.env.num_envs, num_episodes) // layout.world_size)
    chunks = math.ceil(spec.max_episode_steps / config.model.chunk_length)

    def budget_of(changed: RunConfig, layout: Layout) -> Budget:
        simulators = _simulators(changed, hardware, slots, min(len(spec.tasks), num_episodes))
        return _evaluation_budget(changed, hardware, layout, simulators)

    budget = budget_of(config, layout)
    return Plan(
        **_common(config, hardware, layout, budget),
        sharded=False,
        offload=(),
        spill=False,
        slots_per_env_rank=slots,
        num_groups=num_episodes,
        group_size=1,
        episodes_per_step=num_episodes,
        chunks_per_episode=chunks,
        max_episode_steps=spec.max_episode_steps,
        samples_per_step=num_episodes * chunks,
        optimizer_steps=0,
        global_batch_size=0,
        notes=(),
        blockers=memory_blockers(config, budget, budget_of),
    )


def _common(config: RunConfig, hardware: Hardware, layout: Layout, budget: Budget) -> _Common:
    """Fields that plans of both kinds fill alike."""
    threads = max(1, hardware.cores // layout.ranks_per_node)
    variables = {"OMP_NUM_THREADS": str(threads)}
    if hardware.gpus:
        # Rollout and update need blocks of different sizes; without this the allocator fragments.
        variables["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return _Common(
        world_size=layout.world_size,
        device="cuda" if hardware.gpus else "cpu",
        roles=layout.roles,
        devices=layout.devices,
        nodes=layout.nodes,
        chunk_length=config.model.chunk_length,
        inference_batch_size=inference_rows(config),
        threads_per_rank=threads,
        memory=budget.lines(),
        environment=variables,
    )


def _num_devices(hardware: Hardware, gpus: int | None) -> int:
    if gpus is not None and gpus < 1:
        raise ConfigError(
            f"--gpus {gpus}: at least 1", hint="leave it out to use every visible GPU"
        )
    if hardware.gpus:
        return _checked_gpus(hardware, gpus)
    if gpus is not None and gpus > hardware.cores:
        raise ConfigError(
            f"--gpus {gpus}: no GPU is visible, and {gpus} CPU ranks need {gpus} cores; "
            f"this machine has {hardware.cores}",
            hint=f"--gpus {hardware.cores} or fewer run on the CPU; --dry-run plans for any number",
        )
    return gpus or 1


def _checked_gpus(hardware: Hardware, gpus: int | None) -> int:
    visible = join_ranges([gpu.index for gpu in hardware.gpus])
    if gpus is not None and gpus > len(hardware.gpus):
        raise ConfigError(
            f"--gpus {gpus}: only {len(hardware.gpus)} visible: {visible}",
            hint="ask for fewer, or change CUDA_VISIBLE_DEVICES; --dry-run plans for any number",
        )
    return gpus or len(hardware.gpus)


def environment_spec(config: RunConfig) -> EnvSpec:
    """What the configured environment offers.

    Raises:
        EnvironmentNotReadyError: its packages are not installed.
    """
    plugin = registry.find("environment", config.env.name)
    assert isinstance(plugin, EnvironmentPlugin)
    try:
        make_spec: Callable[[object], EnvSpec] = load_object(plugin.spec)
        return make_spec(config.env)
    except ImportError as error:
        registry.require(plugin)
        raise EnvironmentNotReadyError(
            f'the environment "{config.env.name}" cannot describe itself: {error}',
            hint="vlactl plugins list shows what it needs",
        ) from error


def model_footprint(config: RunConfig) -> Footprint:
    """How large the configured model is."""
    plugin = registry.find("model", config.model.name)
    assert isinstance(plugin, ModelPlugin)
    measure: Callable[[object, FootprintContext], Footprint] = load_object(plugin.footprint)
    context = FootprintContext(
        lora_rank=config.lora.rank,
        lora_targets=config.lora.targets,
        values=config.algorithm.needs().values,
        activation_checkpointing=config.train.activation_checkpointing,
        bytes_per_value=BYTES[config.train.dtype],
    )
    return measure(config.model, context)


def inference_rows(config: RunConfig) -> int:
    """Rows of every inference call."""
    return config.rollout.batch_size or min(config.env.num_envs, BATCH_ROWS)


def size_key(config: RunConfig, device: str) -> str:
    """Of what was measured for policies of the configured one's size."""
    whole = config.train.model_copy(update={"activation_checkpointing": "none"})
    return model_key(device, config, model_footprint(config.model_copy(update={"train": whole})))


def _seconds(plan: Plan, config: RunConfig, hardware: Hardware) -> tuple[str, ...]:
    device, rows = hardware.device_name, plan.inference_batch_size
    rates = measured(device, size_key(config, device), config, rows)
    if not isinstance(rates, Rates):
        return (f"no estimate yet: {' and '.join(rates)} measure this machine",)
    found = estimate(plan, config, model_footprint(config), rates)
    return (f"{found.describe()} ({BOUNDS})", rates.source)


def environment_footprint(
    config: RunConfig, context: EnvContext, num_tasks: int
) -> EnvironmentFootprint | None:
    """What the simulators of an env rank take; None where the environment does not tell."""
    plugin = registry.find("environment", config.env.name)
    assert isinstance(plugin, EnvironmentPlugin)
    if not plugin.footprint:
        return None
    measure: Callable[[object, EnvContext, int], EnvironmentFootprint] = load_object(
        plugin.footprint
    )
    return measure(config.env, context, num_tasks)


def _spec_if_installed(config: RunConfig) -> EnvSpec | None:
    try:
        return environment_spec(config)
    except EnvironmentNotReadyError:
        return None


def _horizon(config: RunConfig, spec: EnvSpec | None) -> int:
    if spec is not None:
        return spec.max_episode_steps
    given = config.env.model_dump().get("max_episode_steps")
    if isinstance(given, int):
        return given
    raise EnvironmentNotReadyError(
        f'the environment "{config.env.name}" is not installed, so its episode length is unknown',
        hint="see `vlactl plugins list` for what to install, or set env.max_episode_steps",
    )


def spilled_bytes(config: RunConfig, plan: Plan) -> int:
    """What the pictures of a step take in the run directory."""
    if not plan.spill:
        return 0
    return observation_bytes(config, environment_spec(config), plan.samples_per_step)


def _check_keys(config: RunConfig) -> None:
    name = config.algorithm.name
    if config.rollout.auto_reset and config.algorithm.group_size > 1:
        raise ConfigError(
            f"rollout.auto_reset: {name} compares whole episodes, which have to be played alone",
            hint="set rollout.auto_reset = false, or use an algorithm without groups such as ppo",
        )


def _check_staleness(config: RunConfig, layout: Layout) -> None:
    players = {*layout.roles["env"], *layout.roles["rollout"]}
    shared = players & set(layout.roles["actor"])
    if config.train.staleness and shared:
        raise ConfigError(
            f"train.staleness = {config.train.staleness}: episodes are played while the policy is "
            f"updated, but ranks {join_ranges(shared)} do both",
            hint='give actors devices of their own, such as placement.env = "0-3", '
            'placement.rollout = "0-3", placement.actor = "4-7"; or train.staleness = 0',
        )


def _check_cameras(config: RunConfig, spec: EnvSpec) -> None:
    if unknown := sorted(set(config.model.cameras) - set(spec.cameras)):
        raise ConfigError(
            f'model.cameras: the environment "{config.env.name}" has no camera "{unknown[0]}"',
            hint=f"cameras: {', '.join(spec.cameras)}",
        )


def _check_against_spec(config: RunConfig, spec: EnvSpec) -> None:
    _check_cameras(config, spec)
    tasks = config.rollout.tasks or range(len(spec.tasks))
    _check_indices("rollout.tasks", tasks, len(spec.tasks))
    num_trials = min(spec.tasks[task].num_trials for task in tasks)
    _check_indices("rollout.trials", config.rollout.trials or (), num_trials)
    num_trials = min(task.num_trials for task in spec.tasks)
    _check_indices("eval.trials", config.eval.trials or (), num_trials)


def _check_indices(key: str, indices: Sequence[int], count: int) -> None:
    if beyond := [index for index in indices if index >= count]:
        raise ConfigError(
            f"{key}: there is no {join_ranges(beyond)}",
            hint=f"valid: 0-{count - 1} ({count} of them)",
        )


def _training_budget(
    config: RunConfig,
    hardware: Hardware,
    spec: EnvSpec | None,
    layout: Layout,
    samples: int,
    simulators: EnvironmentFootprint | None,
) -> Budget:
    footprint = model_footprint(config)
    demand = Demand(
        layout=layout,
        policy=policy_memory(config, footprint, len(layout.roles["actor"])),
        simulators=simulators,
        observations=observation_bytes(config, spec, samples) if spec else 0,
        checkpoint=saved_bytes(config, footprint) if config.checkpoint.background else 0,
        steps_held=1 + config.train.staleness,
        on_gpus=bool(hardware.gpus),
    )
    device = _device_capacity(hardware, layout)
    offload = choose_offload(demand, config.train.offload, device)
    return Budget(
        purpose="training",
        demand=demand,
        device_capacity=device,
        host_capacity=hardware.ram_bytes,
        offload=offload,
        spill=choose_spill(demand, offload, hardware.ram_bytes),
    )


def _training_simulators(
    config: RunConfig, hardware: Hardware, spec: EnvSpec | None, layout: Layout, samples: int
) -> EnvironmentFootprint | None:
    slots = config.env.num_envs // len(layout.roles["env"])
    tasks = config.rollout.tasks or (spec.tasks if spec else range(samples))
    return _simulators(config, hardware, slots, len(tasks))


def _evaluation_budget(
    config: RunConfig,
    hardware: Hardware,
    layout: Layout,
    simulators: EnvironmentFootprint | None,
) -> Budget:
    acting = replace(layout, roles={**layout.roles, "actor": ()})
    policy = policy_memory(config, model_footprint(config), 1)
    return Budget(
        purpose="evaluating",
        demand=Demand(
            layout=acting, policy=policy, simulators=simulators, on_gpus=bool(hardware.gpus)
        ),
        device_capacity=_device_capacity(hardware, layout),
        host_capacity=hardware.ram_bytes,
        phases=("rollout",),
    )


def _device_capacity(hardware: Hardware, layout: Layout) -> int:
    if hardware.gpus:
        return min(gpu.memory_bytes for gpu in hardware.gpus)
    return hardware.ram_bytes // layout.ranks_per_node


def _simulators(
    config: RunConfig, hardware: Hardware, slots: int, num_tasks: int
) -> EnvironmentFootprint | None:
    """Of one env process."""
    device_index = 0 if hardware.gpus else -1
    context = EnvContext(num_slots=slots, cameras=config.model.cameras, device_index=device_index)
    return environment_footprint(config, context, num_tasks)


def policy_blockers(config: RunConfig) -> list[str]:
    """Why the configured policy cannot be built at all, one line each; empty = it can."""
    sections = (config.model, config.env, config.algorithm)
    lines = [line for section in sections for line in section.blockers()]
    if config.lora.adapter and not config.lora.rank:
        lines.append("lora.adapter is set, but lora.rank is 0: set it to the rank of the adapter")
    if config.lora.adapter and not Path(config.lora.adapter).is_dir():
        lines.append(f"lora.adapter: there is no directory {config.lora.adapter}")
    return lines


def _blockers(config: RunConfig) -> list[str]:
    lines = policy_blockers(config)
    lines += config.model.training_blockers(has_adapters=config.lora.rank > 0)
    if config.optim.optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
        lines.append(
            "optim.optimizer = adamw8bit needs a package that is missing: "
            'pip install "vlactl[quantization]"'
        )
    return lines


def _notes(
    config: RunConfig, hardware: Hardware, spec: EnvSpec | None, layout: Layout, budget: Budget
) -> tuple[str, ...]:
    notes = [hardware.assumption] if hardware.assumption else []
    notes += layout.notes
    notes += idle_keys(config, can_offload=bool(budget.demand.movable()))
    if budget.spill:
        size = readable(budget.demand.observations)
        notes.append(
            f"pictures of a step, {size}, go through files in the run directory: host memory does "
            "not hold them beside the rest"
        )
    if budget.is_tight():
        notes.append(f"memory is tight: an estimate of more than {TIGHT:.0%} of a device")
    if spec is not None and shares_states(config, spec):
        notes.append(
            "training also uses initial states that evaluations use: rollout.trials and "
            "eval.trials keep them apart"
        )
    if spec is None:
        notes.append(f'episode length from the preset: "{config.env.name}" is not installed')
    return tuple(notes)
