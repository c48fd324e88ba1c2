"""The process group, which rank plays which role, and what ranks tell each other.

A role is a set of ranks with a device mesh. All groups are created once, here, on every rank in the
same order. Every member of a group reaches every collective on every path.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

# Ranks that have played their episodes wait for the others, who may have hours of work left. A hang
# is found by the supervisor, through heartbeats; a rank that dies breaks its connections at once.
COLLECTIVE_TIMEOUT = timedelta(hours=12)

Waiting = Callable[[], AbstractContextManager[None]]
"""A block in which this rank waits for others, and is not to be taken for hung."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Some ranks of the job; implements `vlactl.api.contracts.Reduce` over them.

    Attributes:
        ranks: members, ascending, as numbered in the job.
        rank: this process.
        group: of the members; None where this process is alone or no member.
        waiting: entered while this rank waits for other members.
    """

    ranks: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup | None
    waiting: Waiting = nullcontext

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.ranks)

    @property
    def is_member(self) -> bool:
        """Whether this rank is one of them."""
        return self.rank in self.ranks

    @property
    def is_first(self) -> bool:
        """Whether this rank does what one of them has to do."""
        return self.rank == self.ranks[0]

    @property
    def index(self) -> int:
        """Of this rank among the members.

        Raises:
            ValueError: it is no member.
        """
        return self.ranks.index(self.rank)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over members, as a new tensor."""
        total = value.detach().clone()
        if self.group is not None:
            with self.waiting():
                dist.all_reduce(total, group=self.group)
        return total

    def sum_named(self, values: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Sums over members by name; a member may lack names that others have."""
        totals: dict[str, float] = {}
        for of_rank in self.gather({name: float(value) for name, value in values.items()}):
            for name, value in of_rank.items():
                totals[name] = totals.get(name, 0.0) + value
        return totals

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any member; all members agree."""
        return bool(self.sum(torch.tensor(float(flag))).item())

    def gather(self, value: Any) -> list[Any]:
        """The values of all members, in order of rank, on every member."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        with self.waiting():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        """Wait for all members."""
        self.gather(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This rank's place among all ranks.

    Attributes:
        rank: this process.
        device: what it computes on.
        everyone: all ranks; rank 0 plans, logs and writes what exists once.
        env: ranks that own simulators.
        rollout: ranks whose policy acts.
        actors: ranks that update the policy.
        players: those of `env` and `rollout`.
        receivers: the first actor, and the rollout ranks that are no actors: it sends them weights.
        messages: as `everyone`, for messages from one rank to another, on the CPU.
        saving: as `actors`, for the thread that writes checkpoints; on the CPU.
        meshes: one-dimensional device mesh of each role: "env", "rollout", "actor".
    """

    rank: int
    device: torch.device
    everyone: Ranks
    env: Ranks
    rollout: Ranks
    actors: Ranks
    players: Ranks
    receivers: Ranks
    messages: Ranks
    saving: Ranks
    meshes: Mapping[str, DeviceMesh]

    @property
    def is_main(self) -> bool:
        """Rank 0 plans, logs and writes what exists once."""
        return self.rank == 0

    @classmethod
    def alone(cls, device: torch.device) -> World:
        """One process that plays every role, without a process group."""
        me = Ranks(ranks=(0,), rank=0, group=None)
        sets = (
            "everyone", "env", "rollout", "actors", "players", "receivers", "messages", "saving",
        )  # fmt: skip
        return cls(rank=0, device=device, meshes={}, **dict.fromkeys(sets, me))


def start_world(
    roles: Mapping[str, Sequence[int]], device: torch.device, waiting: Waiting = nullcontext
) -> World:
    """Join the process group that torchrun's variables describe.

    Args:
        roles: ranks of "env", "rollout" and "actor"; a rank may be repeated.
        device: of this rank.
        waiting: see `Ranks`.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    make = _RanksFactory(rank, size, waiting)
    meshes = _meshes(roles, device.type)
    by_role = {role: make.of(roles[role]) for role in meshes}
    return World(
        rank=rank,
        device=device,
        everyone=make.of(range(size)),
        env=by_role["env"],
        rollout=by_role["rollout"],
        actors=by_role["actor"],
        players=make.of([*roles["env"], *roles["rollout"]]),
        receivers=make.of([roles["actor"][0], *(set(roles["rollout"]) - set(roles["actor"]))]),
        messages=make.fresh(range(size), backend="gloo"),
        saving=make.fresh(roles["actor"], backend="gloo"),
        meshes=meshes,
    )


def leave_world() -> None:
    """Destroy the process group; without collectives, since peers may be gone."""
    if dist.is_initialized():
        dist.destroy_process_group()


class _RanksFactory:
    """Makes groups, one for every set of ranks, in the same order on every rank."""

    def __init__(self, rank: int, size: int, waiting: Waiting) -> None:
        self._rank, self._size, self._waiting = rank, size, waiting
        self._made: dict[tuple[int, ...], Ranks] = {}

    def of(self, ranks: Sequence[int]) -> Ranks:
        members = tuple(sorted(set(ranks)))
        if members not in self._made:
            self._made[members] = self.fresh(members)
        return self._made[members]

    def fresh(self, ranks: Sequence[int], backend: str | None = None) -> Ranks:
        members = tuple(sorted(set(ranks)))
        group = None
        if len(members) > 1:
            made = dist.new_group(list(members), timeout=COLLECTIVE_TIMEOUT, backend=backend)
            group = made if isinstance(made, dist.ProcessGroup) else None  # else no member
        return Ranks(ranks=members, rank=self._rank, group=group, waiting=self._waiting)


def _meshes(roles: Mapping[str, Sequence[int]], device_type: str) -> dict[str, DeviceMesh]:
    """A mesh per role; roles on the same ranks share one."""
    made: dict[tuple[int, ...], DeviceMesh] = {}
    meshes = {}
    for role in ("env", "rollout", "actor"):
        members = tuple(sorted(set(roles[role])))
        if members not in made:
            made[members] = DeviceMesh(device_type, list(members), mesh_dim_names=(role,))
        meshes[role] = made[members]
    return meshes
