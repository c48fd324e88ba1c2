"""Low-rank adapters: small matrices A and B that are trained beside frozen weights.

PEFT puts them in place; which layers get one, initial values, files and merging are handled here.
An adapted layer computes W x + alpha / rank * B A x. The value head gets no adapter and stays
trainable.

Names of A: `<layer>.lora_A.default.weight` in the network, `base_model.model.<layer>.lora_A.weight`
in PEFT's files; W, otherwise `<layer>.weight`, becomes `<layer>.base_layer.weight`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlactl.api.contracts import LoraContext
from vlactl.errors import ConfigError, IntegrityError
from vlactl_openvla_oft import loading
from vlactl_openvla_oft.init import random_tensor
from vlactl_openvla_oft.loading import listing
from vlactl_openvla_oft.model import OpenVlaOft, SomeRows, materialise

ADAPTER = "default"
PUBLISHED_TARGETS = (
    *("proj", "qkv", "fc1", "fc2", "fc3", "q", "kv", "out_proj"),
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"),
)
"""Last names of the layers that published adapters stand beside."""
PEFT_NAME = re.compile(r"base_model\.model\.(.+\.lora_[AB])\.weight")
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
VALUE_HEAD_WEIGHTS = "value_head.safetensors"
"""Beside an adapter whose policy has a value head, which PEFT's format has no place for."""
UNSUPPORTED = (
    "use_dora",
    "use_rslora",
    "lora_bias",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "corda_config",
    "eva_config",
    "loftq_config",
)
"""What a config may ask for that changes how its tensors, or those of the base, are to be read."""
PLAIN_STARTS = (True, False, None, "gaussian")
"""Values of init_lora_weights with which the base weights stay as they are."""
NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""What takes layers away from those that target_modules names."""


# --------------------------------------------------------------------------------------------
# Putting adapters in place
# --------------------------------------------------------------------------------------------
def attach(
    module: OpenVlaOft,
    context: LoraContext,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Freeze the network and give it adapters, from a directory or without effect yet.

    A directory decides itself which layers are adapted.
    """
    stored = _read(module, context) if context.adapter else {}
    layers = {_layer(name) for name in stored if ".lora_" in name}
    inject(module, layers if context.adapter else target_layers(module, context), context)
    shapes = {name: p.shape for name, p in module.named_parameters() if ".lora_" in name}
    state = stored or {name: random_tensor(name, shape, seed) for name, shape in shapes.items()}
    wanted = {name: parameter.shape for name, parameter in module.named_parameters()}
    found = {name: tensor.shape for name, tensor in state.items()}
    loading.compare_sizes(context.adapter, found, wanted)
    materialise(module, {name: tensor.to(device, dtype) for name, tensor in state.items()})


def target_layers(module: OpenVlaOft, context: LoraContext) -> set[str]:
    """The published layers, or those of them that can change an action."""
    layers = {name for name in _matrices(module) if name.rpartition(".")[2] in PUBLISHED_TARGETS}
    if context.targets == "published":
        return layers
    unused = {
        layer
        for tower in module.vision_backbone.towers
        for part in tower.unused
        for layer in part.modules()
    }
    return {name for name in layers if module.get_submodule(name) not in unused}


def inject(module: OpenVlaOft, layers: Collection[str], context: LoraContext) -> None:
    """Put adapters without storage beside some layers, and freeze all else but the value head."""
    # PEFT takes seconds to import, which runs without adapters need not spend.
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=context.rank, lora_alpha=context.alpha, target_modules=sorted(layers))
    inject_adapter_in_model(config, module, ADAPTER, low_cpu_mem_usage=True)
    assert set(_adapted_layers(module)) == set(layers)
    if module.value_head is not None:
        module.value_head.requires_grad_(True)
    for tower in module.vision_backbone.towers:
        tower.freeze_unused()
    _narrow(module.language_model.lm_head)


def _narrow(head: nn.Module) -> None:
    """Compute as few rows of the head's adapter as of the head."""
    if is_adapted(head):
        whole = head.lora_B[ADAPTER]
        rows = head.base_layer.rows
        head.lora_B[ADAPTER] = SomeRows(whole.in_features, whole.out_features, rows, device="meta")


def _matrices(module: nn.Module) -> Iterator[str]:
    for name, layer in module.named_modules():
        is_matrix = isinstance(layer, nn.Linear | nn.Conv2d)
        if is_matrix and not name.startswith(loading.VALUE_HEAD):
            yield name


# --------------------------------------------------------------------------------------------
# Reading a directory
# --------------------------------------------------------------------------------------------
def _read(module: OpenVlaOft, context: LoraContext) -> dict[str, torch.Tensor]:
    """Tensors of a directory in PEFT's format, under the names that they have in the network."""
    directory = Path(context.adapter)
    config = loading.read_json(directory / CONFIG)
    _check_config(directory, config, context)
    path = directory / WEIGHTS
    if not path.is_file():
        raise IntegrityError(f"{path} is missing", hint="vlactl reads safetensors only")
    tensors = {_inner_name(name): tensor for name, tensor in loading.read_all(path).items()}
    layers = {_layer(name) for name in tensors} & set(_matrices(module))
    if not layers:
        raise IntegrityError(f"{path} holds no adapter of a layer that OpenVLA-OFT has")
    layers |= _targeted(module, config)
    needed = {f"{layer}.lora_{part}.{ADAPTER}.weight" for layer in layers for part in "AB"}
    loading.check_names(
        path, "an adapter of OpenVLA-OFT", map(_peft_name, needed), map(_peft_name, tensors)
    )
    head = directory / VALUE_HEAD_WEIGHTS
    if module.value_head is not None and head.is_file():
        tensors |= _read_value_head(head, module.value_head)
    return tensors


