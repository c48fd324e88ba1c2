"""Demonstrations, `vlactl sft` and what follows, from end to end on the toy.

A start of torchrun takes seconds, so few runs serve many assertions. The preset is that of PPO:
imitation has no use for its value head.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vlactl_toy.environment import make_spec
from vlactl_toy.plugin import ToyEnvConfig, ToyModelConfig
from vlactl_toy.policy import make_policy

from vlactl.api.contracts import ModelContext
from vlactl.hub.manifest import list_checkpoints, newest_checkpoint
from vlactl.train.checkpoint import load_checkpoint

pytestmark = [
    pytest.mark.dist,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # read without ranks
]
STEPS, HALF = 40, 20
KEYS = [
    f"sft.steps={STEPS}",
    f"sft.eval_every={HALF}",
    f"sft.save_every={HALF}",
    "sft.log_every=5",
    "sft.batch_size=12",
    "sft.warmup_steps=4",
    "sft.lr=2e-2",
    "optim.micro_batch_size=4",
    "env.num_trials=4",
    "sinks=[]",
]
SFT = ["sft", "--preset", "toy_ppo", *(part for key in KEYS for part in ("--set", key))]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "vlactl.cli.app", *map(str, arguments)]


def vlactl(*arguments: str | Path, cwd: Path, code: int = 0) -> str:
    done = subprocess.run(
        command(*arguments), cwd=cwd, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def wait_for(path: Path, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not appear"
        time.sleep(0.05)


def metrics(run: Path) -> list[dict]:
    """Lines of the record, without times."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith("time")} for line in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """What a run has exported."""
    return load_file(run / "model" / "model.safetensors")


def checkpointed(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint."""
    env = make_spec(ToyEnvConfig(num_tasks=2))
    context = ModelContext(env=env, device=torch.device("cpu"), dtype=torch.float32, seed=0)
    module = make_policy(ToyModelConfig(), context).module
    load_checkpoint(checkpoint, module)
    return module.state_dict()


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with demonstrations in `data`."""
    folder = tmp_path_factory.mktemp("toy")
    options = ("--suite", "toy", "--set", "env.num_tasks=2", "--per-task", "6", "--workers", "1")
    told = vlactl("demos", *options, "--out", "data", cwd=folder)
    assert "vlactl sft --preset toy_grpo --data data" in told
    return folder


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """A run on one rank that nothing interrupted."""
    told = vlactl(*SFT, "--data", "data", "--run-dir", "whole", cwd=place)
    assert "vlactl train --preset toy_ppo --set model.path=whole/model" in told
    return place / "whole"


def test_imitation_is_learned_and_measured(whole):
    lines = metrics(whole)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == STEPS / 5
    assert losses[-1] < 0.8 * losses[0]
    rates = {
        line["step"]: line["eval/success_once"] for line in lines if "eval/success_once" in line
    }
    assert rates.keys() == {HALF - 1, STEPS - 1}
    assert lines[0]["train/actor/lr"] == pytest.approx(2e-2, rel=0.3)
    assert not any("value" in name for name in weights(whole)), "there is no value head"
    saved, _ = newest_checkpoint(whole)
    assert json.loads((saved / "state.json").read_text())["status"] == "finished"
    assert json.loads((whole / "config.json").read_text())["sft"]["data"] == [
        str(whole.parent / "data")
    ]


def test_a_stopped_run_goes_on_as_if_nothing_had_been(place, whole):
    """Stopped in the middle of an evaluation, where a simulator hangs."""
    run = place / "stopped"
    hangs = ("--set", 'env.faults={"1/3/0" = "hang"}', "--set", f"env.fault_dir={place}")
    arguments = command(*SFT, *hangs, "--data", "data", "--run-dir", "stopped")
    with subprocess.Popen(arguments, cwd=place, stdout=subprocess.PIPE, text=True) as job:
        wait_for(place / "1-3-0")
        job.send_signal(signal.SIGTERM)
        told = job.stdout.read()
    assert job.returncode == 75, told
    assert "vlactl sft --resume stopped" in told
    assert not (run / "model").exists()
    refused = vlactl("eval", "--run", run, cwd=place, code=2)
    assert "is not finished" in refused
    assert f"vlactl sft --resume {run}" in refused
    refused = vlactl("eval", "--run", run, "--step", "1", cwd=place, code=2)
    assert "is a supervised run, which is measured when it is finished" in refused
    refused = vlactl("train", "--resume", run, cwd=place, code=2)
    assert f"vlactl sft --resume {run}" in refused

    vlactl("sft", "--resume", "stopped", cwd=place)
    one, other = weights(whole), weights(run)
    assert one.keys() == other.keys()
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
    assert metrics(run) == metrics(whole)
    before = (run / "metrics.jsonl").read_bytes()
    assert "is finished" in vlactl("sft", "--resume", run, cwd=place)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_ranks_share_the_work_and_a_wanted_rate_ends_it(place, whole):
    """Sharded on two ranks up to the first evaluation, then told to go further on one."""
    enough = ("--set", "sft.stop_at=0", "--run-dir", "two", "--gpus", "2")
    told = vlactl(*SFT, "--data", "data", *enough, cwd=place)
    assert "actor 0-1" in told
    two = place / "two"
    half, half_of_whole = (list_checkpoints(each)[0] for each in (two, whole))
    assert half[0] == half_of_whole[0] == HALF
    assert newest_checkpoint(two)[0] == half[1]
    assert metrics(two)[-1]["step"] == HALF - 1
    assert_close(checkpointed(half_of_whole[1]), weights(two))

    vlactl("sft", "--resume", two, "--set", "sft.stop_at=1.0", "--gpus", "1", cwd=place)
    assert newest_checkpoint(two)[0].name == f"step-{STEPS:06d}"
    assert_close(weights(whole), weights(two))
    steps = [line["step"] for line in metrics(two)]
    assert steps == [line["step"] for line in metrics(whole)]


def test_what_was_learned_is_evaluated_and_improved(place, whole):
    vlactl("eval", "--run", whole, "--out", "eval", cwd=place)
    final, alone = (
        json.loads((folder / "eval.json").read_text())
        for folder in (whole / "evals" / f"step-{STEPS:06d}", place / "eval")
    )
    assert alone["total"] == final["total"]
    assert alone["tasks"] == final["tasks"]
    assert alone["policy"]["label"] == str(whole / "model")
    assert vlactl("eval", "--model", whole / "model", "--out", "eval", cwd=place)

    keys = ("model.path=whole/model", "sft.data=data", "train.max_steps=1", "sinks=[]")
    options = [part for key in keys for part in ("--set", key)]
    vlactl("train", "--preset", "toy_ppo", *options, "--run-dir", "rl", cwd=place)
    config = json.loads((place / "rl" / "config.json").read_text())
    assert config["model"]["path"] == str(whole / "model")
    assert config["sft"]["data"] == [], "a run that imitates nothing is no supervised run"
    [line] = metrics(place / "rl")
    assert line["env/success_once"] > 0
