"""PPO by hand: advantages, bootstrapping, holes, the critic and what it reports."""

import math

import pytest
import torch
from vlactl_ppo import functional
from vlactl_ppo.algorithm import make_algorithm
from vlactl_ppo.plugin import PpoConfig

from vlactl.api.contracts import End, MicroBatch, Needs, PolicyOutput, TrajectoryBatch


class OneRank:
    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return value.clone()


ONE_RANK = OneRank()
NONE, SUCCESS, TRUNCATED, CUT = End.NONE, End.SUCCESS, End.TRUNCATED, End.CUT
NAN = math.nan


def trajectory(
    rewards: list[list[float]],
    values: list[list[float]],
    ends: list[list[End]],
    *,
    valid: list[list[bool]] | None = None,
    final_value: float = 0.0,
) -> TrajectoryBatch:
    """One row; the final value is that of the state after every end."""
    rewards_BCK, ends_BCK = torch.tensor([rewards]), torch.tensor([ends], dtype=torch.int8)
    is_valid_BCK = torch.ones_like(rewards_BCK, dtype=torch.bool)
    return TrajectoryBatch(
        rewards_BCK=rewards_BCK,
        valid_BCK=is_valid_BCK if valid is None else torch.tensor([valid]),
        ends_BCK=ends_BCK,
        group_size=1,
        values_BCK=torch.tensor([values]),
        final_values_BCK=(ends_BCK != NONE) * final_value,
    )


def returns_of(batch: TrajectoryBatch, **keys) -> list[list[float]]:
    algorithm = make_algorithm(PpoConfig(**keys))
    return algorithm.advantages(batch, ONE_RANK).returns_BCK[0].tolist()


def flat(rows: list[list[float]]) -> list[float]:
    return [x for row in rows for x in row]


# --------------------------------------------------------------------------------------------
# Advantages
# --------------------------------------------------------------------------------------------
def test_generalised_advantages_example():
    """Four steps; the episode ends with the third."""
    rewards_BT = torch.tensor([[0.0, 0.0, 5.0, 0.0]])
    values_BT = torch.tensor([[1.0, 1.5, 2.0, 0.5]])
    is_last_BT = torch.tensor([[False, False, True, True]])
    final_BT = torch.tensor([[0.0, 0.0, 0.0, 0.7]])
    valid_BT = torch.ones_like(is_last_BT)
    got_BT = functional.generalised_advantages(
        rewards_BT, values_BT, valid_BT, is_last_BT, final_BT, 0.99, 0.95
    )
    assert got_BT[0].tolist() == pytest.approx([3.590061, 3.3015, 3.0, 0.193], abs=1e-6)
    mask_BT = torch.tensor([[True, True, True, False]])
    normalised_BT = functional.normalised(got_BT, mask_BT, ONE_RANK)
    want = [0.992577, 0.014618, -1.007195, -10.520385]
    assert normalised_BT[0].tolist() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    ("bootstrap", "counted"),
    [
        ("always", {SUCCESS, TRUNCATED, CUT}),
        ("truncation", {TRUNCATED, CUT}),
        ("none", {CUT}),
    ],
)
@pytest.mark.parametrize("end", [SUCCESS, TRUNCATED, CUT])
def test_what_the_last_state_counts(bootstrap, counted, end):
    batch = trajectory([[1.0, 2.0]], [[0.0, 0.0]], [[NONE, end]], final_value=10.0)
    got = returns_of(batch, bootstrap=bootstrap, gamma=0.5, gae_lambda=1.0)
    after = 10.0 if end in counted else 0.0
    assert flat(got) == pytest.approx([1.0 + 0.5 * (2.0 + 0.5 * after), 2.0 + 0.5 * after])


def test_an_episode_does_not_leak_into_the_one_before_nor_holes_into_anything():
    """A row of two episodes; the first ends in the middle of a chunk."""
    batch = trajectory(
        rewards=[[1.0, 2.0, NAN], [4.0, 8.0, 16.0]],
        values=[[0.5, 0.25, NAN], [100.0, 0.75, 1.0]],
        ends=[[NONE, SUCCESS, NONE], [NONE, NONE, CUT]],
        valid=[[True, True, False], [True, True, True]],
        final_value=32.0,
    )
    got = returns_of(batch, gamma=1.0, gae_lambda=1.0, bootstrap="none")
    assert flat(got) == pytest.approx([3.0, 2.0, 0.0, 60.0, 56.0, 48.0])


def test_padding_after_the_end_is_not_trained_on():
    batch = trajectory(
        rewards=[[0.0, 1.0], [NAN, NAN]],
        values=[[0.5, 0.5], [NAN, NAN]],
        ends=[[NONE, TRUNCATED], [NONE, NONE]],
        valid=[[True, True], [False, False]],
        final_value=0.5,
    )
    got = make_algorithm(PpoConfig()).advantages(batch, ONE_RANK)
    assert got.mask_BCK.tolist() == [[[True, True], [False, False]]]
    assert got.advantages_BCK.isfinite().all()
    assert got.returns_BCK[0, 1].tolist() == [0.0, 0.0]


def test_whole_chunks():
    """The rewards of a chunk are summed, and its end is wherever an action's is."""
    batch = trajectory(
        rewards=[[1.0, 2.0, 3.0], [4.0, 5.0, NAN]],
        values=[[0.5], [0.25]],
        ends=[[NONE, NONE, NONE], [NONE, TRUNCATED, NONE]],
        valid=[[True, True, True], [True, True, False]],
        final_value=10.0,
    )
    config = PpoConfig(reward_level="chunk", gamma=0.5, gae_lambda=1.0, normalize_advantages=False)
    got = make_algorithm(config).advantages(batch, ONE_RANK)
    assert got.mask_BCK.tolist() == [[[True], [True]]]
    assert got.returns_BCK.flatten().tolist() == pytest.approx([6.0 + 0.5 * 14.0, 14.0])
    assert got.advantages_BCK.flatten().tolist() == pytest.approx([12.5, 13.75])


