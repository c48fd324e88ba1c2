"""The supervised stage: imitate demonstrations, and measure now and then how well that goes.

A step draws a batch of samples at random, by (seed, step) alone, so that neither a resume nor the
number of ranks changes it; each actor rank takes an equal share. The loss is the mean over all
labels of the batch, however it is shared and split. Pictures are shifted and recoloured
(Kostrikov et al. 2020, arXiv:2004.13649), which is what keeps a policy that learns from nothing
from learning the pictures by heart.

Shapes: N samples, B of a batch, H and W of a picture.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from vlactl.api import noise
from vlactl.api.contracts import ObservationBatch, SupervisedBatch
from vlactl.config.run import RunConfig, SupervisedConfig
from vlactl.demonstrations.samples import Samples
from vlactl.distributed.exchange import sum_gradients
from vlactl.distributed.roles import World
from vlactl.evaluate.results import EVAL_SUMMARY
from vlactl.evaluate.runner import Evaluator
from vlactl.hub.manifest import step_name
from vlactl.launch.status import Heartbeat, StopFlag
from vlactl.report.sinks import MetricsLog
from vlactl.rollout.collect import StopRequested
from vlactl.train.loop import FINISHED, PREEMPTED
from vlactl.train.meters import Averages, Timer
from vlactl.train.optim import guarded_step, half_cosine
from vlactl.train.saving import RUNNING, Checkpoints
from vlactl.train.state import ActingWeights, Actor

FINAL_LR = 0.02
"""Of the learning rate, which falls along half a cosine."""
_READERS = 2
_LOOKAHEAD = 6


class Share(NamedTuple):
    """An actor's part of a batch, and how many actions are labels in all parts together."""

    batch: SupervisedBatch
    num_labels: int


