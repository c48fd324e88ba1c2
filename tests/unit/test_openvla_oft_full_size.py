"""The full-size network against the list of tensors that published checkpoints hold.

Everything is on the meta device: shapes without storage.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from vlactl_openvla_oft import lora
from vlactl_openvla_oft.architecture import FULL
from vlactl_openvla_oft.model import build

from vlactl.api.contracts import LoraContext

DINO, SIGLIP, HIDDEN, WIDE = 1024, 1152, 4096, 11008
VOCABULARY = 32064
PUBLISHED_TENSORS = 982


def linear(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block(name, width, mlp):
    return {
        **norm(f"{name}.norm1", width),
        **linear(f"{name}.attn.qkv", 3 * width, width),
        **linear(f"{name}.attn.proj", width, width),
        **norm(f"{name}.norm2", width),
        **linear(f"{name}.mlp.fc1", mlp, width),
        **linear(f"{name}.mlp.fc2", width, mlp),
    }


def tower(name, width, mlp, depth):
    """What both towers have: 256 patches of 14 x 14 pixels."""
    tensors = {
        f"{name}.pos_embed": (1, 256, width),
        f"{name}.patch_embed.proj.weight": (width, 3, 14, 14),
        f"{name}.patch_embed.proj.bias": (width,),
        **norm(f"{name}.norm", width),
    }
    for index in range(depth):
        tensors |= block(f"{name}.blocks.{index}", width, mlp)
    return tensors


def dino():
    name = "vision_backbone.featurizer"
    tensors = tower(name, DINO, 4096, 24)
    tensors |= {f"{name}.cls_token": (1, 1, DINO), f"{name}.reg_token": (1, 4, DINO)}
    for index in range(24):
        for scale in ("ls1", "ls2"):
            tensors[f"{name}.blocks.{index}.{scale}.scale_factor"] = (DINO,)
    return tensors


def siglip():
    name = "vision_backbone.fused_featurizer"
    pool = f"{name}.attn_pool"
    return {
        **tower(name, SIGLIP, 4304, 27),
        f"{pool}.latent": (1, 1, SIGLIP),
        **linear(f"{pool}.q", SIGLIP, SIGLIP),
        **linear(f"{pool}.kv", 2 * SIGLIP, SIGLIP),
        **linear(f"{pool}.proj", SIGLIP, SIGLIP),
        **norm(f"{pool}.norm", SIGLIP),
        **linear(f"{pool}.mlp.fc1", 4304, SIGLIP),
        **linear(f"{pool}.mlp.fc2", SIGLIP, 4304),
    }


def projector():
    both = DINO + SIGLIP
    return {
        **linear("projector.fc1", 4 * both, both),
        **linear("projector.fc2", HIDDEN, 4 * both),
        **linear("projector.fc3", HIDDEN, HIDDEN),
    }


def llama():
    tensors = {
        "language_model.model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "language_model.model.norm.weight": (HIDDEN,),
        "language_model.lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for index in range(32):
        name = f"language_model.model.layers.{index}"
        for part in "qkvo":
            tensors[f"{name}.self_attn.{part}_proj.weight"] = (HIDDEN, HIDDEN)
        tensors |= {
            f"{name}.mlp.gate_proj.weight": (WIDE, HIDDEN),
            f"{name}.mlp.up_proj.weight": (WIDE, HIDDEN),
            f"{name}.mlp.down_proj.weight": (HIDDEN, WIDE),
            f"{name}.input_layernorm.weight": (HIDDEN,),
            f"{name}.post_attention_layernorm.weight": (HIDDEN,),
        }
    return tensors


def value_head(outputs):
    return {
        **linear("value_head.mlp.0", 512, HIDDEN),
        **linear("value_head.mlp.2", 128, 512),
        "value_head.mlp.4.weight": (outputs, 128),
    }


def published(value_outputs):
    tensors = {**dino(), **siglip(), **projector(), **llama()}
    return tensors | (value_head(value_outputs) if value_outputs else {})


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def full_size(value_outputs):
    return build(replace(FULL, value_outputs=value_outputs))


@pytest.mark.parametrize(("value_outputs", "extra"), [(0, 0), (1, 5), (8, 5)])
def test_the_published_tensors(value_outputs, extra):
    module = full_size(value_outputs)
    expected = published(value_outputs)
    assert len(expected) == PUBLISHED_TENSORS + extra
    assert shapes(module.state_dict()) == expected
    assert shapes(dict(module.named_parameters())) == expected
    assert shapes(dict(lora.merged_state(module))) == expected


def test_its_size():
    """And that nothing of it was allocated."""
    module = full_size(0)
    assert sum(parameter.numel() for parameter in module.parameters()) == 7_541_237_184
    tensors = [*module.parameters(), *module.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize("targets", ["effective", "published"])
def test_merged_adapters_leave_the_published_tensors(targets):
    module = full_size(0)
    context = LoraContext(rank=32, alpha=32.0, targets=targets)
    lora.inject(module, lora.target_layers(module, context), context)
    assert len(module.state_dict()) > PUBLISHED_TENSORS
    assert shapes(dict(lora.merged_state(module))) == published(0)
