"""Checkpoint directories in the published layout: sizes, statistics, pictures, weights.

Only JSON and safetensors are read, and no code from a checkpoint is run. Weights are strict: every
tensor of the network must be there with its shape and no other may be, except `value_head.*`, which
starts at random where a checkpoint has none and is left out where the network has none.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from vlactl.errors import ConfigError, IntegrityError
from vlactl_openvla_oft.architecture import (
    ACTION_DIM,
    FULL,
    NUM_BINS,
    PUBLISHED_TOWERS,
    Architecture,
    LanguageConfig,
    VisionConfig,
)
from vlactl_openvla_oft.codec import ActionStatistics
from vlactl_openvla_oft.init import random_tensor
from vlactl_openvla_oft.model import OpenVlaOft
from vlactl_openvla_oft.processor import PictureConfig

VALUE_HEAD = "value_head."
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
OTHER_VALUES = (
    "the checkpoint estimates values per action (8 outputs) or per chunk (1), "
    "algorithm.reward_level asks for the other"
)
LISTED = 8
"""Names that an error message spells out."""
BICUBIC = (3, "bicubic")
FIXED_LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
"""What a text_config may say, but only in these words."""


# --------------------------------------------------------------------------------------------
# Sizes
# --------------------------------------------------------------------------------------------
def read_architecture(
    directory: Path, *, vision: VisionConfig = FULL.vision, value_outputs: int = 0
) -> Architecture:
    """Sizes that `config.json` states; what it leaves out has Hugging Face's defaults."""
    config = read_json(directory / "config.json")
    _expect(directory, "model_type", config.get("model_type"), "openvla")
    _expect(directory, "timm_model_ids", config.get("timm_model_ids"), list(PUBLISHED_TOWERS))
    _expect(directory, "n_action_bins", config.get("n_action_bins", NUM_BINS), NUM_BINS)
    sizes = [tower.img_size for tower in vision.towers]
    _expect(directory, "image_sizes", config.get("image_sizes"), sizes)
    return Architecture(
        vision=vision,
        language=_read_language(directory, config.get("text_config", {})),
        vocab_padding=config.get("pad_to_multiple_of", FULL.vocab_padding),
        value_outputs=value_outputs,
    )


def _read_language(directory: Path, text_config: Mapping[str, Any]) -> LanguageConfig:
    for key, value in FIXED_LLAMA.items():
        _expect(directory, f"text_config.{key}", text_config.get(key, value), value)
    rope = text_config.get("rope_parameters") or {}
    _expect(directory, "text_config rope_type", rope.get("rope_type", "default"), "default")
    stated = {"rope_theta": rope.get("rope_theta")} | dict(text_config)
    names = (field.name for field in fields(LanguageConfig))
    sizes: dict[str, Any] = {name: stated[name] for name in names if stated.get(name) is not None}
    if "num_attention_heads" in sizes:
        sizes.setdefault("num_key_value_heads", sizes["num_attention_heads"])
    language = LanguageConfig(**sizes)
    head_dim = language.hidden_size // language.num_attention_heads
    _expect(directory, "text_config.head_dim", stated.get("head_dim") or head_dim, head_dim)
    return language


def _expect(directory: Path, key: str, found: object, expected: object) -> None:
    if found != expected:
        raise IntegrityError(
            f"{directory} is not an OpenVLA-OFT checkpoint that vlactl can run: "
            f"{key} is {found!r}, not {expected!r}"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint directory."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IntegrityError(
            f"{path} is missing",
            hint=f"{path.parent} is not a complete directory of a model or an adapter",
        ) from None
    except ValueError as error:
        raise IntegrityError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise IntegrityError(f"{path} does not hold a JSON object")
    return value


# --------------------------------------------------------------------------------------------
# Pictures and actions
# --------------------------------------------------------------------------------------------
def read_picture_config(directory: Path, image_size: int) -> PictureConfig:
    """How `preprocessor_config.json` wants pictures prepared."""
    config = read_json(directory / "preprocessor_config.json")
    _expect(directory, "tvf_do_letterbox", config.get("tvf_do_letterbox", False), False)
    strategy = config.get("image_resize_strategy", "resize-naive")
    _expect(directory, "image_resize_strategy", strategy, "resize-naive")
    for kind in config.get("interpolations", ()):
        _expect(directory, "interpolation", "bicubic" if kind in BICUBIC else kind, "bicubic")
    sizes = config.get("input_sizes")
    _expect(directory, "input_sizes", sizes, [[3, image_size, image_size]] * 2)
    means, stds = _normalisation(directory, config)
    return PictureConfig(size=image_size, means=means, stds=stds)


