"""Estimates of memory: what a run holds on each device and machine in each phase.

On a device, by the roles of its rank:

    actor            weights, a reference policy, optimizer; in the update also gradients, the
                     activations of one micro-batch and, where the weights are sharded, the units
                     that are whole at a time
    rollout          whole weights: the actor's own where they are whole, else a copy, which an
                     actor has only while episodes are played
    env              what simulators draw with

On a machine: what CPU ranks compute with, pictures and states of a step (of two where rollouts lag
behind), what is offloaded, a checkpoint that is written in the background, simulators.

Not counted: slack of allocators, and what a worker process itself takes on the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from vlactl.api.contracts import EnvSpec
from vlactl.api.plugins import EnvironmentFootprint, Footprint
from vlactl.config.run import RunConfig
from vlactl.launch.hardware import GIB, readable
from vlactl.launch.layout import Layout
from vlactl.launch.placement import join_ranges

Offload = tuple[Literal["optimizer", "weights"], ...]
Phase = Literal["rollout", "update"]
Parts = Mapping[str, int]
"""Bytes by what they are for."""

PHASES: tuple[Phase, ...] = ("rollout", "update")
BYTES = {"float32": 4, "bfloat16": 2}
CHECKPOINT, SIMULATORS = "checkpoint in the background", "simulators"
_MASTER_BYTES = 4
_MOMENTS = 2
_SCALES = 1 + 4 / 256
"""Bytes of a moment in 8 bits: a float32 scale for every 256 values."""
_WHOLE_UNITS = 2
CUDA_BYTES = GIB
"""Of a GPU: the context, kernels, and buffers of libraries."""
TIGHT = 0.9
"""Part of a device above which a person is told."""
HEADROOM = 0.15
"""Of a machine's memory, left to the system and its file cache, when a step is to be held in it."""


def is_sharded(config: RunConfig, num_actors: int) -> bool:
    """Whether FSDP2 wraps the actors' policy; on one rank it only adds float32 weights."""
    trains_all = config.lora.rank == 0 and config.train.sharding
    return trains_all and (num_actors > 1 or has_master_weights(config))


def has_master_weights(config: RunConfig) -> bool:
    """Whether the optimizer works on float32 weights of its own."""
    train = config.train
    wanted = train.master_weights and train.dtype == "bfloat16"
    return wanted and config.lora.rank == 0 and train.sharding


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyMemory:
    """Bytes of the policy on an actor, and of a whole copy for the rollout.

    Attributes:
        weights: an actor's share.
        reference: its share of the initial policy.
        gradients: of what it updates.
        optimizer: both moments.
        units: weights and gradients of the shard units that are whole at a time.
        activations: of one micro-batch.
        stepping: what the optimizer computes with besides, when the passes are over.
        whole: all weights, as they act.
        sharded: actors that act have a copy for it.
    """

    weights: int
    reference: int
    gradients: int
    optimizer: int
    units: int
    activations: int
    stepping: int
    whole: int
    sharded: bool

    def working(self) -> dict[str, int]:
        """The larger of what the passes need and what the optimizer's step needs."""
        passes = {"whole units": self.units, "activations": self.activations}
        step = {"optimizer step": self.stepping}
        return max(passes, step, key=lambda parts: sum(parts.values()))


def policy_memory(config: RunConfig, footprint: Footprint, num_actors: int) -> PolicyMemory:
    """What the configured policy takes when so many actors train it."""
    sharded = is_sharded(config, num_actors)
    shares = num_actors if sharded else 1
    computed = BYTES[config.train.dtype]
    trained = _MASTER_BYTES if has_master_weights(config) else computed
    stored = trained if sharded else footprint.bytes_per_parameter
    has_reference = config.algorithm.needs().reference and config.lora.rank == 0
    unit = footprint.largest_unit or footprint.parameters
    is_plain = config.optim.optimizer == "adamw"
    return PolicyMemory(
        weights=round(footprint.parameters * stored / shares),
        reference=round(footprint.trainable * stored / shares) if has_reference else 0,
        gradients=footprint.trainable * trained // shares,
        optimizer=_optimizer_bytes(config, footprint) // shares,
        # Weights of two units; the gradient of one, and in the precision in which it is reduced.
        units=unit * (_WHOLE_UNITS * computed + computed + trained) if sharded else 0,
        activations=footprint.activation_bytes * config.optim.micro_batch_size,
        # torch's AdamW updates all tensors at once, with one of their size; measured with CUDA.
        stepping=footprint.trainable * trained // shares if is_plain else 0,
        whole=round(footprint.parameters * footprint.bytes_per_parameter),
        sharded=sharded,
    )


def saved_bytes(config: RunConfig, footprint: Footprint) -> int:
    """A checkpoint: weights, of which only adapters where there are some, and optimizer state."""
    each = _MASTER_BYTES if has_master_weights(config) else BYTES[config.train.dtype]
    saved = footprint.trainable if config.lora.rank else footprint.parameters
    return each * saved + _optimizer_bytes(config, footprint)


