"""Size of the network by arithmetic, for the plan. Imports no torch.

Parameters are exact (a test counts them); activation bytes are an estimate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from vlactl.api.plugins import Footprint
from vlactl_openvla_oft.architecture import (
    FULL,
    NUM_ACTION_TOKENS,
    TINY,
    Architecture,
    LanguageConfig,
    TowerConfig,
)
from vlactl_openvla_oft.plugin import OpenVlaOftConfig


class Matrix(NamedTuple):
    """A linear map: what an adapter is put beside. `used` is False where nothing depends on it."""

    outputs: int
    inputs: int
    used: bool = True
    bias: bool = True

    @property
    def parameters(self) -> int:
        """Weight and bias."""
        return self.outputs * (self.inputs + self.bias)


def footprint(config: OpenVlaOftConfig, lora_rank: int) -> Footprint:
    """Parameters, and bytes per sample, of the configured size."""
    architecture = FULL if config.size == "full" else TINY
    bytes_per_value = 2 if config.size == "full" else 4
    bytes_per_parameter = {"none": bytes_per_value, "int8": 1.0, "nf4": 0.5}[config.quantization]
    trainable = count_used(architecture)
    if lora_rank:
        trainable = count_adapters(architecture, lora_rank)
    return Footprint(
        parameters=count(architecture),
        trainable=trainable,
        bytes_per_parameter=bytes_per_parameter,
        activation_bytes=bytes_per_value * _activations(architecture, config),
    )


def count(architecture: Architecture) -> int:
    """All parameters, without a value head."""
    return _count(architecture, only_used=False)


def count_used(architecture: Architecture) -> int:
    """Parameters that get a gradient."""
    return _count(architecture, only_used=True)


def count_adapters(architecture: Architecture, rank: int) -> int:
    """Parameters of adapters beside every matrix and the patch convolutions."""
    return sum(rank * (matrix.outputs + matrix.inputs) for matrix in _matrices(architecture))


def _count(architecture: Architecture, *, only_used: bool) -> int:
    matrices = (m for m in _matrices(architecture) if m.used or not only_used)
    vectors = sum(_tower_vectors(tower, only_used) for tower in architecture.vision.towers)
    language = architecture.language
    table = language.vocab_size * language.hidden_size
    norms = (2 * language.num_hidden_layers + 1) * language.hidden_size
    return sum(matrix.parameters for matrix in matrices) + vectors + table + norms


def _matrices(architecture: Architecture) -> Iterator[Matrix]:
    for tower in architecture.vision.towers:
        yield from _tower_matrices(tower)
    width, hidden = architecture.vision.embed_dim, architecture.language.hidden_size
    yield from (Matrix(4 * width, width), Matrix(hidden, 4 * width), Matrix(hidden, hidden))
    yield from _language_matrices(architecture.language)


def _tower_matrices(tower: TowerConfig) -> Iterator[Matrix]:
    dim, mlp = tower.embed_dim, tower.mlp_dim
    yield Matrix(dim, 3 * tower.patch_size**2)
    for index in range(tower.depth):
        shapes = ((3 * dim, dim), (dim, dim), (mlp, dim), (dim, mlp))
        yield from (Matrix(*shape, used=index < tower.depth - 1) for shape in shapes)
    if tower.global_pool == "map":
        pool = ((dim, dim), (2 * dim, dim), (dim, dim), (mlp, dim), (dim, mlp))
        yield from (Matrix(*shape, used=False) for shape in pool)


def _tower_vectors(tower: TowerConfig, only_used: bool) -> int:
    """Norms, layer scales, positions and extra tokens."""
    positions = tower.num_patches + (0 if tower.no_embed_class else tower.num_prefix_tokens)
    per_block = 4 + (2 if tower.init_values is not None else 0)
    rows = positions + tower.num_prefix_tokens + per_block * (tower.depth - only_used)
    if not only_used:
        rows += 2 + (3 if tower.global_pool == "map" else 0)
    return rows * tower.embed_dim


def _language_matrices(language: LanguageConfig) -> Iterator[Matrix]:
    hidden, inner = language.hidden_size, language.intermediate_size
    keys = hidden * language.num_key_value_heads // language.num_attention_heads
    attention = ((hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden))
    mlp = ((inner, hidden), (inner, hidden), (hidden, inner))
    for _ in range(language.num_hidden_layers):
        yield from (Matrix(*shape, bias=False) for shape in attention + mlp)
    yield Matrix(language.vocab_size, hidden, bias=False)


def _activations(architecture: Architecture, config: OpenVlaOftConfig) -> int:
    """Values of one sample's forward pass that the backward pass needs.

    Per token a Llama layer keeps about 15 vectors of the hidden size (norms in float32 count twice)
    and 4 of the inner size; a tower block about 12 and 2.
    """
    num_pictures = len(config.cameras)
    towers = sum(
        (tower.num_patches + tower.num_prefix_tokens)
        * (tower.depth - 1)
        * (12 * tower.embed_dim + 2 * tower.mlp_dim)
        for tower in architecture.vision.towers
    )
    language = architecture.language
    patches = num_pictures * architecture.vision.featurizer.num_patches
    tokens = patches + config.max_prompt_length + NUM_ACTION_TOKENS
    layer = 15 * language.hidden_size + 4 * language.intermediate_size
    return num_pictures * towers + tokens * language.num_hidden_layers * layer