def _normalisation(directory: Path, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """Means and deviations of both towers; the rounded ones of tvf_normalize_params win."""
    rounded = config.get("tvf_normalize_params")
    try:
        if rounded:
            means, stds = ([tower[key] for tower in rounded] for key in ("mean", "std"))
        else:
            means, stds = config["means"], config["stds"]
        arrays = np.array([means, stds], dtype=np.float64)
    except (KeyError, TypeError, ValueError):
        arrays = np.empty(0)
    if arrays.shape != (2, 2, 3):
        raise IntegrityError(
            f"{directory}/preprocessor_config.json does not state mean and std of both towers"
        )
    return tuple(tuple(map(tuple, half)) for half in arrays.tolist())


def read_statistics(directory: Path) -> dict[str, Any]:
    """Action statistics of every data set that the checkpoint knows, by name."""
    statistics = dict(read_json(directory / "config.json").get("norm_stats") or {})
    if (directory / "dataset_statistics.json").is_file():
        statistics |= read_json(directory / "dataset_statistics.json")
    return statistics


def action_statistics(statistics: Mapping[str, Any], unnorm_key: str) -> ActionStatistics:
    """Statistics of the data set that `model.unnorm_key` names."""
    name = resolve_unnorm_key(statistics, unnorm_key)
    try:
        action = statistics[name]["action"]
        q01, q99 = (np.array(action[key], dtype=np.float64) for key in ("q01", "q99"))
        mask = np.array(action.get("mask", [True] * ACTION_DIM), dtype=bool)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise IntegrityError(f'the action statistics of "{name}" lack q01 or q99') from None
    if not q01.shape == q99.shape == mask.shape == (ACTION_DIM,):
        raise IntegrityError(f'the action statistics of "{name}" are not of {ACTION_DIM} numbers')
    return ActionStatistics(q01=q01, q99=q99, mask=mask)


def resolve_unnorm_key(statistics: Iterable[str], unnorm_key: str) -> str:
    """The data set that a key means: itself, itself with `_no_noops`, or the only one there is."""
    names = sorted(statistics)
    for name in (unnorm_key, f"{unnorm_key}_no_noops"):
        if name in names:
            return name
    if not unnorm_key and len(names) == 1:
        return names[0]
    nearest = difflib.get_close_matches(unnorm_key, names, n=1)
    hint = f"available: {', '.join(names) or 'none'}"
    if nearest:
        hint = f'did you mean "{nearest[0]}"?\n{hint}'
    raise ConfigError(f'model.unnorm_key = "{unnorm_key}" names no action statistics', hint=hint)


# --------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------
def read_state(
    directory: Path, module: OpenVlaOft, *, device: torch.device, dtype: torch.dtype, seed: int
) -> dict[str, torch.Tensor]:
    """All parameters of `module` from a checkpoint."""
    return placed(stream(directory, module, seed=seed), device, dtype)


def placed(
    tensors: Iterable[tuple[str, torch.Tensor]], device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Copies of tensors that come one at a time."""
    return {name: tensor.to(device, dtype, copy=True) for name, tensor in tensors}


def stream(directory: Path, module: OpenVlaOft, *, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters of `module` from a checkpoint, one at a time, as they are stored.

    A tensor is backed by its file: what is to stay must be copied.
    """
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    files = _files_of_tensors(directory)
    _check_checkpoint(directory, shapes, files)
    for name, file in sorted(files.items(), key=lambda item: item[::-1]):
        if name in shapes:
            # A file that stays open keeps all pages in memory that were ever read.
            with _open(directory / file) as opened:
                tensor = opened.get_tensor(name)
            yield name, tensor
    for name in shapes.keys() - files.keys():
        yield name, random_tensor(name, shapes[name], seed)


def read_all(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a small file."""
    with _open(path) as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def _files_of_tensors(directory: Path) -> dict[str, str]:
    """Which file holds each tensor, from the index or from the only file."""
    if not (directory / INDEX).is_file():
        with _open(directory / SINGLE) as file:
            return dict.fromkeys(file.keys(), SINGLE)
    files = read_json(directory / INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise IntegrityError(f"{directory / INDEX} has no weight_map")
    here = {path.name for path in directory.iterdir() if path.is_file()}
    missing = sorted(set(files.values()) - here)
    if missing:
        raise IntegrityError(f"{directory} lacks {listing(missing)}, which {INDEX} names")
    return files


def _check_checkpoint(
    directory: Path, shapes: Mapping[str, torch.Size], files: Mapping[str, str]
) -> None:
    needed, found = (
        {name for name in names if not name.startswith(VALUE_HEAD)} for names in (shapes, files)
    )
    check_names(directory, "OpenVLA-OFT", needed, found)
    for file in sorted(set(files.values())):
        names = [name for name in shapes if files.get(name) == file]
        _check_file(directory / file, {name: shapes[name] for name in names})


def check_names(place: Path, owner: str, needed: Iterable[str], found: Iterable[str]) -> None:
    """Compare names of tensors.

    Raises:
        IntegrityError: some are missing, or unexpected; it lists them.
    """
    needed, found = set(needed), set(found)
    differences = {"missing": needed - found, "unexpected": found - needed}
    problems = [f"{what}: {listing(sorted(names))}" for what, names in differences.items() if names]
    if problems:
        raise IntegrityError(
            "\n".join([f"the tensors of {place} are not those of {owner}", *problems])
        )


def _check_file(path: Path, shapes: Mapping[str, torch.Size]) -> None:
    with _open(path) as file:
        absent = sorted(shapes.keys() - set(file.keys()))
        if absent:
            raise IntegrityError(f"{path} lacks {listing(absent)}, which {INDEX} says it holds")
        sizes = {name: file.get_slice(name).get_shape() for name in sorted(shapes)}
    wrong = {
        name: f"{name} {size} instead of {list(shapes[name])}"
        for name, size in sizes.items()
        if size != list(shapes[name])
    }
    if wrong:
        is_head = all(name.startswith(VALUE_HEAD) for name in wrong)
        raise IntegrityError(
            f"{path} holds tensors of other sizes: {listing(list(wrong.values()))}",
            hint=OTHER_VALUES if is_head else "",
        )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise IntegrityError(
            f"{path.parent} holds neither {SINGLE} nor {INDEX}",
            hint="vlactl reads safetensors only",
        ) from None
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path} is damaged: {error}") from None


def listing(names: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    shown = ", ".join(names[:LISTED])
    return shown if len(names) <= LISTED else f"{shown} and {len(names) - LISTED} more"
