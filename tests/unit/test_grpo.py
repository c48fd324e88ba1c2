"""GRPO by hand: small examples, degenerate groups, and sums over micro-batches and ranks."""

import math

import pytest
import torch
from vlactl_grpo import functional
from vlactl_grpo.algorithm import make_algorithm
from vlactl_grpo.plugin import GrpoConfig

from vlactl.api.contracts import MicroBatch, PolicyOutput, TrajectoryBatch

OLD = torch.tensor([0.2, 0.2, 0.2, 0.2]).log()[None, :, None]
NEW = torch.tensor([0.3, 0.1, 0.22, 0.9]).log()[None, :, None]
SIGNS = torch.tensor([[1.0, -1.0, 1.0, -1.0]])


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
        values_BCK=None,
        group_size=group_size,
    )


def micro_batch(mask_SK: torch.Tensor, weights_SK: torch.Tensor) -> MicroBatch:
    return MicroBatch(
        old_logprobs_SKA=OLD, advantages_SK=SIGNS, mask_SK=mask_SK, weights_SK=weights_SK
    )


def means(terms) -> dict[str, float]:
    return {name: float(total / count) for name, (total, count) in terms.metrics.items()}


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


def test_the_action_that_ends_an_episode_is_the_last_valid_one():
    dones_BLK = torch.tensor([[[False, False], [False, True], [False, False], [True, False]]])
    valid_BCK = functional.valid_actions(dones_BLK)
    assert valid_BCK.tolist() == [[[True, True], [False, False], [False, False]]]
    assert functional.count_valid_actions(valid_BCK).tolist() == [2]


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


# --------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("dual_clip", "loss", "dual"), [(None, 0.73, 0.0), (3.0, 0.355, 1.125)])
def test_policy_loss_example(dual_clip, loss, dual):
    algorithm = make_algorithm(GrpoConfig(dual_clip=dual_clip, aggregation="token-mean"))
    mask_SK = torch.ones(1, 4, dtype=torch.bool)
    weights_SK = algorithm.weights(mask_SK, torch.tensor([4]), 1, 4, ONE_RANK)
    out = PolicyOutput(logprobs_SKA=NEW, entropy_SKA=NEW)
    terms = algorithm.loss(out, micro_batch(mask_SK, weights_SK))
    got = means(terms)
    assert terms.loss.item() == pytest.approx(loss, abs=1e-6)
    assert terms.parts["actor/policy_loss"].item() == pytest.approx(loss, abs=1e-6)
    assert got["actor/dual_cliped_ratio"] == pytest.approx(dual, abs=1e-6)
    assert got["actor/clip_fraction"] == 0.5
    assert got["actor/approx_kl"] == pytest.approx(-0.327926, abs=1e-6)
    assert got["actor/clipped_ratio"] == pytest.approx(1.115, abs=1e-6)
    assert got["actor/ratio"] == pytest.approx(1.9, abs=1e-6)


def test_masked_policy_loss_example():
    algorithm = make_algorithm(GrpoConfig())
    mask_SK = torch.tensor([[True, True, True, False]])
    weights_SK = algorithm.weights(mask_SK, torch.tensor([3]), 1, 4, ONE_RANK)
    out = PolicyOutput(logprobs_SKA=NEW, entropy_SKA=NEW)
    terms = algorithm.loss(out, micro_batch(mask_SK, weights_SK))
    assert terms.loss.item() == pytest.approx(-0.526667, abs=1e-6)


@pytest.mark.parametrize(
    ("estimator", "want"),
    [("k1", [0.5, -1.0]), ("k2", [0.125, 0.5]), ("k3", [0.106531, 0.718282])],
)
def test_kl_examples(estimator, want):
    logprobs, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    got = functional.kl_divergence(logprobs, reference, estimator)
    assert got.tolist() == pytest.approx(want, abs=1e-6)


def test_kl_to_the_reference_is_added():
    algorithm = make_algorithm(GrpoConfig(kl_coef=0.5, kl_estimator="k1", aggregation="token-mean"))
    mask_SK = torch.ones(1, 4, dtype=torch.bool)
    batch = MicroBatch(
        old_logprobs_SKA=NEW,
        advantages_SK=torch.zeros(1, 4),
        mask_SK=mask_SK,
        weights_SK=algorithm.weights(mask_SK, torch.tensor([4]), 1, 4, ONE_RANK),
        reference_logprobs_SKA=NEW - 0.25,
    )
    terms = algorithm.loss(PolicyOutput(logprobs_SKA=NEW, entropy_SKA=NEW), batch)
    assert algorithm.needs.reference
    assert terms.loss.item() == pytest.approx(0.125)
    assert means(terms)["actor/kl_loss"] == pytest.approx(0.25)


