"""Which actions belong to good episodes, and what each of them counts: pure functions of tensors.

Shapes: see `vlactl.api.contracts`; T = C * K steps of a row, N groups.
"""

from __future__ import annotations

import torch

from vlactl.api.contracts import End, Reduce


def returns_of_episodes(
    rewards_BCK: torch.Tensor, valid_BCK: torch.Tensor, ends_BCK: torch.Tensor
) -> torch.Tensor:
    """Undiscounted return of the episode that each action belongs to: float32 [B, C, K].

    A row may hold one episode after the other.
    """
    rewards_BT = rewards_BCK.float().masked_fill(~valid_BCK, 0.0).flatten(1)
    is_last_BT = (ends_BCK != End.NONE).flatten(1).long()
    episode_BT = is_last_BT.cumsum(1) - is_last_BT
    returns_BT = torch.zeros_like(rewards_BT).scatter_add(1, episode_BT, rewards_BT)
    return returns_BT.gather(1, episode_BT).view_as(rewards_BCK)


def balanced(mask_BCK: torch.Tensor, group_size: int, reduce: Reduce) -> torch.Tensor:
    """Factors with which every group in the mask counts the same: float32 [B, 1, 1].

    Their mean over the masked actions of all ranks is 1. Groups that are out of it get 0.
    """
    actions_N = mask_BCK.flatten(1).sum(1).view(-1, group_size).sum(1)
    total, num_groups = reduce.sum(torch.stack([actions_N.sum(), (actions_N > 0).sum()])).tolist()
    share_N = total / max(num_groups, 1) / actions_N.clamp(min=1).float()
    share_N = share_N.masked_fill(actions_N == 0, 0.0)
    share_B: torch.Tensor = share_N.repeat_interleave(group_size)
    return share_B[:, None, None]
