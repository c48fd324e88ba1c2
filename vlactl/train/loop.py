"""The training step. Read this first.

One step: bring the acting weights up to date, play episodes, give whole groups to the actors, turn
them into advantages, update the policy, log, evaluate, save. Every rank tells this story; a verb
does nothing on a rank that does not play its role. Who does what is decided before a run starts
(`vlactl.launch.plan`); formulas live in algorithm plugins, simulators in environment plugins,
collectives in `vlactl.distributed`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from vlactl.api.contracts import Algorithm, Episode, Needs, Policy, Sample
from vlactl.config.run import RunConfig
from vlactl.distributed.exchange import sum_gradients, to_actors
from vlactl.distributed.roles import World
from vlactl.errors import TrainingError
from vlactl.evaluate.results import EVAL_SUMMARY
from vlactl.evaluate.runner import Evaluator, Recorder, prune_recordings
from vlactl.hub.manifest import step_name
from vlactl.launch.status import Heartbeat, StopFlag
from vlactl.report.sinks import MetricsLog
from vlactl.rollout.collect import Collection, Lanes, Roller, StopRequested, Trajectory
from vlactl.rollout.episodes import TrainingEpisodes, share_of_rank
from vlactl.train.batch import Grid, Padding, Samples, pack, select_samples
from vlactl.train.checkpoint import Checkpoints
from vlactl.train.guards import Mismatch, check_versions
from vlactl.train.meters import Averages, RolloutTally, Timer, rollout_metrics
from vlactl.train.optim import freeze_policy, guarded_step, learning_rates
from vlactl.train.state import ActingWeights, Actor

FINISHED, PREEMPTED = "finished", "preempted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """Episodes of a step: trajectories by group, and how it went over all ranks."""

    groups: dict[int, list[Trajectory]]
    metrics: dict[str, float]


@dataclass(slots=True, kw_only=True)
class Trainer:
    """All parts of a run on one rank; `run` is the story.

    `roller` is None on ranks that neither play nor act, `actor` on those that do not train.
    """

    config: RunConfig
    run_dir: Path
    world: World
    grid: Grid
    env_processes: Sequence[int]
    needs: Needs
    episodes: TrainingEpisodes
    algorithm: Algorithm
    roller: Roller | None
    actor: Actor | None
    weights: ActingWeights
    checkpoints: Checkpoints
    evaluator: Evaluator
    log: MetricsLog
    heartbeat: Heartbeat
    stop: StopFlag
    start_step: int
    ahead: Played | None = field(default=None, init=False)
    """With `train.staleness`: episodes of the next step."""

    def run(self) -> str:
        """Train up to `train.max_steps`; returns "finished", or "preempted" when asked to stop."""
        done = self.start_step
        try:
            self.evaluate_if_due(done)  # what a stop may have cut short
            for step in range(self.start_step, self.config.train.max_steps):
                timer = Timer()
                with timer("step"):
                    metrics = self.train_step(step, timer)
                self.write_down(step, metrics, timer)
                done = step + 1
                self.checkpoints.poll()
                if self._is_due(self.config.checkpoint.every or self.config.train.max_steps, done):
                    self.save(done)
                self.evaluate_if_due(done)
        except StopRequested:
            self.heartbeat.beat("checkpoint", max(0, done - 1))
            self.checkpoints.save(done, status=PREEMPTED, now=True)
            return PREEMPTED
        self.heartbeat.beat("checkpoint", max(0, done - 1))
        self.checkpoints.finish()
        return FINISHED

    def train_step(self, step: int, timer: Timer) -> dict[str, float]:
        """One step of reinforcement learning; returns what this rank knows of its metrics."""
        if self.world.everyone.any(self.stop.requested):
            raise StopRequested
        played = self.ahead or self.roll_out(step, version=step, timer=timer)
        self.ahead = None
        next_step = step + self.config.train.staleness
        runs_ahead = step < next_step < self.config.train.max_steps
        if runs_ahead:  # actors are ranks of their own: they update while the others play
            with self.acting(step, timer):
                coming = self.play_step(next_step, version=step, timer=timer)
        metrics = played.metrics | self.learn(step, played, timer)
        if runs_ahead:
            self.ahead = self.hand_over(next_step, coming, timer)
        return metrics

    def roll_out(self, step: int, version: int, timer: Timer) -> Played:
        """Play the step's episodes; an unfinished rollout is thrown away."""
        with self.acting(version, timer):
            played = self.play_step(step, version, timer)
        if self.world.everyone.any(self.stop.requested):
            raise StopRequested
        return self.hand_over(step, played, timer)

    @contextmanager
    def acting(self, version: int, timer: Timer) -> Iterator[None]:
        """A block in which policies act: with these weights, and what else they need in place."""
        with timer("sync_weights"):
            self.heartbeat.beat("sync", version)
            self.weights.begin(version, check=version % self.config.train.check_weights_every == 0)
        try:
            yield
        finally:
            self.weights.end()

    def play_step(self, step: int, version: int, timer: Timer) -> Played:
        """Play this rank's share of the step's episodes.

        Groups that teach nothing are replaced by new ones, as often as the algorithm asks for it.
        """
        if self.roller is None:
            return Played(groups={}, metrics={})
        with timer("generate_rollouts"):
            mine = share_of_rank(self.episodes.next_step(), self.world.rank, self.env_processes)
            tally = RolloutTally()
            trajectories = tally.add(self.play(step, version, mine, attempt=0))
            for attempt in range(1, self.needs.resample_rounds + 1):
                if self.world.players.any(self.stop.requested):
                    break
                idle = self.idle_groups(trajectories)
                if not self.world.players.any(len(idle) > 0):
                    break
                # First of all, because pictures of a step may be half of what the host can hold.
                trajectories = [t for t in trajectories if t.episode.group not in idle]
                replacements = self.episodes.replacements(idle, attempt)
                trajectories += tally.add(
                    self.play(step, version, replacements, attempt), num_replaced=len(idle)
                )
        metrics = tally.reduced(self.world.players)
        if not self.world.players.any(self.stop.requested):
            self.check_complete(metrics["env/dropped_groups"], tally.last_failure)
        groups: dict[int, list[Trajectory]] = {}
        for trajectory in trajectories:
            groups.setdefault(trajectory.episode.group, []).append(trajectory)
        return Played(groups=groups, metrics=metrics)

    def play(
        self, step: int, version: int, episodes: Sequence[Episode], attempt: int
    ) -> Collection:
        """Play episodes with the present policy and write down how they went."""
        assert self.roller is not None
        folder = self.run_dir / "rollouts" / step_name(step + 1)
        if self.world.env.is_member:
            recorder = Recorder(folder, self.world.rank, durable=False)
            first_number = attempt * self.grid.num_slots
            self.roller.on_finished = lambda t: recorder.record(
                t, first_number + self.grid.number(t.episode)
            )
        lanes = Lanes(num_chunks=self.grid.chunks_per_episode, successor=self.episodes.successor)
        collection = self.roller.collect(
            episodes,
            Sample(self.config.rollout.temperature),
            version,
            lambda done, total: self.heartbeat.beat("rollout", step, done, total),
            lanes=lanes if self.config.rollout.auto_reset else None,
            value_ends=self.needs.final_values,
        )
        if self.world.env.is_member and self.world.env.is_first:
            prune_recordings(self.run_dir / "rollouts", keep=2)
        return collection

    def idle_groups(self, trajectories: list[Trajectory]) -> list[int]:
        """Complete groups of this rank from which the algorithm can learn nothing."""
        groups = sorted({trajectory.episode.group for trajectory in trajectories})
        useful_N = self.algorithm.useful_groups(pack(trajectories, self.grid)).tolist()
        return [group for group, useful in zip(groups, useful_N, strict=True) if not useful]

    def check_complete(self, dropped: float, last_failure: str) -> None:
        """Refuse a step of which too little is left."""
        complete = self.grid.num_trajectories / self.grid.group_size - dropped
        if complete < self.config.rollout.min_groups:
            raise TrainingError(
                f"only {complete:.0f} groups are complete, simulators fail too often: "
                f"{last_failure or 'on other ranks'}",
                hint="all reasons are in the rank logs; `vlactl doctor` checks this machine",
            )

    def hand_over(self, step: int, played: Played, timer: Timer) -> Played:
        """Give every group to the actor that trains on it."""
        with timer("exchange"):
            self.heartbeat.beat("exchange", step)
            groups = to_actors(played.groups, self.world)
        return Played(groups=groups, metrics=played.metrics)

    def learn(self, step: int, played: Played, timer: Timer) -> dict[str, float]:
        """Advantages of the step's episodes, and updates of the policy with them."""
        if self.actor is None:
            return {}
        trajectories = [t for group in sorted(played.groups) for t in played.groups[group]]
        check_versions(trajectories, step, self.config.train.staleness)
        with timer("cal_adv_and_returns"):
            self.heartbeat.beat("advantages", step)
            batch = pack(trajectories, self.grid)
            advantages = self.algorithm.advantages(batch, self.world.actors)
        metrics = rollout_metrics(batch, advantages, self.world.actors)
        self.weights.wait()
        with timer("actor_training"):
            averages = Averages()
            mismatch = Mismatch(self.config.train.max_mismatch_kl)
            for slots in self.deals(step):
                samples = select_samples(
                    slots,
                    trajectories,
                    batch,
                    advantages,
                    self.grid,
                    self.algorithm,
                    self.world.actors,
                    version=step,
                )
                self.update(step, samples, averages, mismatch)
                mismatch.close(self.world.actors)
        return metrics | mismatch.metrics | self.training_metrics(step, averages)

    def deals(self, step: int) -> Iterator[np.ndarray]:
        """Slots of each optimizer step of all passes over the step's samples."""
        for epoch in range(self.config.optim.update_epochs):
            yield from self.grid.deal(self.config.train.seed, step, epoch)

    def training_metrics(self, step: int, averages: Averages) -> dict[str, float]:
        """`train/...`."""
        assert self.actor is not None
        means = averages.reduced(self.world.actors)
        means |= self.algorithm.derived_metrics(means)
        means |= learning_rates(self.actor.optimizer, is_warmup=self.is_warmup(step))
        metrics = {f"train/{name}": value for name, value in means.items()}
        for short, name in (("loss", "total_loss"), ("entropy_loss", "entropy_loss")):
            if f"train/actor/{name}" in metrics:
                metrics[f"train/{short}"] = metrics[f"train/actor/{name}"]
        return metrics

    def is_warmup(self, step: int) -> bool:
        """Whether only the value head is trained in this step."""
        return step < self.needs.critic_warmup_steps

    def update(self, step: int, samples: Samples, averages: Averages, mismatch: Mismatch) -> None:
        """One optimizer step, where any actor has samples for it."""
        actors = self.world.actors
        size = self.config.optim.micro_batch_size
        num_micro_batches = actors.max(-(-len(samples) // size))
        updated = num_micro_batches > 0
        averages.add("actor/updates", float(updated) / actors.size, 1 / actors.size)
        if not updated:
            return
        padding = None
        if self.actor is not None and self.actor.is_sharded:  # every pass is a collective
            cell = next(cell for cell in actors.gather(samples.cell()) if cell is not None)
            padding = Padding(num_micro_batches=num_micro_batches, cell=cell)
        self.optimizer_step(step, samples, padding, averages, mismatch)

    def optimizer_step(
        self,
        step: int,
        samples: Samples,
        padding: Padding | None,
        averages: Averages,
        mismatch: Mismatch,
    ) -> None:
        """Accumulate the gradient over this rank's micro-batches, sum it over ranks, step."""
        assert self.actor is not None
        sums: dict[str, torch.Tensor] = {}
        micro_batches = samples.micro_batches(
            self.config.optim.micro_batch_size,
            self.config.rollout.temperature,
            self.world.device,
            critic_only=self.is_warmup(step),
            padding=padding,
        )
        for number, (observed, judged) in enumerate(micro_batches):
            self.heartbeat.beat("update", step, number, 0)
            if self.needs.reference:
                reference_SKA = self.actor.reference_logprobs(observed)
                judged = replace(judged, reference_logprobs_SKA=reference_SKA)
            out = self.actor.policy.evaluate_actions(observed)
            mismatch.add(out, judged)
            terms = self.algorithm.loss(out, judged)
            terms.loss.backward()
            for name, part in {"actor/total_loss": terms.loss, **terms.parts}.items():
                sums[name] = sums.get(name, 0.0) + part.detach()
            averages.add_terms(terms.metrics)
        trained = [parameter for _, parameter in self.actor.policy.trainable()]
        if self.is_warmup(step):
            trained = freeze_policy(self.actor.policy.trainable())
        if not self.actor.is_sharded:  # else every backward pass has done so
            sum_gradients(trained, self.world.actors)
        losses = self.world.actors.sum_named(sums)
        norm = guarded_step(
            self.actor.optimizer,
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
        if self.world.everyone.any((folder / EVAL_SUMMARY).exists()):
            return
        timer = Timer()
        with timer("eval"), self.acting(done, timer):
            metrics = self.evaluator.run(
                folder,
                done,
                lambda finished, total: self.heartbeat.beat("evaluate", done - 1, finished, total),
            )
        self.weights.wait()
        self.write_down(done - 1, metrics, timer)

    def write_down(self, step: int, metrics: dict[str, float], timer: Timer) -> None:
        """Log what the ranks know, on one of them."""
        for name, seconds in self.weights.seconds().items():
            timer.add(name, seconds)
        times = timer.reduced(self.world.everyone)
        known: dict[str, float] = {}
        for of_rank in self.world.everyone.gather(metrics):
            known |= of_rank
        if self.world.is_main:
            self.log.log(step, known | times)

    def save(self, done: int) -> None:
        """Write a checkpoint after `done` finished steps."""
        self.heartbeat.beat("checkpoint", max(0, done - 1))
        is_last = done == self.config.train.max_steps
        self.checkpoints.save(done, status=FINISHED if is_last else "running", now=is_last)

    def _is_due(self, every: int, done: int) -> bool:
        """Every so many steps, and after the last one; evaluations (0 = none) and checkpoints."""
        return every > 0 and (done % every == 0 or done == self.config.train.max_steps)
