"""Rejection-sampling fine-tuning by hand: what is kept, what it counts, and the loss."""

import math

import pytest
import torch
from vlactl_rft import functional
from vlactl_rft.algorithm import make_algorithm
from vlactl_rft.plugin import RftConfig

from vlactl.api.contracts import End, MicroBatch, Needs, PolicyOutput, TrajectoryBatch


class Ranks:
    """Sums as if every other rank held the given value."""

    def __init__(self, *others: float) -> None:
        self.others = others

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return value + sum(self.others)


ONE_RANK = Ranks()


def trajectories(
    returns: list[float], group_size: int, lengths: list[int] | None = None
) -> TrajectoryBatch:
    """Two chunks of two actions per trajectory, the reward on the last action played."""
    last_B = torch.tensor(lengths or [4] * len(returns), dtype=torch.long) - 1
    is_last_BT = torch.arange(4) == last_B[:, None]
    valid_BT = torch.arange(4) <= last_B[:, None]
    return TrajectoryBatch(
        rewards_BCK=(is_last_BT * torch.tensor(returns)[:, None]).view(-1, 2, 2),
        valid_BCK=valid_BT.view(-1, 2, 2),
        ends_BCK=(is_last_BT * int(End.SUCCESS)).to(torch.int8).view(-1, 2, 2),
        group_size=group_size,
    )


def advantages(batch: TrajectoryBatch, ranks: Ranks = ONE_RANK, **keys):
    config = RftConfig(group_size=batch.group_size, **keys)
    return make_algorithm(config).advantages(batch, ranks)


# --------------------------------------------------------------------------------------------
# What is kept
# --------------------------------------------------------------------------------------------
def test_successes_count_1_and_failures_are_dropped():
    got = advantages(trajectories([5.0, 0.0, 0.0, 0.0], group_size=2, lengths=[3, 4, 4, 1]))
    want = torch.zeros(4, 2, 2)
    want.view(4, 4)[0, :3] = 1.0
    assert torch.equal(got.advantages_BCK, want)
    assert torch.equal(got.mask_BCK, want.bool())
    assert got.metrics == {"groups/kept": 0.5}
    assert got.returns_BCK is None


def test_what_is_kept_is_decided_by_the_return():
    batch = trajectories([0.4, 0.5, 5.0, -1.0], group_size=4)
    for min_return, kept in [(0.5, [0, 1, 1, 0]), (-1.0, [1, 1, 1, 1]), (5.5, [0, 0, 0, 0])]:
        got = advantages(batch, min_return=min_return)
        assert got.mask_BCK.all(dim=(1, 2)).tolist() == [bool(flag) for flag in kept]
        assert torch.equal(got.mask_BCK.any(2), got.mask_BCK.all(2))


def test_useful_groups_have_a_success():
    batch = trajectories([0.0, 0.0, 5.0, 0.0, 5.0, 5.0], group_size=2)
    got = make_algorithm(RftConfig(group_size=2)).useful_groups(batch)
    assert got.tolist() == [False, True, True]


def test_a_row_of_several_episodes_keeps_the_successful_ones():
    """The first fails, the second succeeds, the last is cut."""
    rewards_BCK = torch.tensor([[[0.0, 0.0], [0.0, 5.0], [math.nan, 0.0]]])
    valid_BCK = torch.tensor([[[True, False], [True, True], [False, True]]])
    ends_BCK = torch.tensor([[[2, 0], [0, 1], [0, 3]]], dtype=torch.int8)
    returns_BCK = functional.returns_of_episodes(rewards_BCK, valid_BCK, ends_BCK)
    assert returns_BCK[valid_BCK].tolist() == [0, 5, 5, 0]
    batch = TrajectoryBatch(
        rewards_BCK=rewards_BCK, valid_BCK=valid_BCK, ends_BCK=ends_BCK, group_size=1
    )
    want = [[[False, False], [True, True], [False, False]]]
    assert advantages(batch).mask_BCK.tolist() == want


def test_a_rank_without_groups_takes_part():
    got = advantages(trajectories([], group_size=4), Ranks(3), balance_groups=True)
    assert got.mask_BCK.shape == got.advantages_BCK.shape == (0, 2, 2)
    assert got.metrics == {"groups/kept": 1.0}


