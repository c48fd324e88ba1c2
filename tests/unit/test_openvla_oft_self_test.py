"""A network that is blind, causal or broken is refused in every dtype."""

from __future__ import annotations

import pytest
import torch
from vlactl_openvla_oft import self_test
from vlactl_openvla_oft.architecture import TINY
from vlactl_openvla_oft.init import random_state
from vlactl_openvla_oft.model import build, materialise

from vlactl.errors import IntegrityError

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=DTYPES, ids=str)
def module(request):
    module = build(TINY)
    materialise(module, random_state(module, 0))
    return module.to(request.param)


@pytest.mark.parametrize("num_pictures", [1, 2])
def test_a_whole_network_passes(module, num_pictures):
    self_test.check(module, num_pictures=num_pictures)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_kept_stop_token_changes_nothing():
    module = build(TINY, keep_stop_token=True)
    materialise(module, random_state(module, 1))
    self_test.check(module, num_pictures=1)


def test_pictures_must_arrive(module):
    torch.nn.init.zeros_(module.projector.fc3.weight)
    with pytest.raises(IntegrityError, match="does not see"):
        self_test.check(module, num_pictures=1)


@pytest.mark.parametrize("ignored", [0, 1])
def test_every_picture_must_arrive(module, ignored):
    backbone = module.vision_backbone
    see = backbone.forward

    def half_blind(pixels):
        pixels = pixels.clone()
        pixels[:, 6 * ignored : 6 * ignored + 6] = 0
        return see(pixels)

    backbone.forward = half_blind
    with pytest.raises(IntegrityError, match=f"picture {ignored + 1} of 2"):
        self_test.check(module, num_pictures=2)


def test_attention_must_look_ahead(module):
    """A mask of two dimensions is one that transformers makes causal by itself."""
    language = module.language_model

    def causal(embeddings, mask):
        positions = mask.long().cumsum(dim=1) - 1
        output = language.model(
            inputs_embeds=embeddings, attention_mask=mask.long(), position_ids=positions
        )
        return output.last_hidden_state

    language.forward = causal
    with pytest.raises(IntegrityError, match="attention is causal"):
        self_test.check(module, num_pictures=2)


def test_logits_must_be_finite(module):
    with torch.no_grad():
        module.language_model.model.norm.weight[3] = torch.nan
    with pytest.raises(IntegrityError, match="not finite"):
        self_test.check(module, num_pictures=1)
