"""What moves between ranks: gradients, trajectories and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from vlactl.distributed import messages
from vlactl.distributed.messages import Tag
from vlactl.distributed.roles import Ranks, World
from vlactl.distributed.sharding import whole
from vlactl.errors import TrainingError

BUCKET_ELEMENTS = 2**26
_CHECKED_ELEMENTS = 2**22
"""At a time: a checksum takes 24 bytes for each."""

Named = Sequence[tuple[str, nn.Parameter]]


# --------------------------------------------------------------------------------------------
# Gradients
# --------------------------------------------------------------------------------------------
def sum_gradients(parameters: Sequence[nn.Parameter], actors: Ranks) -> None:
    """Add up the gradients of replicated parameters in place, in float32 buckets.

    A parameter without gradient on this rank counts as zero, since it may have one elsewhere.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if actors.group is None:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    for part in _buckets(gradients):
        flat = torch.cat([gradient.float().reshape(-1) for gradient in part])
        sums = actors.sum(flat).split([gradient.numel() for gradient in part])
        for gradient, summed in zip(part, sums, strict=True):
            gradient.copy_(summed.view_as(gradient))


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(member.numel() for member in bucket) >= BUCKET_ELEMENTS:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


# --------------------------------------------------------------------------------------------
# Trajectories
# --------------------------------------------------------------------------------------------
def to_actors(parcels: dict[int, Any], world: World, keep: Callable[[Any], Any]) -> dict[int, Any]:
    """Give the parcel of every group to the actor that trains on it: `group % number of actors`.

    Called on every rank. Ranks send to the one `d` places on and receive from the one `d` places
    back, for every `d`, one parcel at a time: what is on the way never fills the memory, and no two
    ranks can wait for each other.

    Args:
        parcels: by group; those that are sent are taken out of it.
        world: the ranks.
        keep: what is to be made of each parcel that arrives, before the next one does.

    Returns:
        What this rank's actor has now, by group.
    """
    owners = world.actors.ranks
    mine = world.everyone.rank
    leaving: dict[int, list[int]] = {}
    for group in sorted(parcels):
        leaving.setdefault(owners[group % len(owners)], []).append(group)
    counts = world.everyone.gather({to: len(groups) for to, groups in leaving.items()})
    arrived = {group: parcels.pop(group) for group in leaving.get(mine, ())}
    size = world.everyone.size
    for distance in range(1, size):
        outgoing = leaving.get((mine + distance) % size, [])
        source = (mine - distance) % size
        num_incoming = counts[source].get(mine, 0)
        to = (mine + distance) % size
        for group, parcel in _swap(parcels, outgoing, to, num_incoming, source, world):
            arrived[group] = keep(parcel)
    return arrived


def _swap(
    parcels: dict[int, Any],
    outgoing: Sequence[int],
    to: int,
    num_incoming: int,
    source: int,
    world: World,
) -> Iterator[tuple[int, Any]]:
    """Send groups to one rank and receive as many as there are from another, one by one."""
    for turn in range(max(len(outgoing), num_incoming)):
        sending = None
        if turn < len(outgoing):
            parcel = (outgoing[turn], parcels.pop(outgoing[turn]))
            sending = messages.send(parcel, to, Tag.PARCEL, world.messages)
        if turn < num_incoming:
            _, received = messages.receive(Tag.PARCEL, world.messages, source)
            yield received
        if sending is not None:
            sending.wait()


# --------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------
def _nothing() -> None:
    """Progress that nobody follows."""


