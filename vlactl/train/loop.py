"""The training step. Read this first.

One step on every rank: plan the episodes, play them, turn them into advantages, update the policy,
log, evaluate, save. Who computes what is decided before a run starts (`vlactl.launch.plan`);
formulas live in algorithm plugins, simulators in environment plugins, collectives in
`vlactl.distributed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vlactl.api.contracts import (
    Advantages,
    Algorithm,
    Episode,
    Needs,
    Policy,
    Sample,
    TrajectoryBatch,
)
from vlactl.config.run import RunConfig
from vlactl.distributed.roles import World, sum_gradients
from vlactl.errors import TrainingError
from vlactl.evaluate.results import EVAL_SUMMARY
from vlactl.evaluate.runner import Evaluator, Recorder, prune_recordings
from vlactl.hub.manifest import step_name
from vlactl.launch.status import Heartbeat, StopFlag
from vlactl.report.sinks import MetricsLog
from vlactl.rollout.collect import Collection, Collector, Lanes, StopRequested, Trajectory
from vlactl.rollout.episodes import TrainingEpisodes, share_of_rank
from vlactl.train.batch import Grid, Samples, pack, select_samples
from vlactl.train.checkpoint import save_checkpoint
from vlactl.train.meters import Averages, RolloutTally, Timer, rollout_metrics
from vlactl.train.optim import freeze_policy, guarded_step, learning_rates

FINISHED, PREEMPTED = "finished", "preempted"


@dataclass(slots=True, kw_only=True)
class Trainer:
    """All parts of a run on one rank; `run` is the story."""

    config: RunConfig
    run_dir: Path
    world: World
    grid: Grid
    episodes: TrainingEpisodes
    policy: Policy
    algorithm: Algorithm
    needs: Needs
    optimizer: torch.optim.Optimizer
    collector: Collector
    evaluator: Evaluator
    log: MetricsLog
    heartbeat: Heartbeat
    stop: StopFlag
    start_step: int

    def run(self) -> str:
        """Train up to `train.max_steps`; returns "finished", or "preempted" when asked to stop."""
        done = self.start_step
        try:
            self.evaluate_if_due(done)  # what a stop may have cut short
            for step in range(self.start_step, self.config.train.max_steps):
                timer = Timer()
                with timer("step"):
                    metrics = self.train_step(step, timer)
                self.write_down(step, metrics | timer.reduced(self.world))
                done = step + 1
                if self._is_due(self.config.checkpoint.every or self.config.train.max_steps, done):
                    self.save(done)
                self.evaluate_if_due(done)
        except StopRequested:
            self.save(done)
            return PREEMPTED
        return FINISHED

    def train_step(self, step: int, timer: Timer) -> dict[str, float]:
        """One step of reinforcement learning; returns its metrics."""
        with timer("generate_rollouts"):
            trajectories, metrics = self.roll_out(step)
        with timer("cal_adv_and_returns"):
            self.heartbeat.beat("advantages", step)
            batch = pack(trajectories, self.grid)
            advantages = self.algorithm.advantages(batch, self.world)
        metrics |= rollout_metrics(batch, advantages, self.world)
        with timer("actor_training"):
            metrics |= self.update(step, trajectories, batch, advantages)
        return metrics

    def roll_out(self, step: int) -> tuple[list[Trajectory], dict[str, float]]:
        """Play this rank's share of the step's episodes; an unfinished rollout is thrown away.

        Groups that teach nothing are replaced by new ones, as often as the algorithm asks for it.
        """
        mine = share_of_rank(self.episodes.next_step(), self.world.rank, self.world.size)
        tally = RolloutTally()
        trajectories = tally.add(self.play(step, mine, attempt=0))
        for attempt in range(1, self.needs.resample_rounds + 1):
            idle = self.idle_groups(trajectories)
            if not self.world.any(len(idle) > 0):
                break
            # First of all, because the pictures of a step may be half of what the host can hold.
            trajectories = [t for t in trajectories if t.episode.group not in idle]
            replacements = self.episodes.replacements(idle, attempt)
            trajectories += tally.add(
                self.play(step, replacements, attempt), num_replaced=len(idle)
            )
        metrics = tally.reduced(self.world)
        complete = self.grid.num_trajectories / self.grid.group_size - metrics["env/dropped_groups"]
        if complete < self.config.rollout.min_groups:
            raise TrainingError(
                f"only {complete:.0f} groups are complete, simulators fail too often: "
                f"{tally.last_failure or 'on other ranks'}",
                hint="all reasons are in the rank logs; `vlactl doctor` checks this machine",
            )
        return trajectories, metrics

    def play(self, step: int, episodes: Sequence[Episode], attempt: int) -> Collection:
        """Play episodes with the present policy and write down how they went."""
        folder = self.run_dir / "rollouts" / step_name(step + 1)
        recorder = Recorder(folder, self.world.rank, durable=False)
        first_number = attempt * self.grid.num_slots
        self.collector.on_finished = lambda t: recorder.record(
            t, first_number + self.grid.number(t.episode)
        )
        lanes = Lanes(num_chunks=self.grid.chunks_per_episode, successor=self.episodes.successor)
        collection = self.collector.collect(
            episodes,
            Sample(self.config.rollout.temperature),
            lambda done, total: self.heartbeat.beat("rollout", step, done, total),
            lanes=lanes if self.config.rollout.auto_reset else None,
            value_ends=self.needs.final_values,
        )
        if self.world.any(self.stop.requested):
            raise StopRequested
        if self.world.is_main:
            prune_recordings(self.run_dir / "rollouts", keep=2)
        return collection

    def idle_groups(self, trajectories: list[Trajectory]) -> list[int]:
        """Complete groups of this rank from which the algorithm can learn nothing."""
        groups = sorted({trajectory.episode.group for trajectory in trajectories})
        useful_N = self.algorithm.useful_groups(pack(trajectories, self.grid)).tolist()
        return [group for group, useful in zip(groups, useful_N, strict=True) if not useful]

    def update(
        self,
        step: int,
        trajectories: list[Trajectory],
        batch: TrajectoryBatch,
        advantages: Advantages,
    ) -> dict[str, float]:
        """Optimizer steps over the step's samples; returns `train/...`."""
        averages = Averages()
        seed, epochs = self.config.train.seed, self.config.optim.update_epochs
        for epoch in range(epochs):
            for slots in self.grid.deal(seed, step, epoch):
                samples = select_samples(
                    slots, trajectories, batch, advantages, self.grid, self.algorithm, self.world
                )
                updated = self.world.any(len(samples) > 0)
                averages.add("actor/updates", float(updated) / self.world.size, 1 / self.world.size)
                if updated:
                    self.optimizer_step(step, samples, averages)
        means = averages.reduced(self.world)
        means |= self.algorithm.derived_metrics(means)
        means |= learning_rates(self.optimizer, is_warmup=self.is_warmup(step))
        metrics = {f"train/{name}": value for name, value in means.items()}
        for short, name in (("loss", "total_loss"), ("entropy_loss", "entropy_loss")):
            if f"train/actor/{name}" in metrics:
                metrics[f"train/{short}"] = metrics[f"train/actor/{name}"]
        return metrics

    def is_warmup(self, step: int) -> bool:
        """Whether only the value head is trained in this step."""
        return step < self.needs.critic_warmup_steps

    def optimizer_step(self, step: int, samples: Samples, averages: Averages) -> None:
        """Accumulate the gradient over this rank's micro-batches, sum it over ranks, step."""
        sums: dict[str, torch.Tensor] = {}
        micro_batches = samples.micro_batches(
            self.config.optim.micro_batch_size,
            self.config.rollout.temperature,
            self.world.device,
            critic_only=self.is_warmup(step),
        )
        done = 0
        for observed, judged in micro_batches:
            self.heartbeat.beat("update", step, done, len(samples))
            if self.needs.reference:
                reference_SKA = self.policy.reference_logprobs(observed)
                judged = replace(judged, reference_logprobs_SKA=reference_SKA)
            terms = self.algorithm.loss(self.policy.evaluate_actions(observed), judged)
            terms.loss.backward()
            for name, part in {"actor/total_loss": terms.loss, **terms.parts}.items():
                sums[name] = sums.get(name, 0.0) + part.detach()
            averages.add_terms(terms.metrics)
            done += len(observed.observations)
        trained = [parameter for _, parameter in self.policy.trainable()]
        if self.is_warmup(step):
            trained = freeze_policy(self.policy.trainable())
        sum_gradients(trained, self.world)
        losses = self.world.sum_named(sums)
        norm = guarded_step(
            self.optimizer,
            losses["actor/total_loss"],
            clip_grad=self.config.optim.clip_grad,
            on_nonfinite=self.config.optim.on_nonfinite,
        )
        averages.add("actor/skipped_updates", float(norm is None))
        if norm is not None:
            averages.add("actor/grad_norm", norm)
            for name, value in losses.items():
                averages.add(name, value)

    def evaluate_if_due(self, done: int) -> None:
        """Measure and log the success rate after `done` finished steps, once."""
        folder = self.run_dir / "evals" / step_name(done)
        if done == 0 or not self._is_due(self.config.eval.every, done):
            return
        if self.world.any((folder / EVAL_SUMMARY).exists()):
            return
        timer = Timer()
        with timer("eval"):
            metrics = self.evaluator.run(
                folder,
                lambda finished, total: self.heartbeat.beat("evaluate", done - 1, finished, total),
            )
        self.write_down(done - 1, metrics | timer.reduced(self.world))

    def write_down(self, step: int, metrics: dict[str, float]) -> None:
        """Log metrics, on one rank."""
        if self.world.is_main:
            self.log.log(step, metrics)

    def save(self, done: int) -> None:
        """Write a checkpoint after `done` finished steps."""
        self.heartbeat.beat("checkpoint", max(0, done - 1))
        save_checkpoint(
            self.run_dir,
            done,
            self.policy.module,
            self.optimizer,
            self.world,
            keep=self.config.checkpoint.keep,
            trained_only=self.config.lora.rank > 0,
        )

    def _is_due(self, every: int, done: int) -> bool:
        """Every so many steps, and after the last one; evaluations (0 = none) and checkpoints."""
        return every > 0 and (done % every == 0 or done == self.config.train.max_steps)
