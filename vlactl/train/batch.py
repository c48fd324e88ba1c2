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
    End,
    Episode,
    MicroBatch,
    Reduce,
    TrainBatch,
    TrajectoryBatch,
    ValueLevel,
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
    auto_reset: bool = False
    """A row holds one episode after the other: the members of a group of its own."""
    value_level: ValueLevel = "none"

    @property
    def num_slots(self) -> int:
        """Samples of a step, with padding."""
        return self.num_trajectories * self.chunks_per_episode

    @property
    def values_per_chunk(self) -> int:
        """Values that the policy gives with an action chunk."""
        return {"none": 0, "chunk": 1, "action": self.chunk_length}[self.value_level]

    def row(self, episode: Episode) -> int:
        """Of an episode's trajectory among the N of the step."""
        return episode.group if self.auto_reset else self.number(episode)

    def number(self, episode: Episode) -> int:
        """Of an episode among all that a step can have."""
        members = self.chunks_per_episode if self.auto_reset else self.group_size
        return episode.group * members + episode.member

    def deal(self, *key: int | str) -> list[np.ndarray]:
        """Slots of each optimizer step, shuffled by the key."""
        order = generator("shuffle", *key).permutation(self.num_slots)
        return np.split(order, self.num_slots // self.global_batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where this rank's trajectories lie in the grid.

    Attributes:
        rows: numbers of the rows that this rank has, ascending.
        trajectories: of each row, in the order they were played: one, or more with `auto_reset`.
    """

    rows: tuple[int, ...]
    trajectories: tuple[tuple[Trajectory, ...], ...]

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory], grid: Grid) -> Layout:
        """Sort trajectories into rows."""
        by_row: dict[int, list[Trajectory]] = {}
        for trajectory in trajectories:
            by_row.setdefault(grid.row(trajectory.episode), []).append(trajectory)
        rows = sorted(by_row)
        ordered = (sorted(by_row[row], key=lambda t: t.first_chunk) for row in rows)
        return cls(rows=tuple(rows), trajectories=tuple(tuple(row) for row in ordered))

    def find(self, b: int, chunk: int) -> tuple[Trajectory, int]:
        """The trajectory at a chunk of the b-th row, and the chunk's index within it."""
        (trajectory,) = (
            t for t in self.trajectories[b] if 0 <= chunk - t.first_chunk < len(t.rewards)
        )
        return trajectory, chunk - trajectory.first_chunk


def pack(trajectories: Sequence[Trajectory], grid: Grid) -> TrajectoryBatch:
    """Rewards, validity, ends and values of this rank's trajectories, padded to the horizon."""
    layout = Layout.of(trajectories, grid)
    shape = (len(layout.rows), grid.chunks_per_episode, grid.chunk_length)
    rewards_BCK, final_values_BCK = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    valid_BCK, ends_BCK = np.zeros(shape, bool), np.zeros(shape, np.int8)
    for b, row in enumerate(layout.trajectories):
        for trajectory in row:
            for c, rewards in enumerate(trajectory.rewards, trajectory.first_chunk):
                rewards_BCK[b, c, : len(rewards)] = rewards
                valid_BCK[b, c, : len(rewards)] = True
            last = len(trajectory.rewards) - 1
            end = (b, trajectory.first_chunk + last, len(trajectory.rewards[last]) - 1)
            ends_BCK[end], final_values_BCK[end] = _end(trajectory), trajectory.final_value
    values_BCK = _pack_values(layout, grid)
    return TrajectoryBatch(
        rewards_BCK=torch.from_numpy(rewards_BCK),
        valid_BCK=torch.from_numpy(valid_BCK),
        ends_BCK=torch.from_numpy(ends_BCK),
        group_size=grid.group_size,
        values_BCK=values_BCK,
        final_values_BCK=None if values_BCK is None else torch.from_numpy(final_values_BCK),
    )


def _end(trajectory: Trajectory) -> End:
    if trajectory.outcome is None:
        return End.CUT
    return End.SUCCESS if trajectory.outcome.terminated else End.TRUNCATED


def _pack_values(layout: Layout, grid: Grid) -> torch.Tensor | None:
    if grid.value_level == "none":
        return None
    shape = (len(layout.rows), grid.chunks_per_episode, grid.values_per_chunk)
    values_BCK = np.zeros(shape, np.float32)
    for b, row in enumerate(layout.trajectories):
        for trajectory in row:
            end = trajectory.first_chunk + len(trajectory.values_CK)
            values_BCK[b, trajectory.first_chunk : end] = np.stack(trajectory.values_CK)
    return torch.from_numpy(values_BCK)


Cell = tuple[Trajectory, int]
"""A sample: a trajectory, and the index of one of its chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """Micro-batches beyond a rank's own, so that all ranks have equally many.

    Each holds `cell` once, with weight 0.
    """

    num_micro_batches: int
    cell: Cell


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """This rank's share of one optimizer step, in the order of the deal."""

    layout: Layout
    batch: TrajectoryBatch
    advantages: Advantages
    rows: np.ndarray
    """Index into the layout's rows, per sample."""
    chunks: np.ndarray
    """Chunk index, per sample."""
    weights_SK: torch.Tensor
    version: int
    """Updates that the policy had seen when the step began; trajectories may be older."""

    def __len__(self) -> int:
        return len(self.rows)

    def micro_batches(
        self,
        size: int,
        temperature: float,
        device: torch.device,
        *,
        critic_only: bool = False,
        padding: Padding | None = None,
    ) -> Iterator[tuple[TrainBatch, MicroBatch]]:
        """Slices of at most `size` samples: what the policy and what the loss needs."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield self._observed(part, temperature, device), self._judged(part, device, critic_only)
        if padding is not None:
            for _ in range(padding.num_micro_batches - -(-len(self) // size)):
                yield self._padded(padding.cell, temperature, device, critic_only)

    def first_cell(self) -> Cell | None:
        """The first sample, where there is one, without the rest of its trajectory."""
        for trajectory, chunk in self._cells(slice(0, 1)):
            alone = Trajectory(
                episode=trajectory.episode,
                observations=[trajectory.observations[chunk]],
                tokens_CKA=[trajectory.tokens_CKA[chunk]],
                logprobs_CKA=[trajectory.logprobs_CKA[chunk]],
            )
            return alone, 0
        return None

    def _padded(
        self, cell: Cell, temperature: float, device: torch.device, critic_only: bool
    ) -> tuple[TrainBatch, MicroBatch]:
        """One sample that weighs nothing."""
        trajectory, chunk = cell
        width = self.advantages.advantages_BCK.shape[2]
        nothing_SK = torch.zeros(1, width, device=device)
        has_returns = self.advantages.returns_BCK is not None
        values_BCK = self.batch.values_BCK
        judged = MicroBatch(
            old_logprobs_SKA=torch.from_numpy(trajectory.logprobs_CKA[chunk][None]).to(device),
            advantages_SK=nothing_SK,
            mask_SK=nothing_SK.bool(),
            weights_SK=nothing_SK,
            returns_SK=nothing_SK if has_returns else None,
            old_values_SK=(
                None if values_BCK is None else nothing_SK.new_zeros(1, values_BCK.shape[2])
            ),
            critic_only=critic_only,
        )
        return _observe([cell], temperature, device), judged

    def _cells(self, part: slice) -> Iterator[Cell]:
        for row, chunk in zip(self.rows[part], self.chunks[part], strict=True):
            yield self.layout.find(row, chunk)

    def _observed(self, part: slice, temperature: float, device: torch.device) -> TrainBatch:
        return _observe(list(self._cells(part)), temperature, device)

    def _judged(self, part: slice, device: torch.device, critic_only: bool) -> MicroBatch:
        index = (torch.from_numpy(self.rows[part]), torch.from_numpy(self.chunks[part]))
        logprobs = [t.logprobs_CKA[chunk] for t, chunk in self._cells(part)]
        returns_BCK, values_BCK = self.advantages.returns_BCK, self.batch.values_BCK
        lags = [self.version - t.version for t, _ in self._cells(part)]
        return MicroBatch(
            old_logprobs_SKA=torch.from_numpy(np.stack(logprobs)).to(device),
            advantages_SK=self.advantages.advantages_BCK[index].to(device),
            mask_SK=self.advantages.mask_BCK[index].to(device),
            weights_SK=self.weights_SK[part].to(device),
            returns_SK=None if returns_BCK is None else returns_BCK[index].to(device),
            old_values_SK=None if values_BCK is None else values_BCK[index].to(device),
            critic_only=critic_only,
            lags_S=torch.tensor(lags, dtype=torch.float32, device=device) if any(lags) else None,
        )


def _observe(cells: Sequence[Cell], temperature: float, device: torch.device) -> TrainBatch:
    tokens = [trajectory.tokens_CKA[chunk] for trajectory, chunk in cells]
    return TrainBatch(
        observations=stack_observations([t.observations[chunk] for t, chunk in cells]),
        tokens_SKA=torch.from_numpy(np.stack(tokens)).to(device),
        temperature=temperature,
    )


def select_samples(
    slots: np.ndarray,
    trajectories: Sequence[Trajectory],
    batch: TrajectoryBatch,
    advantages: Advantages,
    grid: Grid,
    algorithm: Algorithm,
    reduce: Reduce,
    *,
    version: int,
) -> Samples:
    """This rank's samples among the slots of one optimizer step. Every actor rank must call it."""
    layout = Layout.of(trajectories, grid)
    index_of = {row: b for b, row in enumerate(layout.rows)}
    useful_BC = advantages.mask_BCK.any(-1).numpy()
    rows, chunks = [], []
    for row, chunk in zip(*np.divmod(slots, grid.chunks_per_episode), strict=True):
        b = index_of.get(int(row))
        if b is not None and useful_BC[b, chunk]:
            rows.append(b)
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
        layout=layout,
        batch=batch,
        advantages=advantages,
        rows=row_index,
        chunks=chunk_index,
        weights_SK=weights_SK,
        version=version,
    )
