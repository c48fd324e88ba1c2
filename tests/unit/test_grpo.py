"""GRPO by hand: small examples, filters, degenerate groups and its relatives."""

import math

import pytest
import torch
from vlactl_grpo import functional
from vlactl_grpo.algorithm import make_algorithm
from vlactl_grpo.plugin import GrpoConfig

from vlactl.api.contracts import Needs, TrajectoryBatch


class Ranks:
    """Sums as if every other rank held the given value."""

    def __init__(self, *others: float) -> None:
        self.others = others

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return value + sum(self.others)


ONE_RANK = Ranks()


def trajectories(returns: list[float], group_size: int, num_actions: int = 2) -> TrajectoryBatch:
    """One chunk per trajectory, the reward on its first action."""
    rewards_BCK = torch.zeros(len(returns), 1, num_actions)
    rewards_BCK[:, 0, 0] = torch.tensor(returns)
    return TrajectoryBatch(
        rewards_BCK=rewards_BCK,
        valid_BCK=torch.ones_like(rewards_BCK, dtype=torch.bool),
        ends_BCK=torch.zeros_like(rewards_BCK, dtype=torch.int8),
        group_size=group_size,
    )


# --------------------------------------------------------------------------------------------
# Advantages
# --------------------------------------------------------------------------------------------
def test_group_of_four():
    got = functional.group_advantages(torch.tensor([[5.0, 0.0, 5.0, 0.0]]))
    assert got[0].tolist() == pytest.approx([0.866025, -0.866025, 0.866025, -0.866025], abs=1e-6)


@pytest.mark.parametrize(
    ("successes", "winner", "loser"),
    [
        (1, 2.474872, -0.353553),
        (2, 1.620185, -0.540062),
        (3, 1.207614, -0.724569),
        (4, 0.935414, -0.935414),
        (5, 0.724569, -1.207614),
        (6, 0.540062, -1.620185),
        (7, 0.353553, -2.474872),
    ],
)
def test_group_of_eight(successes, winner, loser):
    returns = [5.0] * successes + [0.0] * (8 - successes)
    got = functional.group_advantages(torch.tensor([returns]))[0].tolist()
    assert got == pytest.approx([winner] * successes + [loser] * (8 - successes), abs=2e-6)


def test_rewards_after_the_end_do_not_count():
    rewards_BCK = torch.tensor([[[0.0, 5.0], [-5.0, math.nan]]])
    valid_BCK = torch.tensor([[[True, True], [False, False]]])
    assert functional.episode_returns(rewards_BCK, valid_BCK).tolist() == [5.0]


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 5.0])
def test_equal_returns_give_exactly_zero_and_are_not_trained_on(value):
    algorithm = make_algorithm(GrpoConfig(group_size=8, filter_rewards=False))
    got = algorithm.advantages(trajectories([value] * 8, group_size=8), ONE_RANK)
    assert torch.equal(got.advantages_BCK, torch.zeros(8, 1, 2))
    assert not got.mask_BCK.any()
    assert got.metrics == {"groups/kept": 1.0, "groups/degenerate": 1.0}


@pytest.mark.parametrize("coefficient", [{"entropy_coef": 0.01}, {"kl_coef": 0.01}])
def test_equal_returns_are_trained_on_for_entropy_or_kl(coefficient):
    algorithm = make_algorithm(GrpoConfig(group_size=2, filter_rewards=False, **coefficient))
    got = algorithm.advantages(trajectories([1.0, 1.0], group_size=2), ONE_RANK)
    assert torch.equal(got.advantages_BCK, torch.zeros(2, 1, 2))
    assert got.mask_BCK.all()


def test_filter_keeps_groups_within_the_bounds():
    algorithm = make_algorithm(
        GrpoConfig(group_size=2, reward_lower_bound=0.5, reward_upper_bound=2.5)
    )
    batch = trajectories([0.0, 0.0, 5.0, 0.0, 5.0, 5.0], group_size=2)
    got = algorithm.advantages(batch, ONE_RANK)
    assert got.mask_BCK.all(dim=(1, 2)).tolist() == [False, False, True, True, False, False]
    assert got.metrics == pytest.approx({"groups/kept": 1 / 3, "groups/degenerate": 2 / 3})


