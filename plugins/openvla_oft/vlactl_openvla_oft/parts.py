"""What the policies of this plugin are made of, from configuration and context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlactl.api.contracts import ModelContext
from vlactl.errors import ConfigError
from vlactl_openvla_oft import loading, lora
from vlactl_openvla_oft.architecture import ACTION_DIM, BUILT_IN, STATE_DIM, Architecture
from vlactl_openvla_oft.codec import Range
from vlactl_openvla_oft.init import random_tensors
from vlactl_openvla_oft.model import OpenVlaOft, build, materialise
from vlactl_openvla_oft.plugin import OpenVlaOftConfig
from vlactl_openvla_oft.processor import (
    PUBLISHED_MEANS,
    PUBLISHED_STDS,
    PictureConfig,
    Processor,
    PromptEncoder,
    make_picture_encoder,
)
from vlactl_openvla_oft.quantization import quantized
from vlactl_openvla_oft.tokenizer import LlamaTokenizer, PromptTokenizer, WordTokenizer

BUILT_IN_STATISTICS = {
    "built-in": {
        "action": {
            "q01": [-1.0] * ACTION_DIM,
            "q99": [1.0] * ACTION_DIM,
            "mask": [True] * (ACTION_DIM - 1) + [False],
        },
        "proprio": {"q01": [-1.0] * STATE_DIM, "q99": [1.0] * STATE_DIM},
    }
}
"""Of a policy that has seen no demonstration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """Everything a policy is made of, except its weights.

    Attributes:
        architecture: sizes.
        pictures: what the towers take.
        tokenizer: of prompts.
        statistics: of all data sets that are known, in OpenVLA's form.
        actions: range of the actions in the one that is used.
        states: range of the proprioceptive state, where the network takes one.
    """

    architecture: Architecture
    pictures: PictureConfig
    tokenizer: PromptTokenizer
    statistics: Mapping[str, Any]
    actions: Range
    states: Range | None = None


def make_blueprint(
    config: OpenVlaOftConfig, context: ModelContext, *, value_outputs: int
) -> Blueprint:
    """What the configuration asks for.

    Raises:
        ConfigError: it does not fit the environment, or names a directory or statistics in vain.
        IntegrityError: the directory does not hold a checkpoint of OpenVLA-OFT.
    """
    _check(config, context)
    if config.size == "full":
        return _published(config, context, value_outputs)
    architecture = replace(BUILT_IN[config.size], value_outputs=value_outputs)
    statistics = _of_demonstrations(config, context) or _built_in_statistics(config)
    _check_state(architecture, context)
    return Blueprint(
        architecture=architecture,
        pictures=PictureConfig(
            size=architecture.vision.featurizer.img_size,
            means=PUBLISHED_MEANS,
            stds=PUBLISHED_STDS,
        ),
        tokenizer=WordTokenizer(),
        statistics=statistics,
        actions=loading.action_statistics(statistics, config.unnorm_key),
        states=loading.state_statistics(statistics, config.unnorm_key)
        if architecture.state_dim
        else None,
    )


def _of_demonstrations(config: OpenVlaOftConfig, context: ModelContext) -> Mapping[str, Any] | None:
    """Those of the data set that the policy imitates, by the name that it will be asked for."""
    if context.statistics is None:
        return None
    ((name, stated),) = context.statistics.items()
    return {config.unnorm_key or name: stated}


def _built_in_statistics(config: OpenVlaOftConfig) -> Mapping[str, Any]:
    """Those beside the weights, which are all that such a directory adds to them.

    `tiny`, which nobody trains on demonstrations, may have none.
    """
    statistics = Path(config.path) / loading.STATISTICS
    if not config.path or (config.size == "tiny" and not statistics.is_file()):
        return BUILT_IN_STATISTICS
    return loading.read_json(statistics)


def _published(config: OpenVlaOftConfig, context: ModelContext, value_outputs: int) -> Blueprint:
    directory = Path(config.path)
    if not config.path or not directory.is_dir():
        raise ConfigError(
            f'model.path = "{config.path}" is not a directory',
            hint="name the directory of an OpenVLA-OFT checkpoint",
        )
    if config.head == "tokens" and config.has_regression_head():
        raise ConfigError(
            f"{directory} has a regression head, and its token head was never trained",
            hint='set model.head = "l1" (evaluation)',
        )
    architecture = loading.read_architecture(directory, value_outputs=value_outputs)
    image_size = architecture.vision.featurizer.img_size
    statistics = _of_demonstrations(config, context) or loading.read_statistics(directory)
    return Blueprint(
        architecture=architecture,
        pictures=loading.read_picture_config(directory, image_size),
        tokenizer=LlamaTokenizer(directory / "tokenizer.json"),
        statistics=statistics,
        actions=loading.action_statistics(statistics, config.unnorm_key),
    )


def make_module(
    config: OpenVlaOftConfig, context: ModelContext, architecture: Architecture
) -> OpenVlaOft:
    """The network with its weights, quantised and adapted as asked for."""
    device, dtype, seed = context.device, context.dtype, context.seed
    module = build(architecture, keep_stop_token=config.keep_stop_token)
    tensors = (
        loading.stream(Path(config.path), module, seed=seed)
        if config.path
        else random_tensors(module, seed)
    )
    is_quantized = config.quantization != "none" and not context.for_export
    if is_quantized:
        tensors = quantized(module, tensors, config.quantization, device=device, dtype=dtype)
    materialise(module, loading.placed(tensors, device, dtype))
    if is_quantized:
        module.requires_grad_(False)
    if context.lora is not None:
        lora.attach(module, context.lora, device=device, dtype=dtype, seed=seed)
    if context.activation_checkpointing != "none":
        module.recompute_activations(context.activation_checkpointing)
    return module


def make_processor(
    config: OpenVlaOftConfig,
    context: ModelContext,
    blueprint: Blueprint,
    states: Range | None = None,
) -> Processor:
    """Makes the network's inputs; `states` takes the place of the blueprint's."""
    prompts = PromptEncoder(
        blueprint.tokenizer,
        config.max_prompt_length,
        blueprint.architecture.language.pad_token_id,
    )
    pictures = make_picture_encoder(
        config.image_pipeline, blueprint.pictures, context.device, context.dtype
    )
    return Processor(prompts, pictures, config.cameras, states or blueprint.states)


def _check(config: OpenVlaOftConfig, context: ModelContext) -> None:
    unknown = sorted(set(config.cameras) - set(context.env.cameras))
    if unknown:
        raise ConfigError(
            f"model.cameras names {', '.join(unknown)}, which the environment does not have",
            hint=f"cameras: {', '.join(context.env.cameras)}",
        )
    if context.env.action_dim != ACTION_DIM:
        raise ConfigError(
            f"openvla-oft acts in {ACTION_DIM} dimensions, "
            f"the environment has {context.env.action_dim}"
        )


def _check_state(architecture: Architecture, context: ModelContext) -> None:
    if architecture.state_dim and context.env.state_dim != architecture.state_dim:
        raise ConfigError(
            f"this size of openvla-oft takes a state of {architecture.state_dim} numbers, "
            f"the environment has {context.env.state_dim}",
            hint='model.size = "tiny" takes none',
        )
