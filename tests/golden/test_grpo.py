"""GRPO against recorded inputs and outputs of a reference implementation.

The recordings put time first ([C, B, K]) and flatten tokens ([S, K * A]); ours is [B, C, K] and
[S, K, A]. Where the reference divides sums over tokens by the number of mask entries, its numbers
exceed the per-token mean by the number of tokens per entry: the tests multiply.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vlactl_grpo import functional
from vlactl_grpo.algorithm import make_algorithm
from vlactl_grpo.plugin import GrpoConfig

from vlactl.api.contracts import MicroBatch, PolicyOutput, TrajectoryBatch
from vlactl.api.sampling import token_logprobs

METRICS = ("ratio", "ratio_abs", "clipped_ratio", "dual_cliped_ratio")
METRICS_PER_MASK_ENTRY = ("approx_kl", "clip_fraction")


class OneRank:
    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return value.clone()


def load(goldens: Path, topic: str, case_id: str) -> SimpleNamespace:
    """One case: its parameters, and its inputs and outputs as tensors."""
    folder = goldens / "algorithms"
    cases = json.loads((folder / f"{topic}.json").read_text())
    case = next(case for case in cases if case["id"] == case_id)
    with np.load(folder / f"{topic}.npz") as arrays:
        given = {name: torch.tensor(arrays[f"{case_id}/in/{name}"]) for name in case["inputs"]}
        want = {name: torch.tensor(arrays[f"{case_id}/out/{name}"]) for name in case["outputs"]}
    return SimpleNamespace(params=case["params"], given=given, want=want)


def batch_first(x_CBK: torch.Tensor) -> torch.Tensor:
    return x_CBK.transpose(0, 1)


def merge_epochs(x: torch.Tensor, num_epochs: int) -> torch.Tensor:
    """[E * L, B, K] -> [L, E * B, K]: the order in which the reference gathers trajectories."""
    return x.unflatten(0, (num_epochs, -1)).transpose(0, 1).flatten(1, 2)


def assert_close(got: torch.Tensor, want: torch.Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(got, want.to(got.dtype), rtol=rtol, atol=atol, check_device=False)


# --------------------------------------------------------------------------------------------
# Masks and advantages
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case_id", ["mask0", "mask1", "mask2"])
def test_valid_actions(goldens, case_id):
    case = load(goldens, "loss_mask", case_id)
    valid_BCK = functional.valid_actions(batch_first(case.given["dones"]))
    counts_B = functional.count_valid_actions(valid_BCK)
    assert torch.equal(batch_first(valid_BCK), case.want["loss_mask"])
    assert torch.equal(
        counts_B[None, :, None].expand_as(case.want["loss_mask_sum"]), case.want["loss_mask_sum"]
    )


def test_merged_epochs_have_the_recorded_order(goldens):
    case = load(goldens, "loss_mask", "epoch_merge")
    merged = merge_epochs(case.given["x"], case.params["rollout_epoch"])
    assert torch.equal(merged, case.want["y"])


@pytest.mark.parametrize("case_id", ["flat0", "flat1"])
def test_group_advantages(goldens, case_id):
    case = load(goldens, "grpo", case_id)
    advantages_B = functional.group_advantages(case.given["scores"]).flatten()
    assert_close(advantages_B * case.given["loss_mask"], case.want["advantages"], 1e-5, 1e-5)


@pytest.mark.parametrize("case_id", [f"embodied{i}" for i in range(4)] + ["multi_epoch"])
def test_advantages_of_trajectories(goldens, case_id):
    case = load(goldens, "grpo", case_id)
    params, num_epochs = case.params, case.params["rollout_epoch"]
    rewards_BCK = batch_first(merge_epochs(case.given["rewards"], num_epochs))
    valid_BCK = functional.valid_actions(batch_first(merge_epochs(case.given["dones"], num_epochs)))
    counts_B = functional.count_valid_actions(valid_BCK)
    if params["reward_type"] == "chunk_level":
        rewards_BCK = rewards_BCK.sum(dim=2, keepdim=True)
        valid_BCK = valid_BCK.any(dim=2, keepdim=True)
    algorithm = make_algorithm(
        GrpoConfig(
            group_size=params["group_size"],
            filter_rewards=params["filter_rewards"],
            reward_lower_bound=params["rewards_lower_bound"],
            reward_upper_bound=params["rewards_upper_bound"],
            entropy_coef=1.0,  # the reference keeps groups of equal returns in its mask
        )
    )
    batch = TrajectoryBatch(
        rewards_BCK=rewards_BCK,
        valid_BCK=valid_BCK,
        values_BCK=None,
        group_size=params["group_size"],
    )
    got = algorithm.advantages(batch, OneRank())
    assert torch.equal(batch_first(got.mask_BCK), case.want["loss_mask"])
    assert_close(
        batch_first(got.advantages_BCK * got.mask_BCK),
        case.want["advantages"] * case.want["loss_mask"],
        1e-5,
        1e-5,
    )
    assert torch.equal(
        counts_B[None, :, None].expand_as(case.want["loss_mask_sum"]), case.want["loss_mask_sum"]
    )


# --------------------------------------------------------------------------------------------
# Policy loss
# --------------------------------------------------------------------------------------------
def to_actions(case: SimpleNamespace, logprobs: torch.Tensor) -> torch.Tensor:
    """Recorded token log-probabilities [S, K * A] as [S, K, A] at the case's granularity."""
    logprobs_SKA = logprobs.unflatten(1, (-1, case.params["action_dim"]))
    match case.params["logprob_type"]:
        case "token_level":
            return logprobs_SKA
        case "action_level":
            return logprobs_SKA.sum(dim=2, keepdim=True)
        case "chunk_level":
            return logprobs_SKA.sum(dim=(1, 2), keepdim=True)


