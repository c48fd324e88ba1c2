"""What a rank holds of the policy, and when it holds it where.

The actors' state (weights, optimizer) and the copy that acts may be too much for one device at the
same time. `ActingWeights.begin` and `end` enclose a block in which policies act: before it the
copy is filled, after it what the update needs is back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from vlactl.api.contracts import Policy, TrainBatch
from vlactl.distributed.exchange import Weights
from vlactl.distributed.offload import Discarded, HostCopy
from vlactl.distributed.sharding import InitialValues


@dataclass(slots=True, kw_only=True)
class Actor:
    """The policy that is trained, on one actor rank.

    Attributes:
        policy: its parameters are sharded, or replicated on all actors.
        optimizer: of `policy.trainable()`.
        is_sharded: every forward and backward pass is a collective of all actors.
        initial: values before the first update, where a sharded policy is held near them.
    """

    policy: Policy
    optimizer: torch.optim.Optimizer
    is_sharded: bool
    initial: InitialValues | None = None

    @torch.no_grad()
    def reference_logprobs(self, batch: TrainBatch) -> torch.Tensor:
        """Log-probabilities [S, K, A] under the initial policy."""
        if self.initial is None:
            return self.policy.reference_logprobs(batch)
        with self.initial.in_place():
            return self.policy.evaluate_actions(batch).logprobs_SKA

    def optimizer_tensors(self) -> Iterator[torch.Tensor]:
        """The optimizer's state of every parameter."""
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))

    def weights(self) -> Iterator[torch.Tensor]:
        """What is trained."""
        return (parameter for _, parameter in self.policy.trainable())


Part = Literal["optimizer", "weights"]


@dataclass(slots=True, kw_only=True)
class ActingWeights:
    """The weights that act, kept up to date, and memory that is lent to them.

    Attributes:
        exchange: fills copies from the actors.
        copy: this rank's copy, where it acts with other parameters than it trains.
        actor: None on a rank that does not train.
        offload: what of the actor's state moves to host memory meanwhile.
        progress: called again and again while something moves.
    """

    exchange: Weights
    copy: Policy | None
    actor: Actor | None
    offload: Sequence[Part]
    progress: Callable[[], None]
    _lent: dict[Part, HostCopy] = field(default_factory=dict, init=False)
    _discarded: Discarded | None = field(default=None, init=False)
    _seconds: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.actor is None:
            return
        tensors = {"optimizer": self.actor.optimizer_tensors, "weights": self.actor.weights}
        self._lent = {part: HostCopy(tensors[part], self.progress) for part in self.offload}
        if self.copy is not None:
            self._discarded = Discarded(parameter for _, parameter in self.copy.trainable())
            self._discarded.free()

    def begin(self, version: int, *, check: bool) -> None:
        """Make room, and bring the acting weights to a version. Called on every rank.

        Args:
            version: updates that the actors' weights have seen.
            check: compare the weights of all ranks; the first time they always are.
        """
        self._move("optimizer")
        if self._discarded is not None:
            self._discarded.allocate()
        is_first = self.exchange.version < 0
        self.exchange.publish(version)
        if check or is_first:
            self.exchange.check()
        self._move("weights")

    def end(self) -> None:
        """Begin to bring back what the update needs; `wait` before it is used."""
        if self._discarded is not None:
            self._discarded.free()
        start = time.perf_counter()
        for part in self._lent.values():
            part.fetch()
        self._add(start)

    def wait(self) -> None:
        """Until the actor's state is in place."""
        start = time.perf_counter()
        for part in self._lent.values():
            part.wait()
        self._add(start)

    def seconds(self) -> dict[str, float]:
        """Spent on moving the actor's state since this was asked last."""
        spent, self._seconds = self._seconds, {}
        return spent

    def _move(self, part: Part) -> None:
        if part in self._lent:
            start = time.perf_counter()
            self._lent[part].to_host()
            self._add(start)

    def _add(self, start: float) -> None:
        if self._lent:
            passed = time.perf_counter() - start
            self._seconds["offload"] = self._seconds.get("offload", 0.0) + passed
