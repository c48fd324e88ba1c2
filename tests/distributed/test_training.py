"""Real torchrun over gloo with the toy plugin: results do not depend on ranks, stops or restarts.

A start of torchrun takes seconds, so few runs serve many assertions.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from vlactl_toy.environment import make_spec
from vlactl_toy.policy import make_policy

from vlactl.api.contracts import ModelContext
from vlactl.config.compose import load_resolved
from vlactl.hub.manifest import newest_checkpoint
from vlactl.train.checkpoint import load_checkpoint

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # read without ranks
]
SMALL = [
    "rollout.episodes_per_step=16",
    "algorithm.group_size=4",
    "optim.global_batch_size=32",
    "optim.micro_batch_size=8",
    "optim.decay_steps=4",
    "env.num_envs=2",
    "env.num_tasks=4",
    "env.num_trials=8",
    "algorithm.entropy_coef=0.01",  # every step has a gradient, also where all returns are equal
    "checkpoint.every=2",
    "sinks=[]",
]


def vlactl(*arguments: str | Path, cwd: Path, check: bool = True, **environment: str):
    return subprocess.run(
        [sys.executable, "-m", "vlactl.cli.app", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=170,
        check=check,
    )


def train(cwd: Path, name: str, *overrides: str, ranks: int = 1) -> Path:
    options = [part for override in (*SMALL, *overrides) for part in ("--set", override)]
    vlactl(
        "train", "--preset", "toy_grpo", "--gpus", str(ranks), "--run-name", name, *options, cwd=cwd
    )
    (run_dir,) = (cwd / "runs" / name).iterdir()
    return run_dir


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    config = load_resolved(run_dir / "config.json")
    context = ModelContext(
        env=make_spec(config.env), device=torch.device("cpu"), dtype=torch.float32, seed=0
    )
    policy = make_policy(config.model, context)
    path, skipped = newest_checkpoint(run_dir)
    assert not skipped
    load_checkpoint(path, policy.module)
    return policy.module.state_dict()


def without_time(steps: list[dict]) -> list[dict]:
    return [{k: v for k, v in step.items() if not k.startswith("time")} for step in steps]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("one"), "run", "train.max_steps=4")


def test_two_ranks_give_the_result_of_one(one_rank, tmp_path):
    two_ranks = train(tmp_path, "run", "train.max_steps=4", ranks=2)
    for one, two in zip(metrics(one_rank), metrics(two_ranks), strict=True):
        for name in ("env/success_once", "env/return", "env/episode_len", "rollout/rewards"):
            assert one[name] == two[name], name
        assert two["train/actor/grad_norm"] == pytest.approx(one["train/actor/grad_norm"], rel=1e-6)
    for name, tensor in weights(one_rank).items():
        torch.testing.assert_close(weights(two_ranks)[name], tensor, rtol=0, atol=1e-6)


def test_resume_goes_on_exactly(one_rank, tmp_path):
    run_dir = train(tmp_path, "run", "train.max_steps=2")
    vlactl("train", "--resume", run_dir, "--set", "train.max_steps=4", cwd=tmp_path)
    assert without_time(metrics(run_dir)) == without_time(metrics(one_rank))
    for name, tensor in weights(one_rank).items():
        assert torch.equal(weights(run_dir)[name], tensor)


def test_the_learning_rate_falls(one_rank):
    rates = [step["train/actor/lr"] for step in metrics(one_rank)]
    assert rates == pytest.approx([0.02 * factor for factor in (1.0, 0.868, 0.55, 0.232)], rel=1e-3)


def test_sigterm_saves_and_the_run_goes_on(one_rank, tmp_path):
    """P3: saved within a step, exit code 75, and nothing is lost or played twice."""
    options = [part for override in (*SMALL, "train.max_steps=999") for part in ("--set", override)]
    command = [sys.executable, "-m", "vlactl.cli.app", "train", "--preset", "toy_grpo", *options]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as job:
        assert any(line.startswith("step 2/") for line in job.stdout)
        job.send_signal(signal.SIGTERM)
        told = job.stdout.read()
    assert job.returncode == 75, told
    assert "--resume" in told
    (run_dir,) = tmp_path.glob("runs/*/*")
    done = len(metrics(run_dir))
    assert newest_checkpoint(run_dir)[0].name == f"step-{done:06d}"
    more = f"train.max_steps={done + 1}"
    vlactl("train", "--resume", run_dir, "--set", more, cwd=tmp_path)
    steps = metrics(run_dir)
    assert [step["step"] for step in steps] == list(range(done + 1))
    shared = min(4, done + 1)
    assert without_time(steps[:shared]) == without_time(metrics(one_rank)[:shared])


def test_simulator_faults_cost_their_own_episode(one_rank, tmp_path):
    """Rows 17 and 19: a killed simulator and a NaN; the numbers of the run stay the same."""
    plan = [json.loads(line) for line in _journal(one_rank, 3).read_text().splitlines()]
    victims = [f"{line['task']}/{line['trial']}/{line['repeat'] % 4}" for line in plan]
    faults = "{" + f'"{victims[1]}" = "die", "{victims[6]}" = "nan"' + "}"
    notes = tmp_path / "faults"
    notes.mkdir()
    run_dir = train(
        tmp_path,
        "run",
        "train.max_steps=4",
        f"env.faults={faults}",
        f"env.fault_dir={notes}",
    )
    assert len(list(notes.iterdir())) == 2
    faulty, clean = metrics(run_dir), metrics(one_rank)
    assert sum(step.pop("env/restarts") for step in faulty) == 2
    assert sum(step.pop("env/restarts") for step in clean) == 0
    assert without_time(faulty) == without_time(clean)


def test_an_evaluation_tells_of_simulator_faults(one_rank, tmp_path):
    out, notes = tmp_path / "eval", tmp_path / "faults"
    notes.mkdir()
    arguments = ["eval", "--checkpoint", one_rank, "--tasks", "0", "--trials", "1"]
    faults = ["--set", 'env.faults={"0/0/0"="die"}']
    once = ["--set", f"env.fault_dir={notes}", "--out", out]
    told = vlactl(*arguments, *faults, *once, cwd=tmp_path).stdout
    assert f"1 episode was played again after a simulator failed: see {out}/logs" in told
    assert json.loads((out / "eval.json").read_text())["redone_episodes"] == 1
    none = ["--set", f"env.fault_dir={tmp_path}", "--set", "rollout.max_restarts_per_step=0"]
    failed = vlactl(*arguments, *faults, *none, cwd=tmp_path, check=False)
    assert failed.returncode == 4
    assert "rank 0 in evaluation: 1 of 1 episodes could not be played" in failed.stderr
    assert "kept failing: simulator process died" in failed.stderr
    assert "keeps" not in failed.stderr


def _journal(run_dir: Path, step: int) -> Path:
    return run_dir / "rollouts" / f"step-{step:06d}" / "episodes-0.jsonl"


def test_evaluation_is_unique_resumable_and_filmed(one_rank, tmp_path):
    """Rows 46 and 47, and the films of what was recorded."""
    out = tmp_path / "eval"
    arguments = ["eval", "--checkpoint", one_rank, "--trials", "3", "--greedy", "--out", out]
    vlactl(*arguments, cwd=tmp_path)
    journal = out / "episodes.jsonl"
    assert not list(out.glob("episodes-*"))
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == len({(r["task"], r["trial"]) for r in map(json.loads, lines)}) == 12
    summary = (out / "eval.json").read_text()
    episodes = journal.read_bytes()
    journal.write_text("".join(lines[:5]) + lines[5][:20])
    again = vlactl(*arguments, "--json", tmp_path / "copy.json", cwd=tmp_path)
    assert json.loads((tmp_path / "copy.json").read_text()) == json.loads(summary)
    assert "5 episodes are there already" in again.stdout
    assert "95 % interval" in again.stdout
    assert journal.read_bytes() == episodes
    refused = vlactl("eval", "--checkpoint", one_rank, "--trials", "9", cwd=tmp_path, check=False)
    assert refused.returncode == 2
    assert "8 initial states" in refused.stderr
    films = tmp_path / "films"
    told = vlactl("video", out, "--task", "0-1", "--out", films, cwd=tmp_path)
    assert "ended differently" not in told.stdout
    assert len(list(films.glob("task-*_*.mp4"))) == 6
    assert (films / "grid.mp4").stat().st_size > 1000


def test_nonfinite_gradient_updates_nothing(tmp_path):
    """A learning rate that explodes: the run stops with exit code 4 and says where."""
    options = [part for override in (*SMALL, "optim.lr=1e30") for part in ("--set", override)]
    done = vlactl("train", "--preset", "toy_grpo", *options, cwd=tmp_path, check=False)
    assert done.returncode == 4
    assert "not finite" in done.stderr


def test_two_jobs_on_one_machine_do_not_meet(tmp_path):
    """Row 36: no fixed port, no shared files."""
    options = [part for override in (*SMALL, "train.max_steps=1") for part in ("--set", override)]
    command = [sys.executable, "-m", "vlactl.cli.app", "train", "--preset", "toy_grpo", *options]
    jobs = [
        subprocess.Popen([*command, "--run-name", name], cwd=tmp_path, stdout=subprocess.DEVNULL)
        for name in ("first", "second")
    ]
    assert [job.wait(170) for job in jobs] == [0, 0]
    first, second = (tmp_path / "runs" / name for name in ("first", "second"))
    assert without_time(metrics(*first.iterdir())) == without_time(metrics(*second.iterdir()))