def _read_value_head(path: Path, head: nn.Module) -> dict[str, torch.Tensor]:
    prefix = loading.VALUE_HEAD.removesuffix(".")
    shapes = {name: parameter.shape for name, parameter in head.named_parameters(prefix)}
    tensors = loading.read_all(path)
    loading.check_names(path, "a value head", shapes, tensors)
    loading.check_sizes(path, shapes)
    return tensors


def _targeted(module: OpenVlaOft, config: Mapping[str, Any]) -> set[str]:
    """Layers that a config names one by one, or by their last names; none if it does otherwise."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or any(config.get(key) for key in NARROWING):
        return set()
    endings = tuple(f".{target}" for target in targets)
    return {name for name in _matrices(module) if f".{name}".endswith(endings)}


def _check_config(directory: Path, config: Mapping[str, Any], context: LoraContext) -> None:
    odd = [key for key in UNSUPPORTED if config.get(key)]
    odd += ["bias"] if config.get("bias", "none") != "none" else []
    odd += ["init_lora_weights"] if config.get("init_lora_weights") not in PLAIN_STARTS else []
    if config.get("peft_type") != "LORA" or odd:
        what = f"it has {listing(odd)}" if odd else f"its peft_type is {config.get('peft_type')!r}"
        raise IntegrityError(f"{directory} is not a plain LoRA adapter: {what}")
    _check_numbers(directory, config)
    for key, name, wanted in (("r", "rank", context.rank), ("lora_alpha", "alpha", context.alpha)):
        if config.get(key) != wanted:
            raise ConfigError(
                f"the adapter {directory} has {key} = {config.get(key)}, lora.{name} is {wanted}",
                hint=f"set lora.{name} = {config.get(key)}",
            )


def _check_numbers(directory: Path, config: Mapping[str, Any]) -> None:
    for key, kinds in (("r", (int,)), ("lora_alpha", (int, float))):
        value = config.get(key)
        if type(value) not in kinds or not math.isfinite(value):
            raise IntegrityError(f"{directory / CONFIG}: {key} is {value!r}, not a number")


# --------------------------------------------------------------------------------------------
# Names
# --------------------------------------------------------------------------------------------
def _inner_name(name: str) -> str:
    match = PEFT_NAME.fullmatch(name)
    return f"{match[1]}.{ADAPTER}.weight" if match else name


def _peft_name(name: str) -> str:
    return f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}" if ".lora_" in name else name


def _layer(name: str) -> str:
    return name.partition(".lora_")[0]


def is_adapted(layer: nn.Module) -> bool:
    """Whether an adapter stands beside the layer."""
    return hasattr(layer, "lora_A")


def _adapted_layers(module: nn.Module) -> Iterator[str]:
    return (name for name, layer in module.named_modules() if is_adapted(layer))


# --------------------------------------------------------------------------------------------
# Taking adapters out again
# --------------------------------------------------------------------------------------------
def adapted_weight(layer: nn.Module) -> torch.Tensor:
    """The matrix that a layer, with or without adapter, multiplies with; with gradient."""
    if not is_adapted(layer):
        return layer.weight
    weight = layer.base_layer.weight
    a, b = (
        matrices[ADAPTER].weight.float().flatten(1) for matrices in (layer.lora_A, layer.lora_B)
    )
    change = layer.scaling[ADAPTER] * (b @ a)
    return (weight.float() + change.view_as(weight)).to(weight.dtype)


class MergedState(Mapping[str, torch.Tensor]):
    """All weights under their published names; an adapter is merged when its layer is asked for."""

    def __init__(self, module: OpenVlaOft) -> None:
        self._module = module
        self._names = {
            name.replace(".base_layer.", "."): name
            for name, _ in module.named_parameters()
            if ".lora_" not in name
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> torch.Tensor:
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight":
            return adapted_weight(self._module.get_submodule(layer)).detach()
        return self._module.get_parameter(self._names[name]).detach()


def merged_state(module: OpenVlaOft) -> MergedState:
    """The network's weights as if it had never had adapters; not for quantised ones."""
    return MergedState(module)


def adapter_state(module: OpenVlaOft) -> dict[str, torch.Tensor]:
    """The adapters under PEFT's names; empty where there are none."""
    return {
        _peft_name(name): p.detach() for name, p in module.named_parameters() if ".lora_" in name
    }


def adapter_config(module: OpenVlaOft) -> dict[str, Any]:
    """What PEFT wants to know about `adapter_state`, in words that all of its versions know."""
    layers = sorted(_adapted_layers(module))
    layer = module.get_submodule(layers[0])
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": layer.r[ADAPTER],
        "lora_alpha": layer.lora_alpha[ADAPTER],
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": layers,
    }


def silent_state(module: OpenVlaOft) -> dict[str, torch.Tensor]:
    """Values of parameters with which adapters have no effect; takes no memory."""
    return {
        name: parameter.new_zeros(()).expand(parameter.shape)
        for name, parameter in module.named_parameters()
        if ".lora_B." in name
    }
