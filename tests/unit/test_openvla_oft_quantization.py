"""Quantised base weights with adapters on top, on the CPU, which bitsandbytes can use, too."""

from __future__ import annotations

import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vlactl_openvla_oft.architecture import ACTION_DIM, TINY
from vlactl_openvla_oft.init import random_state
from vlactl_openvla_oft.model import build
from vlactl_openvla_oft.plugin import OpenVlaOftConfig
from vlactl_openvla_oft.policy import make_policy
from vlactl_openvla_oft.quantization import quantized, quantized_layers

from vlactl.api.contracts import (
    EnvSpec,
    Greedy,
    LoraContext,
    ModelContext,
    ObservationBatch,
    TrainBatch,
)
from vlactl.errors import ConfigError, EnvironmentNotReadyError

KINDS = ("int8", "nf4")
ENV = EnvSpec(
    cameras={"agentview": (96, 96)},
    state_dim=8,
    action_dim=ACTION_DIM,
    max_episode_steps=10,
    control_hz=20,
    tasks=(),
)
CONTEXT = ModelContext(env=ENV, device=torch.device("cpu"), dtype=torch.float32, seed=3)
ADAPTED = replace(CONTEXT, lora=LoraContext(rank=4, alpha=4.0))
CONFIG = OpenVlaOftConfig(size="tiny", max_prompt_length=24)
OWNERS = set(quantized_layers(build(TINY)))


def quantised(kind):
    return CONFIG.model_copy(update={"quantization": kind})


def observe(num_rows):
    pictures = np.random.default_rng(0).integers(0, 256, (num_rows, 96, 96, 3), dtype=np.uint8)
    return ObservationBatch(
        images={"agentview": pictures},
        state=np.zeros((num_rows, 8), np.float32),
        instructions=("open the drawer", "push the plate", "turn on the stove")[:num_rows],
    )


@pytest.fixture(scope="module", params=KINDS)
def policy(request):
    pytest.importorskip("bitsandbytes")
    return make_policy(quantised(request.param), ADAPTED)


def batch_of(policy):
    observations = observe(3)
    tokens = policy.act(observations, Greedy(), [0] * 3).tokens_BKA
    return TrainBatch(
        observations=observations, tokens_SKA=torch.from_numpy(tokens), temperature=1.0
    )


def test_only_the_llama_is_quantised(policy):
    parameters = dict(policy.module.named_parameters())
    small = {name for name, p in parameters.items() if p.dtype in (torch.int8, torch.uint8)}
    assert small == {f"{name}.base_layer.weight" for name in quantized_layers(build(TINY))}
    assert not any(parameters[name].requires_grad for name in small)


def test_quantised_weights_are_near_the_others(policy):
    exact = make_policy(CONFIG, CONTEXT)
    with torch.no_grad():
        actual, expected = (p._predict(observe(3)).logits for p in (policy, exact))
    assert 0 < (actual - expected).std() < 0.4 * expected.std()


def test_rows_do_not_depend_on_each_other(policy):
    batch = observe(3)
    first = replace(batch, images={"agentview": batch.images["agentview"][:1]})
    first = replace(first, state=batch.state[:1], instructions=batch.instructions[:1])
    with torch.no_grad():
        alone, among = policy._predict(first).logits[0], policy._predict(batch).logits[0]
    torch.testing.assert_close(alone, among, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_trained_on_top(kind):
    pytest.importorskip("bitsandbytes")
    policy = make_policy(quantised(kind), replace(ADAPTED, reference=True))
    batch = batch_of(policy)
    before = policy.evaluate_actions(batch).logprobs_SKA
    before.mean().backward()
    trained = dict(policy.trainable())
    assert all(".lora_" in name for name in trained)
    assert any(p.grad.any() for name, p in trained.items() if "layers.0" in name)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.05
    after = policy.evaluate_actions(batch).logprobs_SKA
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(policy.reference_logprobs(batch), before.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_quantised_one_by_one(kind):
    pytest.importorskip("bitsandbytes")
    module, wide = build(TINY), []

    def tensors():
        for name in quantized_layers(module):
            assert not any(tensor() is not None for tensor in wide[:-1])
            tensor = torch.randn(module.get_submodule(name).weight.shape)
            wide.append(weakref.ref(tensor))
            yield f"{name}.weight", tensor

    place = {"device": CONTEXT.device, "dtype": CONTEXT.dtype}
    assert list(quantized(module, tensors(), kind, **place)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_leave_quantised_weights_out(kind):
    pytest.importorskip("bitsandbytes")
    policy, again = (make_policy(quantised(kind), ADAPTED) for _ in range(2))
    state = policy.module.state_dict()
    assert not any(name.removesuffix(".base_layer.weight") in OWNERS for name in state)
    assert state.keys() >= {name for name, _ in policy.trainable()}
    assert not again.module.load_state_dict(state, strict=False).unexpected_keys


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_alone_act_but_cannot_be_trained(kind):
    pytest.importorskip("bitsandbytes")
    policy = make_policy(quantised(kind), CONTEXT)
    assert policy.act(observe(1), Greedy(), [0]).actions_BKA.shape == (1, 8, ACTION_DIM)
    with pytest.raises(ConfigError, match=r"lora\.rank"):
        policy.trainable()


@pytest.mark.parametrize("kind", KINDS)
def test_export_has_the_weights_as_they_are(kind):
    policy = make_policy(quantised(kind), replace(CONTEXT, for_export=True))
    state = policy.module.state_dict()
    assert all(torch.equal(state[name], p) for name, p in random_state(build(TINY), 3).items())


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(EnvironmentNotReadyError, match=r"pip install .vlactl\[quantization\]"):
        make_policy(quantised("nf4"), ADAPTED)


def test_int8_weights_are_quantised_on_their_way_from_the_cpu(monkeypatch):
    """Parameters of bitsandbytes that arrive on a device otherwise stay as they are, unsaid."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    came_from = []

    def parameter(weight, **options):
        came_from.append((weight.device.type, weight.dtype))
        return Int8Params(weight, **options)

    library = SimpleNamespace(nn=SimpleNamespace(Int8Params=parameter, Linear8bitLt=Linear8bitLt))
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    module = build(TINY)
    name = quantized_layers(module)[0]
    tensors = [(f"{name}.weight", torch.randn(module.get_submodule(name).weight.shape))]
    place = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    assert list(quantized(module, tensors, "int8", **place)) == []
    assert came_from == [("cpu", torch.bfloat16)]
    # To the meta device, as between two accelerators, they move without being quantised.
    with pytest.raises(EnvironmentNotReadyError, match="instead of int8"):
        list(quantized(build(TINY), tensors, "int8", **place | {"device": torch.device("meta")}))