@dataclass(slots=True, kw_only=True)
class Imitator:
    """All parts of a supervised run on one rank; `run` is the story."""

    config: RunConfig
    run_dir: Path
    world: World
    samples: Samples | None
    actor: Actor | None
    weights: ActingWeights
    checkpoints: Checkpoints
    evaluator: Evaluator
    log: MetricsLog
    heartbeat: Heartbeat
    stop: StopFlag
    start_step: int

    def run(self) -> str:
        """Train up to `sft.steps` or `sft.stop_at`; returns "finished" or "preempted"."""
        config, done = self.config.sft, self.start_step
        averages, timer = Averages(), Timer(self.world.device)
        try:
            is_enough = self._evaluate_if_due(done)  # what a stop may have cut short
            for step, share in () if is_enough else self._shares():
                self._heed_stop()
                with timer("step"):
                    self._train_step(step, share, averages)
                done = step + 1
                self.checkpoints.poll()
                if done % config.log_every == 0 or done == config.steps:
                    self._write_down(step, averages, timer)
                    averages, timer = Averages(), Timer(self.world.device)
                if self._is_due(config.save_every, done):
                    self.heartbeat.beat("checkpoint", step)
                    is_last = done == config.steps
                    self.checkpoints.save(done, status=FINISHED if is_last else RUNNING)
                if self._evaluate_if_due(done):
                    break
        except StopRequested:
            self._save(done, PREEMPTED)
            return PREEMPTED
        self._save(done, FINISHED)
        return FINISHED

    def _save(self, done: int, status: str) -> None:
        self.heartbeat.beat("checkpoint", max(0, done - 1))
        self.checkpoints.save(done, status=status, now=True)

    def _heed_stop(self) -> None:
        if self.world.everyone.any(self.stop.requested):
            raise StopRequested

    def _is_due(self, every: int, done: int) -> bool:
        return every > 0 and (done % every == 0 or done == self.config.sft.steps)

    # ------------------------------------------------------------------ a step
    def _train_step(self, step: int, share: Share | None, averages: Averages) -> None:
        if self.actor is None or share is None:
            return
        self.heartbeat.beat("imitate", step)
        config, policy = self.config, self.actor.policy
        loss = torch.zeros((), device=self.world.device)
        batch = self._changed(step, share.batch)
        for part in split(batch, config.optim.micro_batch_size):
            term = policy.supervised_loss(part) * (part.valid_SK.sum() / share.num_labels)
            term.backward()
            loss += term.detach()
        trained = [parameter for _, parameter in policy.trainable()]
        if not self.actor.is_sharded:  # else every backward pass has done so
            sum_gradients(trained, self.world.actors)
        for group in self.actor.optimizer.param_groups:
            group["lr"] = learning_rate(config.sft, step)
        total = float(self.world.actors.sum(loss))
        norm = guarded_step(
            self.actor.optimizer,
            total,
            clip_grad=config.optim.clip_grad,
            on_nonfinite=config.optim.on_nonfinite,
        )
        averages.add("loss", total)
        averages.add("actor/grad_norm", norm or 0.0)
        averages.add("actor/lr", learning_rate(config.sft, step))

    def _write_down(self, step: int, averages: Averages, timer: Timer) -> None:
        metrics: dict[str, float] = {}
        if self.actor is not None:
            means = averages.reduced(self.world.actors)
            metrics = {f"train/{name}": value for name, value in means.items()}
        every = self.config.sft.log_every
        num_steps = step + 1 - max(self.start_step, step - step % every)  # since the last line
        times = {
            name: seconds / num_steps
            for name, seconds in timer.reduced(self.world.everyone).items()
        }
        known: dict[str, float] = {}
        for of_rank in self.world.everyone.gather(metrics):
            known |= of_rank
        if self.world.is_main:
            self.log.log(step, known | times)

    # ------------------------------------------------------------------ batches
    def _shares(self) -> Iterator[tuple[int, Share | None]]:
        """This rank's share of the batches of all steps that are left, made ahead by threads."""
        steps = range(self.start_step, self.config.sft.steps)
        if self.actor is None:
            yield from ((step, None) for step in steps)
            return
        with ThreadPoolExecutor(_READERS) as readers:
            coming: deque[Future[Share]] = deque()
            for step in steps:
                ahead = min(steps.stop, step + _LOOKAHEAD)
                for later in range(step + len(coming), ahead):
                    coming.append(readers.submit(self._share, later))
                yield step, coming.popleft().result()

    def _share(self, step: int) -> Share:
        config, actors = self.config.sft, self.world.actors
        rng = noise.generator("sft", self.config.train.seed, step)
        assert self.samples is not None, "actors have samples"
        rows = rng.integers(0, len(self.samples), config.batch_size)
        batch = make_batch(self.samples, rows[actors.index :: actors.size], config)
        valid_NK = self.samples.valid_NK[rows]
        return Share(batch, valid_NK.size if config.whole_chunks else int(valid_NK.sum()))

    def _changed(self, step: int, batch: SupervisedBatch) -> SupervisedBatch:
        """The batch as the policy sees it, with other pictures in every step."""
        actors, images = self.world.actors, dict(batch.observations.images)
        for camera, pictures in images.items():
            rng = noise.generator("sft-pictures", self.config.train.seed, step, camera)
            changes = Changes.draw(rng, self.config.sft).of(slice(actors.index, None, actors.size))
            images[camera] = changes.apply(pictures, self.world.device)
        return replace(batch, observations=replace(batch.observations, images=images))

    # ------------------------------------------------------------------ results
    def _evaluate_if_due(self, done: int) -> bool:
        """Measure the success rate after `done` steps; whether it is as high as is wanted."""
        if done == 0 or not self._is_due(self.config.sft.eval_every, done):
            return False
        folder = self.run_dir / "evals" / step_name(done)
        is_known = self.world.everyone.any((folder / EVAL_SUMMARY).exists())
        timer = Timer(self.world.device)
        with timer("eval"):
            metrics = self._evaluate(folder, done)
        times = timer.reduced(self.world.everyone)
        if self.world.is_main and not is_known:
            self.log.log(done - 1, metrics | times)
        wanted = self.config.sft.stop_at
        return wanted is not None and metrics["eval/success_once"] >= wanted

    def _evaluate(self, folder: Path, done: int) -> dict[str, float]:
        self.weights.begin(done, check=False)
        try:
            return self.evaluator.run(
                folder,
                done,
                lambda finished, total: self.heartbeat.beat("evaluate", done - 1, finished, total),
            )
        finally:
            self.weights.end()
            self.weights.wait()


