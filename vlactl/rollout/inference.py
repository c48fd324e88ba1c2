"""Who computes actions for a collector: this rank's policy, or other ranks'.

A call says which version of the weights it is meant for. Calls are answered in the order in which
they were made.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from vlactl.api.contracts import ActionChunks, Greedy, ObservationBatch, Policy, Sample
from vlactl.distributed import messages
from vlactl.distributed.messages import Sending, Tag
from vlactl.distributed.roles import Ranks, World
from vlactl.errors import TrainingError
from vlactl.launch.routing import routes


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One inference call: B observations, how to choose, a noise key per row, whose weights."""

    batch: ObservationBatch
    mode: Sample | Greedy
    noise_keys: Sequence[int]
    version: int


class Inference(Protocol):
    """Computes actions; at most `capacity` calls may be under way."""

    capacity: int

    def submit(self, query: Query) -> None:
        """Begin a call."""

    def take(self) -> ActionChunks:
        """Wait for the oldest call."""

    def finish(self) -> None:
        """No further call will come in this rollout, and none is under way."""


class LocalInference:
    """Calls this rank's policy; in a thread, where several calls may be under way.

    Args:
        policy: computes.
        version: of its weights.
        capacity: calls that may be under way.
    """

    def __init__(self, policy: Policy, version: Callable[[], int], capacity: int) -> None:
        self.capacity = capacity
        self._policy, self._version = policy, version
        self._answers: deque[Future[ActionChunks]] = deque()
        self._thread = ThreadPoolExecutor(1) if capacity > 1 else None

    def submit(self, query: Query) -> None:
        """Begin a call."""
        if self._thread is not None:
            self._answers.append(self._thread.submit(self.answer, query))
            return
        done: Future[ActionChunks] = Future()
        done.set_result(self.answer(query))
        self._answers.append(done)

    def take(self) -> ActionChunks:
        """Wait for the oldest call."""
        return self._answers.popleft().result()

    def finish(self) -> None:
        """Nothing to tell anybody."""

    def answer(self, query: Query) -> ActionChunks:
        """Compute now.

        Raises:
            TrainingError: the weights here are not those that the query is meant for.
        """
        if query.version != self._version():
            raise TrainingError(
                f"stale weights: version {self._version()} is here, {query.version} was asked for"
            )
        return self._policy.act(query.batch, query.mode, query.noise_keys)


class RemoteInference:
    """Calls the policies of other ranks, in turn.

    Args:
        servers: their ranks.
        capacity: calls that may be under way.
        ranks: that exchange messages.
    """

    def __init__(self, servers: Sequence[int], capacity: int, ranks: Ranks) -> None:
        self.capacity = max(capacity, len(servers))
        self._servers, self._ranks = deque(servers), ranks
        self._calls: deque[tuple[int, Sending]] = deque()

    def submit(self, query: Query) -> None:
        """Begin a call."""
        server = self._servers[0]
        self._servers.rotate(-1)
        self._calls.append((server, messages.send(query, server, Tag.REQUEST, self._ranks)))

    def take(self) -> ActionChunks:
        """Wait for the oldest call."""
        server, call = self._calls.popleft()
        call.wait()
        answer: ActionChunks
        _, answer = messages.receive(Tag.REPLY, self._ranks, server)
        return answer

    def finish(self) -> None:
        """Tell the servers."""
        for server in self._servers:
            messages.send(None, server, Tag.REQUEST, self._ranks).wait()


def serve(
    inference: LocalInference, clients: Sequence[int], ranks: Ranks, progress: Callable[[], None]
) -> None:
    """Answer the calls of other ranks until all of them have finished.

    Args:
        inference: computes.
        clients: the other ranks.
        ranks: that exchange messages.
        progress: called after every answer.
    """
    open_clients = set(clients)
    replies: deque[Sending] = deque()
    while open_clients:
        client, query = messages.receive(Tag.REQUEST, ranks)
        if query is None:
            open_clients.remove(client)
            continue
        replies.append(messages.send(inference.answer(query), client, Tag.REPLY, ranks))
        progress()
        if len(replies) > len(clients):
            replies.popleft().wait()
    for reply in replies:
        reply.wait()


def servers_of(world: World) -> dict[int, list[int]]:
    """Which rollout ranks serve each env rank, where these are not the same ranks."""
    env, rollout = world.env.ranks, world.rollout.ranks
    shares = routes(math.lcm(len(env), len(rollout)), len(env), len(rollout))
    return {
        rank: [rollout[server] for server, _ in share]
        for rank, share in zip(env, shares, strict=True)
    }