def _optimizer_bytes(config: RunConfig, footprint: Footprint) -> int:
    each: float = _MASTER_BYTES if has_master_weights(config) else BYTES[config.train.dtype]
    if config.optim.optimizer == "adamw8bit":
        each = _SCALES
    return round(_MOMENTS * each * footprint.trainable)


def device_parts(
    roles: tuple[str, ...],
    phase: Phase,
    policy: PolicyMemory,
    simulators: int = 0,
    offload: Offload = (),
) -> dict[str, int]:
    """Bytes on the device of a rank that plays these roles."""
    trains, acts = "actor" in roles, "rollout" in roles
    parts: dict[str, int] = {}
    if trains:
        parts = {
            "weights": policy.weights,
            "reference": policy.reference,
            "optimizer": policy.optimizer,
        }
    if trains and phase == "update":
        parts["gradients"] = policy.gradients
        parts |= policy.working()
    if trains and phase == "rollout" and len(roles) > 1:
        # Weights leave when the copy that acts is full, so they never make room for it.
        parts = {n: size for n, size in parts.items() if n == "weights" or n not in offload}
    if acts and not trains:
        parts["weights"] = policy.whole
    elif acts and policy.sharded and phase == "rollout":
        parts["copy that acts"] = policy.whole
    if "env" in roles:
        parts[SIMULATORS] = simulators
    return {name: size for name, size in parts.items() if size}


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Everything that decides how much memory a run needs.

    Attributes:
        layout: ranks, roles and machines.
        policy: see `PolicyMemory`.
        simulators: of one env process; None = their environment does not tell.
        observations: pictures and states of a step, all ranks together.
        checkpoint: that is written in the background, all actors together.
        steps_held: steps whose observations are held at the same time.
        on_gpus: ranks compute on GPUs.
    """

    layout: Layout
    policy: PolicyMemory
    simulators: EnvironmentFootprint | None
    observations: int = 0
    checkpoint: int = 0
    steps_held: int = 1
    on_gpus: bool = True

    def device(self, roles: tuple[str, ...], phase: Phase, offload: Offload) -> dict[str, int]:
        """Bytes on the fullest device among the ranks with these roles."""
        counts = Counter(self.layout.roles["env"])
        most = max((counts[rank] for rank in self.layout.kinds()[roles]), default=0)
        drawn = self.simulators.device_bytes * most if self.simulators else 0
        parts = device_parts(roles, phase, self.policy, drawn, offload)
        return parts | ({"CUDA": CUDA_BYTES} if self.on_gpus else {})

    def most(self, phase: Phase, offload: Offload = ()) -> int:
        """Bytes on the fullest device of all."""
        return max(
            sum(self.device(roles, phase, offload).values()) for roles in self.layout.kinds()
        )

    def host(self, offload: Offload, *, spill: bool) -> dict[str, int]:
        """Bytes on the fullest machine."""
        parts = {"ranks": 0 if self.on_gpus else self._cpu_ranks()}
        parts["observations of a step"] = 0 if spill else self._observations_per_node()
        parts["offloaded"] = sum(self._offloaded(name) for name in offload)
        sharded, layout = self.policy.sharded, self.layout  # each replica is staged whole
        copies = layout.share_of_fullest("actor") if sharded else layout.most_per_node("actor")
        parts[CHECKPOINT] = round(self.checkpoint * copies)
        if self.simulators:
            processes = self.layout.most_per_node("env")
            parts[SIMULATORS] = self.simulators.host_bytes * processes
        return {name: size for name, size in parts.items() if size}

    def num_simulator_processes(self) -> int:
        """Processes of simulators on the machine that has most."""
        each = self.simulators.num_processes if self.simulators else 0
        return each * self.layout.most_per_node("env")

    def _cpu_ranks(self) -> int:
        sizes = {
            roles: max(sum(self.device(roles, phase, ()).values()) for phase in PHASES)
            for roles in self.layout.kinds()
        }
        per_node = self.layout.ranks_per_node
        totals: Counter[int] = Counter()
        for roles, ranks in self.layout.kinds().items():
            for rank in ranks:
                totals[rank // per_node] += sizes[roles]
        return max(totals.values())

    def _observations_per_node(self) -> int:
        """Env ranks hold them until they are complete, then actors do."""
        share = max(self.layout.share_of_fullest(role) for role in ("env", "actor"))
        return round(self.observations * self.steps_held * share)

    def _offloaded(self, name: str) -> int:
        per_node = self.layout.ranks_per_node
        nodes = Counter(rank // per_node for rank in self._movers())
        return int(getattr(self.policy, name)) * max(nodes.values(), default=0)

    def _movers(self) -> Iterator[int]:
        """Actors that also play: theirs is in the way during rollouts."""
        for roles, ranks in self.layout.kinds().items():
            if "actor" in roles and len(roles) > 1:
                yield from ranks

    def movable(self) -> Offload:
        """What could be moved to host memory, in the order in which it is."""
        if not self.on_gpus or not list(self._movers()):
            return ()
        return ("optimizer", "weights") if self.policy.sharded else ("optimizer",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a run needs against what there is.

    Attributes:
        purpose: "training" or "evaluating".
        demand: what it needs.
        device_capacity: of a GPU, or a CPU rank's share of the host.
        host_capacity: of a machine.
        offload: what is moved to the host during rollouts.
        spill: observations of a step go through files.
        phases: that this run has.
    """

    purpose: str
    demand: Demand
    device_capacity: int
    host_capacity: int
    offload: Offload = ()
    spill: bool = False
    phases: tuple[Phase, ...] = PHASES

    def lines(self) -> tuple[str, ...]:
        """The estimates, for a person: one line per kind of rank, one for a machine."""
        kinds = self.demand.layout.kinds().items()
        return (*(self._kind_line(roles, ranks) for roles, ranks in kinds), self._host_line())

    def fits_devices(self) -> bool:
        """Whether every phase fits on every device."""
        return all(self.need(phase) <= self.device_capacity for phase in self.phases)

    def is_tight(self) -> bool:
        """Whether it fits, and little more would not."""
        need = max(self.need(phase) for phase in self.phases)
        return TIGHT * self.device_capacity < need <= self.device_capacity

    def fits_host(self) -> bool:
        """Whether a machine holds it; what CPU ranks compute with is told by their own line."""
        parts = self.demand.host(self.offload, spill=self.spill)
        total, capacity = sum(parts.values()), self.host_capacity
        return total <= capacity or parts.get("ranks", 0) > capacity

    def need(self, phase: Phase) -> int:
        """Bytes on the fullest device."""
        return self.demand.most(phase, self.offload)

    def host_need(self) -> int:
        """Bytes on the fullest machine."""
        return sum(self.demand.host(self.offload, spill=self.spill).values())

    def fewer_simulators(self) -> str:
        """What makes simulators smaller."""
        simulators = self.demand.simulators
        return ", ".join(["lower env.num_envs", *(simulators.ways_out if simulators else ())])

    def _kind_line(self, roles: tuple[str, ...], ranks: list[int]) -> str:
        each = [(phase, self.demand.device(roles, phase, self.offload)) for phase in self.phases]
        unit, name = (GIB, "GiB")
        if max(sum(parts.values()) for _, parts in each) < GIB:
            unit, name = (2**20, "MiB")
        shown = ", ".join(f"{phase} {_sum(parts, unit)}" for phase, parts in each)
        capacity = f"{name} of {self.device_capacity / GIB:.1f} GiB per rank (estimate)"
        return f"{'+'.join(roles)} {join_ranges(ranks)}: {shown} {capacity}"

    def _host_line(self) -> str:
        demand, limit = self.demand, readable(self.host_capacity)
        parts = demand.host(self.offload, spill=self.spill)
        count = demand.num_simulator_processes()
        names = {SIMULATORS: f"{count} simulator {'process' if count == 1 else 'processes'}"}
        terms = " + ".join(f"{names.get(n, n)} {readable(size)}" for n, size in parts.items())
        where = "host" if demand.layout.nodes == 1 else "each host"
        extra = "; simulators extra" if demand.simulators is None else ""
        total = readable(sum(parts.values()))
        sums = f"{terms} = {total}" if len(parts) > 1 else terms or total
        return f"{where}: {sums} of {limit}, all ranks together{extra} (estimate)"


