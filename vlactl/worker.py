"""What each rank runs: `python -m vlactl.worker --run-dir DIR --job train|eval` under torchrun.

Reads the resolved configuration and the plan from the run directory, builds the parts and hands
them to the training loop or to the evaluator.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlactl import logs
from vlactl.api import registry
from vlactl.api.contracts import (
    Algorithm,
    EnvContext,
    Environment,
    EnvSpec,
    Greedy,
    LoraContext,
    ModelContext,
    Policy,
    Sample,
)
from vlactl.api.plugins import EnvironmentPlugin, load_object
from vlactl.config.compose import load_resolved
from vlactl.config.run import LoraConfig, RunConfig
from vlactl.distributed.roles import World, leave_world, start_world
from vlactl.errors import EXIT_BUG, EXIT_OK, ConfigError
from vlactl.evaluate.results import EVAL_REQUEST
from vlactl.evaluate.runner import Evaluator, forget_recordings
from vlactl.hub.manifest import resume_point
from vlactl.launch.plan import Plan
from vlactl.launch.status import (
    Heartbeat,
    StopFlag,
    join_supervisor,
    write_failure,
    write_result,
)
from vlactl.report.sinks import MetricsLog
from vlactl.rollout.collect import Collector, StopRequested
from vlactl.rollout.episodes import TrainingEpisodes, evaluation_episodes, select_pairs
from vlactl.train.batch import Grid
from vlactl.train.checkpoint import load_checkpoint
from vlactl.train.loop import FINISHED, PREEMPTED, Trainer
from vlactl.train.optim import make_optimizer

LOG = logging.getLogger(__name__)


def main() -> int:
    """Run one job on this rank; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--job", choices=("train", "eval"), required=True)
    arguments = parser.parse_args()
    rank = int(os.environ["RANK"])
    join_supervisor(rank)
    logs.setup(rank)
    heartbeat, stop = Heartbeat(arguments.run_dir, rank), StopFlag()
    heartbeat.beat("start", 0)
    job = train if arguments.job == "train" else evaluate
    try:
        status = job(arguments.run_dir, heartbeat, stop)
    except Exception as error:
        LOG.exception("rank %d failed", rank)
        write_failure(arguments.run_dir, rank, heartbeat.phase, heartbeat.step, error)
        return int(getattr(error, "exit_code", EXIT_BUG))
    finally:
        leave_world()
    if rank == 0:
        write_result(arguments.run_dir, status)
    return EXIT_OK


def train(run_dir: Path, heartbeat: Heartbeat, stop: StopFlag) -> str:
    """Train from the newest complete checkpoint of the run directory, or from the start."""
    with Parts.build(run_dir, stop, for_training=True) as parts:
        optimizer = make_optimizer(parts.policy.trainable(), parts.config.optim)
        start_step = _resume(run_dir, parts.policy, optimizer)
        log = MetricsLog(run_dir, parts.config.sinks if parts.world.is_main else ())
        if parts.world.is_main:
            log.resume_from(start_step)
            forget_recordings(run_dir / "rollouts", start_step + 1)
            forget_recordings(run_dir / "evals", start_step + 1)
        parts.world.barrier()
        evaluation = {
            "tasks": parts.config.rollout.tasks,
            "trials": parts.config.eval.trials,
            "repeats": 1,
        }
        try:
            return Trainer(
                config=parts.config,
                run_dir=run_dir,
                world=parts.world,
                grid=_grid(parts.plan, parts.config),
                needs=parts.config.algorithm.needs(),
                episodes=TrainingEpisodes(
                    parts.spec.tasks,
                    parts.config.rollout,
                    group_size=parts.plan.group_size,
                    seed=parts.config.train.seed,
                    start_step=start_step,
                ),
                policy=parts.policy,
                algorithm=parts.algorithm,
                optimizer=optimizer,
                collector=parts.collector,
                evaluator=parts.evaluator(evaluation),
                log=log,
                heartbeat=heartbeat,
                stop=stop,
                start_step=start_step,
            ).run()
        finally:
            log.close()


def evaluate(run_dir: Path, heartbeat: Heartbeat, stop: StopFlag) -> str:
    """Play the episodes of the request with the requested weights."""
    request = json.loads((run_dir / EVAL_REQUEST).read_text())
    with Parts.build(run_dir, stop, for_training=False) as parts:
        if request["checkpoint"]:
            load_checkpoint(Path(request["checkpoint"]), parts.policy.module)
        try:
            parts.evaluator(request).run(
                run_dir, lambda done, total: heartbeat.beat("evaluate", 0, done, total)
            )
        except StopRequested:
            return PREEMPTED
        return FINISHED


