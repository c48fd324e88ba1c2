"""The policy loss by hand: examples, levels, weights, and sums over micro-batches and ranks."""

import math

import pytest
import torch
from pydantic import ValidationError

from vlactl.api.contracts import LossTerms, MicroBatch, PolicyOutput
from vlactl_policy_gradient import functional
from vlactl_policy_gradient.algorithm import PolicyGradient
from vlactl_policy_gradient.config import PolicyGradientConfig

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


def make_algorithm(**keys) -> PolicyGradient:
    return PolicyGradient(PolicyGradientConfig(name="of the test", **keys))


def micro_batch(mask_SK: torch.Tensor, weights_SK: torch.Tensor) -> MicroBatch:
    return MicroBatch(
        old_logprobs_SKA=OLD, advantages_SK=SIGNS, mask_SK=mask_SK, weights_SK=weights_SK
    )


def means(terms: LossTerms) -> dict[str, float]:
    return {name: float(total / count) for name, (total, count) in terms.metrics.items()}


# --------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("dual_clip", "loss", "dual"), [(None, 0.73, 0.0), (3.0, 0.355, 1.125)])
def test_policy_loss_example(dual_clip, loss, dual):
    algorithm = make_algorithm(dual_clip=dual_clip, aggregation="token-mean")
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
    algorithm = make_algorithm()
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
    algorithm = make_algorithm(kl_coef=0.5, kl_estimator="k1", aggregation="token-mean")
    mask_SK = torch.ones(1, 4, dtype=torch.bool)
    batch = MicroBatch(
        old_logprobs_SKA=NEW,
        advantages_SK=torch.zeros(1, 4),
        mask_SK=mask_SK,
        weights_SK=algorithm.weights(mask_SK, torch.tensor([4]), 1, 4, ONE_RANK),
        reference_logprobs_SKA=NEW - 0.25,
    )
    terms = algorithm.loss(PolicyOutput(logprobs_SKA=NEW, entropy_SKA=NEW), batch)
    assert terms.loss.item() == pytest.approx(0.125)
    assert means(terms)["actor/kl_loss"] == pytest.approx(0.25)


def test_whatever_masked_entries_hold_the_gradient_is_finite():
    algorithm = make_algorithm(entropy_coef=0.1)
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
    algorithm = make_algorithm(entropy_coef=1.0, aggregation="token-mean")
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
    algorithm = make_algorithm(aggregation="episode-mean")
    mask_SK = torch.tensor([[True, True], [True, False], [True, False]])
    weights_SK = algorithm.weights(mask_SK, torch.tensor([3, 3, 1]), 4, 4, ONE_RANK)
    per_trajectory = weights_SK[:2].sum(), weights_SK[2].sum()
    assert [float(total) for total in per_trajectory] == pytest.approx([0.5, 0.5])


def test_token_mean_counts_the_actions_of_all_ranks():
    algorithm = make_algorithm(aggregation="token-mean")
    mask_SK = torch.tensor([[True, True], [True, False]])
    weights_SK = algorithm.weights(mask_SK, torch.tensor([2, 1]), 9, 9, Ranks(2))
    torch.testing.assert_close(weights_SK, torch.tensor([[0.2, 0.2], [0.2, 0.0]]))


def test_no_action_trained_on_gives_zero_weights():
    algorithm = make_algorithm(aggregation="token-mean")
    mask_SK = torch.zeros(2, 2, dtype=torch.bool)
    weights_SK = algorithm.weights(mask_SK, torch.zeros(2, dtype=torch.int64), 2, 4, ONE_RANK)
    assert torch.equal(weights_SK, torch.zeros(2, 2))


@pytest.mark.parametrize("aggregation", ["episode-mean", "token-mean"])
def test_loss_adds_up_over_micro_batches_and_ranks(aggregation):
    """8 samples on one rank in one piece, or on two ranks in micro-batches of two."""
    generator = torch.Generator().manual_seed(0)
    algorithm = make_algorithm(aggregation=aggregation, entropy_coef=0.1)
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


# --------------------------------------------------------------------------------------------
# Levels
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", ["logprob_level", "entropy_level"])
def test_one_number_per_chunk_cannot_be_weighed_by_action(key):
    with pytest.raises(ValidationError, match=f'{key} = "chunk" needs reward_level = "chunk"'):
        make_algorithm(**{key: "chunk"})
    make_algorithm(**{key: "chunk", "reward_level": "chunk"})