def test_padding_is_never_trained_on():
    batch = trajectories([5.0, 0.0], group_size=2)
    batch.valid_BCK[0, 0, 1] = False
    got = make_algorithm(GrpoConfig(group_size=2)).advantages(batch, ONE_RANK)
    assert got.mask_BCK.tolist() == [[[True, False]], [[True, True]]]
    assert got.advantages_BCK[0, 0, 1] == 0


def test_a_rank_without_groups_takes_part():
    algorithm = make_algorithm(GrpoConfig(group_size=4))
    got = algorithm.advantages(trajectories([], group_size=4), Ranks(3))
    assert got.mask_BCK.shape == got.advantages_BCK.shape == (0, 1, 2)
    assert got.metrics == {"groups/kept": 1.0, "groups/degenerate": 1.0}


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "reinforce++", "reinforce++-baseline"])
def test_useful_groups_are_kept_and_differ(advantage):
    keys = {"group_size": 2, "advantage": advantage, "reward_upper_bound": 5.0}
    algorithm = make_algorithm(GrpoConfig(**keys))
    got = algorithm.useful_groups(trajectories([0.0, 0.0, 5.0, 0.0, 5.0, 5.0], group_size=2))
    compares_all = advantage == "reinforce++"  # there, equal returns are as good as any
    assert got.tolist() == [False, True, compares_all]


def test_leave_one_out():
    got = functional.leave_one_out_advantages(torch.tensor([[5.0, 0.0, 1.0]]))
    assert got[0].tolist() == pytest.approx([4.5, -3.0, -1.5])


def test_reinforce_compares_all_actions_of_the_step():
    """Values 4, 4, 1 over actions: mean 3, unbiased variance 3."""
    batch = trajectories([4.0, 1.0], group_size=2)
    batch.valid_BCK[1, 0, 1] = False
    algorithm = make_algorithm(GrpoConfig(group_size=2, advantage="reinforce++"))
    got = algorithm.advantages(batch, ONE_RANK).advantages_BCK
    scale = 3**-0.5
    assert got.flatten().tolist() == pytest.approx([scale, scale, -2 * scale, 0.0])


def test_reinforce_with_baseline_subtracts_the_mean_of_the_group_first():
    batch = trajectories([4.0, 0.0, 102.0, 100.0], group_size=2, num_actions=1)
    config = GrpoConfig(group_size=2, advantage="reinforce++-baseline", filter_rewards=False)
    got = make_algorithm(config).advantages(batch, ONE_RANK).advantages_BCK
    deviation = (10 / 3) ** 0.5
    want = [x / deviation for x in (2.0, -2.0, 1.0, -1.0)]
    assert got.flatten().tolist() == pytest.approx(want)


@pytest.mark.parametrize("advantage", ["reinforce++", "reinforce++-baseline"])
def test_entropy_does_not_change_what_is_compared(advantage):
    batch = trajectories([4.0, 0.0, 3.0, 3.0, 1.0, 2.0], group_size=2)
    keys = {"group_size": 2, "advantage": advantage}
    without, with_it = (
        make_algorithm(GrpoConfig(entropy_coef=coefficient, **keys)).advantages(batch, ONE_RANK)
        for coefficient in (0.0, 0.1)
    )
    assert torch.equal(without.advantages_BCK, with_it.advantages_BCK)
    assert with_it.mask_BCK.all()


def test_whole_chunks():
    batch = trajectories([5.0, 0.0], group_size=2)
    batch.valid_BCK[0, 0, 1] = False
    config = GrpoConfig(group_size=2, reward_level="chunk")
    got = make_algorithm(config).advantages(batch, ONE_RANK)
    assert got.mask_BCK.tolist() == [[[True]], [[True]]]
    assert got.advantages_BCK.flatten().tolist() == pytest.approx([0.707107, -0.707107], abs=1e-6)


def test_needs():
    assert GrpoConfig().needs() == Needs()
    config = GrpoConfig(kl_coef=0.1, resample_rounds=2)
    assert config.needs() == Needs(reference=True, resample_rounds=2)