# --------------------------------------------------------------------------------------------
# Balance
# --------------------------------------------------------------------------------------------
def test_groups_count_the_same_however_many_succeed():
    """8 actions of two successes, 2 of one, none: two groups share 10."""
    returns = [5.0, 5.0, 5.0, 0.0, 0.0, 0.0]
    batch = trajectories(returns, group_size=2, lengths=[4, 4, 2, 4, 4, 4])
    got = advantages(batch, balance_groups=True)
    assert got.advantages_BCK.sum((1, 2)).tolist() == pytest.approx([2.5, 2.5, 5, 0, 0, 0])
    assert got.advantages_BCK[got.mask_BCK].mean().item() == pytest.approx(1)
    assert torch.equal(got.mask_BCK, advantages(batch).mask_BCK)


def test_balance_is_that_of_all_ranks():
    """Another rank has 3 groups with 3 actions altogether: four groups share 7."""

    class Another:
        def sum(self, value: torch.Tensor) -> torch.Tensor:
            return value + 3

    mask_BCK = trajectories([5.0, 5.0], group_size=2, lengths=[1, 3]).valid_BCK
    factors_BCK = functional.balanced(mask_BCK, 2, Another())
    assert factors_BCK.flatten().tolist() == pytest.approx([7 / 4 / 4] * 2)


def test_nothing_to_balance():
    got = advantages(trajectories([0.0, 0.0], group_size=2), balance_groups=True)
    assert torch.equal(got.advantages_BCK, torch.zeros(2, 2, 2))


# --------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------
def micro_batch(**changes) -> MicroBatch:
    """Two samples of two actions with two tokens; the last action is not trained on."""
    parts = {
        "old_logprobs_SKA": torch.full((2, 2, 2), -1.0),
        "advantages_SK": torch.tensor([[1.0, 1.0], [2.0, math.nan]]),
        "mask_SK": torch.tensor([[True, True], [True, False]]),
        "weights_SK": torch.tensor([[1.0, 1.0], [1.0, 0.0]]) / 3,
        "reference_logprobs_SKA": torch.full((2, 2, 2), -2.0),
    }
    return MicroBatch(**(parts | changes))


def output(logprob: float = -1.0) -> PolicyOutput:
    logprobs_SKA = torch.full((2, 2, 2), logprob)
    logprobs_SKA[1, 1] = math.nan
    return PolicyOutput(
        logprobs_SKA=logprobs_SKA.requires_grad_(), entropy_SKA=torch.full((2, 2, 2), 0.5)
    )


def test_the_loss_is_the_weighted_negative_log_likelihood():
    out = output(-1.5)
    terms = make_algorithm(RftConfig()).loss(out, micro_batch())
    assert terms.loss.item() == pytest.approx((1.5 + 1.5 + 2 * 1.5) / 3)
    assert terms.parts["actor/policy_loss"] == terms.loss
    terms.loss.backward()
    want = -torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[1.0, 1.0], [0.0, 0.0]]]) / 3
    torch.testing.assert_close(out.logprobs_SKA.grad, want)
    means = {name: (total / count).item() for name, (total, count) in terms.metrics.items()}
    assert means == pytest.approx({"actor/ratio": math.exp(-0.5), "actor/entropy_loss": 0.5})


def test_it_does_not_matter_who_acted():
    for changes in ({"old_logprobs_SKA": torch.zeros(2, 2, 2)}, {"lags_S": torch.ones(2)}):
        gradients = []
        for batch in (micro_batch(), micro_batch(**changes)):
            out = output()
            make_algorithm(RftConfig()).loss(out, batch).loss.backward()
            gradients.append(out.logprobs_SKA.grad)
        assert torch.equal(*gradients)


def test_the_reference_pulls_back():
    algorithm = make_algorithm(RftConfig(kl_coef=0.5, kl_estimator="k2"))
    terms = algorithm.loss(output(), micro_batch())
    plain = make_algorithm(RftConfig()).loss(output(), micro_batch())
    assert (terms.loss - plain.loss).item() == pytest.approx(0.5 * 0.5)  # k2 of a difference of 1
    total, count = terms.metrics["actor/kl_loss"]
    assert (total / count).item() == pytest.approx(0.5)
    assert terms.parts["actor/policy_loss"] == plain.loss


def test_weights_are_a_mean_over_what_is_trained_on_all_ranks():
    mask_SK = torch.tensor([[True, True], [True, False]])
    got = make_algorithm(RftConfig()).weights(mask_SK, torch.tensor([4, 4]), 99, 99, Ranks(2))
    torch.testing.assert_close(got, torch.tensor([[0.2, 0.2], [0.2, 0.0]]))


def test_needs():
    assert RftConfig().needs() == Needs()
    wants = RftConfig(kl_coef=0.1, resample_rounds=2)
    assert wants.needs() == Needs(reference=True, resample_rounds=2)
