"""Sharding a policy over the actor ranks with FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from vlactl.api.contracts import Policy


def shard(policy: Policy, mesh: DeviceMesh, *, master_weights: bool) -> None:
    """Share parameters, gradients and optimizer of a policy among the ranks of a mesh.

    Gradients are summed over ranks, not averaged: the loss of a step adds up over them.

    Args:
        policy: whose parameters all have the dtype that it computes in.
        mesh: one-dimensional.
        master_weights: keep the shards in float32, and sum gradients in it.
    """
    dtype = next(policy.module.parameters()).dtype
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if dtype == torch.float32:
        precision = MixedPrecisionPolicy()
    for part in (*policy.shard_units(), policy.module):
        fully_shard(part, mesh=mesh, mp_policy=precision)
    if master_weights and dtype != torch.float32:
        policy.module.float()
    for unit in _units(policy.module):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no other


class InitialValues:
    """What a sharded policy's parameters were at first, for the KL to that policy."""

    def __init__(self, policy: Policy) -> None:
        self._module = policy.module
        self._current = [parameter for _, parameter in policy.trainable()]
        self._initial = [local(parameter.detach()).clone() for parameter in self._current]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Exchange present and initial values for a while."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for unit in _units(self._module):
            unit.reshard()
        for parameter, other in zip(self._current, self._initial, strict=True):
            present = local(parameter)
            kept = present.clone()
            present.copy_(other)
            other.copy_(kept)


def _units(module: nn.Module) -> Iterator[FSDPModule]:
    return (unit for unit in module.modules() if isinstance(unit, FSDPModule))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, which is all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor put together from all shards; every rank that has one must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(part: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A tensor of which this rank has `part`, sharded as another one of the same shape is."""
    if not isinstance(other, DTensor):
        return part
    return DTensor.from_local(
        part,
        other.device_mesh,
        other.placements,
        run_check=False,
        shape=other.shape,
        stride=other.stride(),
    )
