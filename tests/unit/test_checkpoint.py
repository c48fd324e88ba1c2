"""Checkpoints: complete or not there, never executed, and without effect on the training."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from vlactl.config.run import OptimConfig
from vlactl.distributed.roles import World
from vlactl.errors import IntegrityError
from vlactl.hub.manifest import MANIFEST, list_checkpoints, newest_checkpoint, write_manifest
from vlactl.train.checkpoint import load_checkpoint, save_checkpoint
from vlactl.train.optim import learning_rates, make_optimizer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
WORLD = World.alone(torch.device("cpu"))


def make(width: int = 3):
    torch.manual_seed(0)
    module = nn.Linear(2, width)
    return module, make_optimizer(module.named_parameters(), OptimConfig(lr=0.1))


def step(module, optimizer) -> None:
    module(torch.ones(4, 2)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(run_dir: Path, number: int, parts, keep: int = 2) -> Path:
    return save_checkpoint(run_dir, number, *parts, WORLD, keep=keep)


@pytest.mark.parametrize("steps_before", [0, 1])
def test_saving_and_loading_change_nothing(tmp_path, steps_before):
    plain, saved, loaded = make(), make(), make()
    for parts in (plain, saved):
        for _ in range(steps_before):
            step(*parts)
    path = save(tmp_path, 1, saved)
    assert load_checkpoint(path, *loaded) == 1
    for parts in (plain, saved, loaded):
        step(*parts)
        step(*parts)
        assert torch.equal(parts[0].weight, plain[0].weight)


def test_the_newest_complete_one_counts_and_damage_is_named(tmp_path):
    parts = make()
    paths = [save(tmp_path, number, parts) for number in (1, 2, 3)]
    assert [number for number, _ in list_checkpoints(tmp_path)] == [2, 3]
    (shard,) = paths[2].glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:-1])
    newest, skipped = newest_checkpoint(tmp_path)
    assert newest == paths[1]
    assert "damaged" in skipped[0]
    with pytest.raises(IntegrityError, match="damaged"):
        load_checkpoint(paths[2], *parts)
    assert save(tmp_path, 3, parts) == paths[2]
    assert newest_checkpoint(tmp_path) == (paths[2], [])


@pytest.mark.parametrize("text", ["", "[]", '{"files": 3}', '{"files": {"x": 1}}'])
def test_manifests_of_any_shape_are_refused_as_incomplete(tmp_path, text):
    path = save(tmp_path, 1, make())
    (path / MANIFEST).write_text(text)
    newest, skipped = newest_checkpoint(tmp_path)
    assert newest is None
    assert len(skipped) == 1


def test_an_unfinished_directory_is_no_checkpoint(tmp_path):
    save(tmp_path, 1, make())
    (tmp_path / "checkpoints" / "step-000009.tmp").mkdir()
    (tmp_path / "checkpoints" / "step-000010").mkdir()
    newest, skipped = newest_checkpoint(tmp_path)
    assert newest.name == "step-000001"
    assert len(skipped) == 1


def test_another_model_is_named_before_anything_is_read(tmp_path):
    path = save(tmp_path, 1, make())
    with pytest.raises(IntegrityError, match=r"bias: stored \(3,\), wanted \(5,\)"):
        load_checkpoint(path, *make(width=5))


def test_another_format_is_refused(tmp_path):
    path = save(tmp_path, 1, make())
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"format": 99, "vlactl": "7.0"}))
    with pytest.raises(IntegrityError, match="format 99") as error:
        load_checkpoint(path, *make())
    assert "7.0" in error.value.hint


def replace_metadata(path: Path, content: bytes) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).unlink()
    (path / ".metadata").write_bytes(content)
    write_manifest(path, {key: manifest[key] for key in ("format", "step", "vlactl")})


@pytest.mark.parametrize("module", [b"pathlib", b"pathlib._local"])
def test_paths_of_all_python_versions_are_read(tmp_path, module):
    """Python 3.13 alone pickles paths as `pathlib._local.PosixPath`."""
    path = save(tmp_path, 1, make())
    metadata = pickle.loads((path / ".metadata").read_bytes())
    written = pickle.dumps(metadata, protocol=2)  # names classes as lines of text
    spelled, number = re.subn(rb"cpathlib[.\w]*\nPosixPath", b"c%s\nPosixPath" % module, written)
    assert number == 1
    replace_metadata(path, spelled)
    assert load_checkpoint(path, *make()) == 1


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_metadata_from_elsewhere_is_not_executed(tmp_path):
    path = save(tmp_path, 1, make())
    replace_metadata(path, pickle.dumps(Bomb(tmp_path / "executed")))
    with pytest.raises(IntegrityError, match=r"posix\.mkdir is not allowed"):
        load_checkpoint(path, *make())
    assert not (tmp_path / "executed").exists()


def make_adapted(frozen: float):
    """A frozen layer of the given value, and one that is trained."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 64), nn.Linear(64, 2))
    nn.init.constant_(module[0].weight, frozen)
    module[0].requires_grad_(False)
    trained = ((name, p) for name, p in module.named_parameters() if p.requires_grad)
    return module, make_optimizer(trained, OptimConfig(lr=0.1))


def test_only_what_is_trained_is_stored_where_that_is_asked_for(tmp_path):
    saved, loaded, plain = make_adapted(1.0), make_adapted(1.0), make_adapted(1.0)
    step(*saved)
    step(*plain)
    path = save_checkpoint(tmp_path, 1, *saved, WORLD, keep=1, trained_only=True)
    assert load_checkpoint(path, *loaded) == 1
    assert loaded[0][0].weight.unique().tolist() == [1.0]
    assert torch.equal(loaded[0][1].weight, saved[0][1].weight)
    for parts in (plain, loaded):
        step(*parts)
        assert torch.equal(parts[0][1].weight, plain[0][1].weight)
    other, _ = make_adapted(3.0)
    with pytest.raises(IntegrityError, match="holds adapters of another model: 1 frozen weights"):
        load_checkpoint(path, other)
    alone, _ = make_adapted(1.0)
    load_checkpoint(path, alone)
    assert torch.equal(alone[1].weight, saved[0][1].weight)
    whole = save_checkpoint(tmp_path / "whole", 1, *saved, WORLD, keep=1)
    sizes = [sum(f.stat().st_size for f in folder.iterdir()) for folder in (path, whole)]
    assert sizes[0] < sizes[1]


def test_the_value_head_has_a_rate_of_its_own():
    named = {"a.weight": nn.Parameter(torch.ones(1)), "value_head.b": nn.Parameter(torch.ones(1))}
    optimizer = make_optimizer(named.items(), OptimConfig(lr=0.1, value_lr=0.3))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert [rates[id(p)] for p in named.values()] == [0.1, 0.3]
    assert learning_rates(optimizer, is_warmup=False) == {"actor/lr": 0.1, "critic/lr": 0.3}
    assert learning_rates(optimizer, is_warmup=True) == {"actor/lr": 0.0, "critic/lr": 0.3}
