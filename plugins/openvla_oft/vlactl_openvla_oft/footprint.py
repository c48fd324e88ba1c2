"""Size of the network by arithmetic, for the plan. Imports no torch.

Parameters are exact (a test counts them); activation bytes are an estimate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from vlactl.api.contracts import Recomputation
from vlactl.api.plugins import Footprint, FootprintContext
from vlactl_openvla_oft.architecture import (
    BUILT_IN,
    FULL,
    NUM_ACTION_TOKENS,
    VALUE_HIDDEN,
    VALUE_OUTPUTS,
    Architecture,
    LanguageConfig,
    TowerConfig,
)
from vlactl_openvla_oft.plugin import OpenVlaOftConfig

STEM_WINDOW = 3 * 3
QUANTIZED_BYTES = {"int8": 1.0, "nf4": 0.52}
"""Per parameter, with the scales."""


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


class Stack(NamedTuple):
    """Equal layers, and how many values of one sample the backward pass needs of each."""

    layers: int
    input: int
    inside: int

    def kept(self, recomputation: Recomputation) -> int:
        """Values that stay from the forward to the backward pass."""
        recomputed = {"none": 0, "selective": (self.layers + 1) // 2, "full": self.layers}
        num_inputs = recomputed[recomputation]
        return num_inputs * self.input + (self.layers - num_inputs) * self.inside


def footprint(config: OpenVlaOftConfig, context: FootprintContext) -> Footprint:
    """Parameters, and bytes per sample, of the configured size."""
    base = FULL if config.size == "full" else BUILT_IN[config.size]
    architecture = replace(base, value_outputs=VALUE_OUTPUTS[context.values])
    bytes_per_value = context.bytes_per_value
    rank, adapters = context.lora_rank, 0
    trainable = count_used(architecture)
    if rank:
        adapters = count_adapters(architecture, rank, only_used=context.lora_targets == "effective")
        trainable = count_adapters(architecture, rank, only_used=True) + count_head(architecture)
    parameters = count(architecture) + adapters
    saved = _count_quantizable(architecture) * (
        bytes_per_value - QUANTIZED_BYTES.get(config.quantization, bytes_per_value)
    )
    return Footprint(
        parameters=parameters,
        trainable=trainable,
        bytes_per_parameter=bytes_per_value - saved / parameters,
        activation_bytes=bytes_per_value * _activations(architecture, config, context),
        largest_unit=_largest_unit(architecture),
    )


def count(architecture: Architecture) -> int:
    """All parameters."""
    return _count(architecture, only_used=False)


def count_used(architecture: Architecture) -> int:
    """Parameters that get a gradient."""
    return _count(architecture, only_used=True)


def count_adapters(architecture: Architecture, rank: int, *, only_used: bool) -> int:
    """Parameters of adapters beside the matrices and the patch convolutions."""
    matrices = (m for m in _matrices(architecture) if m.used or not only_used)
    return sum(rank * (matrix.outputs + matrix.inputs) for matrix in matrices)


def count_head(architecture: Architecture) -> int:
    """Parameters of the value head."""
    if not architecture.value_outputs:
        return 0
    wide, narrow = VALUE_HIDDEN
    head = (
        Matrix(wide, architecture.language.hidden_size),
        Matrix(narrow, wide),
        Matrix(architecture.value_outputs, narrow, bias=False),
    )
    return sum(matrix.parameters for matrix in head)


def _count(architecture: Architecture, *, only_used: bool) -> int:
    matrices = (m for m in _matrices(architecture) if m.used or not only_used)
    vectors = sum(_tower_vectors(tower, only_used) for tower in architecture.vision.towers)
    language = architecture.language
    table = language.vocab_size * language.hidden_size
    norms = (2 * language.num_hidden_layers + 1) * language.hidden_size
    head = count_head(architecture)
    return sum(matrix.parameters for matrix in matrices) + vectors + table + norms + head


def _count_quantizable(architecture: Architecture) -> int:
    *layers, _head = _language_matrices(architecture.language)
    return sum(matrix.parameters for matrix in layers)


def _matrices(architecture: Architecture) -> Iterator[Matrix]:
    for tower in architecture.vision.towers:
        yield from _tower_matrices(tower)
    width, hidden = architecture.vision.embed_dim, architecture.language.hidden_size
    yield from (Matrix(4 * width, width), Matrix(hidden, 4 * width), Matrix(hidden, hidden))
    if architecture.state_dim:
        yield from (Matrix(hidden, architecture.state_dim), Matrix(hidden, hidden))
    yield from _language_matrices(architecture.language)


def _tower_matrices(tower: TowerConfig) -> Iterator[Matrix]:
    dim, mlp = tower.embed_dim, tower.mlp_dim
    yield from _stem_matrices(tower)
    for index in range(tower.depth):
        shapes = ((3 * dim, dim), (dim, dim), (mlp, dim), (dim, mlp))
        yield from (Matrix(*shape, used=index < tower.depth - 1) for shape in shapes)
    if tower.global_pool == "map":
        pool = ((dim, dim), (2 * dim, dim), (dim, dim), (mlp, dim), (dim, mlp))
        yield from (Matrix(*shape, used=False) for shape in pool)


def _stem_matrices(tower: TowerConfig) -> Iterator[Matrix]:
    """Convolutions as matrices over their windows."""
    if not tower.stem:
        yield Matrix(tower.embed_dim, 3 * tower.patch_size**2)
        return
    for before, after in pairwise((3, *tower.stem, tower.embed_dim)):
        yield Matrix(after, before * STEM_WINDOW)


def _tower_vectors(tower: TowerConfig, only_used: bool) -> int:
    """Norms, layer scales, positions and extra tokens."""
    positions = tower.num_patches + (0 if tower.no_embed_class else tower.num_prefix_tokens)
    per_block = 4 + (2 if tower.init_values is not None else 0)
    rows = positions + tower.num_prefix_tokens + per_block * (tower.depth - only_used)
    if not only_used:
        rows += 2 + (3 if tower.global_pool == "map" else 0)
    return rows * tower.embed_dim + 2 * sum(tower.stem)


def _language_matrices(language: LanguageConfig) -> Iterator[Matrix]:
    hidden, inner = language.hidden_size, language.intermediate_size
    keys = hidden * language.num_key_value_heads // language.num_attention_heads
    attention = ((hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden))
    mlp = ((inner, hidden), (inner, hidden), (hidden, inner))
    for _ in range(language.num_hidden_layers):
        yield from (Matrix(*shape, bias=False) for shape in attention + mlp)
    yield Matrix(language.vocab_size, hidden, bias=False)


def _largest_unit(architecture: Architecture) -> int:
    """Parameters of the largest of the policy's shard units, or of what is left for the whole."""
    language = architecture.language
    *layers, _head = (matrix.parameters for matrix in _language_matrices(language))
    layer = sum(layers) // language.num_hidden_layers + 2 * language.hidden_size
    towers = [_tower_parameters(tower) for tower in architecture.vision.towers]
    tables = 2 * language.vocab_size * language.hidden_size + language.hidden_size
    return max(layer, tables, *towers)