@pytest.mark.parametrize("case_id", [f"a{i}" for i in range(20)] + ["all_masked"])
def test_policy_loss(goldens, case_id):
    case = load(goldens, "actor_loss", case_id)
    params = case.params
    logprobs = case.given["logprobs"].requires_grad_()
    logprobs_SKA = to_actions(case, logprobs)
    tokens_per_entry = logprobs_SKA.numel() // case.given["loss_mask"].numel()
    mask_SK = case.given["loss_mask"].expand(logprobs_SKA.shape[:2])
    algorithm = make_algorithm(
        GrpoConfig(
            clip_low=params["clip_ratio_low"],
            clip_high=params["clip_ratio_high"],
            dual_clip=params["clip_ratio_c"],
            aggregation="episode-mean" if params["uses_loss_mask_sum"] else "token-mean",
        )
    )
    counts = case.given.get("loss_mask_sum", case.given["loss_mask"].long())
    weights_SK = algorithm.weights(
        mask_SK, counts[:, 0], len(mask_SK), params["max_episode_steps"], OneRank()
    )
    batch = MicroBatch(
        old_logprobs_SKA=to_actions(case, case.given["old_logprobs"]),
        advantages_SK=case.given["advantages"].expand(mask_SK.shape),
        mask_SK=mask_SK,
        weights_SK=weights_SK,
    )
    out = PolicyOutput(logprobs_SKA=logprobs_SKA, entropy_SKA=torch.zeros_like(logprobs_SKA))
    terms = algorithm.loss(out, batch)
    terms.loss.backward()
    scale = 1 if params["uses_loss_mask_sum"] else tokens_per_entry
    assert_close(terms.loss * scale, case.want["loss"], 1e-4, 1e-5)
    assert_close(logprobs.grad * scale, case.want["grad_logprobs"], 1e-4, 1e-5)
    means = {name: total / count.clamp(min=1) for name, (total, count) in terms.metrics.items()}
    expands_mask = params["logprob_type"] == "token_level"
    for name in METRICS:
        factor = 1 if expands_mask else tokens_per_entry
        assert_close(means[f"actor/{name}"] * factor, case.want[f"metric:actor/{name}"], 1e-4, 1e-5)
    for name in METRICS_PER_MASK_ENTRY:
        got = means[f"actor/{name}"] * tokens_per_entry
        assert_close(got, case.want[f"metric:actor/{name}"], 1e-4, 1e-5)
    for name in ("policy_loss", "policy_loss_abs"):
        got = terms.parts[f"actor/{name}"] * scale
        assert_close(got, case.want[f"metric:actor/{name}"], 1e-4, 1e-5)


