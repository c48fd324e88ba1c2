"""From configuration and hardware to a plan: who does what, how much of it, and whether it fits.

Everything that depends on the number of devices is computed here once, checked before any process
starts, shown by `--dry-run` and read by the workers. A number that does not work out is a
`ConfigError`. What can be planned but not started yet is a blocker: one line that says what is
missing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

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
from vlactl.config.run import RunConfig, Section
from vlactl.errors import ConfigError, EnvironmentNotReadyError
from vlactl.launch.arithmetic import check_batches
from vlactl.launch.hardware import Hardware
from vlactl.launch.memory import (
    Budget,
    DeviceMemory,
    HostMemory,
    acting_memory,
    device_memory,
    observation_bytes,
)
from vlactl.launch.placement import Processes, check_overlaps, join_ranges, parse_placement
from vlactl.launch.torchrun import torchrun_command

BATCH_ROWS = 8
ROLES = ("actor", "rollout", "env")


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
        threads_per_rank: CPU threads of a worker's own computations.
        memory: estimates, one line each.
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


def make_plan(config: RunConfig, hardware: Hardware, *, gpus: int | None) -> Plan:
    """Plan a run on `gpus` devices: GPUs where there are some, else CPU ranks; None = all, or one.

    Raises:
        ConfigError: a number that does not work out, naming the nearest ones that do.
        EnvironmentNotReadyError: the horizon is unknown because the environment is not installed.
    """
    for sink in config.sinks:
        registry.find("sink", sink)
    _check_algorithm(config)
    num_devices = _num_devices(hardware, gpus)
    processes = _place(config, num_devices)
    roles, world_size = _ranks(processes)
    spec = _spec_if_installed(config)
    if spec is not None:
        _check_against_spec(config, spec)
    horizon = _horizon(config, spec)
    chunks = math.ceil(horizon / config.model.chunk_length)
    check_batches(config, roles, chunks)
    samples = config.rollout.episodes_per_step * chunks
    slots = config.env.num_envs // len(roles["env"])
    budget = _training_budget(config, hardware, spec, roles, samples)
    return Plan(
        world_size=world_size,
        device="cuda" if hardware.gpus else "cpu",
        roles=roles,
        devices=tuple(range(world_size)),
        nodes=1,
        sharded=_is_sharded(config, len(set(roles["actor"]))),
        offload=(),
        spill=False,
        slots_per_env_rank=slots,
        num_groups=config.rollout.episodes_per_step // config.algorithm.group_size,
        group_size=config.algorithm.group_size,
        episodes_per_step=config.rollout.episodes_per_step,
        chunks_per_episode=chunks,
        chunk_length=config.model.chunk_length,
        max_episode_steps=horizon,
        samples_per_step=samples,
        optimizer_steps=samples // config.optim.global_batch_size * config.optim.update_epochs,
        global_batch_size=config.optim.global_batch_size,
        inference_batch_size=config.rollout.batch_size or min(config.env.num_envs, BATCH_ROWS),
        threads_per_rank=_threads(hardware, world_size),
        memory=budget.lines(),
        notes=_notes(config, hardware, spec),
        blockers=(*_blockers(config, processes), *budget.blockers()),
        environment=_environment(hardware, world_size),
    )


def plan_evaluation(
    config: RunConfig, hardware: Hardware, *, gpus: int | None, num_episodes: int
) -> Plan:
    """Plan an evaluation: ranks share episodes and learn nothing, so nothing must come out even.

    Raises:
        ConfigError: devices that are not there.
        EnvironmentNotReadyError: the environment is not installed.
    """
    ranks = tuple(range(min(_num_devices(hardware, gpus), num_episodes)))
    spec = environment_spec(config)
    _check_cameras(config, spec)
    slots = max(1, min(config.env.num_envs, num_episodes) // len(ranks))
    chunks = math.ceil(spec.max_episode_steps / config.model.chunk_length)
    num_tasks = min(len(spec.tasks), num_episodes)
    simulators = _simulators(config, hardware, ranks, slots, num_tasks)
    device = acting_memory(model_footprint(config), simulators)
    budget = _budget("evaluating", hardware, len(ranks), device, 0, simulators)
    return Plan(
        world_size=len(ranks),
        device="cuda" if hardware.gpus else "cpu",
        roles=dict.fromkeys(ROLES, ranks),
        devices=ranks,
        nodes=1,
        sharded=False,
        offload=(),
        spill=False,
        slots_per_env_rank=slots,
        num_groups=num_episodes,
        group_size=1,
        episodes_per_step=num_episodes,
        chunks_per_episode=chunks,
        chunk_length=config.model.chunk_length,
        max_episode_steps=spec.max_episode_steps,
        samples_per_step=num_episodes * chunks,
        optimizer_steps=0,
        global_batch_size=0,
        inference_batch_size=config.rollout.batch_size or min(config.env.num_envs, BATCH_ROWS),
        threads_per_rank=_threads(hardware, len(ranks)),
        memory=budget.lines(),
        notes=(),
        blockers=budget.blockers(),
        environment=_environment(hardware, len(ranks)),
    )


def _is_sharded(config: RunConfig, num_actors: int) -> bool:
    """Whether FSDP2 wraps the actors' policy; on one rank it only adds float32 weights."""
    has_master_weights = config.train.master_weights and config.train.dtype == "bfloat16"
    trains_all = config.lora.rank == 0
    return trains_all and config.train.sharding and (num_actors > 1 or has_master_weights)


