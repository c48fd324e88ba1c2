"""Adapters of OpenVLA-OFT: where they stand, what they start as, and what is read and refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from vlactl_openvla_oft import lora
from vlactl_openvla_oft.architecture import ACTION_DIM, FULL, TINY
from vlactl_openvla_oft.init import random_state
from vlactl_openvla_oft.model import build, materialise
from vlactl_openvla_oft.plugin import OpenVlaOftConfig
from vlactl_openvla_oft.policy import make_policy

from vlactl.api.contracts import EnvSpec, Greedy, LoraContext, ModelContext, ObservationBatch
from vlactl.errors import ConfigError, IntegrityError

PLACE = {"device": torch.device("cpu"), "dtype": torch.float32, "seed": 3}
EFFECTIVE = LoraContext(rank=4, alpha=8.0)
PUBLISHED = replace(EFFECTIVE, targets="published")
VALUED = replace(TINY, value_outputs=1)
LAYER = "projector.fc1"
HEAD = "language_model.lm_head"
CONFIG = OpenVlaOftConfig(size="tiny", max_prompt_length=24)
ENV = EnvSpec(
    cameras={"agentview": (96, 96)},
    state_dim=8,
    action_dim=ACTION_DIM,
    max_episode_steps=10,
    control_hz=20,
    tasks=(),
)


def adapted(context=EFFECTIVE, architecture=TINY):
    module = build(architecture)
    materialise(module, random_state(module, 0))
    lora.attach(module, context, **PLACE)
    return module


def inputs():
    pixels = torch.randn(1, 6, 112, 112, generator=torch.manual_seed(0))
    return pixels, torch.arange(1, 9)[None], torch.ones(1, 8, dtype=torch.bool)


@torch.no_grad()
def disturb(module):
    generator = torch.manual_seed(1)
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)


def write(directory, module, **changes):
    """An adapter directory with the module's adapters."""
    directory.mkdir(exist_ok=True)
    (directory / lora.CONFIG).write_text(json.dumps(lora.adapter_config(module) | changes))
    save_file(lora.adapter_state(module), directory / lora.WEIGHTS)
    return replace(EFFECTIVE, adapter=str(directory))


# --------------------------------------------------------------------------------------------
# Where they stand
# --------------------------------------------------------------------------------------------
def test_published_figures():
    module = build(FULL)
    layers = lora.target_layers(module, PUBLISHED)
    assert len(layers) == 439
    useful = lora.target_layers(module, EFFECTIVE)
    assert len(layers - useful) == 13
    assert all(
        ".blocks.23." in n or ".blocks.26." in n or "attn_pool" in n for n in layers - useful
    )
    lora.inject(module, layers, replace(PUBLISHED, rank=32))
    adapters = [p for name, p in module.named_parameters() if ".lora_" in name]
    assert len(adapters) == 2 * 439
    assert sum(p.numel() for p in adapters) == 110_828_288


def test_adapters_and_value_head_are_trained():
    module = adapted(PUBLISHED, VALUED)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or name.startswith("value_head.") for name in trained)
    assert sum(name.startswith("value_head.") for name in trained) == 5
    prediction = module(*inputs())
    (prediction.logits.square().sum() + prediction.values.sum()).backward()
    with_gradient = {name for name, p in module.named_parameters() if p.grad is not None}
    assert with_gradient == trained


def test_fresh_adapters_have_no_effect():
    base, module = build(TINY), adapted()
    materialise(base, random_state(base, 0))
    with torch.no_grad():
        assert torch.equal(module(*inputs()).logits, base(*inputs()).logits)


def test_seed_alone_fixes_fresh_adapters():
    state, same, other = (
        lora.adapter_state(make_policy(CONFIG, context_of(EFFECTIVE, seed)).module)
        for seed in (3, 3, 4)
    )
    name = f"base_model.model.{LAYER}.lora_A.weight"
    assert all(torch.equal(same[key], value) for key, value in state.items())
    assert not torch.equal(state[name], other[name])
    # Normal, with PEFT's deviation of 1 / rank.
    assert float(state[name].std()) == pytest.approx(1 / EFFECTIVE.rank, rel=0.1)
    assert not any(value.any() for key, value in state.items() if ".lora_B." in key)


