"""Objects sent from one rank to another, over the CPU.

They are pickled: sender and receiver are the same program of the same job.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

from vlactl.distributed.roles import Ranks


class Tag(IntEnum):
    """What a message is about; messages of one tag between two ranks keep their order."""

    REQUEST = 1
    REPLY = 2
    PARCEL = 3


@dataclass(frozen=True, slots=True)
class Sending:
    """A message on its way; its memory is in use until `wait` returns."""

    parts: tuple[torch.Tensor, ...]
    works: tuple[dist.Work, ...]
    ranks: Ranks

    def wait(self) -> None:
        """Until the message has left."""
        with self.ranks.waiting():
            for work in self.works:
                work.wait()


def send(value: Any, to: int, tag: Tag, ranks: Ranks) -> Sending:
    """Begin to send an object to a rank, which has to `receive` it."""
    content = torch.frombuffer(bytearray(pickle.dumps(value, protocol=5)), dtype=torch.uint8)
    parts = (torch.tensor([content.numel()]), content)
    works = tuple(dist.isend(part, to, ranks.group, tag) for part in parts)
    assert all(works), "this rank is no member of the group"
    return Sending(parts, works, ranks)  # type: ignore[arg-type]


def receive(tag: Tag, ranks: Ranks, source: int | None = None) -> tuple[int, Any]:
    """Wait for a message of a rank, or of any; returns who sent it, and the object."""
    size = torch.zeros(1, dtype=torch.int64)
    with ranks.waiting():
        sender = dist.recv(size, source, ranks.group, tag)
        content = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(content, sender, ranks.group, tag)
    return sender, pickle.loads(content.numpy().data)  # noqa: S301 - written by this job
