"""What the policies of this plugin are made of, from configuration and context."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from vlactl.api.contracts import ModelContext
from vlactl.errors import ConfigError
from vlactl_openvla_oft import loading, lora
from vlactl_openvla_oft.architecture import ACTION_DIM, TINY, Architecture
from vlactl_openvla_oft.codec import ActionStatistics
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

TINY_STATISTICS = {
    "tiny": {
        "action": {
            "q01": [-1.0] * ACTION_DIM,
            "q99": [1.0] * ACTION_DIM,
            "mask": [True] * (ACTION_DIM - 1) + [False],
        }
    }
}
TINY_PICTURES = PictureConfig(
    size=TINY.vision.featurizer.img_size, means=PUBLISHED_MEANS, stds=PUBLISHED_STDS
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """Everything a policy is made of, except its weights."""

    architecture: Architecture
    pictures: PictureConfig
    tokenizer: PromptTokenizer
    statistics: ActionStatistics


def make_blueprint(
    config: OpenVlaOftConfig, context: ModelContext, *, value_outputs: int
) -> Blueprint:
    """What the configuration asks for; of `tiny`, only weights can come from a directory.

    Raises:
        ConfigError: it does not fit the environment, or names a directory or statistics in vain.
        IntegrityError: the directory does not hold a checkpoint of OpenVLA-OFT.
    """
    _check(config, context)
    if config.size == "full":
        return _published(config, Path(config.path), value_outputs)
    return Blueprint(
        architecture=replace(TINY, value_outputs=value_outputs),
        pictures=TINY_PICTURES,
        tokenizer=WordTokenizer(),
        statistics=loading.action_statistics(TINY_STATISTICS, config.unnorm_key),
    )


def _published(config: OpenVlaOftConfig, directory: Path, value_outputs: int) -> Blueprint:
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
    statistics = loading.read_statistics(directory)
    return Blueprint(
        architecture=architecture,
        pictures=loading.read_picture_config(directory, image_size),
        tokenizer=LlamaTokenizer(directory / "tokenizer.json"),
        statistics=loading.action_statistics(statistics, config.unnorm_key),
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
    config: OpenVlaOftConfig, context: ModelContext, blueprint: Blueprint
) -> Processor:
    """Makes the network's inputs."""
    prompts = PromptEncoder(
        blueprint.tokenizer,
        config.max_prompt_length,
        blueprint.architecture.language.pad_token_id,
    )
    pictures = make_picture_encoder(
        config.image_pipeline, blueprint.pictures, context.device, context.dtype
    )
    return Processor(prompts, pictures, config.cameras)


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