class Weights:
    """The actors' trained weights, and the copies of them that act elsewhere.

    Where a rank acts with the very parameters that it trains nothing moves. Other copies are filled
    from the actors: every actor gathers a tensor from its shards, keeps it where it has a copy of
    its own, and the first one sends it to the rollout ranks that are no actors.

    Args:
        actor: what this rank trains; None where it is no actor.
        copy: what this rank acts with, where that is something else than `actor`.
        dtype: of the copies.
        world: the ranks.
        progress: called after every part that was moved.

    `version` counts the updates that the acting weights have seen.
    """

    def __init__(
        self,
        actor: Named | None,
        copy: Named | None,
        dtype: torch.dtype,
        world: World,
        progress: Callable[[], None] = _nothing,
    ) -> None:
        self._actor, self._copy, self._dtype, self._world = actor, copy, dtype, world
        self._progress = progress
        self._moves = world.everyone.any(copy is not None)
        # A copy beside what is trained is given up after every use.
        self._always_moves = world.everyone.any(copy is not None and actor is not None)
        self.version = -1

    def publish(self, version: int) -> None:
        """Bring the acting weights to the actors' version. Called on every rank.

        Raises:
            TrainingError: the ranks do not have the same weights to exchange.
        """
        if version == self.version and not self._always_moves:
            return
        if self._moves and (self._actor is not None or self._copy is not None):
            self._agree(version)
            for start, stop in self._parts():
                self._move(start, stop)
                self._progress()
        self.version = version

    def check(self) -> None:
        """Compare checksums of everything that should be equal. Called on every rank.

        Raises:
            TrainingError: a copy, or one of several replicas, differs from the first actor's.
        """
        mine = self._checksums()
        for rank, held in enumerate(self._world.everyone.gather(mine)):
            for others in held if mine else ():
                _compare(mine[0], others, rank, self._world.everyone.rank)

    def _agree(self, version: int) -> None:
        """Sender and receivers must mean the same tensors and the same version."""
        if not self._world.receivers.is_member:
            return
        tensors = self._actor or self._copy or ()
        said = self._world.receivers.gather((version, [(n, tuple(p.shape)) for n, p in tensors]))
        if any(other != said[0] for other in said):
            raise TrainingError("the ranks disagree about the weights that move between them")

    def _parts(self) -> Iterator[tuple[int, int]]:
        """Ranges of tensors that travel together."""
        sizes = [p.numel() for _, p in (self._actor or self._copy or ())]
        start = total = 0
        for index, size in enumerate(sizes):
            total += size
            if total >= BUCKET_ELEMENTS or index + 1 == len(sizes):
                yield start, index + 1
                start, total = index + 1, 0

    def _move(self, start: int, stop: int) -> None:
        gathered: list[torch.Tensor] = []
        if self._actor is not None:
            gathered = [whole(p.detach().to(self._dtype)) for _, p in self._actor[start:stop]]
        receivers = self._world.receivers
        if receivers.is_member and receivers.size > 1:
            gathered = self._broadcast(gathered, start, stop)
        if self._copy is not None:
            for (_, parameter), tensor in zip(self._copy[start:stop], gathered, strict=True):
                parameter.data.copy_(tensor)

    def _broadcast(self, sent: list[torch.Tensor], start: int, stop: int) -> list[torch.Tensor]:
        tensors = sent or [p for _, p in (self._copy or ())[start:stop]]
        sizes = [tensor.numel() for tensor in tensors]
        if sent:
            flat = torch.cat([tensor.reshape(-1) for tensor in sent])
        else:
            flat = torch.empty(sum(sizes), dtype=self._dtype, device=self._world.device)
        with self._world.everyone.waiting():
            sender = self._world.actors.ranks[0]
            dist.broadcast(flat, sender, group=self._world.receivers.group)
        parts = zip(flat.split(sizes), tensors, strict=True)
        return [part.view_as(tensor) for part, tensor in parts]

    def _checksums(self) -> list[dict[str, int]]:
        """Of what this rank trains, as it would be sent, and of its copy. Called by all actors."""
        held = [tensors for tensors in (self._actor, self._copy) if tensors is not None]
        return [
            {name: _checksum(whole(p.detach().to(self._dtype))) for name, p in tensors}
            for tensors in held
        ]


def _checksum(tensor: torch.Tensor) -> int:
    """Sum of the bits of all numbers, weighted so that an exchange of two of them shows."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    total = 0
    for part in tensor.contiguous().view(kind).flatten().split(_CHECKED_ELEMENTS):
        places = torch.arange(part.numel(), device=part.device) % 65521 + 1
        total = 31 * total + int((part.long() * places).sum())
    return total


def _compare(mine: dict[str, int], others: dict[str, int], rank: int, own_rank: int) -> None:
    different = sorted(n for n in mine.keys() | others.keys() if mine.get(n) != others.get(n))
    if different:
        raise TrainingError(
            f"{len(different)} weights of rank {rank} are not those of rank {own_rank}, such as "
            f"{different[0]}",
            hint="this is a bug or broken memory: resume from the last checkpoint",
        )
