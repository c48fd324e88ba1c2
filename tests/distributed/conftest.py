"""Training runs on any number of CPU ranks, whatever this machine has."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from vlactl_toy.environment import make_spec
from vlactl_toy.policy import make_policy

from vlactl.api.contracts import ModelContext
from vlactl.config.compose import compose, load_resolved, override
from vlactl.config.run import RESUMABLE_KEYS
from vlactl.hub.manifest import newest_checkpoint
from vlactl.launch.hardware import GIB, Hardware
from vlactl.launch.plan import make_plan
from vlactl.launch.progress import PlainProgress
from vlactl.launch.rundir import write_run
from vlactl.launch.supervise import supervise
from vlactl.launch.torchrun import WORKER_MODULE
from vlactl.train.checkpoint import load_checkpoint

MANY_CORES = Hardware(cores=8, ram_bytes=16 * GIB)
SMALL = [
    "rollout.episodes_per_step=16",
    "algorithm.group_size=4",
    "optim.global_batch_size=32",
    "optim.micro_batch_size=8",
    "env.num_envs=4",
    "env.num_tasks=4",
    "env.num_trials=8",
    "algorithm.entropy_coef=0.01",  # every step has a gradient, also where all returns are equal
    "checkpoint.every=0",
    "sinks=[]",
]


class Run:
    """A run directory, read back."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def metrics(self) -> list[dict]:
        lines = (self.path / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def numbers(self) -> list[dict]:
        """Metrics without seconds."""
        return [{k: v for k, v in m.items() if not k.startswith("time")} for m in self.metrics]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        config = load_resolved(self.path / "config.json")
        context = ModelContext(
            env=make_spec(config.env),
            device=torch.device("cpu"),
            dtype=torch.float32,
            seed=0,
            values=config.algorithm.needs().values,
        )
        policy = make_policy(config.model, context)
        path, skipped = newest_checkpoint(self.path)
        assert not skipped
        load_checkpoint(path, policy.module)
        return policy.module.state_dict()

    @property
    def actions(self) -> dict[str, bytes]:
        """Of every recorded episode."""
        return {
            str(file.relative_to(self.path)): file.read_bytes()
            for file in sorted(self.path.glob("rollouts/*/actions/*.npy"))
        }

    def read_log(self, rank: int, attempt: int = 1) -> str:
        return (self.path / f"logs/attempt-{attempt}/rank-{rank}.log").read_text()


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Train on `ranks` CPU ranks; a `run` goes on with its own configuration, on other ranks.

    `planned` changes the plan: what only machines with GPUs or little memory would do.
    """

    def start(
        *overrides: str,
        ranks: int = 1,
        preset: str = "toy_grpo",
        run: Run | None = None,
        base: Sequence[str] = SMALL,
        worker_module: str = WORKER_MODULE,
        lines: list[str] | None = None,
        **planned: object,
    ) -> Run:
        if run is None:
            path = tmp_path_factory.mktemp("run")
            config = compose(preset, [*base, *overrides]).config
        else:
            path = run.path
            config = override(load_resolved(path / "config.json"), overrides, RESUMABLE_KEYS)
        plan = replace(make_plan(config, MANY_CORES, gpus=ranks), **planned)
        write_run(path, config, plan)
        told = [] if lines is None else lines
        progress = PlainProgress(told.append, config.train.max_steps)
        code = supervise(
            path, plan, "train", config=config, progress=progress, worker_module=worker_module
        )
        assert code == 0, told
        return Run(path)

    return start


def assert_same_results(one: Run, other: Run, *, tolerance: float = 1e-6) -> None:
    """Rewards and actions are equal; gradient norms and weights nearly so."""
    for first, second in zip(one.metrics, other.metrics, strict=True):
        for name in ("env/success_once", "env/return", "env/episode_len", "rollout/rewards"):
            assert first[name] == second[name], name
        norms = (second["train/actor/grad_norm"], first["train/actor/grad_norm"])
        assert norms[0] == pytest.approx(norms[1], rel=tolerance)
    assert one.actions == other.actions
    weights = other.weights
    for name, tensor in one.weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=tolerance)


@pytest.fixture(scope="session")
def same_results() -> Callable[..., None]:
    return assert_same_results
