"""Checkpoints: complete or not there, never executed, and without effect on the training."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from vlactl.config.run import CheckpointConfig, OptimConfig
from vlactl.distributed.roles import World
from vlactl.errors import IntegrityError
from vlactl.hub import manifest as manifests
from vlactl.hub.manifest import (
    MANIFEST,
    is_complete,
    list_checkpoints,
    newest_checkpoint,
    step_name,
    write_manifest,
)
from vlactl.train import saving as saving_module
from vlactl.train.checkpoint import load_checkpoint, weights_hash
from vlactl.train.optim import FINAL_LR, learning_rates, make_optimizer, set_learning_rates
from vlactl.train.saving import STATE, Checkpoints

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


def checkpoints(run_dir: Path, parts, *, trained_only: bool = False, **config) -> Checkpoints:
    options = CheckpointConfig(**{"keep": 2, **config})
    return Checkpoints(run_dir, *parts, WORLD, options, trained_only=trained_only)


def save(run_dir: Path, number: int, parts, **options) -> Path:
    checkpoints(run_dir, parts, **options).save(number, now=True)
    return run_dir / "checkpoints" / step_name(number)


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
    save(tmp_path, 3, parts)
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
    other = make(width=5)
    before = other[0].weight.detach().clone()
    with pytest.raises(IntegrityError, match=r"bias: stored \(3,\), wanted \(5,\)") as refused:
        load_checkpoint(path, *other)
    assert "6 of its tensors differ" in refused.value.message  # two, and two moments of each
    assert torch.equal(other[0].weight, before)


def test_missing_and_unexpected_tensors_are_listed_and_none_is_loaded(tmp_path):
    module = nn.ModuleDict({"both": nn.Linear(2, 3, bias=False), "old": nn.Linear(2, 3)})
    path = save(tmp_path, 1, (module, make_optimizer(module.named_parameters(), OptimConfig())))
    other = nn.ModuleDict({"both": nn.Linear(2, 3, bias=False), "new": nn.Linear(2, 3, bias=False)})
    before = other["both"].weight.detach().clone()
    with pytest.raises(IntegrityError) as refused:
        load_checkpoint(path, other)
    lines = refused.value.message.splitlines()[1:]
    assert lines == [
        "model.new.weight: missing",
        "model.old.bias: unexpected",
        "model.old.weight: unexpected",
    ]
    assert torch.equal(other["both"].weight, before)
    optimizer = make_optimizer(other.named_parameters(), OptimConfig())
    with pytest.raises(IntegrityError, match=r"optimizer\.state\.new\.weight\.exp_avg: missing"):
        load_checkpoint(path, other, optimizer)


def test_another_format_is_refused(tmp_path):
    path = save(tmp_path, 1, make())
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"format": 99, "vlactl": "7.0"}))
    with pytest.raises(IntegrityError, match="format 99, not 1") as error:
        load_checkpoint(path, *make())
    assert "by vlactl 7.0, and this is vlactl 0." in error.value.hint


# --------------------------------------------------------------------------------------------
# Damage
# --------------------------------------------------------------------------------------------
def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", STATE])
def test_damage_is_passed_over_and_refused_by_name(tmp_path, damage, file):
    """Row 29."""
    good, bad = (save(tmp_path, number, make()) for number in (1, 2))
    damage(bad / file)
    newest, (reason,) = newest_checkpoint(tmp_path)
    assert newest == good
    assert file in reason
    with pytest.raises(IntegrityError, match=file) as refused:
        load_checkpoint(bad, *make())
    assert refused.value.exit_code == 5


@pytest.mark.parametrize("number", [2, 3])
def test_a_bit_in_a_large_file_is_seen_by_who_reads_it(tmp_path, monkeypatch, caplog, number):
    """What looks complete from outside is passed over, does not count, and is replaced."""
    parts = make()
    good, bad = save(tmp_path, 1, parts), save(tmp_path, number, parts)
    flip_a_bit(bad / "__0_0.distcp")
    monkeypatch.setattr(manifests, "HASHED_BYTES", 1)
    assert newest_checkpoint(tmp_path) == (bad, [])
    with pytest.raises(IntegrityError, match=r"__0_0\.distcp is damaged"):
        load_checkpoint(bad, *parts)
    resumed = checkpoints(tmp_path, parts, keep=1)
    assert resumed.resume() == 1
    assert "checkpoint passed over" in caplog.text
    resumed.save(1, now=True)  # there already
    assert [path for _, path in list_checkpoints(tmp_path)] == [good, bad]
    resumed.save(2, now=True)
    ((_, newest),) = list_checkpoints(tmp_path)
    assert load_checkpoint(newest, *parts) == 2


def test_nothing_intact_is_no_new_start(tmp_path):
    assert checkpoints(tmp_path, make()).resume() == 0
    truncate(save(tmp_path, 1, make()) / "__0_0.distcp")
    with pytest.raises(IntegrityError, match="no checkpoint of this run is complete"):
        checkpoints(tmp_path, make()).resume()


def test_manifests_without_hashes_of_large_files_are_read(tmp_path):
    """As earlier versions wrote them."""
    path = save(tmp_path, 1, make())
    manifest = json.loads((path / MANIFEST).read_text())
    size = manifests.HASHED_BYTES + 1
    with (path / "large").open("wb") as file:
        file.truncate(size)
    manifest["files"]["large"] = {"size": size}
    (path / MANIFEST).write_text(json.dumps(manifest))
    assert load_checkpoint(path, *make()) == 1


# --------------------------------------------------------------------------------------------
# Order, retention and what is written
# --------------------------------------------------------------------------------------------
def test_order_is_by_step_and_not_by_time(tmp_path):
    """Row 49."""
    parts = make()
    paths = {n: save(tmp_path, n, parts, keep=9) for n in (2, 10, 999_999, 1_000_000)}
    for age, path in enumerate(paths.values()):
        os.utime(path, (10**9 - age, 10**9 - age))
    assert [number for number, _ in list_checkpoints(tmp_path)] == [2, 10, 999_999, 1_000_000]
    assert newest_checkpoint(tmp_path) == (paths[1_000_000], [])


def test_only_complete_checkpoints_count_for_retention(tmp_path):
    parts = make()
    first, second, third = (save(tmp_path, number, parts, keep=3) for number in (1, 2, 3))
    truncate(second / ".metadata")
    (tmp_path / "checkpoints" / "step-000009.tmp").mkdir()
    fourth = save(tmp_path, 4, parts, keep=3)
    assert [path for _, path in list_checkpoints(tmp_path)] == [first, third, fourth]
    assert not list(tmp_path.glob("checkpoints/*.tmp"))


def test_the_one_resumed_from_stays_until_a_newer_one_is_complete(tmp_path):
    old = save(tmp_path, 1, make())
    resumed = checkpoints(tmp_path, make(), keep=1)
    resumed.resume()
    resumed.save(2)
    resumed._writing.wait()
    assert is_complete(old)
    assert len(list_checkpoints(tmp_path)) == 1
    resumed.finish()
    assert [number for number, _ in list_checkpoints(tmp_path)] == [2]


def test_state_says_why_it_was_written(tmp_path):
    saving = checkpoints(tmp_path, make())
    saving.save(1)
    saving.save(2, status="preempted", now=True)
    found = [json.loads((path / STATE).read_text()) for _, path in list_checkpoints(tmp_path)]
    assert found == [{"step": 1, "status": "running"}, {"step": 2, "status": "preempted"}]


# --------------------------------------------------------------------------------------------
# In the background
# --------------------------------------------------------------------------------------------
def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.glob("*.distcp")}


def test_the_background_writes_what_the_foreground_would(tmp_path):
    """Byte by byte, although training goes on, in place, before the first byte is written."""
    parts, gate = make(), threading.Event()
    step(*parts)
    expected = contents(save(tmp_path / "foreground", 1, parts))
    saving = checkpoints(tmp_path / "background", parts)
    with held_back(gate):
        saving.save(1)
        saving.poll()
        step(*parts)
        assert not list_checkpoints(tmp_path / "background")
        gate.set()
        saving.finish()
    ((_, path),) = list_checkpoints(tmp_path / "background")
    assert contents(path) == expected
    saving.save(2, now=True)
    assert contents(path.with_name(step_name(2))) != expected


@contextmanager
def held_back(gate: threading.Event):
    """Threads that write shards wait for the gate."""
    with pytest.MonkeyPatch.context() as patch:
        write = saving_module.write_shards
        patch.setattr(saving_module, "write_shards", lambda *a: (gate.wait(60), write(*a)))
        yield


def test_poll_completes_what_is_written(tmp_path):
    saving = checkpoints(tmp_path, make())
    saving.poll()
    saving.save(1)
    saving._writing.wait()
    assert not list_checkpoints(tmp_path)
    saving.poll()
    assert [number for number, _ in list_checkpoints(tmp_path)] == [1]
    saving.poll()
    saving.finish()


def test_a_save_waits_for_the_previous_one(tmp_path):
    saving = checkpoints(tmp_path, make())
    for number in (1, 2):
        saving.save(number)
    assert [number for number, _ in list_checkpoints(tmp_path)] == [1]
    saving.finish()
    assert [number for number, _ in list_checkpoints(tmp_path)] == [1, 2]


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
    path = save(tmp_path, 1, saved, trained_only=True)
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
    whole = save(tmp_path / "whole", 1, saved)
    sizes = [sum(f.stat().st_size for f in folder.iterdir()) for folder in (path, whole)]
    assert sizes[0] < sizes[1]


def test_the_value_head_has_a_rate_of_its_own():
    named = {"a.weight": nn.Parameter(torch.ones(1)), "value_head.b": nn.Parameter(torch.ones(1))}
    optimizer = make_optimizer(named.items(), OptimConfig(lr=0.1, value_lr=0.3))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert [rates[id(p)] for p in named.values()] == [0.1, 0.3]
    assert learning_rates(optimizer, is_warmup=False) == {"actor/lr": 0.1, "critic/lr": 0.3}
    assert learning_rates(optimizer, is_warmup=True) == {"actor/lr": 0.0, "critic/lr": 0.3}


def test_rates_may_fall_along_half_a_cosine():
    named = {"a.weight": nn.Parameter(torch.ones(1)), "value_head.b": nn.Parameter(torch.ones(1))}
    config = OptimConfig(lr=0.1, value_lr=0.3, decay_steps=10)
    optimizer = make_optimizer(named.items(), config)
    seen = []
    for step in range(14):
        set_learning_rates(optimizer, config, step)
        seen.append(learning_rates(optimizer, is_warmup=False))
        assert seen[-1]["critic/lr"] == pytest.approx(3 * seen[-1]["actor/lr"])
    rates = [rate["actor/lr"] for rate in seen]
    assert rates[0] == 0.1
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[:11]))
    assert rates[5] == pytest.approx(0.1 * (1 + FINAL_LR) / 2), "half way down"
    assert rates[10:] == pytest.approx([0.1 * FINAL_LR] * 4), "and stay there"
    set_learning_rates(optimizer, OptimConfig(lr=0.1, value_lr=0.3), 9)
    assert learning_rates(optimizer, is_warmup=False)["actor/lr"] == 0.1, "they stay by default"


def test_the_hash_of_weights_is_of_every_bit_and_of_nothing_else():
    def hashed(dtype: torch.dtype = torch.float32, change: float = 0.0) -> str:
        module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(dtype)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(0.5)
            module[0].weight[1, 2] += change
            module[0].weight.data = module[0].weight.data.T.contiguous().T  # laid out otherwise
        return weights_hash(module)

    assert hashed() == hashed()
    hashes = {
        hashed(),
        hashed(torch.bfloat16),
        hashed(change=2.0**-24),
        hashed(torch.bfloat16, change=2.0**-7),
    }
    assert len(hashes) == 4
    assert all(re.fullmatch("[0-9a-f]{64}", each) for each in hashes)
