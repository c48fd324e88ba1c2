"""The parts of a rank, built from the resolved configuration and the plan of its run.

`Parts.build` makes what the rank's roles need; `build_policy` makes a policy for whoever wants one.
"""

from __future__ import annotations

import os
import platform
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
    Needs,
    Policy,
    Sample,
)
from vlactl.config.compose import load_resolved
from vlactl.config.run import LoraConfig, RunConfig
from vlactl.distributed.exchange import Weights
from vlactl.distributed.roles import World, start_world
from vlactl.distributed.sharding import InitialValues, shard
from vlactl.evaluate.runner import Evaluator
from vlactl.launch.hardware import detect
from vlactl.launch.plan import Plan, environment_spec
from vlactl.launch.status import (
    Heartbeat,
    StopFlag,
)
from vlactl.rollout.collect import Collector, Roller, Server
from vlactl.rollout.episodes import (
    evaluation_episodes,
    select_pairs,
)
from vlactl.rollout.inference import LocalInference, RemoteInference, servers_of
from vlactl.rollout.spill import Spill
from vlactl.train.batch import Grid
from vlactl.train.optim import make_optimizer
from vlactl.train.saving import Checkpoints
from vlactl.train.state import ActingWeights, Actor
from vlactl.train.update import Updater


@dataclass(slots=True, kw_only=True)
class Parts:
    """What both jobs need, built on every rank; leaving the block stops the simulators.

    Attributes:
        env: None on a rank without simulators.
        actor: None on a rank that trains nothing.
        acting: the policy that acts here; None on a rank that does not act.
        roller: what this rank does in a rollout; None = nothing.
        spill: takes pictures that host memory cannot hold; None = it can.
    """

    config: RunConfig
    plan: Plan
    world: World
    spec: EnvSpec
    algorithm: Algorithm
    env: Environment | None
    actor: Actor | None
    acting: Policy | None
    weights: ActingWeights
    roller: Roller | None
    spill: Spill | None
    stop: StopFlag

    @classmethod
    def build(
        cls,
        run_dir: Path,
        heartbeat: Heartbeat,
        stop: StopFlag,
        *,
        for_training: bool,
        statistics: Mapping[str, Any] | None = None,
    ) -> Parts:
        """Join the process group and build what the rank's roles need.

        The environment comes first: what it refuses is refused before a large model is loaded.

        Args:
            run_dir: with configuration and plan.
            heartbeat: of this rank.
            stop: whether the job was asked to end.
            for_training: the policy will be updated.
            statistics: see `ModelContext.statistics`.
        """
        config = load_resolved(run_dir / "config.json")
        plan = Plan.from_json((run_dir / "plan.json").read_text())
        torch.set_num_threads(plan.threads_per_rank)
        world = start_world(plan.roles, _device(plan), heartbeat.waiting)
        needs = _needs(config, statistics)
        observes_ends = for_training and needs.final_values
        spec = environment_spec(config)
        env = _build_environment(config, plan, world, observes_ends=observes_ends)
        algorithm = registry.load_factory(registry.find("algorithm", config.algorithm.name))(
            config.algorithm
        )
        actor = _build_actor(config, plan, spec, world, statistics) if for_training else None
        acting, copy = _build_acting(config, spec, world, actor, statistics, for_training)
        spill = Spill(run_dir / "spill") if plan.spill else None
        weights = _build_weights(config, plan, world, actor, copy, heartbeat)
        return cls(
            config=config,
            plan=plan,
            world=world,
            spec=spec,
            algorithm=algorithm,
            env=env,
            actor=actor,
            acting=acting,
            weights=weights,
            roller=_build_roller(config, plan, world, env, acting, weights.exchange, stop, spill),
            spill=spill,
            stop=stop,
        )

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: object) -> None:
        if self.env is not None:
            self.env.close()

    def checkpoints(self, run_dir: Path) -> Checkpoints:
        """Those of the run, of what this rank trains."""
        return Checkpoints(
            run_dir,
            self.actor.policy.module if self.actor else None,
            self.actor.optimizer if self.actor else None,
            self.world,
            self.config.checkpoint,
            trained_only=self.config.lora.rank > 0,
            command=f"vlactl {'sft' if self.config.sft.data else 'train'} --resume",
        )

    def grid(self) -> Grid:
        """The arithmetic of a training step."""
        return Grid(
            group_size=self.plan.group_size,
            num_trajectories=self.plan.episodes_per_step,
            chunks_per_episode=self.plan.chunks_per_episode,
            chunk_length=self.plan.chunk_length,
            max_episode_steps=self.plan.max_episode_steps,
            global_batch_size=self.config.optim.global_batch_size,
            auto_reset=self.config.rollout.auto_reset,
            value_level=self.config.algorithm.needs().values,
        )

    def updater(self, heartbeat: Heartbeat) -> Updater | None:
        """What trains the policy, on actor ranks."""
        if self.actor is None:
            return None
        return Updater(
            config=self.config,
            grid=self.grid(),
            needs=self.config.algorithm.needs(),
            algorithm=self.algorithm,
            actor=self.actor,
            actors=self.world.actors,
            device=self.world.device,
            heartbeat=heartbeat,
        )

    def evaluator(self, request: Mapping[str, Any]) -> Evaluator:
        """An evaluator for the wanted tasks, trials and passes."""
        config, passes = self.config, request["passes"]
        temperature = config.eval.temperature or config.rollout.temperature
        pairs = select_pairs(
            self.spec.tasks, request["tasks"], request["trials"], for_evaluation=True
        )
        return Evaluator(
            roller=self.roller,
            env_processes=self.plan.roles["env"],
            episodes=evaluation_episodes(pairs, passes=passes, seed=config.eval.seed),
            tasks=self.spec.tasks,
            mode=Greedy() if config.eval.greedy else Sample(temperature, config.eval.top_k),
            world=self.world,
            stop=self.stop,
            header={
                "command": request.get("command", ""),
                "policy": request["policy"],
                "mode": "greedy" if config.eval.greedy else "sampled",
                "temperature": None if config.eval.greedy else temperature,
                "top_k": None if config.eval.greedy else config.eval.top_k,
                "passes": passes,
                "horizon": self.spec.max_episode_steps,
                "seed": config.eval.seed,
                "initial_weights_seed": config.train.seed,
                "dtype": config.train.dtype,
                "inference_batch_size": self.plan.inference_batch_size,
                "machine": _machine(self.plan) if self.world.is_main else {},
                "versions": logs.versions(),
                "env": config.env.model_dump(mode="json"),
                "model": config.model.model_dump(mode="json"),
                "lora": config.lora.model_dump(mode="json"),
            },
        )


