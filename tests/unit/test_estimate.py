"""Seconds of a step: sums that can be done by hand, and rates that are kept in a file."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from vlactl.config.compose import compose
from vlactl.config.run import RunConfig
from vlactl.launch import rates as rates_of
from vlactl.launch.estimate import Estimate, estimate, readable_seconds
from vlactl.launch.hardware import GIB, Hardware, suppose_gpus
from vlactl.launch.plan import Plan, make_plan, model_footprint, size_key
from vlactl.launch.rates import PUBLISHED, Rates, environment_key, published, store

# 64 episodes = 8 groups x 8, 4 chunks of 4 actions each, 4 simulators, 2 optimizer steps of 128
TOY = (
    *("env.num_envs=4", "env.max_episode_steps=16", "model.chunk_length=4"),
    *("algorithm.group_size=8", "rollout.episodes_per_step=64"),
    *("optim.global_batch_size=128", "optim.update_epochs=1", "rollout.batch_size=4"),
)
RATES = Rates(simulator=2.0, inference=0.01, update=0.25, optimizer=0.0, source="made up")
CPU = Hardware(cores=16, ram_bytes=64 * GIB, cpu="some CPU")


def toy(*overrides: str) -> RunConfig:
    return compose("toy_grpo", [*TOY, *overrides]).config


def planned(config: RunConfig, gpus: int, nodes: int = 1) -> Plan:
    return make_plan(config, suppose_gpus(CPU, gpus), gpus=gpus, nodes=nodes)


def estimated(config: RunConfig, gpus: int = 1, rates: Rates = RATES, nodes: int = 1) -> Estimate:
    return estimate(planned(config, gpus, nodes), config, model_footprint(config), rates)


def test_simulators_decide():
    # 16 waves of 4 chunks; a chunk takes 4 actions / 2 per second and a call of 4 x 0.01 s
    found = estimated(toy())
    assert found.phases["rollout"] == pytest.approx(16 * 4 * (2 + 0.04))
    assert found.reasons["rollout"] == "simulators"
    assert found.limit == "rollout: simulators"
    # 256 samples
    assert found.phases["update"] == pytest.approx(256 * 0.25)
    assert found.total == pytest.approx(sum(found.phases.values()))


def test_inference_decides():
    found = estimated(toy(), rates=replace(RATES, simulator=1e6))
    assert found.phases["rollout"] == pytest.approx(256 * 0.01, rel=0.01)
    slow = replace(RATES, simulator=1e3, inference=1.0)
    assert estimated(toy("env.num_envs=8"), rates=slow).reasons["rollout"] == "inference"


def test_calls_that_cannot_be_full_cost_as_much():
    fast = replace(RATES, simulator=1e9)
    full, half = (estimated(toy(f"env.num_envs={n}"), rates=fast) for n in (4, 2))
    assert half.phases["rollout"] == pytest.approx(2 * full.phases["rollout"])


def test_simulators_without_a_core_of_their_own_are_slower():
    config = toy("env.num_envs=32")
    crowded = estimated(config).phases["rollout"]  # 16 cores
    assert crowded == pytest.approx(2 * 4 * (2 * 2 + 0.04))


def test_more_devices_share_the_work():
    one, four = (estimated(toy("env.num_envs=4"), n) for n in (1, 4))
    assert four.phases["update"] == pytest.approx(one.phases["update"] / 4)
    assert four.phases["rollout"] == pytest.approx(one.phases["rollout"])  # as many simulators


def test_a_wave_that_is_not_full_takes_its_time():
    few = toy("rollout.episodes_per_step=8", "optim.global_batch_size=32", "env.num_envs=5")
    assert estimated(few).phases["rollout"] == pytest.approx(2 * 4 * (2 + 0.04))


def test_cpu_ranks_share_the_cores():
    config = toy()
    found = [
        estimate(make_plan(config, CPU, gpus=n), config, model_footprint(config), RATES)
        for n in (1, 2)
    ]
    assert found[0].phases["update"] == pytest.approx(found[1].phases["update"])


def full(*overrides: str) -> RunConfig:
    return compose("libero_10_grpo", ["model.path=.", *overrides]).config


def test_sharded_weights_move_for_every_micro_batch():
    config = full()
    free = estimated(config, 8, PUBLISHED)
    assert free.reasons["update"] == "forward and backward passes"
    slow = estimated(config, 8, replace(PUBLISHED, within=1e9))
    # 4 steps x 64 micro-batches x 7.5 billion x (2 + 2 + 4) bytes x 7/8 at 1 GB/s
    assert slow.phases["update"] == pytest.approx(256 * 7.54 * 8 * 7 / 8, rel=0.01)
    assert slow.reasons["update"] == "traffic of weights and gradients"
    between = estimated(config, 8, replace(PUBLISHED, between=1e9), nodes=2)
    assert between.reasons["update"] == "traffic of weights and gradients"


def test_weights_that_act_are_gathered_unless_they_are_there():
    assert estimated(full(), 8, PUBLISHED).phases["weights"] == pytest.approx(0.05, rel=0.05)
    assert estimated(full("lora.rank=32"), 8, PUBLISHED).phases["weights"] == 0


def test_offload_costs_both_ways():
    config = full("train.offload=always")
    moved = 7.54e9 * 12 / 8
    found = estimated(config, 8, PUBLISHED).phases["offload"]
    assert found == pytest.approx(2 * moved / PUBLISHED.copy, rel=0.01)


def test_rollouts_that_lag_behind_overlap():
    apart = ["train.staleness=1", "placement.env=0-1", "placement.rollout=0-1"]
    found = estimated(toy(*apart, "placement.actor=2-3"), 4)
    phases = found.phases
    assert found.total == pytest.approx(
        max(phases["rollout"], phases["update"]) + phases["weights"] + phases["offload"]
    )


def test_no_estimate_without_rates(tmp_path, monkeypatch):
    monkeypatch.setenv("VLACTL_HOME", str(tmp_path))
    assert make_plan(toy(), CPU, gpus=1).seconds == (
        "no estimate yet: vlactl bench env and vlactl bench model --preset ... measure this "
        "machine",
    )


def keep_rates(config: RunConfig) -> None:
    simulators = {"steps_per_second": 8.0, "simulators": 4, "measured": "2026-01-01"}
    store("env", environment_key("some CPU", config.env.name), simulators)
    policy = {
        "inference": {"1": 0.5, "8": 0.01},
        "update": {"none": {"samples": 16, "seconds_per_sample": 0.25, "peak_bytes": None}},
        "optimizer_seconds_per_parameter": 0.0,
        "measured": "2026-01-02",
    }
    store("model", size_key(config, "some CPU"), policy)


def test_an_estimate_with_rates_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("VLACTL_HOME", str(tmp_path / "home"))
    config = toy()
    keep_rates(config)
    line, source = make_plan(config, CPU, gpus=1).seconds
    assert line.startswith("3 min 15 s = rollout 2 min 11 s + update 1 min 4 s; limited by rollout")
    assert "at most: episodes to their horizon" in line
    assert "4 simulators (2026-01-01)" in source
    assert "inference in batches of 8" in source  # the nearest to the 4 of this run
    larger = toy("model.hidden=64")
    assert make_plan(larger, CPU, gpus=1).seconds[0].startswith("no estimate yet: vlactl bench m")
    recomputed = toy("train.activation_checkpointing=full")
    assert make_plan(recomputed, CPU, gpus=1).seconds[0].startswith("no estimate yet")


def test_a_damaged_file_of_rates_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("VLACTL_HOME", str(tmp_path))
    (tmp_path / rates_of.FILE_NAME).write_text("{")
    assert make_plan(toy(), CPU, gpus=1).seconds[0].startswith("no estimate yet")
    keep_rates(toy())
    assert len(make_plan(toy(), CPU, gpus=1).seconds) == 2


def test_published_rates_follow_the_recomputation():
    assert published(full()) == PUBLISHED
    kept = published(full("train.activation_checkpointing=none"))
    assert kept.update < PUBLISHED.update
    assert "37.7 ms" in kept.source


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (8.34, "8.3 s"),
        (42.4, "42 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3900, "1 h 5 min"),
    ],
)
def test_seconds_for_people(seconds, text):
    assert readable_seconds(seconds) == text


def test_estimates_import_no_torch():
    code = "import sys, vlactl.launch.plan, vlactl.cli.bench; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