def describe(plan: Plan, run_dir: Path) -> list[str]:
    """The plan as lines for a person."""
    lines = [
        ("ranks", _describe_ranks(plan)),
        (
            "per step",
            f"{_describe_trajectories(plan)};  {_count(plan.samples_per_step)} samples;  "
            f"{plan.optimizer_steps} optimizer steps of {_count(plan.global_batch_size)}",
        ),
        (
            "episode",
            f"{plan.max_episode_steps} control steps = {plan.chunks_per_episode} chunks of "
            f"{plan.chunk_length} actions;  inference in batches of {plan.inference_batch_size}",
        ),
        *(("memory", line) for line in plan.memory),
        ("run dir", str(run_dir)),
        ("command", " ".join(torchrun_command(plan.world_size, run_dir, "train"))),
        ("env", "  ".join(f"{name}={value}" for name, value in plan.environment.items())),
        *(("note", note) for note in plan.notes),
        *(("blocked", blocker) for blocker in plan.blockers),
    ]
    return [f"{label:<9} {text}" for label, text in lines]


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


def _place(config: RunConfig, num_devices: int) -> dict[str, Processes]:
    texts = {role: getattr(config.placement, role) for role in ROLES}
    processes = {role: parse_placement(text, num_devices) for role, text in texts.items()}
    devices = {role: [d for owned in each for d in owned] for role, each in processes.items()}
    check_overlaps(devices, range(num_devices))
    return processes


def _ranks(processes: dict[str, Processes]) -> tuple[dict[str, tuple[int, ...]], int]:
    """One worker per device in use; a process that owns several devices lives on the first."""
    used = sorted({device for each in processes.values() for owned in each for device in owned})
    rank_of = {device: rank for rank, device in enumerate(used)}
    roles = {role: tuple(rank_of[owned[0]] for owned in each) for role, each in processes.items()}
    return roles, len(used)


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
    )
    return measure(config.model, context)


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


def _check_algorithm(config: RunConfig) -> None:
    name = config.algorithm.name
    if config.rollout.auto_reset and config.algorithm.group_size > 1:
        raise ConfigError(
            f"rollout.auto_reset: {name} compares whole episodes, which have to be played alone",
            hint="set rollout.auto_reset = false, or use an algorithm without groups such as ppo",
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
    roles: dict[str, tuple[int, ...]],
    samples: int,
) -> Budget:
    slots = config.env.num_envs // len(roles["env"])
    num_tasks = len(config.rollout.tasks or (spec.tasks if spec else range(samples)))
    simulators = _simulators(config, hardware, roles["env"], slots, num_tasks)
    device = device_memory(config, model_footprint(config), simulators)
    observations = observation_bytes(config, spec, samples) if spec else 0
    world_size = len({rank for ranks in roles.values() for rank in ranks})
    return _budget("training", hardware, world_size, device, observations, simulators)


def _simulators(
    config: RunConfig, hardware: Hardware, ranks: Sequence[int], slots: int, num_tasks: int
) -> EnvironmentFootprint | None:
    """Of all env ranks: processes and host memory in all, and the GPU that has most of them."""
    device_index = 0 if hardware.gpus else -1
    context = EnvContext(num_slots=slots, cameras=config.model.cameras, device_index=device_index)
    each = environment_footprint(config, context, num_tasks)
    if each is None:
        return None
    return replace(
        each,
        num_processes=each.num_processes * len(ranks),
        host_bytes=each.host_bytes * len(ranks),
        device_bytes=each.device_bytes * max(Counter(ranks).values()),
    )


def _budget(
    purpose: str,
    hardware: Hardware,
    world_size: int,
    device: DeviceMemory,
    observations: int,
    simulators: EnvironmentFootprint | None,
) -> Budget:
    capacity = hardware.ram_bytes // world_size
    if hardware.gpus:
        capacity = min(gpu.memory_bytes for gpu in hardware.gpus)
    return Budget(
        purpose=purpose,
        device=device,
        device_capacity=capacity,
        host=HostMemory(
            ranks=0 if hardware.gpus else device.total * world_size,
            observations=observations,
            simulators=simulators,
        ),
        host_capacity=None if hardware.assumption else hardware.ram_bytes,
    )


