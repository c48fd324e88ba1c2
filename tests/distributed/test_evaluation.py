"""`vlactl eval` from end to end on the toy: killed and continued, shared, compared.

A start of torchrun takes seconds, so few evaluations serve many assertions.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vlactl.evaluate.results import EpisodeJournal, read_results

pytestmark = [pytest.mark.dist, pytest.mark.timeout(400)]
MANY = ["--preset", "toy_grpo", "--set", "env.num_tasks=4", "--set", "env.num_trials=250"]
NUM_EPISODES = 1000


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "vlactl.cli.app", *map(str, arguments)]


def vlactl(*arguments: str | Path, cwd: Path, check: bool = True):
    return subprocess.run(
        command(*arguments), cwd=cwd, capture_output=True, text=True, timeout=170, check=check
    )


def header(folder: Path) -> dict:
    """eval.json without what may differ between two ways to play the same evaluation."""
    summary = json.loads((folder / "eval.json").read_text())
    return {key: value for key, value in summary.items() if key not in ("command", "machine")}


def kill_when_playing(folder: Path, arguments: list[str | Path], cwd: Path, episodes: int) -> None:
    """Start an evaluation and kill its supervisor, with no chance to tidy up, while it plays."""
    running = subprocess.Popen(command(*arguments), cwd=cwd, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(read_results(folder)) < episodes:
        assert time.monotonic() < deadline
        assert running.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    everyone = psutil.Process(running.pid).children(recursive=True)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    _, alive = psutil.wait_procs(everyone, timeout=60)
    assert not alive, "workers outlive their supervisor"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nothing interrupted, on one rank."""
    folder = tmp_path_factory.mktemp("whole") / "eval"
    vlactl("eval", *MANY, "--out", folder, cwd=folder.parent)
    return folder


def test_a_killed_evaluation_plays_what_is_missing_only(whole, tmp_path):
    """Killed on two ranks and continued on one, it is the one that nothing interrupted."""
    out = tmp_path / "eval"
    arguments = ["eval", *MANY, "--out", out]
    kill_when_playing(out, [*arguments, "--gpus", "2"], tmp_path, episodes=50)
    assert not (out / "eval.json").exists()
    kept = {result.key for result in read_results(out)}
    assert 50 <= len(kept) < NUM_EPISODES
    played_at = {path.name: path.stat().st_mtime_ns for path in (out / "actions").iterdir()}
    refused = vlactl("eval", "--compare", whole, out, cwd=tmp_path, check=False)
    assert (refused.returncode, "is not finished" in refused.stderr) == (2, True)
    told = vlactl(*arguments, cwd=tmp_path).stdout
    assert f"{len(kept)} episodes are there already" in told
    results = read_results(out)
    assert len(results) == NUM_EPISODES
    for result in results:
        if result.key in kept:
            name = f"task-{result.task:02d}_trial-{result.trial:02d}_0.npy"
            assert (out / "actions" / name).stat().st_mtime_ns == played_at[name]
    assert (out / "episodes.jsonl").read_bytes() == (whole / "episodes.jsonl").read_bytes()
    assert not list(out.glob("episodes-*.jsonl"))
    assert header(out) == header(whole)
    compared = vlactl("eval", "--compare", whole, out, cwd=tmp_path).stdout
    assert "B - A: +0.0 points" in compared
    assert "played with the same weights" in compared


def test_what_eval_json_says(whole):
    summary = json.loads((whole / "eval.json").read_text())
    assert summary["command"].endswith(f"--out {whole}")
    assert len(summary["policy"]["sha256"]) == 64
    assert summary["policy"]["label"] == "untrained toy_grpo"
    given = ("mode", "temperature", "top_k", "passes", "seed", "initial_weights_seed", "dtype")
    assert [summary[key] for key in given] == ["sampled", 1.0, 0, 1, 0, 1234, "float32"]
    assert summary["horizon"] == summary["env"]["max_episode_steps"] == 16
    assert summary["machine"]["ranks"] == 1
    assert summary["machine"]["device"]
    assert {"python", "vlactl", "torch"} <= summary["versions"].keys()
    assert (summary["env"]["num_trials"], summary["model"]["hidden"]) == (250, 32)
    assert summary["lora"]["rank"] == 0
    assert summary["total"]["trials"] == NUM_EPISODES
    assert [task["trials"] for task in summary["tasks"]] == [250] * 4


def test_before_and_after_training_with_passes_and_a_table_for_a_readme(tmp_path):
    """A run's policy before training is the one that its preset starts from."""
    keys = ["rollout.episodes_per_step=16", "optim.global_batch_size=32", "train.max_steps=2"]
    options = [part for key in (*keys, "eval.every=2", "sinks=[]") for part in ("--set", key)]
    vlactl("train", "--preset", "toy_grpo", "--run-name", "run", *options, cwd=tmp_path)
    (run,) = (tmp_path / "runs" / "run").iterdir()
    during = json.loads((run / "evals" / "step-000002" / "eval.json").read_text())
    assert during["policy"] == {"step": 2, "label": f"{run.relative_to(tmp_path)} in training"}
    both = ["--run", run, "--passes", "2", "--trials", "4"]
    told = vlactl("eval", *both, "--step", "0", "--greedy", "--out", "before", cwd=tmp_path)
    assert "16: 2 tasks x 4 initial states x 2 passes (the whole suite: 16)" in told.stdout
    assert "greedy passes differ in nothing but what simulators draw" in told.stdout
    after = vlactl("eval", *both, "--out", "after", "--markdown", cwd=tmp_path).stdout
    assert "| all |  | " in after
    preset = ["--preset", "toy_grpo", "--set", "train.seed=1234", "--passes", "2", "--trials", "4"]
    vlactl("eval", *preset, "--greedy", "--out", "fresh", cwd=tmp_path)
    policies = {
        name: json.loads((tmp_path / name / "eval.json").read_text())["policy"]
        for name in ("before", "after", "fresh")
    }
    assert policies["before"]["sha256"] == policies["fresh"]["sha256"]
    assert policies["after"]["sha256"] != policies["before"]["sha256"]
    assert [policies[name]["step"] for name in ("before", "after", "fresh")] == [0, 2, None]
    vlactl("export", run, "--out", "exported", cwd=tmp_path)
    vlactl("eval", "--model", "exported", "--trials", "1", "--out", "copy", cwd=tmp_path)
    exported = json.loads((tmp_path / "copy" / "eval.json").read_text())["policy"]
    assert exported["sha256"] == policies["after"]["sha256"]
    same = [(tmp_path / name / "episodes.jsonl").read_bytes() for name in ("before", "fresh")]
    assert same[0] == same[1]
    out = vlactl("eval", "--compare", "before", "after", cwd=tmp_path).stdout
    assert "exact test, passes of a pair taken together" in out
    assert "sampled at temperature 1" in out


def test_other_weights_do_not_finish_an_evaluation(tmp_path):
    out = tmp_path / "eval"
    arguments = ["eval", "--preset", "toy_grpo", "--trials", "2", "--out", out]
    vlactl(*arguments, cwd=tmp_path)
    episodes = read_results(out)
    (out / "episodes.jsonl").unlink()
    EpisodeJournal(out / "episodes-0.jsonl").append(episodes[0])
    (out / "weights.json").write_text(json.dumps({"sha256": "0" * 64}))
    refused = vlactl(*arguments, cwd=tmp_path, check=False)
    assert refused.returncode == 5
    assert "holds episodes of other weights" in refused.stderr
