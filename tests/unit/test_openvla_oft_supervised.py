"""The supervised loss on a tiny network."""

from __future__ import annotations

import math

import pytest
import torch
from vlactl_openvla_oft import lora
from vlactl_openvla_oft.architecture import BOS_ID, NUM_ACTION_TOKENS, STOP_ID, TINY
from vlactl_openvla_oft.init import random_state
from vlactl_openvla_oft.model import build, materialise
from vlactl_openvla_oft.processor import Inputs
from vlactl_openvla_oft.supervised import supervised_loss

from vlactl.api.contracts import LoraContext
from vlactl.errors import ConfigError

SIZE = TINY.vision.featurizer.img_size
CPU = torch.device("cpu")


def make_module(*, keep_stop_token=True):
    module = build(TINY, keep_stop_token=keep_stop_token)
    materialise(module, random_state(module, 0))
    return module


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[BOS_ID, 9, 10, 3], [BOS_ID, 11, 12, 3]])
    pixels = torch.randn(2, 6, SIZE, SIZE, generator=generator)
    return Inputs(pixels, ids, torch.ones_like(ids, dtype=torch.bool))


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(
        TINY.action_start, TINY.action_end, (2, NUM_ACTION_TOKENS), generator=generator
    )


def test_an_untrained_network_knows_nothing(inputs, tokens):
    loss = supervised_loss(make_module(), inputs, tokens)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(math.log(TINY.language.vocab_size), abs=0.1)


def test_the_loss_is_the_mean_over_all_labelled_tokens(inputs, tokens):
    module = make_module()
    with torch.no_grad():
        whole = supervised_loss(module, inputs, tokens)
        actions = supervised_loss(module, inputs, tokens, predict_stop_token=False)
        hidden = module.hidden_states(*inputs, num_positions=NUM_ACTION_TOKENS + 1)[:, -1]
        logits = module.language_model.vocabulary_logits(hidden)
        stop = -torch.log_softmax(logits, -1)[:, STOP_ID].mean()
    expected = (NUM_ACTION_TOKENS * actions + stop) / (NUM_ACTION_TOKENS + 1)
    torch.testing.assert_close(whole, expected)


def test_everything_used_is_taught(inputs, tokens):
    module = make_module()
    supervised_loss(module, inputs, tokens).backward()
    without = {
        name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    }
    assert not without
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)
    rows = module.language_model.lm_head.weight.grad.abs().sum(1) > 0
    assert rows.all()


def test_the_answer_itself_is_not_seen(inputs, tokens):
    """One label more to the right changes one term of the mean, however it was predicted."""
    module = make_module()
    other = tokens.clone()
    other[0, 7] = TINY.action_start + (tokens[0, 7] - TINY.action_start + 1) % 256
    with torch.no_grad():
        log_p = torch.log_softmax(
            module.language_model.vocabulary_logits(module.hidden_states(*inputs)), -1
        )
        change = supervised_loss(module, inputs, other) - supervised_loss(module, inputs, tokens)
    expected = log_p[0, 7, tokens[0, 7]] - log_p[0, 7, other[0, 7]]
    torch.testing.assert_close(change * 2 * (NUM_ACTION_TOKENS + 1), expected, atol=1e-3, rtol=0)


def test_adapters_learn_and_the_stop_token_too(inputs, tokens):
    module = make_module()
    context = LoraContext(rank=4, alpha=8)
    lora.attach(module, context, device=CPU, dtype=torch.float32, seed=0)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    losses = []
    for _ in range(12):
        loss = supervised_loss(module, inputs, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    head = module.language_model.lm_head.lora_B["default"].weight.grad
    assert head[STOP_ID].any()


def test_the_stop_token_must_be_kept(inputs, tokens):
    with pytest.raises(ConfigError, match="keeps </s>"):
        supervised_loss(make_module(keep_stop_token=False), inputs, tokens)
