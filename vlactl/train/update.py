"""The update of a step on an actor rank: optimizer steps over its share of the samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vlactl.api.contracts import Advantages, Algorithm, Needs, TrajectoryBatch
from vlactl.config.run import RunConfig
from vlactl.distributed.exchange import sum_gradients
from vlactl.distributed.roles import Ranks
from vlactl.launch.status import Heartbeat
from vlactl.rollout.collect import Trajectory
from vlactl.train.batch import Grid, Padding, Samples, select_samples
from vlactl.train.guards import Mismatch
from vlactl.train.meters import Averages
from vlactl.train.optim import freeze_policy, guarded_step, learning_rates, set_learning_rates
from vlactl.train.state import Actor


@dataclass(slots=True, kw_only=True)
class Updater:
    """Updates the policy; all actor ranks call it together."""

    config: RunConfig
    grid: Grid
    needs: Needs
    algorithm: Algorithm
    actor: Actor
    actors: Ranks
    device: torch.device
    heartbeat: Heartbeat

    def update(
        self,
        step: int,
        trajectories: Sequence[Trajectory],
        batch: TrajectoryBatch,
        advantages: Advantages,
    ) -> dict[str, float]:
        """Optimizer steps over the step's samples; returns `train/...`."""
        set_learning_rates(self.actor.optimizer, self.config.optim, step)
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
                self.actors,
                version=step,
            )
            self.update_once(step, samples, averages, mismatch)
        return mismatch.metrics | self.metrics(step, averages)

    def deals(self, step: int) -> Iterator[np.ndarray]:
        """Slots of each optimizer step of all passes over the step's samples."""
        for epoch in range(self.config.optim.update_epochs):
            yield from self.grid.deal(self.config.train.seed, step, epoch)

    def update_once(
        self, step: int, samples: Samples, averages: Averages, mismatch: Mismatch
    ) -> None:
        """One optimizer step, where any actor has samples for it."""
        size = self.config.optim.micro_batch_size
        counts = self.actors.gather(-(-len(samples) // size))
        updated = float(max(counts) > 0)
        averages.add("actor/updates", updated / self.actors.size, 1 / self.actors.size)
        if not updated:
            return
        padding = None
        if self.actor.is_sharded and min(counts) < max(counts):  # every pass is a collective
            cells = self.actors.gather(samples.first_cell())
            cell = next(cell for cell in cells if cell is not None)
            padding = Padding(num_micro_batches=max(counts), cell=cell)
        sums = self.accumulate(step, samples, padding, averages, mismatch)
        mismatch.close(self.actors)
        trained = [parameter for _, parameter in self.actor.policy.trainable()]
        if self.is_warmup(step):
            trained = freeze_policy(self.actor.policy.trainable())
        if not self.actor.is_sharded:  # else every backward pass has done so
            sum_gradients(trained, self.actors)
        losses = self.actors.sum_named(sums)
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

    def accumulate(
        self,
        step: int,
        samples: Samples,
        padding: Padding | None,
        averages: Averages,
        mismatch: Mismatch,
    ) -> dict[str, torch.Tensor]:
        """Add up the gradient of this rank's micro-batches; returns the terms of the loss."""
        sums: dict[str, torch.Tensor] = {}
        micro_batches = samples.micro_batches(
            self.config.optim.micro_batch_size,
            self.config.rollout.temperature,
            self.device,
            critic_only=self.is_warmup(step),
            padding=padding,
        )
        for number, (observed, judged) in enumerate(micro_batches):
            self.heartbeat.beat("update", step, number)
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
        return sums

    def metrics(self, step: int, averages: Averages) -> dict[str, float]:
        """`train/...` of the step, over all actors."""
        means = averages.reduced(self.actors)
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