@dataclass(slots=True, kw_only=True)
class Parts:
    """What both jobs need, built on every rank; leaving the block stops the simulators."""

    config: RunConfig
    plan: Plan
    world: World
    spec: EnvSpec
    env: Environment
    policy: Policy
    algorithm: Algorithm
    collector: Collector
    stop: StopFlag

    @classmethod
    def build(cls, run_dir: Path, stop: StopFlag, *, for_training: bool) -> Parts:
        """Join the process group and build environment, algorithm and policy.

        The environment comes first: what it refuses is refused before a large model is loaded.
        """
        config = load_resolved(run_dir / "config.json")
        plan = Plan.from_json((run_dir / "plan.json").read_text())
        torch.set_num_threads(plan.threads_per_rank)
        world = start_world(plan.device)
        observes_ends = for_training and config.algorithm.needs().final_values
        spec, env = _build_environment(config, plan, world, observes_ends=observes_ends)
        algorithm = registry.load_factory(registry.find("algorithm", config.algorithm.name))(
            config.algorithm
        )
        policy = build_policy(config, spec, world.device, for_training=for_training)
        collector = Collector(
            env,
            policy,
            num_slots=plan.slots_per_env_rank,
            batch_size=plan.inference_batch_size,
            max_restarts=config.rollout.max_restarts_per_step,
            should_stop=lambda: stop.requested,
        )
        return cls(
            config=config,
            plan=plan,
            world=world,
            spec=spec,
            env=env,
            policy=policy,
            algorithm=algorithm,
            collector=collector,
            stop=stop,
        )

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: object) -> None:
        self.env.close()

    def evaluator(self, request: Mapping[str, Any]) -> Evaluator:
        """An evaluator for the wanted tasks, trials and repeats."""
        config = self.config
        temperature = config.eval.temperature or config.rollout.temperature
        pairs = select_pairs(self.spec.tasks, request["tasks"], request["trials"])
        return Evaluator(
            collector=self.collector,
            episodes=evaluation_episodes(pairs, repeats=request["repeats"], seed=config.train.seed),
            tasks=self.spec.tasks,
            mode=Greedy() if config.eval.greedy else Sample(temperature, config.eval.top_k),
            world=self.world,
            stop=self.stop,
            header={
                "mode": "greedy" if config.eval.greedy else "sampled",
                "temperature": None if config.eval.greedy else temperature,
                "top_k": None if config.eval.greedy else config.eval.top_k,
                "checkpoint": request.get("checkpoint", ""),
                "versions": logs.versions(),
                "env": config.env.model_dump(mode="json"),
                "model": config.model.model_dump(mode="json"),
            },
        )


def _build_environment(
    config: RunConfig, plan: Plan, world: World, *, observes_ends: bool
) -> tuple[EnvSpec, Environment]:
    plugin = registry.find("environment", config.env.name)
    if not isinstance(plugin, EnvironmentPlugin):
        raise ConfigError(f'plugin "{config.env.name}" does not describe an environment')
    spec: EnvSpec = load_object(plugin.spec)(config.env)
    context = EnvContext(
        num_slots=plan.slots_per_env_rank,
        cameras=config.model.cameras,
        device_index=-1 if world.device.index is None else world.device.index,
        final_observations=observes_ends,
    )
    env: Environment = registry.load_factory(plugin)(config.env, context)
    return spec, env


def build_policy(
    config: RunConfig,
    spec: EnvSpec,
    device: torch.device,
    *,
    for_training: bool,
    for_export: bool = False,
) -> Policy:
    """The configured policy with its initial weights."""
    needs = config.algorithm.needs()
    context = ModelContext(
        env=spec,
        device=device,
        dtype=getattr(torch, config.train.dtype),
        seed=config.train.seed,
        values=needs.values,
        lora=_lora(config.lora) if config.lora.rank else None,
        reference=for_training and needs.reference,
        activation_checkpointing=config.train.activation_checkpointing if for_training else "none",
        for_export=for_export,
    )
    plugin = registry.find("model", config.model.name)
    policy: Policy = registry.load_factory(plugin)(config.model, context)
    return policy


def _lora(config: LoraConfig) -> LoraContext:
    return LoraContext(
        rank=config.rank,
        alpha=config.alpha or float(config.rank),
        targets=config.targets,
        adapter=config.adapter,
    )


def _resume(run_dir: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> int:
    checkpoint, skipped = resume_point(run_dir)
    for reason in skipped:
        LOG.warning("checkpoint passed over: %s", reason)
    if checkpoint is None:
        return 0
    LOG.info("going on from %s", checkpoint)
    return load_checkpoint(checkpoint, policy.module, optimizer)


def _grid(plan: Plan, config: RunConfig) -> Grid:
    return Grid(
        group_size=plan.group_size,
        num_trajectories=plan.episodes_per_step,
        chunks_per_episode=plan.chunks_per_episode,
        chunk_length=plan.chunk_length,
        max_episode_steps=plan.max_episode_steps,
        global_batch_size=config.optim.global_batch_size,
        auto_reset=config.rollout.auto_reset,
        value_level=config.algorithm.needs().values,
    )


if __name__ == "__main__":
    sys.exit(main())
