"""The main job on real LIBERO: train, evaluate, film."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.sim, pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(600)]


def vlactl(cwd: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "vlactl.cli.app", *arguments],
        cwd=cwd,
        env={**os.environ, "HOME": str(cwd)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_evaluate_and_film(tmp_path: Path):
    """Also rows 11 and 12: a home folder whose LIBERO settings point nowhere is not read."""
    settings = tmp_path / ".libero" / "config.yaml"
    settings.parent.mkdir()
    settings.write_text("benchmark_root: /nowhere\nassets: /nowhere\nbddl_files: /nowhere\n")
    small = ["env.max_episode_steps=16", "env.image_size=64", "env.wait_steps=2"]
    small += ["rollout.episodes_per_step=4", "algorithm.group_size=2", "train.max_steps=1"]
    small += ["optim.global_batch_size=8"]
    options = [part for key in small for part in ("--set", key)]
    vlactl(tmp_path, "train", "--preset", "libero_spatial_tiny_grpo", *options)
    (run,) = tmp_path.glob("runs/*/*")
    (step,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert step["env/num_trajectories"] == 4
    assert step["train/actor/grad_norm"] > 0
    assert {"env/success_once/task_0", "env/success_once/task_3"} <= set(step)
    # The weights that chose the actions judge them alike: nothing drifts before the first update.
    assert abs(step["train/actor/approx_kl"]) < 0.1

    out = tmp_path / "eval"
    table = vlactl(
        tmp_path, *("eval", "--suite", "libero-spatial", "--tasks", "0", "--trials", "2"),
        *("--greedy", "--out", str(out)),
    )  # fmt: skip
    assert "0/2" in table
    summary = json.loads((out / "eval.json").read_text())
    assert summary["total"]["trials"] == 2
    assert summary["versions"]["mujoco"].startswith("3.3.")

    told = vlactl(tmp_path, "video", str(out), "--size", "64", "--out", str(tmp_path / "films"))
    assert "ended differently" not in told
    assert len(list((tmp_path / "films").glob("task-00_*_failure_*.mp4"))) == 2


def test_the_policy_that_comes_with_vlactl_solves_tasks(tmp_path: Path):
    """Judged by success: pictures, state, words, tokens and actions mean what they meant."""
    preset = ("--preset", "libero_object_tiny_vla_demo", "--set", "model.shipped=rl")
    out = tmp_path / "eval"
    vlactl(tmp_path, "eval", *preset, "--tasks", "2,4", "--trials", "2", "--out", str(out))
    summary = json.loads((out / "eval.json").read_text())
    assert summary["total"]["trials"] == 4
    assert summary["total"]["successes"] >= 3, summary["tasks"]
