"""Ranks that exchange trajectories and weights: `python exchange_ranks.py ROOT`."""

from pathlib import Path

import pytest
import torch
from forked_ranks import everywhere, main, scenario
from torch import nn

from vlactl.api.contracts import MicroBatch, PolicyOutput
from vlactl.config.run import OptimConfig
from vlactl.distributed.exchange import Weights, sum_gradients, to_actors
from vlactl.distributed.offload import Discarded, HostCopy
from vlactl.distributed.roles import World
from vlactl.distributed.sharding import InitialValues, local, shard, whole
from vlactl.errors import TrainingError
from vlactl.train.guards import Mismatch
from vlactl.train.optim import guarded_step, make_optimizer

SEPARATE = {"env": (0, 1), "rollout": (2,), "actor": (3, 4)}
HYBRID = {"env": (0,), "rollout": (1, 2), "actor": (0, 1, 2)}
MAIN_IS_ACTOR = {"env": (2,), "rollout": (2,), "actor": (0, 1)}
CONTAINED = {"env": (0,), "rollout": (1, 2), "actor": (1,)}


class Policy:
    """What sharding needs of one."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5, bias=False))

    def shard_units(self) -> list[nn.Module]:
        return [self.module[0], self.module[2]]

    def trainable(self):
        return self.module.named_parameters()


@scenario(everywhere(1), everywhere(3), SEPARATE, HYBRID, MAIN_IS_ACTOR)
def every_group_reaches_its_actor(world: World, _root: Path) -> None:
    players = world.env.ranks
    everything = {group: ("trajectories of", group, b"x" * group * 1000) for group in range(11)}
    mine = {g: value for g, value in everything.items() if players[g % len(players)] == world.rank}
    held = []
    arrived = to_actors(dict(mine), world, lambda parcel: held.append(parcel) or parcel)
    assert len(held) == len(arrived.keys() - mine.keys())  # what was here already is not kept anew
    wanted = {}
    if world.actors.is_member:
        number = world.actors.size
        wanted = {g: v for g, v in everything.items() if g % number == world.actors.index}
    assert arrived == wanted
    mine.pop(0, None)  # a group that was dropped
    again = to_actors(dict(mine), world, lambda parcel: parcel)
    assert again.keys() == wanted.keys() - {0}


def weights(world: World, *, sharded: bool) -> tuple[Weights, Policy | None, Policy | None]:
    actor = copy_ = None
    if world.actors.is_member:
        actor = Policy()
        if sharded:
            shard(actor, world.meshes["actor"], master_weights=False)
    if world.rollout.is_member and (sharded or actor is None):
        copy_ = Policy()
        with torch.no_grad():
            for _, parameter in copy_.trainable():
                parameter.fill_(7.0)
    exchange = Weights(
        list(actor.trainable()) if actor else None,
        list(copy_.trainable()) if copy_ else None,
        torch.float32,
        world,
    )
    return exchange, actor, copy_


@scenario(SEPARATE, HYBRID, CONTAINED, everywhere(2))
def copies_become_what_was_trained(world: World, _root: Path) -> None:
    for sharded in (True, False):
        exchange, actor, copy_ = weights(world, sharded=sharded)
        for version in range(2):
            exchange.publish(version)
            exchange.check()
            expected = Policy().module
            with torch.no_grad():
                for parameter in expected.parameters():
                    parameter.add_(float(version))
            for name, parameter in expected.named_parameters() if copy_ else ():
                assert torch.equal(dict(copy_.trainable())[name], parameter), (sharded, name)
            assert exchange.version == version
            if actor:
                with torch.no_grad():
                    for _, parameter in actor.trainable():
                        local(parameter).add_(1.0)


@scenario(SEPARATE, HYBRID)
def a_copy_that_differs_is_found(world: World, _root: Path) -> None:
    """Row 25: on all ranks, by name."""
    exchange, _, copy_ = weights(world, sharded=True)
    exchange.publish(0)
    if world.rollout.is_member and world.rollout.is_first:
        with torch.no_grad():
            copy_.module[2].weight[1, 1] += 1e-6
    if world.actors.is_member or world.rollout.is_member:
        with pytest.raises(TrainingError, match=r"weights of rank \d are not those.*\n*"):
            exchange.check()
    else:
        exchange.check()


@scenario(everywhere(2))
def replicas_that_drift_apart_are_found(world: World, _root: Path) -> None:
    exchange, actor, _ = weights(world, sharded=False)
    exchange.publish(0)
    exchange.check()
    with torch.no_grad():
        actor.module[0].weight[0, 0] += world.rank
    with pytest.raises(TrainingError, match=r"such as 0\.weight"):
        exchange.check()


@scenario(SEPARATE)
def ranks_that_mean_other_weights_say_so(world: World, _root: Path) -> None:
    """A dropped name: nothing is sent in its place."""
    exchange, _, copy_ = weights(world, sharded=False)
    if copy_ is not None:
        exchange._copy = exchange._copy[:-1]
    if world.receivers.is_member:
        with pytest.raises(TrainingError, match="disagree about the weights"):
            exchange.publish(0)


@scenario(everywhere(2))
def one_rank_with_a_gradient_that_is_not_finite_stops_all(world: World, _root: Path) -> None:
    """Row 23: sharded or not, no rank updates anything."""
    for sharded in (True, False):
        policy = Policy()
        if sharded:
            shard(policy, world.meshes["actor"], master_weights=False)
        optimizer = make_optimizer(policy.trainable(), OptimConfig(lr=0.1))
        before = [local(p.detach()).clone() for _, p in policy.trainable()]
        loss = policy.module(torch.ones(2, 3)).sum() * (float("inf") if world.rank == 1 else 1.0)
        loss.backward()
        if not sharded:
            sum_gradients([p for _, p in policy.trainable()], world.actors)
        total = world.actors.sum_named({"loss": loss})["loss"]
        skipped = guarded_step(optimizer, total, clip_grad=1.0, on_nonfinite="skip")
        assert skipped is None
        after = [local(p.detach()) for _, p in policy.trainable()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def moved_on() -> None:
    """Nobody follows."""


@scenario(everywhere(2))
def what_is_in_host_memory_comes_back(world: World, _root: Path) -> None:
    """Wrappers and optimizers keep working on the same tensors."""
    plain, moved = Policy(), Policy()
    results = []
    for policy, moves in ((plain, False), (moved, True)):
        shard(policy, world.meshes["actor"], master_weights=False)
        optimizer = make_optimizer(policy.trainable(), OptimConfig(lr=0.1))
        shards = HostCopy(lambda policy=policy: (p for _, p in policy.trainable()), moved_on)
        state = HostCopy(
            lambda optimizer=optimizer: (
                value for tensors in optimizer.state.values() for value in tensors.values()
            ),
            moved_on,
        )
        for turn in range(3):
            policy.module(torch.full((2, 3), turn + world.rank + 1.0)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if moves:
                for part in (state, shards):
                    part.to_host()
                assert all(
                    local(p.detach()).untyped_storage().nbytes() == 0 for _, p in policy.trainable()
                )
                for part in (state, shards):
                    part.fetch()
                    part.wait()
        results.append([whole(p.detach()) for _, p in policy.trainable()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    tensor = torch.arange(5.0)
    lent = Discarded([tensor])
    lent.free()
    assert tensor.untyped_storage().nbytes() == 0
    lent.allocate()
    assert tensor.copy_(torch.ones(5)).sum() == 5


@scenario(everywhere(2))
def initial_values_can_be_put_in_place(world: World, _root: Path) -> None:
    policy = Policy()
    expected = policy.module(torch.ones(1, 3)).detach()
    shard(policy, world.meshes["actor"], master_weights=False)
    initial = InitialValues(policy)
    with torch.no_grad():
        policy.module(torch.ones(1, 3))  # leaves gathered parameters behind
        for _, parameter in policy.trainable():
            local(parameter).add_(1.0)
        with initial.in_place():
            assert torch.allclose(policy.module(torch.ones(1, 3)), expected)
        assert not torch.allclose(policy.module(torch.ones(1, 3)), expected)


@scenario(everywhere(2))
def a_mismatch_on_one_rank_stops_all(world: World, _root: Path) -> None:
    """Row 24: what acted was another function than what is trained."""
    logprobs = torch.full((4, 2, 3), -1.0)
    judged = MicroBatch(
        old_logprobs_SKA=logprobs - 2.0 * world.rank,
        advantages_SK=torch.ones(4, 2),
        mask_SK=torch.ones(4, 2, dtype=torch.bool),
        weights_SK=torch.ones(4, 2),
    )
    mismatch = Mismatch(limit=0.1)
    mismatch.add(PolicyOutput(logprobs_SKA=logprobs, entropy_SKA=logprobs), judged)
    with pytest.raises(TrainingError, match=r"a KL of 2\.19 per token"):
        mismatch.close(world.actors)  # (e^2 - 1 - 2) / 2
    nothing = Mismatch(limit=0.1)
    nothing.close(world.actors)  # an update whose samples all are of older weights
    spoiled = Mismatch(limit=0.1)
    spoiled.add(PolicyOutput(logprobs_SKA=logprobs * float("nan"), entropy_SKA=logprobs), judged)
    spoiled.close(world.actors)  # `guarded_step` decides about what is not finite
    assert nothing.metrics == spoiled.metrics == {}


if __name__ == "__main__":
    main()
