"""A plan as lines for a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlactl.launch.layout import ROLES, Layout, form_of
from vlactl.launch.placement import join_ranges
from vlactl.launch.torchrun import torchrun_command

if TYPE_CHECKING:
    from vlactl.launch.plan import Plan


def describe(plan: Plan, run_dir: Path) -> list[str]:
    """The plan as lines for a person."""
    command = torchrun_command(plan.world_size // plan.nodes, run_dir, "train")
    lines = [
        *(("ranks", line) for line in _ranks(plan)),
        ("per step", _batches(plan)),
        (
            "episode",
            f"{plan.max_episode_steps} control steps = {plan.chunks_per_episode} chunks of "
            f"{plan.chunk_length} actions;  inference in batches of {plan.inference_batch_size}",
        ),
        *(("memory", line) for line in plan.memory),
        *(("moves", line) for line in _moves(plan)),
        *(("time", line) for line in plan.seconds),
        ("run dir", str(run_dir)),
        ("command", " ".join(command)),
        ("env", "  ".join(f"{name}={value}" for name, value in plan.environment.items())),
        *(("note", note) for note in plan.notes),
        *(("blocked", blocker) for blocker in plan.blockers),
    ]
    return [f"{label:<9} {text}" for label, text in lines]


def _ranks(plan: Plan) -> Iterator[str]:
    """Ranks of each role; where that is not all, also what each kind of rank does, and where."""
    roles = "   ".join(f"{role} {_members(plan.roles[role])}" for role in ROLES)
    machines = "" if plan.nodes == 1 else f", {plan.nodes} machines"
    form = f"{form_of(plan.roles)} on {plan.device}{machines}"
    yield f"{roles} ({plan.slots_per_env_rank} simulators each)   {form}"
    layout = Layout(roles=plan.roles, devices=plan.devices, nodes=plan.nodes)
    if form_of(plan.roles) == "shared" and plan.devices == tuple(range(plan.world_size)):
        return
    for played, ranks in layout.kinds().items():
        yield f"{join_ranges(ranks)} on {_places(layout, ranks)}: {' + '.join(played)}"


def _members(ranks: Sequence[int]) -> str:
    each = len(ranks) // len(set(ranks))
    return join_ranges(ranks) if each == 1 else f"{join_ranges(ranks)} x {each}"


def _places(layout: Layout, ranks: list[int]) -> str:
    """Devices, and machines where there are several."""
    devices = _named("device", {layout.devices[rank] for rank in ranks})
    if layout.nodes == 1:
        return devices
    return f"{devices} of {_named('node', {rank // layout.ranks_per_node for rank in ranks})}"


def _named(noun: str, numbers: set[int]) -> str:
    return f"{noun}{'s' if len(numbers) > 1 else ''} {join_ranges(numbers)}"


def _batches(plan: Plan) -> str:
    micro = f" in {count(plan.micro_batches)} micro-batches on each actor" * bool(
        plan.micro_batches
    )
    return (
        f"{_trajectories(plan)};  {count(plan.samples_per_step)} samples;  "
        f"{plan.optimizer_steps} optimizer steps of {count(plan.global_batch_size)}{micro}"
    )


def _trajectories(plan: Plan) -> str:
    trajectories = f"{count(plan.episodes_per_step)} trajectories"
    if plan.group_size == 1:
        return trajectories
    return f"{trajectories} = {count(plan.num_groups)} groups x {plan.group_size}"


def _moves(plan: Plan) -> Iterator[str]:
    if plan.sharded:
        actors = len(plan.roles["actor"])
        shared = "weights, gradients and optimizer"
        yield (
            f"{shared} are shared by {actors} actors (FSDP2)"
            if actors > 1
            else ("the optimizer works on float32 weights (FSDP2 on one actor)")
        )
    if plan.offload:
        yield f"in host memory while episodes are played: {' and '.join(plan.offload)}"


def count(number: int) -> str:
    """Digits in groups of three from 10 000 on."""
    return f"{number:,}".replace(",", " ") if number >= 10_000 else str(number)
