"""The tiny OpenVLA-OFT as a policy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from vlactl_openvla_oft.architecture import ACTION_DIM, CHUNK_LENGTH, NUM_ACTION_TOKENS, TINY
from vlactl_openvla_oft.plugin import OpenVlaOftConfig
from vlactl_openvla_oft.policy import make_policy

from vlactl.api.contracts import (
    EnvSpec,
    Greedy,
    LoraContext,
    ModelContext,
    ObservationBatch,
    Sample,
    TrainBatch,
)
from vlactl.errors import ConfigError

CAMERAS = ("agentview", "wrist")
ENV = EnvSpec(
    cameras=dict.fromkeys(CAMERAS, (96, 96)),
    state_dim=8,
    action_dim=ACTION_DIM,
    max_episode_steps=10,
    control_hz=20,
    tasks=(),
)
CONTEXT = ModelContext(env=ENV, device=torch.device("cpu"), dtype=torch.float32, seed=3)
CONFIG = OpenVlaOftConfig(size="tiny", max_prompt_length=24)
ADAPTERS = LoraContext(rank=4, alpha=8.0)
VARIANTS = {
    "plain": ({}, {}),
    "values": ({}, {"values": "chunk"}),
    "stop token": ({"keep_stop_token": True}, {}),
    "two cameras": ({"cameras": CAMERAS}, {}),
    "adapters": ({}, {"lora": ADAPTERS}),
    "recomputed": ({}, {"activation_checkpointing": "full"}),
}
INSTRUCTIONS = ("open the middle drawer", "push the plate", "put the bowl on the stove", "turn on")


@pytest.fixture(scope="module")
def policy():
    return make_policy(CONFIG, CONTEXT)


def observe(num_rows, seed=0):
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 256, (num_rows, 96, 96, 3), dtype=np.uint8) for name in CAMERAS}
    instructions = tuple(INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(num_rows))
    state = np.zeros((num_rows, 8), np.float32)
    return ObservationBatch(images=images, state=state, instructions=instructions)


def take(batch, rows):
    return ObservationBatch(
        images={name: image[rows] for name, image in batch.images.items()},
        state=batch.state[rows],
        instructions=tuple(batch.instructions[row] for row in rows),
    )


def evaluate(policy, batch, chunks, temperature):
    return policy.evaluate_actions(
        TrainBatch(
            observations=batch,
            tokens_SKA=torch.from_numpy(chunks.tokens_BKA),
            temperature=temperature,
        )
    )


def test_act_returns_chunks_for_the_simulator(policy):
    chunks = policy.act(observe(2), Sample(), [1, 2])
    assert chunks.actions_BKA.shape == (2, CHUNK_LENGTH, ACTION_DIM)
    assert (chunks.actions_BKA.dtype, chunks.tokens_BKA.dtype) == (np.float64, np.int64)
    assert chunks.logprobs_BKA.dtype == np.float32
    assert chunks.values_BK is None
    assert chunks.tokens_BKA.min() >= TINY.action_start
    assert chunks.tokens_BKA.max() < TINY.action_end
    assert np.abs(chunks.actions_BKA).max() <= 1
    assert set(np.unique(chunks.actions_BKA[..., -1])) == {-1.0, 1.0}


def make(config=None, **context):
    return make_policy(CONFIG.model_copy(update=config or {}), replace(CONTEXT, **context))


def take_step(policy):
    """One step of gradient descent that is large enough to be seen."""
    output = evaluate(policy, observe(2), policy.act(observe(2), Sample(), [1, 2]), 1.0)
    output.logprobs_SKA.mean().backward()
    torch.optim.SGD([p for _, p in policy.trainable()], lr=1.0).step()
    policy.module.zero_grad(set_to_none=True)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    config, context = VARIANTS[request.param]
    return make(config, **context)


@pytest.mark.parametrize("mode", [Sample(1.0), Sample(1.6), Greedy()])
def test_evaluation_agrees_with_act(variant, mode):
    check_agreement(variant, mode)


@pytest.mark.parametrize("context", [{}, {"lora": ADAPTERS}], ids=["all weights", "adapters"])
def test_evaluation_agrees_with_act_after_an_update(context):
    policy = make(**context)
    before = policy.act(observe(3), Greedy(), [0] * 3).logprobs_BKA
    take_step(policy)
    assert np.abs(policy.act(observe(3), Greedy(), [0] * 3).logprobs_BKA - before).max() > 1e-4
    check_agreement(policy, Sample(1.6))


def check_agreement(policy, mode):
    batch = observe(3)
    chunks = policy.act(batch, mode, [5, 6, 7])
    temperature = mode.temperature if isinstance(mode, Sample) else 1.0
    output = evaluate(policy, batch, chunks, temperature)
    logprobs = output.logprobs_SKA.detach().numpy()
    np.testing.assert_allclose(logprobs, chunks.logprobs_BKA, rtol=0, atol=1e-5)
    assert output.entropy_SKA.shape == chunks.tokens_BKA.shape
    assert (output.values_SK is None) == (chunks.values_BK is None)
    if chunks.values_BK is not None:
        values = output.values_SK.detach().numpy()
        np.testing.assert_allclose(values, chunks.values_BK, rtol=0, atol=1e-5)


def test_rows_follow_their_keys_not_their_places(policy):
    batch, keys = observe(4), [11, 12, 13, 14]
    order = [2, 0, 3, 1]
    chunks = policy.act(batch, Sample(), keys)
    moved = policy.act(take(batch, order), Sample(), [keys[row] for row in order])
    np.testing.assert_array_equal(moved.tokens_BKA, chunks.tokens_BKA[order])
    np.testing.assert_array_equal(moved.logprobs_BKA, chunks.logprobs_BKA[order])


def test_a_row_does_not_depend_on_the_others(policy):
    batch, others = observe(4), observe(4, seed=9)
    images = {name: image.copy() for name, image in others.images.items()}
    for name, image in batch.images.items():
        images[name][1] = image[1]
    instructions = (others.instructions[3], batch.instructions[1], *others.instructions[2:])
    mixed = replace(others, images=images, instructions=instructions)
    chunks = policy.act(batch, Sample(), [1, 2, 3, 4])
    among_others = policy.act(mixed, Sample(), [7, 2, 8, 9])
    np.testing.assert_array_equal(among_others.logprobs_BKA[1], chunks.logprobs_BKA[1])
    np.testing.assert_array_equal(among_others.tokens_BKA[1], chunks.tokens_BKA[1])


def test_batch_size_does_not_matter(variant):
    batch = observe(5)
    chunks = variant.act(batch, Greedy(), [0] * 5)
    for row in range(5):
        output = evaluate(variant, take(batch, [row]), policy_row(chunks, row), 1.0)
        logprobs = output.logprobs_SKA[0].detach().numpy()
        np.testing.assert_allclose(logprobs, chunks.logprobs_BKA[row], rtol=0, atol=1e-5)


def policy_row(chunks, row):
    return replace(chunks, tokens_BKA=chunks.tokens_BKA[row : row + 1])


def test_other_keys_draw_other_tokens(policy):
    batch = take(observe(1), [0, 0])
    chunks = policy.act(batch, Sample(), [1, 2])
    assert (chunks.tokens_BKA[0] != chunks.tokens_BKA[1]).any()
    np.testing.assert_array_equal(
        policy.act(batch, Sample(), [1, 1]).tokens_BKA[0], chunks.tokens_BKA[0]
    )


@pytest.mark.parametrize("changed", ["picture", "instruction"])
def test_logits_depend_on_what_is_observed(policy, changed):
    batch = take(observe(1), [0, 0])
    if changed == "picture":
        batch.images["agentview"][1] = observe(1, seed=4).images["agentview"][0]
    else:
        batch = replace(batch, instructions=INSTRUCTIONS[:2])
    first, second = logits(policy, batch)
    assert (first - second).abs().max() > 1e-3


def logits(policy, batch):
    with torch.no_grad():
        return policy._predict(batch).logits


def test_length_of_the_prompt_does_not_matter(policy):
    longer = make_policy(CONFIG.model_copy(update={"max_prompt_length": 40}), CONTEXT)
    torch.testing.assert_close(logits(longer, observe(2)), logits(policy, observe(2)))


def test_attention_looks_ahead(policy):
    language_model = policy.module.language_model
    embeddings = torch.randn(1, 20, TINY.language.hidden_size, generator=torch.manual_seed(0))
    mask = torch.ones(1, 20, dtype=torch.bool)
    later = embeddings.clone()
    later[:, 15] += 1
    with torch.no_grad():
        change = language_model(later, mask) - language_model(embeddings, mask)
    assert change[:, :15].abs().amax(dim=-1).min() > 1e-5


def test_cameras_are_used_in_order():
    both = make_policy(CONFIG.model_copy(update={"cameras": CAMERAS}), CONTEXT)
    batch = observe(2)
    swapped = replace(
        batch, images=dict(zip(CAMERAS, reversed(batch.images.values()), strict=True))
    )
    assert (logits(both, batch) - logits(both, swapped)).abs().max() > 1e-3
    batch.images["wrist"][:] = 0
    assert (logits(both, batch) - logits(both, observe(2))).abs().max() > 1e-3


def test_stop_token_changes_the_prediction(policy):
    keeps = make_policy(CONFIG.model_copy(update={"keep_stop_token": True}), CONTEXT)
    assert (logits(keeps, observe(1)) - logits(policy, observe(1))).abs().max() > 1e-4


def test_everything_trainable_gets_a_gradient():
    policy = make_policy(CONFIG, replace(CONTEXT, values="action"))
    batch = observe(2)
    chunks = policy.act(batch, Sample(), [1, 2])
    assert chunks.values_BK.shape == (2, CHUNK_LENGTH)
    output = evaluate(policy, batch, chunks, 1.0)
    terms = (output.logprobs_SKA, output.entropy_SKA, output.values_SK)
    sum(term.mean() for term in terms).backward()
    with_gradient = {
        name for name, p in policy.module.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert with_gradient == {name for name, _ in policy.trainable()}


@pytest.mark.parametrize(("level", "outputs"), [("action", CHUNK_LENGTH), ("chunk", 1)])
def test_values_are_as_many_as_asked_for(level, outputs):
    chunks = make(values=level).act(observe(2), Sample(), [1, 2])
    assert chunks.values_BK.shape == (2, outputs)
    assert chunks.values_BK.dtype == np.float32


def test_shard_units_are_distinct_parts(policy):
    units = policy.shard_units()
    owned = [id(parameter) for unit in units for parameter in unit.parameters()]
    assert len(owned) == len(set(owned))
    assert len(units) == 3 + TINY.language.num_hidden_layers


def test_seed_alone_fixes_the_weights(policy):
    again, other = (make_policy(CONFIG, replace(CONTEXT, seed=seed)) for seed in (3, 4))
    state, same, different = (p.module.state_dict() for p in (policy, again, other))
    assert all(torch.equal(same[name], tensor) for name, tensor in state.items())
    name = "language_model.lm_head.weight"
    assert not torch.equal(different[name], state[name])
    valued = make_policy(CONFIG, replace(CONTEXT, values="action")).module.state_dict()
    assert torch.equal(valued[name], state[name])


def test_untrained_policy_explores(policy):
    entropy = evaluate(policy, observe(1), policy.act(observe(1), Sample(), [1]), 1.0).entropy_SKA
    assert entropy.min() > 0.9 * np.log(256)


def test_bfloat16_keeps_positions_in_float32():
    policy = make_policy(CONFIG, replace(CONTEXT, dtype=torch.bfloat16))
    assert {p.dtype for p in policy.module.parameters()} == {torch.bfloat16}
    assert policy.module.language_model.model.rotary_emb.inv_freq.dtype == torch.float32
    chunks = policy.act(observe(1), Sample(), [1])
    assert chunks.logprobs_BKA.dtype == np.float32
    assert chunks.tokens_BKA.size == NUM_ACTION_TOKENS


# --------------------------------------------------------------------------------------------
# Reference policy
# --------------------------------------------------------------------------------------------
def train_batch(policy):
    tokens = torch.from_numpy(policy.act(observe(3), Sample(), [1, 2, 3]).tokens_BKA)
    return TrainBatch(observations=observe(3), tokens_SKA=tokens, temperature=1.6)


def adapter_directory(directory):
    policy = make(lora=ADAPTERS)
    take_step(policy)
    directory.mkdir()
    policy.export(directory, adapter_only=True)
    return replace(ADAPTERS, adapter=str(directory))


@pytest.mark.parametrize("kind", ["all weights", "fresh adapters", "continued adapters"])
def test_reference_stays_what_the_policy_was(tmp_path, kind):
    adapters = None if kind == "all weights" else ADAPTERS
    if kind == "continued adapters":
        adapters = adapter_directory(tmp_path / "adapter")
    policy = make(reference=True, lora=adapters, values="action", activation_checkpointing="full")
    batch = train_batch(policy)
    initial = policy.evaluate_actions(batch).logprobs_SKA
    reference = policy.reference_logprobs(batch)
    assert torch.equal(reference, initial)
    assert not reference.requires_grad
    names = [name for name, _ in policy.module.named_parameters()]
    take_step(policy)
    assert (policy.evaluate_actions(batch).logprobs_SKA - initial).abs().max() > 1e-4
    assert torch.equal(policy.reference_logprobs(batch), initial)
    assert [name for name, _ in policy.module.named_parameters()] == names


def test_reference_must_be_asked_for_in_time(policy):
    with pytest.raises(AssertionError, match="without ModelContext"):
        policy.reference_logprobs(train_batch(policy))


# --------------------------------------------------------------------------------------------
# Recomputed activations
# --------------------------------------------------------------------------------------------
def gradients_and_bytes(policy):
    """Gradients of one backward pass, and what autograd held for it, parameters apart."""
    batch, held = train_batch(policy), {}
    parameters = {p.untyped_storage().data_ptr() for p in policy.module.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = policy.evaluate_actions(batch)
    (output.logprobs_SKA.mean() + output.values_SK.square().mean()).backward()
    return {name: p.grad for name, p in policy.trainable()}, sum(held.values())


@pytest.mark.parametrize(("how", "share"), [("selective", 0.7), ("full", 1 / 3)])
@pytest.mark.parametrize("lora", [None, ADAPTERS], ids=["all weights", "adapters"])
def test_recomputing_changes_memory_and_nothing_else(lora, how, share):
    kept, recomputed = (
        make(lora=lora, values="chunk", activation_checkpointing=choice) for choice in ("none", how)
    )
    if lora is not None:
        take_step(kept)
        recomputed.module.load_state_dict(kept.module.state_dict())
    (expected, most), (actual, least) = map(gradients_and_bytes, (kept, recomputed))
    assert most * share / 2 < least < most * share
    assert actual.keys() == expected.keys()
    assert any(gradient.any() for name, gradient in actual.items() if "featurizer" in name)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "context", "message"),
    [
        ({"cameras": ("overhead",)}, {}, "overhead"),
        ({}, {"env": replace(ENV, action_dim=6)}, "6"),
        ({"unnorm_key": "tinny"}, {}, "tinny"),
        ({"size": "full", "path": "/nowhere/at/all"}, {}, "/nowhere/at/all"),
    ],
)
def test_what_cannot_run_says_so(config, context, message):
    with pytest.raises(ConfigError, match=message):
        make_policy(CONFIG.model_copy(update=config), replace(CONTEXT, **context))


def test_a_prompt_that_does_not_fit_says_so():
    policy = make_policy(CONFIG.model_copy(update={"max_prompt_length": 12}), CONTEXT)
    with pytest.raises(ConfigError, match="max_prompt_length"):
        policy.act(observe(1), Greedy(), [0])
