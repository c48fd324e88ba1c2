"""PPO's advantages and value loss against recorded inputs and outputs of a reference.

The recordings put time first ([T, B] and [C, B, K]); ours is [B, T] and [B, C, K]. Their `dones`
and `values` have a further row: row t of `dones` tells of the state before action t.
"""

import math
from collections.abc import Callable

import pytest
import torch
from vlactl_ppo import functional
from vlactl_ppo.algorithm import Ppo, make_algorithm
from vlactl_ppo.plugin import PpoConfig

from vlactl.api.contracts import End, LossTerms, MicroBatch, PolicyOutput, TrajectoryBatch


class OneRank:
    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return value.clone()


def assert_close(got: torch.Tensor, want: torch.Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(got, want.to(got.dtype), rtol=rtol, atol=atol)


# --------------------------------------------------------------------------------------------
# Advantages
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case_id", [f"flat{i}" for i in range(12)] + ["critic_free"])
def test_generalised_advantages(algorithm_case, case_id):
    case = algorithm_case("gae", case_id)
    params, given = case.params, case.given
    rewards_BT, done_BT = given["rewards"].T, given["dones"].T[:, 1:]
    values_BL = given.get("values", torch.zeros(given["dones"].shape)).T
    is_last_BT, final_BT = done_BT.clone(), torch.zeros_like(rewards_BT)
    is_last_BT[:, -1] = True
    final_BT[:, -1] = values_BL[:, -1].masked_fill(done_BT[:, -1], 0.0)
    advantages_BT = functional.generalised_advantages(
        rewards_BT,
        values_BL[:, :-1],
        torch.ones_like(done_BT),
        is_last_BT,
        final_BT,
        params.get("gamma", 1.0),
        params.get("gae_lambda", 1.0),
    )
    assert_close((advantages_BT + values_BL[:, :-1]).T, case.want["returns"], 1e-5, 1e-5)
    tolerance = 1e-5
    if params["normalize_advantages"]:
        tolerance = 1e-4
        mask_BT = given["loss_mask"].T
        advantages_BT = functional.normalised(advantages_BT, mask_BT, OneRank())
    assert_close(advantages_BT.T, case.want["advantages"], tolerance, tolerance)


@pytest.mark.parametrize("case_id", [f"embodied{i}" for i in range(4)])
def test_advantages_of_trajectories(algorithm_case, valid_actions, case_id):
    case = algorithm_case("gae", case_id)
    params, batch = case.params, trajectories(case.params, case.given, valid_actions)
    algorithm = make_algorithm(
        PpoConfig(
            reward_level=params["reward_type"].removesuffix("_level"),
            gamma=params["gamma"],
            gae_lambda=params["gae_lambda"],
            normalize_advantages=params["normalize_advantages"],
            bootstrap="none",
        )
    )
    got = algorithm.advantages(batch, OneRank())
    mask_CBK = case.given["loss_mask"]
    assert torch.equal(got.mask_BCK.transpose(0, 1), mask_CBK)
    for name in ("advantages", "returns"):
        want_BCK = (case.want[name] * mask_CBK).transpose(0, 1)
        assert_close(getattr(got, f"{name}_BCK"), want_BCK, 1e-4, 1e-4)


def trajectories(
    params: dict, given: dict[str, torch.Tensor], valid_actions: Callable
) -> TrajectoryBatch:
    dones_BLK, values_BLK = given["dones"].transpose(0, 1), given["values"].transpose(0, 1)
    rewards_BCK = given["rewards"].transpose(0, 1).clone()
    valid_BCK = valid_actions(dones_BLK)
    if params["reward_type"] == "chunk_level":
        # Simulators of the reference go on, and earn, to the end of a chunk.
        rewards_BCK[:, :, 0] = rewards_BCK.sum(dim=2)
        rewards_BCK[:, :, 1:] = 0.0
    is_end_BCK = valid_BCK & dones_BLK[:, 1:]
    ends_BCK = torch.where(is_end_BCK, End.SUCCESS, End.NONE).to(torch.int8)
    is_open_B = valid_BCK[:, -1, -1] & ~is_end_BCK[:, -1, -1]
    ends_BCK[is_open_B, -1, -1] = End.CUT
    final_BCK = torch.ones_like(rewards_BCK)  # nothing but the value of the last row may count
    final_BCK[is_open_B, -1, -1] = values_BLK[is_open_B, -1, 0]
    return TrajectoryBatch(
        rewards_BCK=rewards_BCK,
        valid_BCK=valid_BCK,
        ends_BCK=ends_BCK,
        group_size=1,
        values_BCK=values_BLK[:, :-1],
        final_values_BCK=final_BCK,
    )


# --------------------------------------------------------------------------------------------
# Critic
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("delta", ["0.5", "1.0", "10.0"])
def test_huber(algorithm_case, delta):
    case = algorithm_case("kl", f"huber_{delta}")
    got = functional.huber(case.given["error"], case.params["delta"])
    assert_close(got, case.want["loss"], 1e-5, 1e-6)


def value_loss(
    algorithm: Ppo,
    values_SK: torch.Tensor,
    given: dict[str, torch.Tensor],
    *,
    max_episode_steps: int = 1,
) -> LossTerms:
    """The loss of a policy that has not moved and got no advantages: that of its values."""
    mask_SK = given.get("loss_mask", torch.ones_like(values_SK, dtype=torch.bool))
    counts_SK = given.get("loss_mask_sum", mask_SK.long())
    zeros_SKA = torch.zeros(*mask_SK.shape, 1)
    batch = MicroBatch(
        old_logprobs_SKA=zeros_SKA,
        advantages_SK=torch.zeros(mask_SK.shape),
        mask_SK=mask_SK,
        weights_SK=algorithm.weights(
            mask_SK, counts_SK[:, 0], len(mask_SK), max_episode_steps, OneRank()
        ),
        returns_SK=given["returns"],
        old_values_SK=given.get("prev_values", values_SK.detach()),
    )
    out = PolicyOutput(logprobs_SKA=zeros_SKA, entropy_SKA=zeros_SKA, values_SK=values_SK)
    return algorithm.loss(out, batch)


@pytest.mark.parametrize("case_id", ["c0", "c1", "c2", "c3", "c4"])
def test_value_loss(algorithm_case, case_id):
    case = algorithm_case("critic_loss", case_id)
    params, want = case.params, case.want
    values_SK = case.given["values"].requires_grad_()
    horizon = params["max_episode_steps"]
    algorithm = make_algorithm(
        PpoConfig(
            value_clip=params["value_clip"],
            huber_delta=params["huber_delta"],
            aggregation="episode-mean" if horizon else "token-mean",
        )
    )
    terms = value_loss(algorithm, values_SK, case.given, max_episode_steps=horizon or 1)
    terms.loss.backward()
    assert_close(terms.loss, want["loss"], 1e-4, 1e-5)
    assert_close(terms.parts["critic/value_loss"], want["value_loss"], 1e-4, 1e-5)
    assert_close(values_SK.grad, want["grad_values"], 1e-4, 1e-5)
    for name, (metric, index) in {
        "count": ("return_mean", 1),
        "returns_sum": ("return_mean", 0),
        "returns_sq_sum": ("return_square_mean", 0),
        "errors_sum": ("error_mean", 0),
        "errors_sq_sum": ("error_square_mean", 0),
    }.items():
        got = terms.metrics[f"critic/{metric}"][index]
        assert_close(got, want[f"stat:{name}"], 1e-4, 1e-5)
    explained = explained_variance(algorithm, [terms])
    assert explained == pytest.approx(want["explained_variance"].item(), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("case_id", ["c0", "c1", "c2", "c3", "c4"])
def test_value_clip_ratio_is_the_share_of_clipped_values(algorithm_case, case_id):
    """The recorded number compares values after they were clipped, and so is rounding noise."""
    case = algorithm_case("critic_loss", case_id)
    given, value_clip = case.given, case.params["value_clip"]
    algorithm = make_algorithm(PpoConfig(value_clip=value_clip))
    total, count = value_loss(algorithm, given["values"], given).metrics["critic/value_clip_ratio"]
    is_clipped_SK = (given["values"] - given["prev_values"]).abs() > value_clip
    mask_SK = given.get("loss_mask", torch.ones_like(is_clipped_SK))
    assert float(total / count) == pytest.approx(is_clipped_SK[mask_SK].float().mean().item())


def explained_variance(algorithm: Ppo, micro_batches: list[LossTerms]) -> float:
    """NaN where there is no such metric."""
    means = {}
    for name in micro_batches[0].metrics:
        pairs = [terms.metrics[name] for terms in micro_batches]
        means[name] = float(sum(total for total, _ in pairs) / sum(count for _, count in pairs))
    return algorithm.derived_metrics(means).get("critic/explained_variance", math.nan)


def test_explained_variance_over_micro_batches(algorithm_case):
    case = algorithm_case("critic_loss", "ev_microbatches")
    algorithm = make_algorithm(PpoConfig())
    micro_batches = [
        value_loss(algorithm, values_S[:, None], {"returns": returns_S[:, None]})
        for values_S, returns_S in zip(case.given["values"], case.given["returns"], strict=True)
    ]
    got = explained_variance(algorithm, micro_batches)
    assert got == pytest.approx(case.want["explained_variance"].item(), rel=1e-3, abs=1e-3)


def test_explained_variance_of_constant_returns(algorithm_case):
    case = algorithm_case("critic_loss", "ev_constant_returns")
    algorithm = make_algorithm(PpoConfig())
    terms = value_loss(
        algorithm, case.given["values"][:, None], {"returns": case.given["returns"][:, None]}
    )
    assert math.isnan(case.want["explained_variance"].item())
    assert math.isnan(explained_variance(algorithm, [terms]))


def test_policy_and_values_together(algorithm_case):
    case = algorithm_case("critic_loss", "actor_critic")
    params, given = case.params, case.given
    algorithm = make_algorithm(
        PpoConfig(
            reward_level=params["reward_type"].removesuffix("_level"),
            logprob_level=params["logprob_type"].removesuffix("_level"),
            clip_low=params["clip_ratio_low"],
            clip_high=params["clip_ratio_high"],
            value_clip=params["value_clip"],
            huber_delta=params["huber_delta"],
        )
    )
    mask_SK = torch.ones_like(given["advantages"], dtype=torch.bool)
    logprobs_SKA = given["logprobs"].unflatten(1, (-1, params["action_dim"]))
    batch = MicroBatch(
        old_logprobs_SKA=given["old_logprobs"].view_as(logprobs_SKA),
        advantages_SK=given["advantages"],
        mask_SK=mask_SK,
        weights_SK=algorithm.weights(mask_SK, mask_SK.sum(1), len(mask_SK), 1, OneRank()),
        returns_SK=given["returns"],
        old_values_SK=given["prev_values"],
    )
    out = PolicyOutput(
        logprobs_SKA=logprobs_SKA,
        entropy_SKA=torch.zeros_like(logprobs_SKA),
        values_SK=given["values"],
    )
    terms = algorithm.loss(out, batch)
    assert_close(terms.loss, case.want["loss"], 1e-4, 1e-5)
    for part, name in (("actor/policy_loss", "policy_loss"), ("critic/value_loss", "value_loss")):
        assert_close(terms.parts[part], case.want[name], 1e-4, 1e-5)