def _tower_parameters(tower: TowerConfig) -> int:
    matrices = sum(matrix.parameters for matrix in _tower_matrices(tower))
    return matrices + _tower_vectors(tower, only_used=False)


def _activations(
    architecture: Architecture, config: OpenVlaOftConfig, context: FootprintContext
) -> int:
    """Values of one sample's forward pass that the backward pass needs.

    Where something is recomputed, so is all that is inside one layer at a time.
    """
    num_pictures = len(config.cameras)
    patches = num_pictures * architecture.vision.featurizer.num_patches
    stacks = [_language_stack(architecture.language, patches + config.max_prompt_length)]
    stacks += [_tower_stack(tower, num_pictures) for tower in architecture.vision.towers]
    recomputation = context.activation_checkpointing
    kept = sum(stack.kept(recomputation) for stack in stacks)
    return kept + (max(s.inside for s in stacks) if recomputation != "none" else 0)


def _language_stack(language: LanguageConfig, num_inputs: int) -> Stack:
    """Per token some 15 vectors of the hidden size (float32 norms count twice), 4 of the inner."""
    tokens = num_inputs + NUM_ACTION_TOKENS
    inside = 15 * language.hidden_size + 4 * language.intermediate_size
    return Stack(language.num_hidden_layers, tokens * language.hidden_size, tokens * inside)


def _tower_stack(tower: TowerConfig, num_pictures: int) -> Stack:
    tokens = num_pictures * (tower.num_patches + tower.num_prefix_tokens)
    inside = 12 * tower.embed_dim + 2 * tower.mlp_dim
    return Stack(tower.depth - 1, tokens * tower.embed_dim, tokens * inside)
