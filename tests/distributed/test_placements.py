"""The same run in every placement: results do not depend on who plays, acts and trains.

A start of torchrun takes seconds, so few runs serve many assertions.
"""

from collections.abc import Callable

import pytest

pytestmark = [
    pytest.mark.dist,
    pytest.mark.timeout(400),  # several starts of torchrun
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
STEPS = "train.max_steps=5"
PLACEMENTS = {
    "shared on 2": (2, "all", "all", "all"),
    "shared on 4": (4, "all", "all", "all"),
    "two env processes per rank": (2, "0-1:0-3", "all", "all"),
    "hybrid on 2": (2, "0", "1", "0-1"),
    "hybrid on 4": (4, "0-1", "2-3", "0-3"),
    "separate on 3": (3, "0", "1", "2"),
    "separate on 4": (4, "0", "1", "2-3"),
    "more rollout than env ranks": (3, "0", "1-2", "0"),
    "actors are some of the rollout ranks": (4, "0-1", "2-3", "2"),
}
ALL = ("optimizer", "weights")
VARIANTS = {
    "smaller micro-batches": (2, ["optim.micro_batch_size=3"], {}),
    "one micro-batch": (1, ["optim.micro_batch_size=32"], {}),
    "replicated": (2, ["train.sharding=false"], {}),
    "offloaded": (2, ["train.check_weights_every=1"], {"offload": ALL}),
    "offloaded on one rank": (1, [], {"offload": ALL[:1]}),
    "calls under way": (2, ["rollout.pipeline_stages=2"], {}),
    "spilled": (2, ["checkpoint.background=false", "checkpoint.every=2"], {"spill": True}),
    "spilled where groups travel": (
        2,
        ["placement.env=0", "placement.rollout=0", "placement.actor=1"],
        {"spill": True},
    ),
}


def place(env: str, rollout: str, actor: str) -> list[str]:
    return [f"placement.env={env}", f"placement.rollout={rollout}", f"placement.actor={actor}"]


@pytest.fixture(scope="module")
def reference(train: Callable):
    return train(STEPS)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_placement_does_not_matter(
    name: str, train: Callable, reference, same_results: Callable
) -> None:
    ranks, *roles = PLACEMENTS[name]
    same_results(reference, train(STEPS, *place(*roles), ranks=ranks))


@pytest.mark.parametrize("name", VARIANTS)
def test_how_the_gradient_is_computed_does_not_matter(
    name: str, train: Callable, reference, same_results: Callable
) -> None:
    ranks, overrides, planned = VARIANTS[name]
    run = train(STEPS, *overrides, ranks=ranks, **planned)
    same_results(reference, run)
    assert all(("time/offload" in step) == ("offload" in planned) for step in run.metrics)
    assert all(step["train/mismatch_kl"] < 1e-9 for step in run.metrics)
    assert (run.path / "spill").is_dir() == ("spill" in planned)


def test_values_lanes_and_a_reference_policy_survive_sharding(
    train: Callable, same_results: Callable
) -> None:
    """PPO with bootstrapped lanes and a KL: one rank that shares nothing, three that share all."""
    settings = [
        "rollout.episodes_per_step=8",
        "rollout.auto_reset=true",
        "algorithm.group_size=1",
        "algorithm.kl_coef=0.1",
        "algorithm.critic_warmup_steps=1",
        "train.max_steps=3",
    ]
    one = train(*settings, preset="toy_ppo")
    many = train(*settings, *place("0", "1", "2-3"), preset="toy_ppo", ranks=4)
    same_results(one, many)
    for first, second in zip(one.metrics, many.metrics, strict=True):
        kls = [step["train/actor/kl_loss"] for step in (second, first)]
        assert kls[0] == pytest.approx(kls[1], rel=1e-4, abs=1e-9)
    assert one.metrics[-1]["train/actor/kl_loss"] > 0


def test_resume_is_exact_and_may_change_the_placement(
    train: Callable, reference, same_results: Callable
) -> None:
    """Byte for byte on the same ranks, within 1e-6 on others, in any order of placements."""
    whole, stopped, moved = (train(f"train.max_steps={steps}", ranks=2) for steps in (5, 3, 2))
    train(STEPS, run=stopped, ranks=2)
    assert stopped.numbers == whole.numbers
    assert all((whole.weights[name] == value).all() for name, value in stopped.weights.items())
    train("train.max_steps=3", *place("0", "1", "2"), run=moved, ranks=3)
    train("train.max_steps=4", *place("0", "1", "0-1"), run=moved, ranks=2)
    train(STEPS, *place("all", "all", "all"), run=moved, ranks=1)
    same_results(reference, moved)


def test_bfloat16_with_float32_master_weights(train: Callable) -> None:
    """Updates that bfloat16 cannot hold are kept, on any number of ranks."""
    settings = ["train.dtype=bfloat16", "train.max_steps=3", "optim.lr=1e-5"]
    start = train(*settings[:1], "train.max_steps=1", "optim.lr=1e-30").weights
    one, two, lost = (
        train(*settings, *more, ranks=ranks).weights["head.weight"] - start["head.weight"]
        for more, ranks in (([], 1), ([], 2), (["train.master_weights=false"], 1))
    )
    for moved in (one, two):
        assert (moved != 0).float().mean() > 0.95
        assert moved.abs().max() < 3e-4
    assert (lost != 0).float().mean() < 0.5


# --------------------------------------------------------------------------------------------
# Rollouts that run ahead
# --------------------------------------------------------------------------------------------
def test_stale_rollouts_overlap_and_do_not_depend_on_ranks(
    train: Callable, reference, same_results: Callable
) -> None:
    three = train(STEPS, "train.staleness=1", *place("0", "1", "2"), ranks=3)
    four = train(STEPS, "train.staleness=1", *place("0", "1", "2-3"), ranks=4)
    same_results(three, four)
    # The first step is on-policy; the second was played with the weights before its update.
    assert three.numbers[0] == pytest.approx(reference.numbers[0], rel=1e-4)
    assert "train/mismatch_kl" in three.metrics[0]
    assert "train/mismatch_kl" not in three.metrics[1]
    norms = [run.metrics[1]["train/actor/grad_norm"] for run in (three, reference)]
    assert norms[0] != pytest.approx(norms[1], rel=1e-3)


def test_eight_bit_optimizer_on_shards(train: Callable) -> None:
    """Close to 32 bits, on one rank as on two; a resumed run goes on closely."""
    pytest.importorskip("bitsandbytes")
    settings = ["model.hidden=64", "optim.lr=1e-3", "train.max_steps=3"]
    exact = train(*settings).weights
    eight = [*settings, "optim.optimizer=adamw8bit"]
    saved = train(*eight[:2], "train.max_steps=2", eight[3], ranks=2)
    train("train.max_steps=3", run=saved, ranks=1)
    start = train("model.hidden=64", "optim.lr=1e-30", "train.max_steps=1").weights
    for run in (train(*eight), train(*eight, ranks=2), saved):
        # Most gradients of the body are tiny beside others, which 8 bits per block cannot hold.
        for name in ("head.weight", "head.bias"):
            moved = (exact[name] - start[name]).abs().mean()
            assert (run.weights[name] - exact[name]).abs().mean() < 0.2 * moved, name


# --------------------------------------------------------------------------------------------
# Real LIBERO
# --------------------------------------------------------------------------------------------
LIBERO = [
    "env.max_episode_steps=16",
    "env.image_size=64",
    "env.wait_steps=2",
    "rollout.episodes_per_step=4",
    "rollout.tasks=0",
    "algorithm.group_size=2",
    "optim.global_batch_size=8",
    "checkpoint.every=0",
    "sinks=[]",
    "train.max_steps=2",
]


@pytest.mark.sim
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_placement_does_not_matter_to_libero(train: Callable) -> None:
    preset = "libero_spatial_tiny_grpo"
    one = train(preset=preset, base=LIBERO)
    hybrid = train(*place("0", "1", "0-1"), preset=preset, base=LIBERO, ranks=2)
    for first, second in zip(one.metrics, hybrid.metrics, strict=True):
        for name in ("env/return", "env/episode_len", "rollout/rewards"):
            assert first[name] == second[name], name
        norms = [step["train/actor/grad_norm"] for step in (second, first)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert one.actions == hybrid.actions