def test_ratios_of_tokens_actions_and_chunks():
    """Log-ratios 0.1 and 0.2 for the tokens of one action, 0.3 and 0.4 for those of the other."""
    new_SKA = torch.tensor([[[0.1, 0.2], [0.3, 0.4]]])
    want = {"token": [0.1, 0.2, 0.3, 0.4], "action": [0.3, 0.7], "chunk": [1.0]}
    for level, log_ratios in want.items():
        algorithm = make_algorithm(
            reward_level="chunk", logprob_level=level, clip_high=9.0, aggregation="token-mean"
        )
        mask_SK = torch.ones(1, 1, dtype=torch.bool)
        batch = MicroBatch(
            old_logprobs_SKA=torch.zeros_like(new_SKA),
            advantages_SK=torch.tensor([[-2.0]]),
            mask_SK=mask_SK,
            weights_SK=algorithm.weights(mask_SK, torch.tensor([2]), 1, 2, ONE_RANK),
        )
        terms = algorithm.loss(PolicyOutput(logprobs_SKA=new_SKA, entropy_SKA=new_SKA), batch)
        ratios = [math.exp(log_ratio) for log_ratio in log_ratios]
        mean = sum(ratios) / len(ratios)
        assert terms.loss.item() == pytest.approx(2 * mean)
        assert means(terms)["actor/ratio"] == pytest.approx(mean)
        assert terms.metrics["actor/ratio"][1] == len(ratios)


@pytest.mark.parametrize(("level", "want"), [("token", 2.5), ("action", 5.0), ("chunk", 10.0)])
def test_entropy_of_tokens_actions_and_chunks(level, want):
    entropy_SKA = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], requires_grad=True)
    algorithm = make_algorithm(
        reward_level="chunk", entropy_level=level, entropy_coef=0.5, aggregation="token-mean"
    )
    mask_SK = torch.ones(1, 1, dtype=torch.bool)
    batch = MicroBatch(
        old_logprobs_SKA=torch.zeros(1, 2, 2),
        advantages_SK=torch.zeros(1, 1),
        mask_SK=mask_SK,
        weights_SK=algorithm.weights(mask_SK, torch.tensor([2]), 1, 2, ONE_RANK),
    )
    out = PolicyOutput(logprobs_SKA=torch.zeros(1, 2, 2), entropy_SKA=entropy_SKA)
    terms = algorithm.loss(out, batch)
    terms.loss.backward()
    assert means(terms)["actor/entropy_loss"] == pytest.approx(want)
    assert terms.loss.item() == pytest.approx(-0.5 * want)
    assert entropy_SKA.grad.unique().tolist() == pytest.approx([-0.5 * want / 10])


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("distance", [math.inf, 1e4, -1e4, -math.inf])
def test_ratios_beyond_all_bounds_leave_the_gradient_finite(sign, distance):
    """exp(1e4) is infinite, and 0 * infinity is what a clipped ratio's gradient would be."""
    new_SKA = torch.tensor([[[distance]]], requires_grad=True)
    mask_SK = torch.ones(1, 1, dtype=torch.bool)
    batch = MicroBatch(
        old_logprobs_SKA=torch.zeros(1, 1, 1),
        advantages_SK=torch.tensor([[sign]]),
        mask_SK=mask_SK,
        weights_SK=torch.ones(1, 1),
    )
    out = PolicyOutput(logprobs_SKA=new_SKA, entropy_SKA=torch.zeros(1, 1, 1))
    terms = make_algorithm().loss(out, batch)
    terms.loss.backward()
    assert math.isfinite(terms.loss.item())
    assert new_SKA.grad.item() == 0.0


def test_versions_interpolate_between_who_acted_and_the_present():
    versions = torch.tensor([7.0, 6.0, 5.0, 3.0])
    got = functional.proximal_logprobs(torch.zeros(4), -torch.ones(4), versions, 7.0)
    assert got.tolist() == pytest.approx([-1.0, -1.0, -0.5, -0.25])


def test_too_large_importance_weights_drop_a_sample():
    got = functional.decoupled_objective(
        logprobs=torch.tensor([0.1, 0.1]),
        old_logprobs=torch.tensor([0.0, -1.0]),
        proximal=torch.tensor([0.0, 0.0]),
        advantages=torch.tensor([1.0, 1.0]),
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=None,
        max_weight=2.0,
    )
    assert got.is_kept.tolist() == [True, False]
    assert got.loss.tolist() == pytest.approx([-math.exp(0.1), 0.0])


def test_a_warm_up_of_the_critic_leaves_the_policy_alone():
    algorithm = make_algorithm(entropy_coef=0.1, kl_coef=0.1)
    new_SKA = NEW.clone().requires_grad_()
    mask_SK = torch.ones(1, 4, dtype=torch.bool)
    batch = MicroBatch(
        old_logprobs_SKA=OLD,
        advantages_SK=SIGNS,
        mask_SK=mask_SK,
        weights_SK=torch.full((1, 4), 0.25),
        reference_logprobs_SKA=OLD,
        critic_only=True,
    )
    terms = algorithm.loss(PolicyOutput(logprobs_SKA=new_SKA, entropy_SKA=new_SKA), batch)
    assert terms.loss.item() == terms.parts["actor/policy_loss"].item() == 0.0
    assert not terms.loss.requires_grad
    assert means(terms)["actor/kl_loss"] > 0