def _machine(plan: Plan) -> dict[str, Any]:
    """What an evaluation ran on: another kind of device rounds differently."""
    hardware = detect()
    return {
        "device": hardware.device_name,
        "ranks": plan.world_size,
        "nodes": plan.nodes,
        "cpu": hardware.cpu,
        "cores": hardware.cores,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _device(plan: Plan) -> torch.device:
    if plan.device == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", plan.devices[int(os.environ["RANK"])])


def _build_environment(
    config: RunConfig, plan: Plan, world: World, *, observes_ends: bool
) -> Environment | None:
    if not world.env.is_member:
        return None
    context = EnvContext(
        num_slots=_num_slots(plan, world.rank),
        cameras=config.model.cameras,
        device_index=-1 if world.device.index is None else world.device.index,
        final_observations=observes_ends,
    )
    plugin = registry.find("environment", config.env.name)
    env: Environment = registry.load_factory(plugin)(config.env, context)
    return env


def _num_slots(plan: Plan, rank: int) -> int:
    return plan.slots_per_env_rank * plan.roles["env"].count(rank)


def _build_actor(
    config: RunConfig,
    plan: Plan,
    spec: EnvSpec,
    world: World,
    statistics: Mapping[str, Any] | None,
) -> Actor | None:
    """The policy that is trained, sharded where the plan says so, with its optimizer."""
    if not world.actors.is_member:
        return None
    policy = build_policy(
        config,
        spec,
        world.device,
        for_training=True,
        keeps_reference=not plan.sharded,
        statistics=statistics,
    )
    initial = None
    if plan.sharded:
        shard(policy, world.meshes["actor"], master_weights=config.train.master_weights)
        initial = InitialValues(policy) if _needs(config, statistics).reference else None
    return Actor(
        policy=policy,
        optimizer=make_optimizer(policy.trainable(), config.optim),
        is_sharded=plan.sharded,
        initial=initial,
    )


def _build_acting(
    config: RunConfig,
    spec: EnvSpec,
    world: World,
    actor: Actor | None,
    statistics: Mapping[str, Any] | None,
    for_training: bool,
) -> tuple[Policy | None, Policy | None]:
    """The policy that acts on this rank, and the same where actors have to fill it."""
    if not world.rollout.is_member:
        return None, None
    if actor is not None and not actor.is_sharded:
        return actor.policy, None
    policy = build_policy(config, spec, world.device, for_training=False, statistics=statistics)
    return policy, policy if for_training else None


def _build_weights(
    config: RunConfig,
    plan: Plan,
    world: World,
    actor: Actor | None,
    copy: Policy | None,
    heartbeat: Heartbeat,
) -> ActingWeights:
    """What brings the actors' weights to the policies that act."""

    def still_moving() -> None:
        heartbeat.beat(heartbeat.phase, heartbeat.step)

    exchange = Weights(
        list(actor.policy.trainable()) if actor else None,
        list(copy.trainable()) if copy else None,
        getattr(torch, config.train.dtype),
        world,
        still_moving,
    )
    return ActingWeights(
        exchange=exchange,
        copy=copy,
        actor=actor,
        offload=plan.offload if world.players.is_member else (),
        progress=still_moving,
    )


def _build_roller(
    config: RunConfig,
    plan: Plan,
    world: World,
    env: Environment | None,
    acting: Policy | None,
    exchange: Weights,
    stop: StopFlag,
    spill: Spill | None,
) -> Roller | None:
    stages = config.rollout.pipeline_stages
    is_shared = world.env.ranks == world.rollout.ranks
    local = LocalInference(acting, lambda: exchange.version, stages) if acting else None
    if env is None:
        if local is None:
            return None
        clients = [rank for rank, at in servers_of(world).items() if world.rank in at]
        return Server(local, clients, world.messages)
    remote = None
    if not is_shared:
        remote = RemoteInference(servers_of(world)[world.rank], stages, world.messages)
    inference = remote or local
    assert inference is not None, "env and rollout ranks are the same or apart"
    return Collector(
        env,
        inference,
        num_slots=_num_slots(plan, world.rank),
        batch_size=plan.inference_batch_size,
        max_restarts=config.rollout.max_restarts_per_step,
        should_stop=lambda: stop.requested,
        spill=spill,
    )


def build_policy(
    config: RunConfig,
    spec: EnvSpec,
    device: torch.device,
    *,
    for_training: bool,
    for_export: bool = False,
    keeps_reference: bool = True,
    statistics: Mapping[str, Any] | None = None,
) -> Policy:
    """The configured policy with its initial weights.

    Args:
        config: of the run.
        spec: of its environment.
        device: to build on.
        for_training: gradients will be asked for.
        for_export: only `export` will be called.
        keeps_reference: where the algorithm needs a reference policy, the policy provides it.
        statistics: of demonstrations that the policy imitates (`ModelContext.statistics`); it gets
            no value head then, which they could not teach.
    """
    if device.type == "cuda":
        # float32 matrices multiplied in TF32: many times as fast, and logits move by 1e-3.
        torch.set_float32_matmul_precision("high")
    needs = _needs(config, statistics)
    context = ModelContext(
        env=spec,
        device=device,
        dtype=getattr(torch, config.train.dtype),
        seed=config.train.seed,
        values=needs.values,
        lora=_lora(config.lora) if config.lora.rank else None,
        reference=for_training and needs.reference and keeps_reference,
        activation_checkpointing=config.train.activation_checkpointing if for_training else "none",
        for_export=for_export,
        statistics=statistics,
    )
    plugin = registry.find("model", config.model.name)
    policy: Policy = registry.load_factory(plugin)(config.model, context)
    return policy


def _needs(config: RunConfig, statistics: Mapping[str, Any] | None) -> Needs:
    """What the policy must offer: to the algorithm, or to imitation, which asks for nothing."""
    return config.algorithm.needs() if statistics is None else Needs()


def _lora(config: LoraConfig) -> LoraContext:
    return LoraContext(
        rank=config.rank,
        alpha=config.alpha or float(config.rank),
        targets=config.targets,
        adapter=config.adapter,
    )
