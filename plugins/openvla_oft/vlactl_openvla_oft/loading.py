"""Checkpoint directories in the published layout: sizes, statistics, pictures, weights.

Only JSON and safetensors are read, and no code from a checkpoint is run. Weights are strict: every
tensor of the network must be there with its shape and no other may be, except `value_head.*`, which
starts at random where a checkpoint has nothing of it and is left out where the network has none.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from vlactl.errors import ConfigError, IntegrityError
from vlactl_openvla_oft.architecture import (
    ACTION_DIM,
    FULL,
    NUM_BINS,
    PUBLISHED_TOWERS,
    STATE_DIM,
    Architecture,
    LanguageConfig,
    VisionConfig,
)
from vlactl_openvla_oft.codec import Range
from vlactl_openvla_oft.init import random_tensor
from vlactl_openvla_oft.model import OpenVlaOft
from vlactl_openvla_oft.processor import PictureConfig

VALUE_HEAD = "value_head."
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
STATISTICS = "dataset_statistics.json"
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
    towers = list(PUBLISHED_TOWERS)
    _expect(directory, "timm_model_ids", config.get("timm_model_ids", towers), towers)
    _expect(directory, "n_action_bins", config.get("n_action_bins", NUM_BINS), NUM_BINS)
    sizes = [tower.img_size for tower in vision.towers]
    _expect(directory, "image_sizes", config.get("image_sizes", sizes), sizes)
    padding = config.get("pad_to_multiple_of", FULL.vocab_padding)
    if type(padding) is not int or padding < 0:
        _refuse(directory, "pad_to_multiple_of", padding, "a number of rows")
    architecture = Architecture(
        vision=vision,
        language=_read_language(directory, config.get("text_config", {})),
        vocab_padding=padding,
        value_outputs=value_outputs,
    )
    if architecture.action_start < 0:
        size = architecture.language.vocab_size
        _refuse(directory, "text_config.vocab_size", size, f"{NUM_BINS + padding} or more")
    return architecture


def _read_language(directory: Path, text_config: object) -> LanguageConfig:
    if not isinstance(text_config, dict):
        _refuse(directory, "text_config", text_config, "an object")
    for key, value in FIXED_LLAMA.items():
        _expect(directory, f"text_config.{key}", text_config.get(key, value), value)
    rope = text_config.get("rope_parameters", {})
    rope = {} if rope is None else rope
    if not isinstance(rope, dict):
        _refuse(directory, "text_config.rope_parameters", rope, "an object")
    _expect(directory, "text_config rope_type", rope.get("rope_type", "default"), "default")
    stated = {"rope_theta": rope.get("rope_theta")} | dict(text_config)
    names = (field.name for field in fields(LanguageConfig))
    sizes: dict[str, Any] = {name: stated[name] for name in names if stated.get(name) is not None}
    if "num_attention_heads" in sizes:
        sizes.setdefault("num_key_value_heads", sizes["num_attention_heads"])
    _check_numbers(directory, sizes)
    language = LanguageConfig(**sizes)
    _check_language(directory, language)
    head_dim = language.hidden_size // language.num_attention_heads
    _expect(directory, "text_config.head_dim", stated.get("head_dim") or head_dim, head_dim)
    return language


def _check_numbers(directory: Path, sizes: Mapping[str, Any]) -> None:
    """Every stated size is a number of the kind that its default is."""
    for field in fields(LanguageConfig):
        value = sizes.get(field.name, field.default)
        kinds = (int,) if isinstance(field.default, int) else (int, float)
        smallest = 0 if field.name == "pad_token_id" else 1e-300
        if type(value) not in kinds or not smallest <= value < math.inf:
            _refuse(directory, f"text_config.{field.name}", value, "a size")


def _check_language(directory: Path, language: LanguageConfig) -> None:
    """Sizes that do not go together would fail deep inside of transformers."""
    heads, shared = language.num_attention_heads, language.num_key_value_heads
    if language.hidden_size % (2 * heads):
        wanted = f"a multiple of twice the {heads} heads"
        _refuse(directory, "text_config.hidden_size", language.hidden_size, wanted)
    if heads % shared:
        _refuse(directory, "text_config.num_key_value_heads", shared, f"a divisor of {heads}")
    if language.pad_token_id >= language.vocab_size:
        _refuse(directory, "text_config.pad_token_id", language.pad_token_id, "in the vocabulary")


def _expect(directory: Path, key: str, found: object, expected: object) -> None:
    if found != expected:
        _refuse(directory, key, found, repr(expected))


def _refuse(directory: Path, key: str, found: object, wanted: str) -> NoReturn:
    raise IntegrityError(
        f"{directory} is not an OpenVLA-OFT checkpoint that vlactl can run: "
        f"{key} is {found!r}, not {wanted}"
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
    interpolations = config.get("interpolations", [])
    if not isinstance(interpolations, list):
        _refuse(directory, "interpolations", interpolations, "a list")
    for kind in interpolations:
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
    except (KeyError, TypeError, ValueError, OverflowError):
        arrays = np.empty(0)
    if arrays.shape != (2, 2, 3) or not np.isfinite(arrays).all() or not arrays[1].all():
        raise IntegrityError(
            f"{directory}/preprocessor_config.json does not state mean and std of both towers"
        )
    return tuple(tuple(map(tuple, half)) for half in arrays.tolist())


def read_statistics(directory: Path) -> dict[str, Any]:
    """Statistics of every data set that the checkpoint knows, by name."""
    stated = read_json(directory / "config.json").get("norm_stats")
    if not isinstance(stated, dict | None):
        raise IntegrityError(f"{directory / 'config.json'}: norm_stats is not an object")
    statistics = dict(stated or {})
    if (directory / STATISTICS).is_file():
        statistics |= read_json(directory / STATISTICS)
    return statistics


def action_statistics(statistics: Mapping[str, Any], unnorm_key: str) -> Range:
    """Statistics of the data set that `model.unnorm_key` names."""
    name = resolve_unnorm_key(statistics, unnorm_key)
    q01, q99, mask = read_range(statistics, name, "action", ACTION_DIM)
    return Range(q01=q01, q99=q99, mask=mask)


def state_statistics(statistics: Mapping[str, Any], unnorm_key: str) -> Range:
    """Range of the state in the data set that `model.unnorm_key` names."""
    name = resolve_unnorm_key(statistics, unnorm_key)
    q01, q99, mask = read_range(statistics, name, "proprio", STATE_DIM)
    return Range(q01=q01, q99=q99, mask=mask)


def read_range(
    statistics: Mapping[str, Any], name: str, kind: str, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q01, q99 and mask of `size` numbers each; without a mask, everything is normalised."""
    try:
        stated = statistics[name][kind]
        q01, q99 = (np.array(stated[key], dtype=np.float64) for key in ("q01", "q99"))
        mask = stated.get("mask")
        mask = np.array([True] * size if mask is None else mask, dtype=bool)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise IntegrityError(f'the {kind} statistics of "{name}" lack q01 or q99') from None
    if not q01.shape == q99.shape == mask.shape == (size,):
        raise IntegrityError(f'the {kind} statistics of "{name}" are not of {size} numbers')
    if not (np.isfinite(q01).all() and np.isfinite(q99).all()):
        raise IntegrityError(f'the {kind} statistics of "{name}" are not finite')
    return q01, q99, mask


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
    (wanted, needed), (stored, found) = (_divided(names) for names in (shapes, files))
    check_names(directory, "OpenVLA-OFT", needed, found)
    if wanted and stored:
        check_names(directory, "its value head", wanted, stored)
    for file in sorted(set(files.values())):
        names = {name for name in files if files[name] == file}
        _check_shard(directory / file, names)
        check_sizes(directory / file, {name: shapes[name] for name in names & shapes.keys()})