@pytest.mark.parametrize("case_id", ["direct_nomask", "direct_dual"])
def test_policy_objective(goldens, case_id):
    case = load(goldens, "actor_loss", case_id)
    params, want = case.params, case.want
    logprobs = case.given["logprobs"].requires_grad_()
    objective = functional.clipped_objective(
        logprobs - case.given["old_logprobs"],
        case.given["advantages"],
        params.get("clip_ratio_low", 0.2),
        params.get("clip_ratio_high", 0.28),
        params.get("clip_ratio_c"),
    )
    objective.loss.mean().backward()
    dual = (objective.ratio * objective.is_dual_clipped).mean()
    assert_close(objective.loss.mean(), want["loss"], 1e-4, 1e-5)
    assert_close(logprobs.grad, want["grad_logprobs"], 1e-4, 1e-5)
    assert_close(objective.loss.abs().mean(), want["metric:actor/policy_loss_abs"], 1e-4, 1e-5)
    assert_close(dual, want["metric:actor/dual_cliped_ratio"], 1e-4, 1e-5)


# --------------------------------------------------------------------------------------------
# KL and entropy
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("case_id", "estimator"),
    [
        ("kl_kl", "k1"),
        ("kl_k1", "k1"),
        ("kl_mse", "k2"),
        ("kl_k2", "k2"),
        ("kl_low_var_kl", "k3"),
        ("kl_k3", "k3"),
    ],
)
def test_kl(goldens, case_id, estimator):
    case = load(goldens, "kl", case_id)
    got = functional.kl_divergence(case.given["logprob"], case.given["ref_logprob"], estimator)
    assert_close(got, case.want["kl"], 1e-5, 1e-6)


@pytest.mark.parametrize("case_id", ["e0", "e1"])
def test_logprobs_and_entropy_over_the_action_tokens(goldens, case_id):
    case = load(goldens, "entropy", case_id)
    params = case.params
    end = params["vocab"] - params["pad_to_multiple"]
    start = end - params["n_action_bins"]
    logits_STV = case.given["logits"][..., start:end]
    tokens_ST = case.given["target"] - start
    logprobs_ST, entropy_ST = token_logprobs(logits_STV, tokens_ST, params["temperature"])
    finite_ST = case.given["finite"]
    assert_close(logprobs_ST[finite_ST], case.want["logprobs"][finite_ST], 1e-4, 1e-5)
    assert_close(entropy_ST[finite_ST], case.want["entropy_token"][finite_ST], 1e-4, 1e-5)


@pytest.mark.parametrize("case_id", ["e0", "e1", "e2", "e3"])
@pytest.mark.parametrize("masked", [True, False])
def test_entropy_is_averaged_over_trained_tokens(goldens, case_id, masked):
    case = load(goldens, "entropy", case_id)
    num_tokens = case.params["action_dim"]
    entropy_SKA = case.want["entropy_token"].unflatten(1, (-1, num_tokens))
    mask_SK = case.given["loss_mask"] if masked else torch.ones_like(case.given["loss_mask"])
    # The reference averages actions over the mask, and tokens over everything.
    want = case.want["mean_action"] / num_tokens if masked else case.want["mean_token"]
    algorithm = make_algorithm(GrpoConfig(aggregation="token-mean", entropy_coef=0.5))
    zeros_SKA = torch.zeros_like(entropy_SKA)
    batch = MicroBatch(
        old_logprobs_SKA=zeros_SKA,
        advantages_SK=torch.zeros(mask_SK.shape),
        mask_SK=mask_SK,
        weights_SK=algorithm.weights(mask_SK, mask_SK.sum(dim=1), len(mask_SK), 1, OneRank()),
    )
    terms = algorithm.loss(PolicyOutput(logprobs_SKA=zeros_SKA, entropy_SKA=entropy_SKA), batch)
    total, count = terms.metrics["actor/entropy_loss"]
    assert_close(total / count, want, 1e-4, 1e-5)
    assert_close(terms.loss, -0.5 * want, 1e-4, 1e-5)
