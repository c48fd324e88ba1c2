"""GRPO's advantages against recorded inputs and outputs of a reference implementation.

The recordings put time first ([C, B, K]); ours is [B, C, K].
"""

import pytest
import torch
from vlactl_grpo import functional
from vlactl_grpo.algorithm import make_algorithm
from vlactl_grpo.plugin import GrpoConfig

from vlactl.api.contracts import TrajectoryBatch


class OneRank:
    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return value.clone()


def batch_first(x_CBK: torch.Tensor) -> torch.Tensor:
    return x_CBK.transpose(0, 1)


def merge_epochs(x: torch.Tensor, num_epochs: int) -> torch.Tensor:
    """[E * L, B, K] -> [L, E * B, K]: the order in which the reference gathers trajectories."""
    return x.unflatten(0, (num_epochs, -1)).transpose(0, 1).flatten(1, 2)


@pytest.mark.parametrize("case_id", ["mask0", "mask1", "mask2"])
def test_valid_actions(algorithm_case, valid_actions, case_id):
    case = algorithm_case("loss_mask", case_id)
    valid_BCK = valid_actions(batch_first(case.given["dones"]))
    counts_B = valid_BCK.sum((1, 2))
    assert torch.equal(batch_first(valid_BCK), case.want["loss_mask"])
    assert torch.equal(
        counts_B[None, :, None].expand_as(case.want["loss_mask_sum"]), case.want["loss_mask_sum"]
    )


def test_merged_epochs_have_the_recorded_order(algorithm_case):
    case = algorithm_case("loss_mask", "epoch_merge")
    merged = merge_epochs(case.given["x"], case.params["rollout_epoch"])
    assert torch.equal(merged, case.want["y"])


@pytest.mark.parametrize("case_id", ["flat0", "flat1"])
def test_group_advantages(algorithm_case, case_id):
    case = algorithm_case("grpo", case_id)
    advantages_B = functional.group_advantages(case.given["scores"]).flatten()
    torch.testing.assert_close(
        advantages_B * case.given["loss_mask"], case.want["advantages"], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("case_id", [f"embodied{i}" for i in range(4)] + ["multi_epoch"])
def test_advantages_of_trajectories(algorithm_case, valid_actions, case_id):
    case = algorithm_case("grpo", case_id)
    params, num_epochs = case.params, case.params["rollout_epoch"]
    rewards_CBK = merge_epochs(case.given["rewards"], num_epochs)
    dones_LBK = merge_epochs(case.given["dones"], num_epochs)
    if "rewards_merged" in case.want:
        assert torch.equal(rewards_CBK, case.want["rewards_merged"])
        assert torch.equal(dones_LBK, case.want["dones_merged"])
    valid_BCK = valid_actions(batch_first(dones_LBK))
    rewards_BCK, level = batch_first(rewards_CBK), params["reward_type"].removesuffix("_level")
    if level == "chunk":  # simulators of the reference go on, and earn, to the end of a chunk
        rewards_BCK = torch.zeros_like(rewards_BCK).index_copy(
            2, torch.tensor([0]), rewards_BCK.sum(dim=2, keepdim=True)
        )
    algorithm = make_algorithm(
        GrpoConfig(
            group_size=params["group_size"],
            reward_level=level,
            filter_rewards=params["filter_rewards"],
            reward_lower_bound=params["rewards_lower_bound"],
            reward_upper_bound=params["rewards_upper_bound"],
            entropy_coef=1.0,  # the reference keeps groups of equal returns in its mask
        )
    )
    batch = TrajectoryBatch(
        rewards_BCK=rewards_BCK,
        valid_BCK=valid_BCK,
        ends_BCK=torch.zeros_like(valid_BCK, dtype=torch.int8),
        group_size=params["group_size"],
    )
    got = algorithm.advantages(batch, OneRank())
    assert torch.equal(batch_first(got.mask_BCK), case.want["loss_mask"])
    torch.testing.assert_close(
        batch_first(got.advantages_BCK),
        case.want["advantages"] * case.want["loss_mask"],
        rtol=1e-5,
        atol=1e-5,
    )
    counts_B = valid_BCK.sum((1, 2))
    assert torch.equal(
        counts_B[None, :, None].expand_as(case.want["loss_mask_sum"]), case.want["loss_mask_sum"]
    )


def test_recorded_order_of_samples(algorithm_case):
    """Chunk by chunk, then shuffled by seed and rank.

    The reference draws the same permutation in every step; ours (`Grid.deal`) is keyed by step and
    epoch, and by no rank, so there is nothing of ours to compare with.
    """
    case = algorithm_case("grpo", "flatten_shuffle")
    generator = torch.Generator().manual_seed(case.params["seed"] + case.params["rank"])
    perm_S = torch.randperm(len(case.want["perm"]), generator=generator)
    assert torch.equal(perm_S, case.want["perm"])
    for name in ("advantages", "loss_mask", "dones"):
        flat_SK = case.given[name][: len(case.given["advantages"])].flatten(0, 1)
        assert torch.equal(flat_SK[perm_S], case.want[name])
