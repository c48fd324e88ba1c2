"""The process group, which rank plays which role, and what ranks tell each other.

Groups are created once, here. Every member of a group reaches every collective on every path.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# Ranks that have played their episodes wait for the others, who may have hours of work left. A hang
# is found by the supervisor, through heartbeats; a rank that dies breaks its connections at once.
COLLECTIVE_TIMEOUT = timedelta(hours=12)
BUCKET_ELEMENTS = 2**26


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This rank's place among all ranks.

    In the shared placement, the only one built so far, every rank plays every role and one mesh
    serves
    all of them. Implements `vlactl.api.contracts.Reduce` over the actor ranks.
    """

    rank: int
    size: int
    device: torch.device
    actors: DeviceMesh

    @property
    def is_main(self) -> bool:
        """Rank 0 plans, logs and writes what exists once."""
        return self.rank == 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over actor ranks, as a new tensor."""
        total = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(total, group=self.actors.get_group())
        return total

    def sum_named(self, values: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Sums over ranks by name; a rank may lack names that others have."""
        totals: dict[str, float] = {}
        for of_rank in self.gather({name: float(value) for name, value in values.items()}):
            for name, value in of_rank.items():
                totals[name] = totals.get(name, 0.0) + value
        return totals

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank; all ranks agree."""
        raised = torch.tensor(float(flag), device=self.device)
        return bool(self.sum(raised).item())

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order of rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


def start_world(device_type: str) -> World:
    """Join the process group that torchrun's variables describe.

    Args:
        device_type: "cpu" or "cuda".
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    mesh = init_device_mesh(device_type, (size,), mesh_dim_names=("actor",))
    return World(rank=rank, size=size, device=device, actors=mesh)


def leave_world() -> None:
    """Destroy the process group; without collectives, since peers may be gone."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_gradients(parameters: Sequence[torch.nn.Parameter], world: World) -> None:
    """Add up gradients over actor ranks in place, in float32 buckets.

    A parameter without gradient on this rank counts as zero, since it may have one elsewhere.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if world.size == 1:
        return
    for gradients in _buckets([p.grad for p in parameters if p.grad is not None]):
        flat = torch.cat([gradient.float().reshape(-1) for gradient in gradients])
        dist.all_reduce(flat, group=world.actors.get_group())
        sums = flat.split([gradient.numel() for gradient in gradients])
        for gradient, summed in zip(gradients, sums, strict=True):
            gradient.copy_(summed.view_as(gradient))


def _buckets(gradients: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for gradient in gradients:
        bucket.append(gradient)
        if sum(member.numel() for member in bucket) >= BUCKET_ELEMENTS:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