def context_of(context, seed=3):
    return ModelContext(
        env=ENV, device=PLACE["device"], dtype=torch.float32, seed=seed, lora=context
    )


def test_only_action_rows_of_the_head_are_adapted_at_work():
    module = adapted()
    disturb(module)
    hidden = torch.randn(1, 56, TINY.language.hidden_size, generator=torch.manual_seed(0))
    language = module.language_model
    with torch.no_grad():
        rows, whole = language.lm_head(hidden), language.vocabulary_logits(hidden)
        weight = lora.adapted_weight(language.lm_head)
    assert rows.shape[-1] == 256
    torch.testing.assert_close(rows, whole[..., TINY.action_start : TINY.action_end])
    torch.testing.assert_close(whole, hidden @ weight.T, rtol=0, atol=1e-5)


def test_a_failed_pass_over_the_vocabulary_leaves_no_trace():
    language = adapted().language_model
    with torch.no_grad(), pytest.raises(RuntimeError):
        language.vocabulary_logits(torch.zeros(1, 3))
    hidden = torch.zeros(1, 5, TINY.language.hidden_size)
    assert language.lm_head(hidden).shape[-1] == 256


# --------------------------------------------------------------------------------------------
# Merging
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("context", [EFFECTIVE, PUBLISHED])
def test_merged_weights_do_the_same(context):
    module, plain = adapted(context, VALUED), build(VALUED)
    disturb(module)
    merged = lora.merged_state(module)
    assert list(merged) == [name for name, _ in plain.named_parameters()]
    materialise(plain, dict(merged))
    with torch.no_grad():
        expected, actual = module(*inputs()), plain(*inputs())
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(actual.values, expected.values, rtol=0, atol=1e-4)


def test_merging_rounds_once():
    module = build(TINY)
    materialise(module, {n: p.bfloat16() for n, p in random_state(module, 0).items()})
    lora.attach(module, EFFECTIVE, **PLACE | {"dtype": torch.bfloat16})
    disturb(module)
    layer = module.projector.fc1
    a, b = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
    exact = layer.base_layer.weight.double() + 2.0 * b @ a
    merged = lora.merged_state(module)[f"{LAYER}.weight"]
    assert merged.dtype == torch.bfloat16
    assert (merged.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_a_network_without_adapters_is_merged_already():
    module = build(VALUED)
    state = random_state(module, 0)
    materialise(module, state)
    merged = lora.merged_state(module)
    assert len(merged) == len(state)
    assert all(torch.equal(merged[name], tensor) for name, tensor in state.items())
    assert lora.adapter_state(module) == {}


# --------------------------------------------------------------------------------------------
# Directories
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("context", [EFFECTIVE, PUBLISHED])
def test_directories_decide_which_layers_are_adapted(tmp_path, context):
    module = adapted(context)
    disturb(module)
    again = adapted(write(tmp_path, module))
    expected, actual = lora.adapter_state(module), lora.adapter_state(again)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_a_value_head_beside_the_adapter_is_read(tmp_path):
    module = adapted(architecture=VALUED)
    context = write(tmp_path, module)
    head = {
        name: torch.ones_like(p) for name, p in module.value_head.named_parameters("value_head")
    }
    save_file(head, tmp_path / lora.VALUE_HEAD_WEIGHTS)
    again = adapted(context, VALUED)
    assert all((p == 1).all() for p in again.value_head.parameters())
    assert adapted(context).value_head is None


def test_a_value_head_beside_the_adapter_must_be_that_of_the_network(tmp_path):
    module = adapted(architecture=VALUED)
    context = write(tmp_path, module)
    head = {name: p.detach() for name, p in module.value_head.named_parameters("value_head")}
    path = tmp_path / lora.VALUE_HEAD_WEIGHTS
    save_file(head, path)
    with pytest.raises(IntegrityError, match="other sizes") as caught:
        adapted(context, replace(TINY, value_outputs=8))
    assert "per action" in caught.value.hint
    removed = head.popitem()[0]
    save_file(head | {"projector.fc1.bias": torch.zeros(1)}, path)
    with pytest.raises(IntegrityError) as caught:
        adapted(context, VALUED)
    assert f"missing: {removed}" in caught.value.message
    assert "unexpected: projector.fc1.bias" in caught.value.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 8}, r"lora\.rank = 8"),
        ({"lora_alpha": 16}, r"lora\.alpha = 16"),
    ],
)
def test_other_rank_or_alpha_says_what_to_set(tmp_path, changes, message):
    context = write(tmp_path, adapted(), **changes)
    with pytest.raises(ConfigError, match=message):
        adapted(context)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": []}, "init_lora_weights"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"r": "4"}, "r is '4', not a number"),
        ({"r": 4.0}, "r is 4.0"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": True}, "lora_alpha is True"),
    ],
)
def test_other_kinds_of_adapters_are_refused(tmp_path, changes, message):
    context = write(tmp_path, adapted(), **changes)
    with pytest.raises(IntegrityError, match=message):
        adapted(context)