def policy_blockers(config: RunConfig) -> list[str]:
    """Why the configured policy cannot be built at all, one line each; empty = it can."""
    sections = (config.model, config.env, config.algorithm)
    lines = [line for section in sections for line in section.blockers()]
    if config.lora.adapter and not config.lora.rank:
        lines.append("lora.adapter is set, but lora.rank is 0: set it to the rank of the adapter")
    if config.lora.adapter and not Path(config.lora.adapter).is_dir():
        lines.append(f"lora.adapter: there is no directory {config.lora.adapter}")
    return lines


def _blockers(config: RunConfig, processes: dict[str, Processes]) -> list[str]:
    unbuilt = {
        "train.staleness > 0: rollouts that lag behind are planned": config.train.staleness > 0,
        "rollout.pipeline_stages > 1: pipelined rollouts are planned": (
            config.rollout.pipeline_stages > 1
        ),
        "placement: roles on ranks of their own are planned": not _is_shared(processes),
    }
    blockers = policy_blockers(config) + config.model.training_blockers(
        has_adapters=config.lora.rank > 0
    )
    return blockers + [f"{what} but not built yet" for what, wanted in unbuilt.items() if wanted]


def _is_shared(processes: dict[str, Processes]) -> bool:
    """Every role has one process on every device in use."""
    one_each = all(len(owned) == 1 for each in processes.values() for owned in each)
    return one_each and len(set(processes.values())) == 1 and _distinct(processes["env"])


def _distinct(processes: Processes) -> bool:
    return len(set(processes)) == len(processes)


def _notes(config: RunConfig, hardware: Hardware, spec: EnvSpec | None) -> tuple[str, ...]:
    notes = [hardware.assumption] if hardware.assumption else []
    notes += _idle_keys(config)
    if spec is None:
        notes.append(f'episode length from the preset: "{config.env.name}" is not installed')
    return tuple(notes)


def _idle_keys(config: RunConfig) -> list[str]:
    """Keys that were set and change nothing beside the others."""
    needs = config.algorithm.needs()
    has_values, warmup = needs.values != "none", needs.critic_warmup_steps
    lora, evaluation = config.lora, config.eval
    idle = {
        f"optim.value_lr has no effect: {config.algorithm.name} has no value head": (
            not has_values and _is_set(config.optim, "value_lr")
        ),
        f"the policy is not trained: the critic is warmed up for {warmup} steps, and "
        "train.max_steps is no more": warmup >= config.train.max_steps,
        "lora.alpha and lora.targets have no effect while lora.rank is 0": (
            lora.rank == 0 and (_is_set(lora, "alpha") or _is_set(lora, "targets"))
        ),
        "eval.temperature and eval.top_k have no effect on greedy evaluations": (
            evaluation.greedy
            and (_is_set(evaluation, "temperature") or _is_set(evaluation, "top_k"))
        ),
    }
    return [text for text, applies in idle.items() if applies]


def _is_set(section: Section, key: str) -> bool:
    return bool(getattr(section, key) != type(section).model_fields[key].default)


def _threads(hardware: Hardware, world_size: int) -> int:
    return max(1, hardware.cores // world_size)


def _environment(hardware: Hardware, world_size: int) -> dict[str, str]:
    variables = {"OMP_NUM_THREADS": str(_threads(hardware, world_size))}
    if hardware.gpus:
        # Rollout and update need blocks of different sizes; without this the allocator fragments.
        variables["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return variables


def _describe_ranks(plan: Plan) -> str:
    roles = "   ".join(f"{role} {_rank_list(plan.roles[role])}" for role in ROLES)
    shared = len(set(plan.roles.values())) == 1
    form = "colocated" if shared else "separate"
    return f"{roles} ({plan.slots_per_env_rank} simulators each)   {form} on {plan.device}"


def _describe_trajectories(plan: Plan) -> str:
    trajectories = f"{_count(plan.episodes_per_step)} trajectories"
    if plan.group_size == 1:
        return trajectories
    return f"{trajectories} = {_count(plan.num_groups)} groups x {plan.group_size}"


def _rank_list(ranks: Sequence[int]) -> str:
    each = len(ranks) // len(set(ranks))
    return join_ranges(ranks) if each == 1 else f"{join_ranges(ranks)} x {each}"


def _count(number: int) -> str:
    """Digits in groups of three from 10 000 on."""
    return f"{number:,}".replace(",", " ") if number >= 10_000 else str(number)
