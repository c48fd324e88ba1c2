"""Policy loss, KL and entropy against recorded inputs and outputs of a reference implementation.

The recordings flatten tokens ([S, K * A]); ours is [S, K, A]. Two of the reference's habits are
defects, which are not repeated: without `loss_mask_sum` it divides the sum over tokens by the
number of mask entries, and so it does in `approx_kl` and `clip_fraction` always. Its numbers exceed
the mean over tokens by the number of tokens per mask entry: the tests multiply.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from vlactl.api.contracts import LossTerms, MicroBatch, PolicyOutput
from vlactl.api.sampling import token_logprobs
from vlactl_policy_gradient import functional
from vlactl_policy_gradient.algorithm import PolicyGradient
from vlactl_policy_gradient.config import PolicyGradientConfig

METRICS = ("ratio", "ratio_abs", "clipped_ratio", "dual_cliped_ratio")
METRICS_PER_MASK_ENTRY = ("approx_kl", "clip_fraction")
LEVELS = ("token", "action", "chunk")


class OneRank:
    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return value.clone()


def make_algorithm(**keys) -> PolicyGradient:
    return PolicyGradient(PolicyGradientConfig(name="of the test", **keys))


def assert_close(
    got: torch.Tensor, want: torch.Tensor, rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    torch.testing.assert_close(got, want.to(got.dtype), rtol=rtol, atol=atol)


def means(terms: LossTerms) -> dict[str, torch.Tensor]:
    return {name: total / count.clamp(min=1) for name, (total, count) in terms.metrics.items()}


# --------------------------------------------------------------------------------------------
# Policy loss
# --------------------------------------------------------------------------------------------
def level_of(text: str) -> str:
    return text.removesuffix("_level")


@pytest.mark.parametrize("case_id", [f"a{i}" for i in range(20)] + ["all_masked"])
def test_policy_loss(algorithm_case, case_id):
    case = algorithm_case("actor_loss", case_id)
    params, want = case.params, case.want
    logprobs = case.given["logprobs"].requires_grad_()
    terms = loss_of(case, logprobs)
    terms.loss.backward()
    # Elements with a ratio of their own, per mask entry.
    num_elements = {"token": logprobs.numel(), "chunk": len(logprobs)}
    num_elements["action"] = num_elements["token"] // params["action_dim"]
    per_entry = num_elements[level_of(params["logprob_type"])] // case.given["loss_mask"].numel()
    scale = 1 if params["uses_loss_mask_sum"] else per_entry
    assert_close(terms.loss * scale, want["loss"])
    assert_close(logprobs.grad * scale, want["grad_logprobs"])
    for name in ("policy_loss", "policy_loss_abs"):
        assert_close(terms.parts[f"actor/{name}"] * scale, want[f"metric:actor/{name}"])
    got = means(terms)
    expands_mask = params["logprob_type"] == "token_level"  # elsewhere these are off, too
    for name in METRICS:
        factor = 1 if expands_mask else per_entry
        assert_close(got[f"actor/{name}"] * factor, want[f"metric:actor/{name}"])
    for name in METRICS_PER_MASK_ENTRY:
        assert_close(got[f"actor/{name}"] * per_entry, want[f"metric:actor/{name}"])
        assert math.isfinite(got[f"actor/{name}"])
    assert 0 <= got["actor/clip_fraction"] <= 1


def loss_of(case: SimpleNamespace, logprobs: torch.Tensor) -> LossTerms:
    params, mask_SK = case.params, case.given["loss_mask"]
    algorithm = make_algorithm(
        reward_level=level_of(params["reward_type"]),
        logprob_level=level_of(params["logprob_type"]),
        clip_low=params["clip_ratio_low"],
        clip_high=params["clip_ratio_high"],
        dual_clip=params["clip_ratio_c"],
        aggregation="episode-mean" if params["uses_loss_mask_sum"] else "token-mean",
    )
    counts_SK = case.given.get("loss_mask_sum", mask_SK.long())
    weights_SK = algorithm.weights(
        mask_SK, counts_SK[:, 0], len(mask_SK), params["max_episode_steps"], OneRank()
    )
    logprobs_SKA = logprobs.unflatten(1, (-1, params["action_dim"]))
    batch = MicroBatch(
        old_logprobs_SKA=case.given["old_logprobs"].view_as(logprobs_SKA),
        advantages_SK=case.given["advantages"],
        mask_SK=mask_SK,
        weights_SK=weights_SK,
    )
    out = PolicyOutput(logprobs_SKA=logprobs_SKA, entropy_SKA=torch.zeros_like(logprobs_SKA))
    return algorithm.loss(out, batch)


@pytest.mark.parametrize(
    "case_id", ["direct_nomask", "direct_dual", "direct_clamp", "direct_warmup"]
)
def test_policy_loss_of_flat_samples(algorithm_case, case_id):
    case = algorithm_case("actor_loss", case_id)
    params, want = case.params, case.want
    logprobs = case.given["logprobs"].requires_grad_()
    keys = {
        ours: params[theirs]
        for ours, theirs in (
            ("clip_low", "clip_ratio_low"),
            ("clip_high", "clip_ratio_high"),
            ("dual_clip", "clip_ratio_c"),
            ("clip_log_ratio_min", "clip_log_ratio_min"),
            ("clip_log_ratio_max", "clip_log_ratio_max"),
        )
        if theirs in params
    }
    mask_SK = torch.ones(len(logprobs), 1, dtype=torch.bool)
    algorithm = make_algorithm(aggregation="token-mean", **keys)
    batch = MicroBatch(
        old_logprobs_SKA=case.given["old_logprobs"][:, None, None],
        advantages_SK=case.given["advantages"][:, None],
        mask_SK=mask_SK,
        weights_SK=algorithm.weights(mask_SK, mask_SK.sum(1), len(mask_SK), 1, OneRank()),
        critic_only=params.get("critic_warmup", False),
    )
    logprobs_SKA = logprobs[:, None, None]
    terms = algorithm.loss(
        PolicyOutput(logprobs_SKA=logprobs_SKA, entropy_SKA=torch.zeros_like(logprobs_SKA)), batch
    )
    assert_close(terms.loss, want["loss"])
    assert terms.loss.requires_grad == (not batch.critic_only)
    if terms.loss.requires_grad:
        terms.loss.backward()
        assert_close(logprobs.grad, want["grad_logprobs"])
    got = means(terms) | terms.parts
    for name, value in want.items():
        if name.startswith("metric:"):
            assert_close(got[name.removeprefix("metric:")], value)


@pytest.mark.parametrize("case_id", ["d0", "d1", "d2", "d3"])
def test_decoupled_policy_loss(algorithm_case, case_id):
    case = algorithm_case("decoupled_actor_loss", case_id)
    params, given, want = case.params, case.given, case.want
    mask, old = given["loss_mask"], given["old_logprobs"]
    logprobs = given["logprobs"].requires_grad_()
    proximal = given.get("proximal_logprobs", old)
    if "versions" in given:
        proximal = functional.proximal_logprobs(
            logprobs, old, given["versions"], params["current_version"]
        )
    got = functional.decoupled_objective(
        logprobs,
        old,
        proximal,
        given["advantages"],
        params["clip_ratio_low"],
        params["clip_ratio_high"],
        params.get("clip_ratio_c"),
        params.get("behave_weight_threshold"),
    )
    loss, metrics = functional.decoupled_loss(got, mask)
    loss.backward()
    assert_close(loss, want["loss"])
    assert_close(logprobs.grad, want["grad_logprobs"])
    if "versions" in given:
        metrics["average_version"] = given["versions"][mask].mean()
        metrics["current_version"] = torch.tensor(params["current_version"])
    recorded = {name.removeprefix("metric:actor/"): want[name] for name in want if ":" in name}
    assert metrics.keys() == recorded.keys()
    for name, value in metrics.items():
        assert_close(value, recorded[name])


# --------------------------------------------------------------------------------------------
# KL and entropy
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("case_id", "estimator"),
    [
        ("kl_kl", "k1"),
        ("kl_k1", "k1"),
        ("kl_abs", "abs"),
        ("kl_mse", "k2"),
        ("kl_k2", "k2"),
        ("kl_low_var_kl", "k3"),
        ("kl_k3", "k3"),
    ],
)
def test_kl(algorithm_case, case_id, estimator):
    case = algorithm_case("kl", case_id)
    got = functional.kl_divergence(case.given["logprob"], case.given["ref_logprob"], estimator)
    assert_close(got, case.want["kl"], 1e-5, 1e-6)


@pytest.mark.parametrize("case_id", ["e0", "e1", "e2", "e3"])
def test_logprobs_and_entropy_over_the_action_tokens(algorithm_case, case_id):
    """The reference picks the top k of the whole vocabulary: n of them are actions, its best n."""
    case = algorithm_case("entropy", case_id)
    params, logits_STV, finite_ST = case.params, case.given["logits"], case.given["finite"]
    end = params["vocab"] - params["pad_to_multiple"]
    start = end - params["n_action_bins"]
    actions_STV, tokens_ST = logits_STV[..., start:end], case.given["target"] - start
    num_best_ST = torch.full_like(tokens_ST, params["n_action_bins"])
    if params["top_k"] > 0:
        best_STk = logits_STV.topk(params["top_k"]).indices
        num_best_ST = ((best_STk >= start) & (best_STk < end)).sum(dim=-1)
    for s, t in finite_ST.nonzero().tolist():
        logprob, entropy = token_logprobs(
            actions_STV[s, t], tokens_ST[s, t], params["temperature"], int(num_best_ST[s, t])
        )
        assert_close(logprob, case.want["logprobs"][s, t])
        assert_close(entropy, case.want["entropy_token"][s, t])


@pytest.mark.parametrize("case_id", ["e0", "e1", "e2", "e3"])
def test_entropy_of_actions_and_chunks(algorithm_case, case_id):
    case = algorithm_case("entropy", case_id)
    entropy_SKA = case.want["entropy_token"].unflatten(1, (-1, case.params["action_dim"]))
    for level in LEVELS:
        got = functional.at_level(entropy_SKA, level)
        want = case.want[f"entropy_{level}"]
        assert_close(got, want.view(got.shape))


@pytest.mark.parametrize("case_id", ["e0", "e1", "e2", "e3"])
@pytest.mark.parametrize("level", LEVELS)
def test_entropy_bonus(algorithm_case, case_id, level):
    """The reference averages actions over the mask, and tokens and chunks over everything."""
    case = algorithm_case("entropy", case_id)
    entropy_SKA = case.want["entropy_token"].unflatten(1, (-1, case.params["action_dim"]))
    mask_SK = torch.ones_like(case.given["loss_mask"])
    if level == "action":
        mask_SK = case.given["loss_mask"]
    reward_level = "chunk" if level == "chunk" else "action"
    mask_SK = functional.to_entries(mask_SK[None], reward_level)[0]
    algorithm = make_algorithm(
        aggregation="token-mean", entropy_coef=0.5, entropy_level=level, reward_level=reward_level
    )
    zeros_SKA = torch.zeros_like(entropy_SKA)
    batch = MicroBatch(
        old_logprobs_SKA=zeros_SKA,
        advantages_SK=torch.zeros(mask_SK.shape),
        mask_SK=mask_SK,
        weights_SK=algorithm.weights(mask_SK, mask_SK.sum(dim=1), len(mask_SK), 1, OneRank()),
    )
    terms = algorithm.loss(PolicyOutput(logprobs_SKA=zeros_SKA, entropy_SKA=entropy_SKA), batch)
    want = case.want[f"mean_{level}"]
    assert_close(means(terms)["actor/entropy_loss"], want)
    assert_close(terms.loss, -0.5 * want)
