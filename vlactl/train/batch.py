"""From trajectories to tensors, and from a step's samples to optimizer steps and micro-batches.

A step has a grid of slots: N trajectories of all ranks x C chunks of the horizon. One permutation
of the grid, keyed by (seed, step, epoch), deals the slots to optimizer steps, so the deal depends
neither on the number of ranks nor on timing. Slots that are padding, or that cannot change the
gradient, are never computed; with `episode-mean` they still count in the denominators.

Shapes: B trajectories of this rank, N of all ranks, S samples, C chunks, K actions, A action
dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlactl.api.contracts import (
    Advantages,
    Algorithm,
    Episode,
    MicroBatch,
    Observation,
    Reduce,
    TrainBatch,
    TrajectoryBatch,
)
from vlactl.api.noise import generator
from vlactl.rollout.collect import Trajectory, stack_observations


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Arithmetic of a step that all ranks share."""

    group_size: int
    num_trajectories: int
    chunks_per_episode: int
    chunk_length: int
    max_episode_steps: int
    global_batch_size: int

    @property
    def num_slots(self) -> int:
        """Samples of a step, with padding."""
        return self.num_trajectories * self.chunks_per_episode

    def index(self, episode: Episode) -> int:
        """Of an episode's trajectory among the N of the step."""
        return episode.group * self.group_size + episode.member

    def deal(self, *key: int | str) -> list[np.ndarray]:
        """Slots of each optimizer step, shuffled by the key."""
        order = generator("shuffle", *key).permutation(self.num_slots)
        return np.split(order, self.num_slots // self.global_batch_size)


def pack(trajectories: Sequence[Trajectory], grid: Grid) -> TrajectoryBatch:
    """Rewards, validity and values of this rank's trajectories, padded to the horizon."""
    shape = (len(trajectories), grid.chunks_per_episode, grid.chunk_length)
    rewards_BCK = np.zeros(shape, np.float32)
    valid_BCK = np.zeros(shape, bool)
    for b, trajectory in enumerate(trajectories):
        for c, rewards in enumerate(trajectory.rewards):
            rewards_BCK[b, c, : len(rewards)] = rewards
            valid_BCK[b, c, : len(rewards)] = True
    return TrajectoryBatch(
        rewards_BCK=torch.from_numpy(rewards_BCK),
        valid_BCK=torch.from_numpy(valid_BCK),
        values_BCK=_pack_values(trajectories, shape),
        group_size=grid.group_size,
    )


def _pack_values(
    trajectories: Sequence[Trajectory], shape: tuple[int, int, int]
) -> torch.Tensor | None:
    if not any(trajectory.values_CK for trajectory in trajectories):
        return None
    values_BCK = np.zeros(shape, np.float32)
    for b, trajectory in enumerate(trajectories):
        values_BCK[b, : len(trajectory.values_CK)] = np.stack(trajectory.values_CK)
    return torch.from_numpy(values_BCK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """This rank's share of one optimizer step, in the order of the deal."""

    trajectories: Sequence[Trajectory]
    batch: TrajectoryBatch
    advantages: Advantages
    rows: np.ndarray
    """Index into `trajectories`, per sample."""
    chunks: np.ndarray
    """Chunk index, per sample."""
    weights_SK: torch.Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def micro_batches(
        self, size: int, temperature: float, device: torch.device
    ) -> Iterator[tuple[TrainBatch, MicroBatch]]:
        """Slices of at most `size` samples: what the policy and what the loss needs."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield self._observed(part, temperature, device), self._judged(part, device)

    def _observed(self, part: slice, temperature: float, device: torch.device) -> TrainBatch:
        observations: list[Observation] = []
        tokens = []
        for row, chunk in zip(self.rows[part], self.chunks[part], strict=True):
            observations.append(self.trajectories[row].observations[chunk])
            tokens.append(self.trajectories[row].tokens_CKA[chunk])
        return TrainBatch(
            observations=stack_observations(observations),
            tokens_SKA=torch.from_numpy(np.stack(tokens)).to(device),
            temperature=temperature,
        )

    def _judged(self, part: slice, device: torch.device) -> MicroBatch:
        index = (torch.from_numpy(self.rows[part]), torch.from_numpy(self.chunks[part]))
        logprobs = [
            self.trajectories[row].logprobs_CKA[chunk]
            for row, chunk in zip(self.rows[part], self.chunks[part], strict=True)
        ]
        returns_BCK, values_BCK = self.advantages.returns_BCK, self.batch.values_BCK
        return MicroBatch(
            old_logprobs_SKA=torch.from_numpy(np.stack(logprobs)).to(device),
            advantages_SK=self.advantages.advantages_BCK[index].to(device),
            mask_SK=self.advantages.mask_BCK[index].to(device),
            weights_SK=self.weights_SK[part].to(device),
            returns_SK=None if returns_BCK is None else returns_BCK[index].to(device),
            old_values_SK=None if values_BCK is None else values_BCK[index].to(device),
        )


def select_samples(
    slots: np.ndarray,
    trajectories: Sequence[Trajectory],
    batch: TrajectoryBatch,
    advantages: Advantages,
    grid: Grid,
    algorithm: Algorithm,
    reduce: Reduce,
) -> Samples:
    """This rank's samples among the slots of one optimizer step. Every actor rank must call it."""
    row_of = {grid.index(t.episode): row for row, t in enumerate(trajectories)}
    useful_BC = advantages.mask_BCK.any(-1).numpy()
    rows, chunks = [], []
    for trajectory, chunk in zip(*np.divmod(slots, grid.chunks_per_episode), strict=True):
        row = row_of.get(int(trajectory))
        if row is not None and useful_BC[row, chunk]:
            rows.append(row)
            chunks.append(int(chunk))
    row_index, chunk_index = np.array(rows, np.int64), np.array(chunks, np.int64)
    valid_actions_B = batch.valid_BCK.sum((1, 2))
    weights_SK = algorithm.weights(
        advantages.mask_BCK[row_index, chunk_index],
        valid_actions_B[row_index],
        len(slots),
        grid.max_episode_steps,
        reduce,
    )
    return Samples(
        trajectories=trajectories,
        batch=batch,
        advantages=advantages,
        rows=row_index,
        chunks=chunk_index,
        weights_SK=weights_SK,
    )
