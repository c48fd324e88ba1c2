"""How long a step takes: arithmetic on a plan and on rates. Imports no torch.

An upper bound in two respects: every episode is taken to last to its horizon, and every sample to
be trained on. A lower bound in others: nothing is lost in waiting for the slowest rank, and traffic
of FSDP hides behind computation as far as it fits there. Messages between env and rollout ranks,
advantages and logging are not counted.

    rollout     the longer of: waves of episodes, each chunk simulated and then waiting for one
                inference call; all inference calls of a rollout rank, one after the other
    update      micro-batches of an actor, each the longer of its computation and the traffic of
                sharded weights; then the optimizer, and the sum of gradients that are not sharded
    weights     from actors to the ranks that act
    offload     to the host and back
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vlactl.api.plugins import Footprint
from vlactl.config.run import RunConfig
from vlactl.launch.layout import Layout
from vlactl.launch.memory import BYTES, PolicyMemory, has_master_weights, policy_memory
from vlactl.launch.rates import Rates

if TYPE_CHECKING:
    from vlactl.launch.plan import Plan

HOP_SECONDS = 5e-6
"""From one rank to the next in a ring; supposed."""
_COLLECTIVES = 3
"""Of a unit and micro-batch."""
BOUNDS = "at most: episodes to their horizon, all samples trained on"


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Seconds of a step.

    Attributes:
        phases: "rollout", "update", "weights", "offload".
        reasons: what decides the first two.
        overlapped: the update runs during the rollout.
    """

    phases: Mapping[str, float]
    reasons: Mapping[str, str]
    overlapped: bool

    @property
    def total(self) -> float:
        """Of the whole step."""
        both = (self.phases["rollout"], self.phases["update"])
        rest = sum(self.phases.values()) - sum(both)
        return rest + (max(both) if self.overlapped else sum(both))

    @property
    def limit(self) -> str:
        """The longest phase, and why."""
        phase = max(self.phases, key=lambda name: self.phases[name])
        reason = self.reasons.get(phase)
        return f"{phase}: {reason}" if reason else phase

    def describe(self) -> str:
        """One line."""
        join = " | " if self.overlapped else " + "
        shown = {name: size for name, size in self.phases.items() if size >= _SHOWN}
        terms = join.join(f"{name} {readable_seconds(size)}" for name, size in shown.items())
        return f"{readable_seconds(self.total)} = {terms}; limited by {self.limit}"


_SHOWN = 0.05


def estimate(plan: Plan, config: RunConfig, footprint: Footprint, rates: Rates) -> Estimate:
    """Seconds per phase of the plan's step."""
    layout = Layout(roles=plan.roles, devices=plan.devices, nodes=plan.nodes)
    rates = _shared(rates, plan, layout)
    policy = policy_memory(config, footprint, len(set(plan.roles["actor"])))
    bandwidth = rates.within if plan.nodes == 1 else rates.between
    rollout, rollout_reason = _rollout(plan, layout, rates)
    update, update_reason = _update(plan, config, footprint, rates, bandwidth)
    moved = sum(int(getattr(policy, name)) for name in plan.offload)
    return Estimate(
        phases={
            "rollout": rollout,
            "update": update,
            "weights": _sync_bytes(plan, config, footprint, policy) / bandwidth,
            "offload": 2 * moved / rates.copy,
        },
        reasons={"rollout": rollout_reason, "update": update_reason},
        overlapped=config.train.staleness > 0,
    )


def _shared(rates: Rates, plan: Plan, layout: Layout) -> Rates:
    """CPU ranks share the cores that were measured with."""
    if plan.device == "cuda":
        return rates
    ranks = layout.ranks_per_node
    return replace(
        rates,
        inference=ranks * rates.inference,
        update=ranks * rates.update,
        optimizer=ranks * rates.optimizer,
    )


def _rollout(plan: Plan, layout: Layout, rates: Rates) -> tuple[float, str]:
    processes, rollouts = len(plan.roles["env"]), len(plan.roles["rollout"])
    episodes = math.ceil(plan.episodes_per_step / processes)
    busy = min(plan.slots_per_env_rank, episodes)
    cores = plan.threads_per_rank * layout.ranks_per_node
    crowding = max(1.0, busy * layout.most_per_node("env") / cores)
    call = rates.inference * plan.inference_batch_size
    chunk = plan.chunk_length / rates.simulator * crowding
    waves = math.ceil(episodes / plan.slots_per_env_rank) * plan.chunks_per_episode
    playing = waves * (chunk + call)
    rows = max(1, min(plan.inference_batch_size, busy * processes // rollouts))
    acting = plan.samples_per_step / rollouts / rows * call
    if acting > playing:
        return acting, "inference"
    return playing, "simulators" if chunk > call else "latency of inference calls"


def _update(
    plan: Plan, config: RunConfig, footprint: Footprint, rates: Rates, bandwidth: float
) -> tuple[float, str]:
    actors = len(set(plan.roles["actor"]))
    others = (actors - 1) / actors
    steps = plan.optimizer_steps
    samples = plan.global_batch_size / actors
    trained = 4 if has_master_weights(config) else BYTES[config.train.dtype]
    optimizer = rates.optimizer * footprint.trainable / (actors if plan.sharded else 1)
    computing = samples * rates.update
    if plan.sharded:
        # Weights are gathered for the forward and the backward pass, gradients are scattered.
        each = footprint.parameters * (2 * BYTES[config.train.dtype] + trained) * others
        units = math.ceil(footprint.parameters / (footprint.largest_unit or footprint.parameters))
        hops = _COLLECTIVES * units * (actors - 1) * HOP_SECONDS
        traffic = plan.micro_batches * (each / bandwidth + hops)
        seconds = steps * (max(computing, traffic) + optimizer)
    else:
        traffic = 2 * footprint.trainable * trained * others / bandwidth
        seconds = steps * (computing + traffic + optimizer)
    costs = {
        "forward and backward passes": computing,
        "traffic of weights and gradients": traffic,
        "the optimizer": optimizer,
    }
    return seconds, max(costs, key=lambda name: costs[name])


def _sync_bytes(plan: Plan, config: RunConfig, footprint: Footprint, policy: PolicyMemory) -> int:
    """What the ranks that act have to be given before each rollout."""
    if plan.sharded:
        return policy.whole
    apart = set(plan.roles["rollout"]) - set(plan.roles["actor"])
    return footprint.trainable * BYTES[config.train.dtype] if apart else 0


def readable_seconds(seconds: float) -> str:
    """For people: 8.3 s, 42 s, 3 min 20 s, 1 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