def test_whatever_masked_entries_hold_the_gradient_is_finite():
    algorithm = make_algorithm(GrpoConfig(entropy_coef=0.1))
    logprobs_SKA = torch.tensor([[[-0.5], [-math.inf], [math.nan]]], requires_grad=True)
    entropy_SKA = torch.tensor([[[0.7], [math.nan], [math.inf]]], requires_grad=True)
    mask_SK = torch.tensor([[True, False, False]])
    batch = MicroBatch(
        old_logprobs_SKA=torch.tensor([[[-0.5], [-1.0], [-1.0]]]),
        advantages_SK=torch.tensor([[1.0, 0.0, 0.0]]),
        mask_SK=mask_SK,
        weights_SK=algorithm.weights(mask_SK, torch.tensor([1]), 1, 3, ONE_RANK),
    )
    terms = algorithm.loss(PolicyOutput(logprobs_SKA=logprobs_SKA, entropy_SKA=entropy_SKA), batch)
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(-1.0 - 0.1 * 0.7)
    assert logprobs_SKA.grad.flatten().tolist() == pytest.approx([-1.0, 0.0, 0.0])
    assert entropy_SKA.grad.flatten().tolist() == pytest.approx([-0.1, 0.0, 0.0])
    assert all(math.isfinite(value) for value in means(terms).values())


def test_entropy_bonus_pushes_towards_uniform_with_a_finite_gradient():
    algorithm = make_algorithm(GrpoConfig(entropy_coef=1.0, aggregation="token-mean"))
    logits_SKAV = torch.tensor([[[[200.0, 0.0, 0.0]], [[1.0, 0.0, 0.0]]]], requires_grad=True)
    logprobs_SKAV = logits_SKAV.log_softmax(dim=-1)
    entropy_SKA = -(logprobs_SKAV.exp() * logprobs_SKAV).sum(dim=-1)
    logprobs_SKA = logprobs_SKAV[..., 0]
    mask_SK = torch.ones(1, 2, dtype=torch.bool)
    batch = MicroBatch(
        old_logprobs_SKA=logprobs_SKA.detach(),
        advantages_SK=torch.zeros(1, 2),
        mask_SK=mask_SK,
        weights_SK=algorithm.weights(mask_SK, torch.tensor([2]), 1, 2, ONE_RANK),
    )
    out = PolicyOutput(logprobs_SKA=logprobs_SKA, entropy_SKA=entropy_SKA)
    algorithm.loss(out, batch).loss.backward()
    assert logits_SKAV.grad.isfinite().all()
    assert logits_SKAV.grad[0, 1, 0, 0] > 0


# --------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------
def test_episode_mean_weighs_trajectories_alike():
    algorithm = make_algorithm(GrpoConfig(aggregation="episode-mean"))
    mask_SK = torch.tensor([[True, True], [True, False], [True, False]])
    weights_SK = algorithm.weights(mask_SK, torch.tensor([3, 3, 1]), 4, 4, ONE_RANK)
    per_trajectory = weights_SK[:2].sum(), weights_SK[2].sum()
    assert [float(total) for total in per_trajectory] == pytest.approx([0.5, 0.5])


def test_token_mean_counts_the_actions_of_all_ranks():
    algorithm = make_algorithm(GrpoConfig(aggregation="token-mean"))
    mask_SK = torch.tensor([[True, True], [True, False]])
    weights_SK = algorithm.weights(mask_SK, torch.tensor([2, 1]), 9, 9, Ranks(2))
    torch.testing.assert_close(weights_SK, torch.tensor([[0.2, 0.2], [0.2, 0.0]]))


def test_no_action_trained_on_gives_zero_weights():
    algorithm = make_algorithm(GrpoConfig(aggregation="token-mean"))
    mask_SK = torch.zeros(2, 2, dtype=torch.bool)
    weights_SK = algorithm.weights(mask_SK, torch.zeros(2, dtype=torch.int64), 2, 4, ONE_RANK)
    assert torch.equal(weights_SK, torch.zeros(2, 2))


@pytest.mark.parametrize("aggregation", ["episode-mean", "token-mean"])
def test_loss_adds_up_over_micro_batches_and_ranks(aggregation):
    """8 samples on one rank in one piece, or on two ranks in micro-batches of two."""
    generator = torch.Generator().manual_seed(0)
    algorithm = make_algorithm(GrpoConfig(aggregation=aggregation, entropy_coef=0.1))
    new_SKA, old_SKA, entropy_SKA = torch.randn(3, 8, 4, 3, generator=generator).unbind()
    advantages_SK = torch.randn(8, 4, generator=generator)
    mask_SK = torch.rand(8, 4, generator=generator) < 0.6
    valid_S = torch.randint(4, 16, (8,), generator=generator)

    def loss(rows: slice, weights_SK: torch.Tensor):
        batch = MicroBatch(
            old_logprobs_SKA=old_SKA[rows],
            advantages_SK=advantages_SK[rows],
            mask_SK=mask_SK[rows],
            weights_SK=weights_SK[rows],
        )
        out = PolicyOutput(logprobs_SKA=new_SKA[rows], entropy_SKA=entropy_SKA[rows])
        return algorithm.loss(out, batch)

    whole = loss(slice(0, 8), algorithm.weights(mask_SK, valid_S, 10, 16, ONE_RANK))
    weights = []
    for mine, other in ((slice(0, 4), slice(4, 8)), (slice(4, 8), slice(0, 4))):
        reduce = Ranks(int(mask_SK[other].sum()))
        weights.append(algorithm.weights(mask_SK[mine], valid_S[mine], 10, 16, reduce))
    parts = [loss(slice(i, i + 2), torch.cat(weights)) for i in range(0, 8, 2)]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    for name, (total, count) in whole.metrics.items():
        torch.testing.assert_close(sum(part.metrics[name][0] for part in parts), total)
        assert sum(part.metrics[name][1] for part in parts) == count