def choose_offload(demand: Demand, wanted: str, capacity: int) -> Offload:
    """What is moved to the host during rollouts: all, nothing, or what makes them fit."""
    if wanted == "always":
        return demand.movable()
    fits = demand.most("rollout") <= capacity
    return () if wanted == "never" or fits else demand.movable()[:1]


def choose_spill(demand: Demand, offload: Offload, capacity: int) -> bool:
    """Whether the observations of a step go through files: they do not fit beside the rest."""
    if not demand.observations:
        return False
    return sum(demand.host(offload, spill=False).values()) > (1 - HEADROOM) * capacity


def largest_fitting(value: int, fits: Callable[[int], bool]) -> int:
    """The largest of value/2, value/4, ... 1 that fits; 0 = none does."""
    candidate = value // 2
    while candidate and not fits(candidate):
        candidate //= 2
    return candidate


def picture_bytes(config: RunConfig, spec: EnvSpec) -> int:
    """The pictures (uint8 RGB) of one observation."""
    sizes = [spec.cameras[name] for name in config.model.cameras]
    return sum(3 * height * width for height, width in sizes)


def observation_bytes(config: RunConfig, spec: EnvSpec, samples_per_step: int) -> int:
    """Pictures and states (float32) that all ranks keep from rollout to update."""
    return samples_per_step * (picture_bytes(config, spec) + 4 * spec.state_dim)


def _sum(parts: Parts, unit: int) -> str:
    total = f"{sum(parts.values()) / unit:.1f}"
    terms = " + ".join(f"{name} {size / unit:.1f}" for name, size in parts.items())
    return f"{total} ({terms})" if len(parts) > 1 else f"{total} ({terms.rpartition(' ')[0]})"
