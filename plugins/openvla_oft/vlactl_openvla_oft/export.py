"""Writing a policy to a directory: whole, in the published layout, or its adapters, in PEFT's.

A whole policy is a directory that `loading` reads back bit by bit, and other tools as the original
model: weights with adapters merged into them, and what the directory the model came from has
beside its weights. Code, and the references to it, stay behind.

Weights are written shard by shard as they come, so that no more than one shard is held besides the
module. The same state gives the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vlactl.errors import ConfigError
from vlactl_openvla_oft import loading, lora
from vlactl_openvla_oft.model import OpenVlaOft

SHARD_BYTES = 5 * 10**9
CONFIG = "config.json"
COPIED = (
    "added_tokens.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)
"""What is taken over as it is; everything else in a directory is weights, code or unknown."""
CODE_REFERENCE = "auto_map"
BUILT_IN_TYPE = "vlactl-openvla-oft-"
"""With a built-in size behind it: such a directory holds weights and statistics only, and the name
keeps others from taking it for more."""


def export_policy(
    module: OpenVlaOft,
    directory: Path,
    *,
    source: Path | None,
    adapter_only: bool,
    built_in: str = "tiny",
    statistics: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a policy to an empty directory.

    Args:
        module: the network, with or without adapters, not quantised.
        directory: where to.
        source: the directory that the network came from; None = from a seed.
        adapter_only: write the adapters for PEFT, and a value head to a file of its own beside
            them, since PEFT's base model has none.
        built_in: name of the size where `source` is None or has no configuration.
        statistics: of all data sets that the policy knows; None = what the source knows.
        shard_bytes: of tensors in a file, unless one tensor alone is larger.

    Raises:
        ConfigError: `adapter_only`, and there are no adapters.
    """
    if adapter_only:
        _write_adapter(module, directory)
        return
    write_weights(lora.merged_state(module).items(), directory, shard_bytes)
    _write_config(module, source, directory, built_in, statistics)
    if source is not None:
        _write_companions(source, directory)


# --------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------
def write_weights(
    tensors: Iterable[tuple[str, torch.Tensor]], directory: Path, shard_bytes: int
) -> None:
    """Write tensors in the order they come in, with an index where one file is not enough."""
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    size = total = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            shards.append(_write_shard(shard, directory, len(shards)))
            shard, size = {}, 0
        shard[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    shards.append(_write_shard(shard, directory, len(shards)))
    _name_shards(shards, directory, total)


def _write_shard(shard: dict[str, torch.Tensor], directory: Path, number: int) -> list[str]:
    _save(shard, directory / _unnamed(number))
    return list(shard)


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(dense, path, metadata={"format": "pt"})
    path.chmod(mode)  # the library lets nobody but the owner read it


def _unnamed(number: int) -> str:
    return f"{number}.safetensors"


def _name_shards(shards: list[list[str]], directory: Path, total_size: int) -> None:
    """Names tell how many files there are, which is known only after the last."""
    if len(shards) == 1:
        (directory / _unnamed(0)).rename(directory / loading.SINGLE)
        return
    files: dict[str, str] = {}
    for number, tensors in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / _unnamed(number)).rename(directory / file)
        files |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(files.items()))}
    _write_json(directory / loading.INDEX, index)


# --------------------------------------------------------------------------------------------
# What lies beside them
# --------------------------------------------------------------------------------------------
def _write_config(
    module: OpenVlaOft,
    source: Path | None,
    directory: Path,
    built_in: str,
    statistics: Mapping[str, Any] | None,
) -> None:
    """The source's own, with the statistics and the type of the weights."""
    dtype = str(module.language_model.lm_head.weight.dtype).removeprefix("torch.")
    is_published = source is not None and (source / CONFIG).is_file()
    if statistics is None and is_published:
        statistics = loading.read_statistics(source)
    if statistics:
        _write_json(directory / loading.STATISTICS, statistics)
    if not is_published:
        kind = {"model_type": f"{BUILT_IN_TYPE}{built_in}", "torch_dtype": dtype}
        _write_json(directory / CONFIG, kind)
        return
    config = _with_dtype(loading.read_json(source / CONFIG), dtype)
    config.pop(CODE_REFERENCE, None)
    if "text_config" in config:
        config["text_config"] = _with_dtype(config["text_config"], dtype)
    if statistics:
        config["norm_stats"] = statistics
    _write_json(directory / CONFIG, config)


def _with_dtype(section: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Under its old name, which every version of transformers reads."""
    return {key: value for key, value in section.items() if key != "dtype"} | {"torch_dtype": dtype}


def _write_companions(source: Path, directory: Path) -> None:
    for name in COPIED:
        if not (source / name).is_file():
            continue
        content = loading.read_json(source / name) if name.endswith(".json") else {}
        if CODE_REFERENCE in content:
            del content[CODE_REFERENCE]
            _write_json(directory / name, content)
        else:
            shutil.copyfile(source / name, directory / name)


# --------------------------------------------------------------------------------------------
# Adapters
# --------------------------------------------------------------------------------------------
def _write_adapter(module: OpenVlaOft, directory: Path) -> None:
    state = lora.adapter_state(module)
    if not state:
        raise ConfigError(
            "this policy has no adapters: all of its weights were trained",
            hint="leave out --adapter-only",
        )
    _save(state, directory / lora.WEIGHTS)
    _write_json(directory / lora.CONFIG, lora.adapter_config(module))
    if module.value_head is not None:
        head = module.value_head.state_dict(prefix=loading.VALUE_HEAD)
        _save(head, directory / lora.VALUE_HEAD_WEIGHTS)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
