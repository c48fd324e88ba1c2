"""What holds for advantages and losses whatever the numbers."""

import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, get_ident

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from vlactl_grpo import functional as grpo
from vlactl_grpo.algorithm import make_algorithm as make_grpo
from vlactl_grpo.plugin import GrpoConfig
from vlactl_ppo import functional as ppo
from vlactl_ppo.algorithm import make_algorithm as make_ppo
from vlactl_ppo.plugin import PpoConfig
from vlactl_rft.algorithm import make_algorithm as make_rft
from vlactl_rft.plugin import RftConfig

from vlactl.api.contracts import (
    Advantages,
    Algorithm,
    End,
    MicroBatch,
    PolicyOutput,
    TrajectoryBatch,
)
from vlactl_policy_gradient.functional import to_entries

quickly = settings(max_examples=30, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
ESTIMATORS = ("grpo", "rloo", "reinforce++", "reinforce++-baseline")
GARBAGE = (math.nan, math.inf, -math.inf, 1e30)


class Ranks:
    """Sums over ranks that run in threads."""

    def __init__(self, size: int) -> None:
        self.barrier, self.values = Barrier(size), {}

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        self.values[get_ident()] = value
        self.barrier.wait(timeout=10)
        total = sum(self.values.values())
        self.barrier.wait(timeout=10)
        return total


ONE_RANK = Ranks(1)


def group_returns(seed: int, num_groups: int, group_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (num_groups, group_size), generator=generator) / 4


def episodes(
    seed: int, *, num_groups: int = 3, group_size: int = 4, level="action"
) -> TrajectoryBatch:
    """Episodes of random length, played alone, with random rewards, values and ends."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_groups * group_size, 3, 2)
    length_B = torch.randint(1, 7, shape[:1], generator=generator)
    step_T = torch.arange(6)
    ends_BT = torch.zeros(shape[0], 6, dtype=torch.int8)
    kinds_B = torch.randint(End.SUCCESS, End.CUT + 1, shape[:1], generator=generator)
    ends_BT.scatter_(1, length_B[:, None] - 1, kinds_B[:, None].to(torch.int8))
    ends_BCK = ends_BT.view(shape)
    values_BCK = torch.randn(shape, generator=generator)
    return TrajectoryBatch(
        rewards_BCK=torch.randint(-4, 5, shape, generator=generator) / 2,
        valid_BCK=(step_T < length_B[:, None]).view(shape),
        ends_BCK=ends_BCK,
        group_size=group_size,
        values_BCK=values_BCK if level == "action" else values_BCK[:, :, :1],
        final_values_BCK=torch.randn(shape, generator=generator) * (ends_BCK != End.NONE),
    )


def rows(batch: TrajectoryBatch, index: torch.Tensor | slice) -> TrajectoryBatch:
    return TrajectoryBatch(
        rewards_BCK=batch.rewards_BCK[index],
        valid_BCK=batch.valid_BCK[index],
        ends_BCK=batch.ends_BCK[index],
        group_size=batch.group_size,
        values_BCK=batch.values_BCK[index],
        final_values_BCK=batch.final_values_BCK[index],
    )


def assert_same(got: Advantages, want: Advantages, index: torch.Tensor | slice) -> None:
    assert torch.equal(got.mask_BCK, want.mask_BCK[index])
    torch.testing.assert_close(got.advantages_BCK, want.advantages_BCK[index])
    if want.returns_BCK is not None:
        torch.testing.assert_close(got.returns_BCK, want.returns_BCK[index])


def algorithms() -> list[Algorithm]:
    keys = {"group_size": 4, "reward_lower_bound": -1.0, "reward_upper_bound": 1.5}
    return [
        *(make_grpo(GrpoConfig(advantage=name, **keys)) for name in ESTIMATORS),
        make_ppo(PpoConfig()),
        *(make_rft(RftConfig(group_size=4, balance_groups=balance)) for balance in (False, True)),
    ]


# --------------------------------------------------------------------------------------------
# Groups
# --------------------------------------------------------------------------------------------
@quickly
@given(seeds, st.integers(1, 5), st.integers(2, 9))
def test_advantages_of_a_group_sum_to_zero(seed, num_groups, group_size):
    returns_NG = group_returns(seed, num_groups, group_size)
    for estimator in (
        grpo.centred_returns,
        grpo.group_advantages,
        grpo.leave_one_out_advantages,
    ):
        sums_N = estimator(returns_NG).sum(dim=1)
        torch.testing.assert_close(sums_N, torch.zeros_like(sums_N), rtol=0, atol=1e-4)


@quickly
@given(seeds, st.integers(2, 9))
def test_only_differences_within_a_group_count(seed, group_size):
    returns_NG = group_returns(seed, 4, group_size)
    shifted_NG = returns_NG + torch.arange(4.0)[:, None]
    for estimator in (grpo.group_advantages, grpo.leave_one_out_advantages):
        torch.testing.assert_close(
            estimator(shifted_NG), estimator(returns_NG), rtol=1e-4, atol=1e-4
        )


@quickly
@given(seeds, st.integers(2, 9), st.floats(0.5, 8))
def test_scaling_returns(seed, group_size, factor):
    returns_NG = group_returns(seed, 4, group_size)
    torch.testing.assert_close(
        grpo.group_advantages(factor * returns_NG),
        grpo.group_advantages(returns_NG),
        rtol=1e-3,
        atol=1e-4,
    )
    torch.testing.assert_close(
        grpo.leave_one_out_advantages(factor * returns_NG),
        factor * grpo.leave_one_out_advantages(returns_NG),
        rtol=1e-4,
        atol=1e-4,
    )


@quickly
@given(seeds, st.integers(2, 9))
def test_leaving_one_out_takes_the_mean_of_the_others(seed, group_size):
    returns_NG = group_returns(seed, 2, group_size)
    others_NG = (returns_NG.sum(dim=1, keepdim=True) - returns_NG) / (group_size - 1)
    torch.testing.assert_close(
        grpo.leave_one_out_advantages(returns_NG), returns_NG - others_NG, rtol=1e-4, atol=1e-5
    )


@quickly
@given(seeds, st.permutations(range(3)), st.permutations(range(4)))
def test_permuting_groups_and_members_permutes_results(seed, groups, members):
    batch = episodes(seed)
    index_B = torch.arange(12).view(3, 4)[list(groups)][:, list(members)].flatten()
    for algorithm in algorithms():
        whole = algorithm.advantages(batch, ONE_RANK)
        assert_same(algorithm.advantages(rows(batch, index_B), ONE_RANK), whole, index_B)


@quickly
@given(seeds, st.integers(0, 3))
def test_ranks_agree_with_one_rank_that_has_everything(seed, num_groups_of_first):
    batch = episodes(seed)
    cut = 4 * num_groups_of_first
    shares = (slice(0, cut), slice(cut, 12))
    for algorithm in algorithms():
        whole, ranks = algorithm.advantages(batch, ONE_RANK), Ranks(2)
        with ThreadPoolExecutor(2) as pool:
            futures = [
                pool.submit(algorithm.advantages, rows(batch, share), ranks) for share in shares
            ]
        for future, share in zip(futures, shares, strict=True):
            assert_same(future.result(), whole, share)
            assert future.result().metrics == whole.metrics


@quickly
@given(seeds)
def test_whitened_advantages_have_mean_0_and_deviation_1(seed):
    batch = episodes(seed)
    algorithm = make_grpo(GrpoConfig(group_size=4, advantage="reinforce++", filter_rewards=False))
    for got in (
        algorithm.advantages(batch, ONE_RANK),
        make_ppo(PpoConfig()).advantages(batch, ONE_RANK),
    ):
        trained = got.advantages_BCK[got.mask_BCK]
        assert trained.mean().item() == pytest.approx(0, abs=1e-4)
        assert trained.std().item() == pytest.approx(1, abs=1e-3)


# --------------------------------------------------------------------------------------------
# Generalised advantage estimates
# --------------------------------------------------------------------------------------------
def estimates(batch: TrajectoryBatch, **keys) -> Advantages:
    config = PpoConfig(normalize_advantages=False, **keys)
    return make_ppo(config).advantages(batch, ONE_RANK)


@quickly
@given(seeds, st.sampled_from(["action", "chunk"]))
def test_without_discount_an_advantage_is_return_minus_value(seed, level):
    batch = episodes(seed, level=level)
    got = estimates(batch, gamma=1.0, gae_lambda=1.0, reward_level=level)
    earned_BCK = batch.rewards_BCK * batch.valid_BCK + batch.final_values_BCK
    earned_BT = to_entries(earned_BCK, level).flatten(1)
    to_go_BCK = earned_BT.flip(1).cumsum(1).flip(1).view_as(got.mask_BCK)
    want_BCK = (to_go_BCK - batch.values_BCK) * got.mask_BCK
    torch.testing.assert_close(got.advantages_BCK, want_BCK, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.returns_BCK, to_go_BCK * got.mask_BCK, rtol=1e-4, atol=1e-4)


@quickly
@given(seeds, st.floats(0.1, 1.0), st.floats(0.0, 1.0))
def test_a_perfect_critic_leaves_no_advantages(seed, gamma, gae_lambda):
    batch = episodes(seed)
    values_BT = torch.zeros(12, 7)
    for t in reversed(range(6)):
        after_B = torch.where(
            batch.ends_BCK.flatten(1)[:, t] != End.NONE,
            batch.final_values_BCK.flatten(1)[:, t],
            values_BT[:, t + 1],
        )
        values_BT[:, t] = batch.rewards_BCK.flatten(1)[:, t] + gamma * after_B
    batch.values_BCK.copy_(values_BT[:, :-1].view_as(batch.values_BCK))
    got = estimates(batch, gamma=gamma, gae_lambda=gae_lambda).advantages_BCK
    torch.testing.assert_close(got, torch.zeros_like(got), rtol=0, atol=1e-5)


@quickly
@given(seeds, st.sampled_from(GARBAGE))
def test_what_was_not_played_does_not_count(seed, garbage):
    batch = episodes(seed)
    spoiled = episodes(seed)
    for tensor in (spoiled.rewards_BCK, spoiled.values_BCK, spoiled.final_values_BCK):
        tensor[~batch.valid_BCK] = garbage
    for algorithm in algorithms():
        want = algorithm.advantages(batch, ONE_RANK)
        assert_same(algorithm.advantages(spoiled, ONE_RANK), want, slice(None))


@quickly
@given(seeds, st.sampled_from(["always", "truncation", "none"]))
def test_episodes_in_one_row_are_judged_as_if_played_alone(seed, bootstrap):
    alone = episodes(seed)
    row = TrajectoryBatch(
        rewards_BCK=alone.rewards_BCK.flatten(0, 1)[None],
        valid_BCK=alone.valid_BCK.flatten(0, 1)[None],
        ends_BCK=alone.ends_BCK.flatten(0, 1)[None],
        group_size=1,
        values_BCK=alone.values_BCK.flatten(0, 1)[None],
        final_values_BCK=alone.final_values_BCK.flatten(0, 1)[None],
    )
    want, got = (estimates(batch, bootstrap=bootstrap) for batch in (alone, row))
    assert torch.equal(got.advantages_BCK.flatten(0, 1), want.advantages_BCK.flatten(0, 1))
    assert torch.equal(got.returns_BCK.flatten(0, 1), want.returns_BCK.flatten(0, 1))


@quickly
@given(seeds, st.floats(0.0, 1.0))
def test_huber_is_between_its_branches(seed, delta_fraction):
    error = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 3
    delta = 0.1 + delta_fraction
    got = ppo.huber(error, delta)
    assert (got <= 0.5 * error.square() + 1e-6).all()
    assert (got <= delta * error.abs() + 1e-6).all()
    assert (got >= 0).all()


# --------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------
LEVELS = [
    (reward, logprob, entropy)
    for reward in ("action", "chunk")
    for logprob in ("token", "action", "chunk")
    for entropy in ("token", "action", "chunk")
    if reward == "chunk" or "chunk" not in (logprob, entropy)
]
levels = st.sampled_from(LEVELS)


class Case:
    """Inputs of a loss at some levels: 5 samples of 3 actions with 2 tokens."""

    def __init__(self, seed: int, reward_level: str) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape_SK = (5, 3 if reward_level == "action" else 1)
        self.mask_SK = torch.rand(shape_SK, generator=generator) < 0.6
        self.per_token = {
            name: 0.3 * torch.randn(5, 3, 2, generator=generator)
            for name in ("new", "old", "reference", "entropy")
        }
        self.per_entry = {
            name: torch.randn(shape_SK, generator=generator)
            for name in ("advantages", "returns", "old values", "new values")
        }

    def spoil(self, garbage: float) -> None:
        for values_SKA in self.per_token.values():
            values_SKA[~self.mask_SK.expand(5, 3)] = garbage
        for values_SK in self.per_entry.values():
            values_SK[~self.mask_SK] = garbage

    def gradients(self, algorithm: Algorithm) -> tuple[torch.Tensor, ...]:
        """Loss and its gradients with respect to log-probabilities, entropies and values."""
        leaves = [self.per_token["new"], self.per_token["entropy"], self.per_entry["new values"]]
        new_SKA, entropy_SKA, values_SK = (leaf.clone().requires_grad_() for leaf in leaves)
        batch = MicroBatch(
            old_logprobs_SKA=self.per_token["old"],
            advantages_SK=self.per_entry["advantages"],
            mask_SK=self.mask_SK,
            weights_SK=algorithm.weights(self.mask_SK, torch.full((5,), 3), 6, 9, ONE_RANK),
            returns_SK=self.per_entry["returns"],
            old_values_SK=self.per_entry["old values"],
            reference_logprobs_SKA=self.per_token["reference"],
        )
        out = PolicyOutput(logprobs_SKA=new_SKA, entropy_SKA=entropy_SKA, values_SK=values_SK)
        terms = algorithm.loss(out, batch)
        terms.loss.backward()
        metrics = torch.stack([total for total, _ in terms.metrics.values()])
        return terms.loss.detach(), new_SKA.grad, entropy_SKA.grad, values_SK.grad, metrics


def ppo_at(levels: tuple[str, str, str], aggregation: str, **keys) -> Algorithm:
    reward, logprob, entropy = levels
    return make_ppo(
        PpoConfig(
            reward_level=reward,
            logprob_level=logprob,
            entropy_level=entropy,
            aggregation=aggregation,
            **keys,
        )
    )


@pytest.mark.parametrize("aggregation", ["episode-mean", "token-mean"])
@quickly
@given(seeds, levels, st.sampled_from(GARBAGE))
def test_masked_samples_never_influence_loss_metrics_or_gradient(
    aggregation, seed, levels, garbage
):
    algorithm = ppo_at(levels, aggregation, entropy_coef=0.1, kl_coef=0.2, dual_clip=2.0)
    clean, spoiled = Case(seed, levels[0]), Case(seed, levels[0])
    spoiled.spoil(garbage)
    for want, got in zip(clean.gradients(algorithm), spoiled.gradients(algorithm), strict=True):
        assert torch.equal(got, want)
    _, new_grad_SKA, _, values_grad_SK, _ = spoiled.gradients(algorithm)
    assert not new_grad_SKA[~clean.mask_SK.expand(5, 3)].any()
    assert not values_grad_SK[~clean.mask_SK].any()


@quickly
@given(seeds, levels)
def test_before_the_first_update_the_loss_is_the_mean_advantage(seed, levels):
    """All ratios are 1; however fine, an entry counts once."""
    case = Case(seed, levels[0])
    assume(case.mask_SK.any())
    case.per_token["old"] = case.per_token["new"]
    loss = case.gradients(ppo_at(levels, "token-mean", value_coef=0.0))[0]
    want = -case.per_entry["advantages"][case.mask_SK].mean()
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)


@quickly
@given(seeds, levels)
def test_copies_of_a_token_change_nothing_at_token_level(seed, levels):
    """The loss of an entry is a mean: no factor for the number of its tokens."""
    reward_level, _, _ = levels
    case, doubled = Case(seed, reward_level), Case(seed, reward_level)
    for name, values_SKA in doubled.per_token.items():
        doubled.per_token[name] = values_SKA.repeat(1, 1, 2)
    algorithm = ppo_at((reward_level, "token", "token"), "token-mean", entropy_coef=0.1)
    torch.testing.assert_close(doubled.gradients(algorithm)[0], case.gradients(algorithm)[0])


@quickly
@given(seeds, levels, st.sampled_from(["episode-mean", "token-mean"]), st.floats(0.1, 10))
def test_the_policy_loss_scales_with_advantages(seed, levels, aggregation, factor):
    algorithm = ppo_at(levels, aggregation, value_coef=0.0)
    case, scaled = Case(seed, levels[0]), Case(seed, levels[0])
    scaled.per_entry["advantages"] *= factor
    for index in (0, 1):  # loss, gradient
        torch.testing.assert_close(
            scaled.gradients(algorithm)[index],
            factor * case.gradients(algorithm)[index],
            rtol=1e-4,
            atol=1e-5,
        )


@quickly
@given(seeds, st.sampled_from(["action", "chunk"]))
def test_weights_of_a_token_mean_add_up_to_one(seed, reward_level):
    mask_SK = Case(seed, reward_level).mask_SK
    assume(mask_SK.any())
    algorithm = ppo_at((reward_level, "token", "token"), "token-mean")
    weights_SK = algorithm.weights(mask_SK, mask_SK.sum(1), len(mask_SK), 9, ONE_RANK)
    assert weights_SK.sum().item() == pytest.approx(1)
    assert not weights_SK[~mask_SK].any()
