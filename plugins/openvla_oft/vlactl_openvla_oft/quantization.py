"""Frozen weights of the Llama's layers in 8 or 4 bits, through bitsandbytes.

Weights are quantised one after the other as they are read, so the network never exists in 16 bits.
Towers, projector, embeddings, norms and heads stay as they are. Quantised weights have no gradient:
adapters on top of them are what can be trained.

Every input row is scaled by itself: with bitsandbytes' separate treatment of outliers, which looks
at whole batches, a row's result would depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import nn

from vlactl.errors import EnvironmentNotReadyError
from vlactl_openvla_oft.model import OpenVlaOft

Kind = Literal["int8", "nf4"]


def quantized(
    module: OpenVlaOft,
    tensors: Iterable[tuple[str, torch.Tensor]],
    kind: Kind,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Put quantised layers into `module` as their weights come by, and pass on all else.

    Raises:
        EnvironmentNotReadyError: bitsandbytes is not installed.
    """
    bitsandbytes = _library(kind)
    make = {"int8": _int8, "nf4": _nf4}[kind]
    layers = {f"{name}.weight": name for name in quantized_layers(module)}
    for name, tensor in tensors:
        if name in layers:
            layer = make(bitsandbytes, tensor, device, dtype)
            layer.register_state_dict_post_hook(_leave_out)
            module.set_submodule(layers[name], layer)
        else:
            yield name, tensor
    # How PEFT learns what kind of layers it has before it.
    module.is_loaded_in_8bit = kind == "int8"
    module.is_loaded_in_4bit = kind == "nf4"


def quantized_layers(module: OpenVlaOft) -> list[str]:
    """Names of the layers whose weights can be quantised."""
    root = "language_model.model.layers"
    layers = module.get_submodule(root).named_modules()
    return [f"{root}.{name}" for name, layer in layers if isinstance(layer, nn.Linear)]


def _leave_out(
    layer: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """Quantised weights never change, and no checkpoint needs them: they are read again."""
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]


def _library(kind: Kind) -> Any:
    try:
        import bitsandbytes
    except ImportError:
        raise EnvironmentNotReadyError(
            f'model.quantization = "{kind}" needs bitsandbytes',
            hint='pip install "vlactl[quantization]"',
        ) from None
    return bitsandbytes


def _int8(
    bitsandbytes: Any, weight: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    outputs, inputs = weight.shape
    layer = bitsandbytes.nn.Linear8bitLt(
        inputs, outputs, bias=False, has_fp16_weights=False, threshold=0.0, device="meta"
    )
    # Such parameters quantise themselves on their way from the CPU, and from nowhere else.
    parameter = bitsandbytes.nn.Int8Params(
        weight.to("cpu", dtype), requires_grad=False, has_fp16_weights=False
    )
    layer.weight = parameter.to(device)
    if layer.weight.dtype != torch.int8:
        raise EnvironmentNotReadyError(
            f"bitsandbytes left weights in {layer.weight.dtype} instead of int8",
            hint="install a version of bitsandbytes that vlactl was tested with",
        )
    return layer


def _nf4(
    bitsandbytes: Any, weight: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    outputs, inputs = weight.shape
    layer = bitsandbytes.nn.Linear4bit(
        inputs, outputs, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    parameter = bitsandbytes.nn.Params4bit(
        weight.to(device, dtype), requires_grad=False, quant_type="nf4", module=layer
    )
    layer.weight = parameter.to(device)
    return layer