def test_a_row_without_anything_and_a_rank_without_rows():
    algorithm = make_algorithm(PpoConfig())
    batch = trajectory([[1.0]], [[1.0]], [[NONE]], valid=[[False]])
    assert algorithm.advantages(batch, ONE_RANK).advantages_BCK.tolist() == [[[0.0]]]
    nothing = TrajectoryBatch(
        rewards_BCK=torch.zeros(0, 2, 3),
        valid_BCK=torch.zeros(0, 2, 3, dtype=torch.bool),
        ends_BCK=torch.zeros(0, 2, 3, dtype=torch.int8),
        group_size=1,
        values_BCK=torch.zeros(0, 2, 3),
        final_values_BCK=torch.zeros(0, 2, 3),
    )
    assert algorithm.advantages(nothing, ONE_RANK).advantages_BCK.shape == (0, 2, 3)


def test_every_group_is_useful():
    batch = trajectory([[0.0]], [[0.0]], [[SUCCESS]])
    assert make_algorithm(PpoConfig()).useful_groups(batch).tolist() == [True]


def test_needs():
    assert PpoConfig().needs() == Needs(values="action", final_values=True)
    config = PpoConfig(reward_level="chunk", kl_coef=0.1, critic_warmup_steps=3)
    assert config.needs() == Needs(
        values="chunk", final_values=True, reference=True, critic_warmup_steps=3
    )


# --------------------------------------------------------------------------------------------
# Critic
# --------------------------------------------------------------------------------------------
def value_batch(returns: list[float], old_values: list[float], **keys) -> MicroBatch:
    """Samples of one action with one token, which all count 1; the policy has not moved."""
    num_samples = len(returns)
    return MicroBatch(
        old_logprobs_SKA=torch.zeros(num_samples, 1, 1),
        advantages_SK=torch.ones(num_samples, 1),
        mask_SK=torch.ones(num_samples, 1, dtype=torch.bool),
        weights_SK=torch.ones(num_samples, 1),
        returns_SK=torch.tensor(returns)[:, None],
        old_values_SK=torch.tensor(old_values)[:, None],
        **keys,
    )


def output(values: list[float]) -> PolicyOutput:
    zeros_SKA = torch.zeros(len(values), 1, 1)
    values_SK = torch.tensor(values)[:, None].requires_grad_()
    return PolicyOutput(logprobs_SKA=zeros_SKA, entropy_SKA=zeros_SKA, values_SK=values_SK)


def test_value_loss_example():
    batch = value_batch(returns=[2.0, 2.0], old_values=[0.5, 2.1])
    terms = make_algorithm(PpoConfig()).loss(output([1.0, 2.0]), batch)
    assert terms.parts["critic/value_loss"].item() / 2 == pytest.approx(0.4225)
    total, count = terms.metrics["critic/value_clip_ratio"]
    assert float(total / count) == 0.5


def test_values_are_added_to_the_policy_with_their_weight():
    batch = value_batch(returns=[1.0], old_values=[0.0])
    terms = make_algorithm(PpoConfig(value_coef=0.25)).loss(output([0.0]), batch)
    assert terms.loss.item() == pytest.approx(-1.0 + 0.25 * 0.5)
    assert terms.parts["critic/value_loss"].item() == pytest.approx(0.5)


def test_a_warm_up_trains_the_values_alone():
    out = output([0.0])
    batch = value_batch(returns=[1.0], old_values=[0.0], critic_only=True)
    terms = make_algorithm(PpoConfig(entropy_coef=1.0)).loss(out, batch)
    assert terms.loss.item() == pytest.approx(0.5)
    terms.loss.backward()
    assert out.values_SK.grad.item() == pytest.approx(-1.0)


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (1000.0, 0.01)])
def test_explained_variance_survives_a_large_mean(offset, scale):
    """Single precision would lose all digits of the second case."""
    returns = torch.randn(64, generator=torch.Generator().manual_seed(0)) * scale + offset
    errors = torch.randn(64, generator=torch.Generator().manual_seed(1)) * scale * 0.5
    values = returns - errors
    algorithm = make_algorithm(PpoConfig())
    terms = algorithm.loss(output(values.tolist()), value_batch(returns.tolist(), values.tolist()))
    means = {name: float(total / count) for name, (total, count) in terms.metrics.items()}
    got = algorithm.derived_metrics(means)["critic/explained_variance"]
    want = 1 - (returns.double() - values.double()).var() / returns.double().var()
    assert got == pytest.approx(want.item(), abs=1e-6)


@pytest.mark.parametrize("returns", [[3.3], [0.1] * 7, [0.0, 0.0]])
def test_returns_that_do_not_vary_have_no_explained_variance(returns):
    algorithm = make_algorithm(PpoConfig())
    values = [0.5 * i for i in range(len(returns))]
    terms = algorithm.loss(output(values), value_batch(returns, values))
    means = {name: float(total / count) for name, (total, count) in terms.metrics.items()}
    assert "critic/return_mean" in means
    assert algorithm.derived_metrics(means) == {}


def test_a_step_without_updates_has_no_explained_variance():
    assert make_algorithm(PpoConfig()).derived_metrics({}) == {}
