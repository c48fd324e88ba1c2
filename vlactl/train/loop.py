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
from dataclasses import dataclass, field
from pathlib import Path

from vlactl.api.contracts import Algorithm, Episode, Needs, Sample
from vlactl.config.run import RunConfig
from vlactl.distributed.exchange import to_actors
from vlactl.distributed.roles import World
from vlactl.errors import TrainingError
from vlactl.evaluate.results import EVAL_SUMMARY
from vlactl.evaluate.runner import Evaluator, Recorder, prune_recordings
from vlactl.hub.manifest import step_name
from vlactl.launch.status import Heartbeat, StopFlag
from vlactl.report.sinks import MetricsLog
from vlactl.rollout.collect import (
    Collection,
    Lanes,
    Request,
    Roller,
    StopRequested,
    Trajectory,
    kept,
)
from vlactl.rollout.episodes import TrainingEpisodes, share_of_rank
from vlactl.rollout.spill import Spill
from vlactl.train.batch import Grid, pack
from vlactl.train.guards import check_versions
from vlactl.train.meters import RolloutTally, Timer, rollout_metrics
from vlactl.train.saving import Checkpoints
from vlactl.train.state import ActingWeights
from vlactl.train.update import Updater

FINISHED, PREEMPTED = "finished", "preempted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """Episodes of a step: trajectories by group, and how it went over all ranks."""

    groups: dict[int, list[Trajectory]]
    metrics: dict[str, float]


@dataclass(slots=True, kw_only=True)
class Trainer:
    """All parts of a run on one rank; `run` is the story.

    `roller` is None on ranks that neither play nor act, `updater` on those that do not train.
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
    updater: Updater | None
    weights: ActingWeights
    checkpoints: Checkpoints
    evaluator: Evaluator
    spill: Spill | None
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
                timer = Timer(self.world.device)
                with timer("step"):
                    metrics = self.train_step(step, timer)
                self.write_down(step, metrics, timer)
                done = step + 1
                self.heartbeat.beat("checkpoint", step)
                self.checkpoints.poll()
                if self._is_due(self.config.checkpoint.every or self.config.train.max_steps, done):
                    self.save(done)
                self.evaluate_if_due(done)
        except StopRequested:
            self.weights.wait()
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
        self.episodes.observe(metrics)
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
        request = Request(
            episodes=episodes,
            mode=Sample(self.config.rollout.temperature),
            version=version,
            lanes=lanes if self.config.rollout.auto_reset else None,
            value_ends=self.needs.final_values,
        )
        collection = self.roller.collect(
            request, lambda done, total: self.heartbeat.beat("rollout", step, done, total)
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
            groups = to_actors(played.groups, self.world, lambda group: self.keep(step, group))
        return Played(groups=groups, metrics=played.metrics)

    def keep(self, step: int, group: list[Trajectory]) -> list[Trajectory]:
        """Put the pictures of a group that has arrived where there is room for them."""
        self.heartbeat.beat("exchange", step)
        for trajectory in group:
            trajectory.observations = [kept(o, self.spill) for o in trajectory.observations]
        return group

    def learn(self, step: int, played: Played, timer: Timer) -> dict[str, float]:
        """Advantages of the step's episodes, and updates of the policy with them."""
        if self.updater is None:
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
            metrics |= self.updater.update(step, trajectories, batch, advantages)
        return metrics

    def evaluate_if_due(self, done: int) -> None:
        """Measure and log the success rate after `done` finished steps, once."""
        folder = self.run_dir / "evals" / step_name(done)
        if done == 0 or not self._is_due(self.config.eval.every, done):
            return
        if self.world.everyone.any((folder / EVAL_SUMMARY).exists()):
            return
        timer = Timer(self.world.device)
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