def learning_rate(config: SupervisedConfig, step: int) -> float:
    """Linear up to the peak, then along half a cosine."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    passed = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * half_cosine(passed, FINAL_LR)


def make_batch(samples: Samples, rows: np.ndarray, config: SupervisedConfig) -> SupervisedBatch:
    """The samples of `rows`."""
    words, valid_SK = samples.instructions, samples.valid_NK[rows]
    return SupervisedBatch(
        observations=ObservationBatch(
            images={camera: pictures[rows] for camera, pictures in samples.pictures.items()},
            state=samples.states_NP[rows],
            instructions=tuple(words[index] for index in samples.instruction_N[rows]),
        ),
        actions_SKA=samples.actions_NKA[rows],
        valid_SK=np.ones_like(valid_SK) if config.whole_chunks else valid_SK,
        label_width=config.label_width,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What is done to the pictures of a camera in a batch.

    Attributes:
        shifts_B2: int64, pixels down and to the right.
        gains_BC: float32, factors per colour.
        offsets_BC: float32, levels that are added afterwards.
    """

    shifts_B2: np.ndarray
    gains_BC: np.ndarray
    offsets_BC: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator, config: SupervisedConfig) -> Changes:
        """At random; a picture becomes brighter rather than more colourful."""
        size, strength = config.batch_size, config.recolour
        tint = 0.3 * rng.normal(size=(2, size, 3)) + rng.normal(size=(2, size, 1))
        return cls(
            shifts_B2=rng.integers(-config.shift, config.shift + 1, (size, 2)),
            gains_BC=np.exp(strength * tint[0]).astype(np.float32),
            offsets_BC=(128 * strength * tint[1]).astype(np.float32),
        )

    def of(self, rows: slice) -> Changes:
        """Those of some rows of the batch."""
        return Changes(
            shifts_B2=self.shifts_B2[rows],
            gains_BC=self.gains_BC[rows],
            offsets_BC=self.offsets_BC[rows],
        )

    def apply(self, pictures_BHWC: np.ndarray, device: torch.device) -> np.ndarray:
        """Changed pictures, uint8; what a shift uncovers repeats the edge."""
        pictures = torch.from_numpy(pictures_BHWC).to(device)
        size, height, width, _ = pictures.shape
        down, right = torch.from_numpy(self.shifts_B2).to(device).T
        y = (torch.arange(height, device=device) - down[:, None]).clamp(0, height - 1)
        x = (torch.arange(width, device=device) - right[:, None]).clamp(0, width - 1)
        rows = torch.arange(size, device=device)[:, None, None]
        moved = pictures[rows, y[:, :, None], x[:, None, :]].float()
        gains, offsets = (
            torch.from_numpy(values).to(device)[:, None, None]
            for values in (self.gains_BC, self.offsets_BC)
        )
        levels = (moved * gains + offsets).round().clamp(0, 255)
        return levels.to(torch.uint8).cpu().numpy()


def split(batch: SupervisedBatch, size: int) -> Iterator[SupervisedBatch]:
    """Micro-batches of at most `size` samples."""
    seen = batch.observations
    for start in range(0, len(seen), size):
        part = slice(start, start + size)
        yield SupervisedBatch(
            observations=ObservationBatch(
                images={camera: pictures[part] for camera, pictures in seen.images.items()},
                state=seen.state[part],
                instructions=seen.instructions[part],
            ),
            actions_SKA=batch.actions_SKA[part],
            valid_SK=batch.valid_SK[part],
            label_width=batch.label_width,
        )