def test_missing_and_unexpected_tensors_are_listed(tmp_path):
    module = adapted()
    context = write(tmp_path, module)
    state = lora.adapter_state(module)
    del state[f"base_model.model.{LAYER}.lora_B.weight"]
    state["base_model.model.elsewhere.lora_A.weight"] = torch.zeros(1)
    state["base_model.model.projector.fc2.lora_magnitude_vector"] = torch.zeros(1)
    save_file(state, tmp_path / lora.WEIGHTS)
    with pytest.raises(IntegrityError) as caught:
        adapted(context)
    missing, unexpected = caught.value.message.splitlines()[1:]
    assert missing == f"missing: base_model.model.{LAYER}.lora_B.weight"
    assert "elsewhere.lora_A" in unexpected
    assert "lora_magnitude_vector" in unexpected


@pytest.mark.parametrize("targets", [None, ["projector.fc1", "fc2"]])
def test_layers_that_the_config_targets_are_needed(tmp_path, targets):
    module = adapted()
    context = write(tmp_path, module, **{"target_modules": targets} if targets else {})
    state = lora.adapter_state(module)
    for part in "AB":
        del state[f"base_model.model.{LAYER}.lora_{part}.weight"]
    save_file(state, tmp_path / lora.WEIGHTS)
    with pytest.raises(IntegrityError, match=rf"missing: base_model\.model\.{LAYER}\.lora_A"):
        adapted(context)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.fc\d"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": None, "loftq_config": {}, "eva_config": None},
    ],
)
def test_other_words_for_plain_adapters_are_read(tmp_path, changes):
    module = adapted()
    context = write(tmp_path, module, **changes)
    assert lora.adapter_state(adapted(context)).keys() == lora.adapter_state(module).keys()


def test_wrong_shapes_are_listed(tmp_path):
    module = adapted()
    context = write(tmp_path, module)
    state = lora.adapter_state(module) | {
        f"base_model.model.{LAYER}.lora_A.weight": torch.zeros(4, 3)
    }
    save_file(state, tmp_path / lora.WEIGHTS)
    with pytest.raises(IntegrityError, match=r"fc1\.lora_A\S* \[4, 3\] instead of \[4, 192\]"):
        adapted(context)


@pytest.mark.parametrize("state", [{}, {"base_model.model.other.lora_A.weight": torch.zeros(1)}])
def test_an_adapter_of_something_else_is_refused(tmp_path, state):
    context = write(tmp_path, adapted())
    save_file(state, tmp_path / lora.WEIGHTS)
    with pytest.raises(IntegrityError, match="no adapter"):
        adapted(context)


def test_pickles_are_not_read(tmp_path):
    context = write(tmp_path, adapted())
    (tmp_path / lora.WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(IntegrityError, match="safetensors only"):
        adapted(context)


def test_policy_continues_from_a_directory(tmp_path):
    first = make_policy(CONFIG, context_of(EFFECTIVE))
    disturb(first.module)
    again = make_policy(CONFIG, context_of(write(tmp_path, first.module)))
    pictures = np.random.default_rng(0).integers(0, 256, (1, 96, 96, 3), dtype=np.uint8)
    batch = ObservationBatch(
        images={"agentview": pictures}, state=np.zeros((1, 8)), instructions=("open it",)
    )
    chunks, same = (policy.act(batch, Greedy(), [0]) for policy in (first, again))
    np.testing.assert_array_equal(same.logprobs_BKA, chunks.logprobs_BKA)