def _divided(names: Iterable[str]) -> tuple[set[str], set[str]]:
    """Those of the value head, and the others."""
    names = set(names)
    head = {name for name in names if name.startswith(VALUE_HEAD)}
    return head, names - head


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


def _check_shard(path: Path, names: set[str]) -> None:
    """The file holds what the index says, and nothing that it is silent about."""
    with _open(path) as file:
        held = set(file.keys())
    if absent := sorted(names - held):
        raise IntegrityError(f"{path} lacks {listing(absent)}, which {INDEX} says it holds")
    if unnamed := sorted(held - names):
        raise IntegrityError(f"{path} holds {listing(unnamed)}, which {INDEX} does not name there")


def check_sizes(path: Path, shapes: Mapping[str, torch.Size]) -> None:
    """Compare sizes of tensors that a file holds.

    Raises:
        IntegrityError: some differ; it lists them.
    """
    with _open(path) as file:
        compare_sizes(path, {name: file.get_slice(name).get_shape() for name in shapes}, shapes)


def compare_sizes(
    place: object, found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]
) -> None:
    """Compare sizes by name of what was read from a place with what the network has.

    Raises:
        IntegrityError: some differ; it lists them.
    """
    wrong = {
        name: f"{name} {list(size)} instead of {list(wanted.get(name, ()))}"
        for name, size in sorted(found.items())
        if list(size) != list(wanted.get(name, ()))
    }
    if wrong:
        is_head = all(name.startswith(VALUE_HEAD) for name in wrong)
        raise IntegrityError(
            f"{place} holds tensors of other sizes: {listing(list(wrong.values()))}",
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
