"""Ranks that save and load checkpoints: `python checkpoint_ranks.py ROOT`.

Imports torch once and forks the ranks of each scenario, which join a process group over gloo. Later
scenarios go on with what earlier ones have left. Writes one line of JSON per scenario: its name and
the traceback of every rank that failed.
"""

import contextlib
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked_ranks import PATIENCE, everywhere, main, scenario
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vlactl.config.run import CheckpointConfig, OptimConfig
from vlactl.distributed.roles import World
from vlactl.errors import IntegrityError
from vlactl.hub.manifest import (
    CHECKPOINTS,
    MANIFEST,
    list_checkpoints,
    newest_checkpoint,
    step_name,
    write_manifest,
)
from vlactl.train import saving
from vlactl.train.checkpoint import checkpoint_state, load_checkpoint
from vlactl.train.optim import make_optimizer
from vlactl.train.saving import Checkpoints

KILLED = -signal.SIGKILL

Parts = tuple[nn.Module, torch.optim.Optimizer] | tuple[None, None]


def make(world: World, *, sharded: bool = True) -> Parts:
    """Seven rows and three: no number of ranks divides them."""
    if not world.actors.is_member:
        return None, None
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    if sharded:
        for layer in (module[0], module[2], module):
            fully_shard(layer, mesh=world.meshes["actor"])
    return module, make_optimizer(module.named_parameters(), OptimConfig(lr=0.1))


def train(parts: Parts, first: int, last: int) -> None:
    """Steps with the same numbers on all ranks, so that their mean is exact."""
    module, optimizer = parts
    if module is None or optimizer is None:
        return
    for step in range(first, last):
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        module(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def checkpoints(run_dir: Path, parts: Parts, world: World, **config) -> Checkpoints:
    return Checkpoints(run_dir, *parts, world, CheckpointConfig(**config), trained_only=False)


def whole(parts: Parts) -> dict[str, torch.Tensor]:
    """All tensors, gathered, by name."""
    module, optimizer = parts
    if module is None:
        return {}
    found = checkpoint_state(module, optimizer, trained_only=False)
    named = {f"model.{name}": tensor for name, tensor in found["model"].items()}
    for name, tensors in found["optimizer"]["state"].items():
        named |= {f"{name}.{kind}": tensor for kind, tensor in tensors.items()}
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t.detach()).clone()
        for name, t in named.items()
    }


def same(parts: Parts, file: Path) -> None:
    expected, found = torch.load(file), whole(parts)
    if not found:
        return
    assert found.keys() == expected.keys()
    assert len(found) == 16
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def fails_together(world: World, text: str, action: Callable[[], object]) -> None:
    """All ranks get the same error, with the exit code of damaged files."""
    with pytest.raises(IntegrityError) as raised:
        action()
    assert text in raised.value.message
    assert raised.value.exit_code == 5
    messages = world.everyone.gather(raised.value.message)
    assert len(set(messages)) == 1, messages


# --------------------------------------------------------------------------------------------
# Other placements
# --------------------------------------------------------------------------------------------
@scenario(everywhere(2))
def two_shards_are_saved_while_training_goes_on(world: World, root: Path) -> None:
    run, parts = root / "two", make(world)
    saved = checkpoints(run, parts, world)
    assert saved.resume() == 0
    train(parts, 0, 3)
    torch.save(whole(parts), root / f"after-3-{world.rank}")
    assert isinstance(next(iter(parts[0].parameters())), DTensor)
    saved.save(3)
    for step in range(3, 5):
        train(parts, step, step + 1)
        saved.poll()
    deadline = time.monotonic() + PATIENCE
    while not world.everyone.any(bool(list_checkpoints(run))) and time.monotonic() < deadline:
        saved.poll()
        time.sleep(0.01)
    torch.save(whole(parts), root / f"after-5-{world.rank}")
    assert {"__0_0.distcp", "__1_0.distcp"} < {
        path.name for path in newest_checkpoint(run)[0].iterdir()
    }


@scenario(everywhere(2))
def the_same_placement_goes_on_exactly(world: World, root: Path) -> None:
    parts = make(world)
    assert checkpoints(root / "two", parts, world).resume() == 3
    same(parts, root / "after-3-0")
    train(parts, 3, 5)
    same(parts, root / "after-5-0")


@scenario(everywhere(4), everywhere(1))
def other_numbers_of_shards_go_on(world: World, root: Path) -> None:
    parts = make(world)
    assert checkpoints(root / "two", parts, world).resume() == 3
    same(parts, root / "after-3-0")
    checkpoints(root / f"from-{world.actors.size}", parts, world).save(3, now=True)
    train(parts, 3, 5)
    same(parts, root / "after-5-0")


@scenario(everywhere(2))
def shards_become_replicas(world: World, root: Path) -> None:
    parts = make(world, sharded=False)
    assert checkpoints(root / "from-4", parts, world).resume() == 3
    same(parts, root / "after-3-0")
    checkpoints(root / "replicas", parts, world).save(3, now=True)
    train(parts, 3, 5)
    same(parts, root / "after-5-0")


@scenario(everywhere(4), everywhere(2))
def replicas_become_shards(world: World, root: Path) -> None:
    parts = make(world)
    assert checkpoints(root / "replicas", parts, world).resume() == 3
    same(parts, root / "after-3-0")


