"""Checks that keep wrong data out of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from vlactl.api.contracts import MicroBatch, PolicyOutput
from vlactl.distributed.roles import Ranks
from vlactl.errors import TrainingError
from vlactl.rollout.collect import Trajectory


def check_versions(trajectories: Sequence[Trajectory], step: int, staleness: int) -> None:
    """Refuse trajectories of weights that are older than `train.staleness` allows.

    Raises:
        TrainingError: names a version that should not be there.
    """
    wrong = [t.version for t in trajectories if not step - staleness <= t.version <= step]
    if wrong:
        raise TrainingError(
            f"{len(wrong)} trajectories were played with version {wrong[0]} of the weights, "
            f"in step {step}",
            hint="this is a bug: resume from the last checkpoint",
        )


class Mismatch:
    """How far acting and training disagree about the same actions under the same weights.

    The KL of the policy that is trained to the one that acted, per token, by the k3 estimator
    (http://joschu.net/blog/kl-approx.html), over the samples of a step's first update that acted
    with the weights at its start; with `train.staleness` only a run's first step has such. Rounding
    leaves some 1e-3 in bfloat16; far more means that the two are different functions.

    Args:
        limit: above which the run stops.
    """

    def __init__(self, limit: float) -> None:
        self.metrics: dict[str, float] = {}
        self._limit = limit
        self._is_open = True
        self._sums = torch.zeros(2, dtype=torch.float64)

    def add(self, out: PolicyOutput, batch: MicroBatch) -> None:
        """Measure a micro-batch of the first update."""
        if not self._is_open:
            return
        mask_SK = batch.mask_SK.expand(-1, out.logprobs_SKA.shape[1])
        if batch.lags_S is not None:
            mask_SK = mask_SK & (batch.lags_S == 0)[:, None]
        log_ratio = (out.logprobs_SKA - batch.old_logprobs_SKA).detach().double()[mask_SK]
        kl = (log_ratio.exp() - 1.0 - log_ratio).sum()
        self._sums += torch.stack([kl, kl.new_tensor(log_ratio.numel())]).cpu()

    def close(self, actors: Ranks) -> None:
        """After the first update: reduce over actors, and judge.

        Raises:
            TrainingError: the mismatch is above the limit.
        """
        if not self._is_open:
            return
        total, count = actors.sum(self._sums).tolist()
        self._is_open = False  # the next update finds other weights
        if count == 0 or not math.isfinite(total):
            return  # nothing acted with these weights; what is not finite is `guarded_step`'s
        self.metrics = {"train/mismatch_kl": total / count}
        if total / count > self._limit:
            raise TrainingError(
                f"acting and training disagree: a KL of {total / count:.3g} per token under the "
                f"same weights, more than train.max_mismatch_kl = {self._limit:g}",
                hint="rollout temperature, precision or weights differ; nothing was saved since "
                "the last checkpoint",
            )
