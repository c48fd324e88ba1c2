"""The scripted expert demonstrates a task of real LIBERO, with pictures and pushes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vlactl.cli.app import main
from vlactl.demonstrations.dataset import STATISTICS
from vlactl.demonstrations.samples import load_dataset

pytestmark = pytest.mark.sim


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demonstrations") / "object"
    options = ("--tasks", "2", "--per-task", "2", "--image-size", "64", "--cameras", "agentview")
    set_ = ("--set", "env.renderer=osmesa", "--workers", "1", "--perturbations", "3")
    assert main(["demos", "--suite", "libero-object", *options, *set_, "--out", str(folder)]) == 0
    return folder


@pytest.mark.timeout(400)
def test_demonstrations_of_libero_can_be_learned_from(dataset):
    read = load_dataset(dataset, cameras=("agentview",), chunk_length=8)
    assert read.instructions == ("pick up the salad dressing and place it in the basket",)
    assert len(read) > 60
    assert np.unique(read.episode_N).tolist() == [0, 1]
    assert np.abs(read.actions_NKA).max() <= 1.0
    assert set(np.unique(read.actions_NKA[read.valid_NK][:, 6])) == {-1.0, 1.0}
    pictures = read.pictures["agentview"].astype(float)
    assert pictures.shape[1:] == (64, 64, 3)
    assert pictures.std(axis=(1, 2, 3)).min() > 20, "something is seen on each of them"
    changes = np.abs(np.diff(pictures, axis=0)).mean(axis=(1, 2, 3))
    assert np.median(changes) > 0.1, "something moves"
    heights = read.states_NP[:, 2]
    assert heights.max() - heights.min() > 0.1, "the arm goes down and up again"


@pytest.mark.timeout(400)
def test_states_come_before_their_actions(dataset):
    """The arm moves the way it is told, from the state that is recorded with the command."""
    read = load_dataset(dataset, cameras=(), chunk_length=1)
    moved = np.diff(read.states_NP[:, :3], axis=0)
    told = read.actions_NKA[:-1, 0, :3]
    same = (np.diff(read.episode_N) == 0) & read.valid_NK[:-1, 0]
    correlation = np.corrcoef(moved[same].ravel(), told[same].ravel())[0, 1]
    assert correlation > 0.6


@pytest.mark.timeout(400)
def test_openvla_can_normalise_with_the_statistics(dataset):
    stated = json.loads((dataset / STATISTICS).read_text())["libero_object"]
    assert stated["action"]["mask"] == [True] * 6 + [False]
    assert (stated["action"]["min"][6], stated["action"]["max"][6]) == (0.0, 1.0)
    q01, q99 = np.array(stated["action"]["q01"]), np.array(stated["action"]["q99"])
    assert (q01[:3] < 0).all()
    assert (q99[:3] > 0).all()
    assert len(stated["proprio"]["q01"]) == 8


@pytest.mark.timeout(400)
def test_a_policy_imitates_them_and_is_measured(dataset, tmp_path, capsys):
    """A few steps teach nothing: what is tested is that all of it goes together."""
    keys = (
        "env.image_size=64",
        "env.renderer=osmesa",
        "env.num_envs=1",
        "env.slots_per_process=1",
        "env.task_cache=1",
        "env.sampled_trials=0",
        "env.wait_steps=1",
        "model.image_size=64",
        "model.width=64",
        "model.num_heads=2",
        "model.depth=2",
        "rollout.tasks=[2]",
        "rollout.trials=none",
        "eval.trials=[0]",
        "sft.demos_per_task=2",
        "sft.steps=6",
        "sft.batch_size=8",
        "sft.eval_every=6",
        "sft.log_every=1",
        "sinks=[]",
    )
    options = [part for key in keys for part in ("--set", key)]
    run = tmp_path / "run"
    preset = ("--preset", "libero_object_tiny_vla_grpo", "--gpus", "1")
    code = main(["sft", *preset, "--data", str(dataset), *options, "--run-dir", str(run)])
    assert code == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert lines[-1]["eval/num_trajectories"] == 1
    stated = json.loads((run / "model" / "dataset_statistics.json").read_text())
    assert stated == json.loads((dataset / STATISTICS).read_text())
    [episode] = (run / "evals" / "step-000006" / "episodes.jsonl").read_text().splitlines()
    assert (json.loads(episode)["task"], json.loads(episode)["trial"]) == (2, 0)
