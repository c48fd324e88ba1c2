"""A tiny policy learns a toy task with each algorithm, on real torchrun; PPO's promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

pytestmark = pytest.mark.dist
SMALL = ("rollout.episodes_per_step=16", "optim.global_batch_size=32", "optim.micro_batch_size=8")


def train(cwd: Path, preset: str, *overrides: str, ranks: int = 1, resume: Path | None = None):
    """Metrics of the steps, and the run's directory."""
    options = [part for override in ("sinks=[]", *overrides) for part in ("--set", override)]
    what = ["--resume", resume] if resume else ["--preset", preset, "--gpus", ranks]
    subprocess.run(
        [sys.executable, "-m", "vlactl.cli.app", "train", *map(str, what), *options],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=170,
        check=True,
    )
    (run_dir,) = (cwd / "runs" / preset).iterdir()
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], run_dir


def column(steps: list[dict], name: str) -> list[float]:
    return [step[name] for step in steps]


def without_time(steps: list[dict]) -> list[dict]:
    return [{k: v for k, v in step.items() if not k.startswith("time")} for step in steps]


@pytest.mark.parametrize("preset", ["toy_grpo", "toy_ppo", "toy_rft"])
def test_reward_rises(tmp_path, preset):
    steps, _ = train(tmp_path, preset)
    success = column(steps, "env/success_once")
    assert mean(success[:3]) < 0.3
    assert mean(success[-5:]) > 0.8
    length = column(steps, "env/episode_len")
    assert mean(length[-5:]) < 0.7 * mean(length[:3])
    if preset == "toy_ppo":
        explained = column(steps, "train/critic/explained_variance")
        assert mean(explained[-5:]) > 0.6 > mean(explained[:5])


def test_two_ranks_give_the_result_of_one_with_values(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    runs = [
        train(tmp_path / folder, "toy_ppo", *SMALL, "train.max_steps=2", ranks=ranks)[0]
        for folder, ranks in (("one", 1), ("two", 2))
    ]
    for one, two in zip(*runs, strict=True):
        assert one["env/return"] == two["env/return"]
        assert one["env/num_trajectories"] == two["env/num_trajectories"]
        for name in ("train/actor/grad_norm", "train/critic/value_loss", "train/actor/approx_kl"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


def test_a_warm_up_moves_the_critic_only_and_survives_a_resume(tmp_path):
    warm = (*SMALL, "algorithm.critic_warmup_steps=2", "checkpoint.every=1")
    whole, _ = train(tmp_path, "toy_ppo", *warm, "train.max_steps=3")
    assert column(whole, "train/actor/lr") == [0, 0, 2e-2]
    assert column(whole, "train/actor/approx_kl")[:2] == [0, 0]
    assert whole[1]["train/critic/value_loss"] > 0
    other = tmp_path / "other"
    other.mkdir()
    _, run_dir = train(other, "toy_ppo", *warm, "train.max_steps=1")
    resumed, _ = train(other, "toy_ppo", "train.max_steps=3", resume=run_dir)
    assert without_time(resumed) == without_time(whole)


def test_steps_without_a_success_change_nothing_and_successes_are_looked_for(tmp_path):
    """With rejection sampling a step may be without samples, on one rank or on all."""
    keys = (*SMALL, "algorithm.group_size=2", "algorithm.min_return=6", "train.max_steps=2")
    steps, _ = train(tmp_path, "toy_rft", *keys, ranks=2)
    assert column(steps, "train/actor/updates") == [0, 0]
    assert column(steps, "rollout/groups/kept") == [0, 0]
    other = tmp_path / "other"
    other.mkdir()
    found, _ = train(
        other, "toy_rft", *keys, "algorithm.min_return=5", "algorithm.resample_rounds=3", ranks=2
    )
    assert found[0]["env/replaced_groups"] > 0
    assert found[0]["train/actor/updates"] > 0


def test_groups_that_teach_nothing_are_replaced(tmp_path):
    keys = (*SMALL, "algorithm.group_size=2", "algorithm.resample_rounds=3", "train.max_steps=2")
    steps, _ = train(tmp_path, "toy_grpo", *keys, ranks=2)
    for step in steps:
        assert step["env/replaced_groups"] > 0
        assert step["env/num_trajectories"] == 16 + 2 * step["env/replaced_groups"]
    plain = tmp_path / "plain"
    plain.mkdir()
    without, _ = train(plain, "toy_grpo", *keys, "algorithm.resample_rounds=0", ranks=2)
    assert steps[0]["rollout/groups/degenerate"] < without[0]["rollout/groups/degenerate"]


def test_a_curriculum_survives_a_resume_and_is_that_of_any_number_of_ranks(tmp_path):
    keys = (*SMALL, "rollout.order=informative", "env.num_tasks=4", "algorithm.group_size=2")
    for folder in ("whole", "two", "cut"):
        (tmp_path / folder).mkdir()
    whole, run_dir = train(tmp_path / "whole", "toy_grpo", *keys, "train.max_steps=4")
    played = [{k for k in step if k.startswith("env/success_once/task_")} for step in whole]
    assert len(set.union(*played)) == 4
    two, _ = train(tmp_path / "two", "toy_grpo", *keys, "train.max_steps=4", ranks=2)
    for one, other in zip(whole, two, strict=True):
        ours, theirs = ({k: v for k, v in m.items() if k.startswith("env/")} for m in (one, other))
        assert theirs == pytest.approx(ours)
    _, run_dir = train(tmp_path / "cut", "toy_grpo", *keys, "train.max_steps=2")
    resumed, _ = train(tmp_path / "cut", "toy_grpo", "train.max_steps=4", resume=run_dir)
    assert without_time(resumed) == without_time(whole)
    (run_dir / "metrics.jsonl").unlink()
    with pytest.raises(subprocess.CalledProcessError) as caught:
        train(tmp_path / "cut", "toy_grpo", "train.max_steps=5", resume=run_dir)
    assert "metrics of 0 steps: 4 were played" in caught.value.stdout + caught.value.stderr


def test_the_reference_policy_is_the_initial_one(tmp_path):
    keys = (*SMALL, "algorithm.kl_coef=0.1", "train.max_steps=3", "algorithm.filter_rewards=false")
    steps, _ = train(tmp_path, "toy_grpo", *keys)
    kl = column(steps, "train/actor/kl_loss")
    assert kl[0] < kl[-1]
    assert kl[-1] > 0