@scenario(
    {"env": [0], "rollout": [0], "actor": [1, 2]},
    {"env": [0], "rollout": [0], "actor": [1]},
)
def the_main_rank_need_not_be_an_actor(world: World, root: Path) -> None:
    for sharded in (True, False):
        run, parts = root / f"apart-{world.actors.size}-{sharded}", make(world, sharded=sharded)
        assert checkpoints(root / "two", parts, world).resume() == 3
        saved = checkpoints(run, parts, world)
        saved.save(3)
        train(parts, 3, 5)
        saved.finish()
        again = make(world, sharded=not sharded)
        assert checkpoints(run, again, world).resume() == 3
        same(again, root / "after-3-0")


@scenario(everywhere(2))
def gathered_parameters_are_saved_as_shards(world: World, root: Path) -> None:
    """A forward pass alone leaves the root's parameters gathered."""
    run, parts = root / "gathered", make(world)
    checkpoints(root / "two", parts, world).resume()
    with torch.no_grad():
        parts[0](torch.zeros(1, 5))
    checkpoints(run, parts, world).save(3, now=True)
    again = make(world)
    checkpoints(run, again, world).resume()
    same(again, root / "after-3-0")


@scenario(everywhere(2))
def adapters_beside_sharded_weights(world: World, root: Path) -> None:
    def make_adapted(frozen: float) -> Parts:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 2))
        nn.init.constant_(module[0].weight, frozen)
        module[0].requires_grad_(False)
        fully_shard(module[0], mesh=world.meshes["actor"])
        trained = module[1].named_parameters(prefix="1")
        return module, make_optimizer(trained, OptimConfig(lr=0.1))

    def saved(frozen: float) -> Checkpoints:
        parts, config = make_adapted(frozen), CheckpointConfig()
        return Checkpoints(root / "adapters", *parts, world, config, trained_only=True)

    saved(1.0).save(1, now=True)
    assert saved(1.0).resume() == 1
    fails_together(world, "adapters of another model: 1 frozen", saved(3.0).resume)


# --------------------------------------------------------------------------------------------
# Faults
# --------------------------------------------------------------------------------------------
@contextlib.contextmanager
def no_room_for_files(of_rank: int, world: World):
    """The system lets one rank write no file of more than 1 kB: as a full disk of its host."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == of_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@scenario(everywhere(2))
def a_write_that_fails_on_one_rank_fails_on_both(world: World, root: Path) -> None:
    """Rows 23 and 28: nothing looks complete, the old one stays, and training goes on."""
    run, parts = root / "half-full", make(world)
    saved = checkpoints(run, parts, world, max_failures=2)
    saved.save(1, now=True)

    def save_without_room(number: int, *, now: bool = False) -> None:
        with no_room_for_files(1, world):
            saved.save(number, now=now)
            train(parts, number, number + 1)
            saved.finish()

    for number in (2, 3):
        save_without_room(number)
        world.everyone.barrier()
        assert [path.name for path in (run / CHECKPOINTS).iterdir()] == [step_name(1)]
    fails_together(world, "3 in a row failed", lambda: save_without_room(4))
    fails_together(world, "actor 1: OSError: [Errno 27]", lambda: save_without_room(5, now=True))
    saved.save(6, now=True)
    save_without_room(7)
    world.everyone.barrier()
    assert newest_checkpoint(run)[0].name == step_name(6)


@scenario(everywhere(2))
def what_fails_before_writing_fails_on_both(world: World, root: Path) -> None:
    run, parts = root / "unstaged", make(world)
    saved = checkpoints(run, parts, world)
    stage = saving.stage
    if world.rank == 1:
        saving.stage = lambda *_: [][0]
    saved.save(1)
    world.everyone.barrier()
    assert not list((run / CHECKPOINTS).iterdir())
    saving.stage = stage
    saved.save(2, now=True)
    assert newest_checkpoint(run)[0].name == step_name(2)


@scenario(everywhere(2))
def a_bad_shard_is_bad_for_both(world: World, root: Path) -> None:
    """Rows 29 and 30: also when only one rank would have read it."""
    run, parts = root / "damaged", make(world)
    saved = checkpoints(run, parts, world)
    for number in (1, 2):
        saved.save(number, now=True)
    bad = run / CHECKPOINTS / step_name(2)
    if world.is_main:
        shard = bad / "__1_0.distcp"
        shard.write_bytes(shard.read_bytes()[:-200])
    world.everyone.barrier()
    fails_together(
        world,
        "__1_0.distcp is damaged",
        lambda: load_checkpoint(bad, *parts, group=world.actors),
    )
    assert checkpoints(run, make(world), world).resume() == 1
    if world.is_main:  # written by who meant it: only reading shows that it is no shard
        header = json.loads((bad / MANIFEST).read_text())
        write_manifest(bad, header)
    world.everyone.barrier()
    fails_together(
        world,
        "step-000002 cannot be read",
        lambda: load_checkpoint(bad, *make(world), group=world.actors),
    )
    fails_together(world, "cannot be read", checkpoints(run, make(world), world).resume)


@scenario(everywhere(2))
def ranks_that_see_other_directories_say_so(world: World, root: Path) -> None:
    run = root / ("damaged" if world.rank else "two")
    with pytest.raises(IntegrityError, match="ranks see different checkpoints"):
        checkpoints(run, make(world), world).resume()


@scenario(everywhere(2))
def a_rank_dies_while_both_are_writing(world: World, root: Path) -> None:
    """The other one leaves, although a thread of its waits for the dead one."""
    saved = checkpoints(root / "two", make(world), world)
    assert saved.resume() == 3
    write = saving.write_shards
    if world.rank == 1:
        saving.write_shards = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    else:
        saving.write_shards = lambda *arguments: (time.sleep(0.3), write(*arguments))
    saved.save(9)
    saved.finish()


if __name__ == "__main__":
    main()
