"""Random initial weights, keyed by (seed, parameter name).

They come from numpy, so they are the same on every rank, device and torch version, and a
parameter's values do not depend on which other parameters there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from vlactl.api import noise

HEADS = ("language_model.lm_head.", "value_head.")
HEAD_STD = 0.02
TABLES = ("embed_tokens.weight", "pos_embed", "cls_token", "reg_token", "attn_pool.latent")


def random_tensor(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Initial value of one parameter, float32."""
    if name.endswith("bias") or ".lora_B." in name:
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    normal = noise.generator("weights", seed, name).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(normal) * _deviation(name, shape)


def _deviation(name: str, shape: torch.Size) -> float:
    """Matrices keep the scale of what they multiply; heads start near uniform; tables at one.

    The first matrix of an adapter, whose rows are its rank, starts as in PEFT's "gaussian".
    """
    if ".lora_A." in name:
        return 1 / shape[0]
    if name.startswith(HEADS):
        return HEAD_STD
    return 1.0 if name.endswith(TABLES) else 1 / math.sqrt(shape[1:].numel())


def random_tensors(module: nn.Module, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Initial values of all parameters of a module, which may be on the meta device, one by one."""
    for name, parameter in module.named_parameters():
        yield name, random_tensor(name, parameter.shape, seed)


def random_state(module: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Initial values of all parameters of a module, which may be on the meta device."""
    return dict(random_tensors(module, seed))
