"""OpenVLA-OFT as a vlactl policy: observations in, action chunks and log-probabilities out.

Shapes: B (or S) observations, K actions of a chunk, A dimensions of an action. Tokens that leave
this module are ids of the model's whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from vlactl.api.contracts import (
    ActionChunks,
    Greedy,
    ModelContext,
    ObservationBatch,
    PolicyOutput,
    Sample,
    TrainBatch,
)
from vlactl.api.sampling import draw_tokens, token_logprobs
from vlactl.errors import ConfigError
from vlactl_openvla_oft import codec, loading
from vlactl_openvla_oft.architecture import ACTION_DIM, CHUNK_LENGTH, TINY, Architecture
from vlactl_openvla_oft.codec import ActionStatistics
from vlactl_openvla_oft.init import random_state
from vlactl_openvla_oft.model import OpenVlaOft, Prediction, build, materialise
from vlactl_openvla_oft.plugin import OpenVlaOftConfig
from vlactl_openvla_oft.processor import (
    PUBLISHED_MEANS,
    PUBLISHED_STDS,
    PictureConfig,
    PictureEncoder,
    Processor,
    PromptEncoder,
)
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


class OpenVlaOftPolicy:
    """Implements `vlactl.api.contracts.Policy`.

    Args:
        module: the network, with its weights.
        processor: makes the network's inputs.
        statistics: of the actions that the policy was trained on.
        architecture: of the module.
    """

    def __init__(
        self,
        module: OpenVlaOft,
        processor: Processor,
        statistics: ActionStatistics,
        architecture: Architecture,
    ) -> None:
        self.module = module
        self._processor = processor
        self._statistics = statistics
        self._architecture = architecture

    @torch.no_grad()
    def act(
        self, batch: ObservationBatch, mode: Sample | Greedy, noise_keys: Sequence[int]
    ) -> ActionChunks:
        """Choose an action chunk per observation."""
        prediction = self._predict(batch)
        bins, logprobs = draw_tokens(prediction.logits, mode, noise_keys)
        tokens_BKA = _by_action(bins + self._architecture.action_start).cpu().numpy()
        normalized_BKA = codec.decode(tokens_BKA, self._architecture.action_end)
        values = prediction.values
        return ActionChunks(
            actions_BKA=codec.to_simulator(self._statistics.unnormalize(normalized_BKA)),
            tokens_BKA=tokens_BKA,
            logprobs_BKA=_by_action(logprobs).cpu().numpy(),
            values_BK=None if values is None else values.cpu().numpy(),
        )

    def evaluate_actions(self, batch: TrainBatch) -> PolicyOutput:
        """Log-probabilities, entropy and values of given tokens, with gradient."""
        prediction = self._predict(batch.observations)
        bins = batch.tokens_SKA.flatten(1) - self._architecture.action_start
        logprobs, entropy = token_logprobs(prediction.logits, bins, batch.temperature)
        return PolicyOutput(
            logprobs_SKA=_by_action(logprobs),
            entropy_SKA=_by_action(entropy),
            values_SK=prediction.values,
        )

    def shard_units(self) -> Sequence[nn.Module]:
        """The towers, the projector, each decoder layer, and the value head."""
        module = self.module
        return [
            module.vision_backbone.featurizer,
            module.vision_backbone.fused_featurizer,
            module.projector,
            *module.language_model.model.layers,
            *([] if module.value_head is None else [module.value_head]),
        ]

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters that influence an action or a value."""
        return (item for item in self.module.named_parameters() if item[1].requires_grad)

    def _predict(self, batch: ObservationBatch) -> Prediction:
        device = next(self.module.parameters()).device
        return self.module(*self._processor.encode(batch, device))


def _by_action(values: torch.Tensor) -> torch.Tensor:
    return values.unflatten(1, (CHUNK_LENGTH, ACTION_DIM))


def make_policy(config: OpenVlaOftConfig, context: ModelContext) -> OpenVlaOftPolicy:
    """Build the policy on this rank: from a checkpoint directory, or `tiny` from its seed."""
    _check(config, context)
    blueprint = _blueprint(config, value_outputs=CHUNK_LENGTH if context.values else 0)
    module = build(blueprint.architecture, keep_stop_token=config.keep_stop_token)
    materialise(module, _weights(module, config, context))
    prompts = PromptEncoder(
        blueprint.tokenizer,
        config.max_prompt_length,
        blueprint.architecture.language.pad_token_id,
    )
    pictures = PictureEncoder(blueprint.pictures, context.device, context.dtype)
    processor = Processor(prompts, pictures, config.cameras)
    return OpenVlaOftPolicy(module, processor, blueprint.statistics, blueprint.architecture)


def _blueprint(config: OpenVlaOftConfig, *, value_outputs: int) -> Blueprint:
    """What the configuration asks for; of `tiny`, only weights can come from a directory."""
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
    architecture = loading.read_architecture(directory, value_outputs=value_outputs)
    image_size = architecture.vision.featurizer.img_size
    statistics = loading.read_statistics(directory)
    return Blueprint(
        architecture=architecture,
        pictures=loading.read_picture_config(directory, image_size),
        tokenizer=LlamaTokenizer(directory / "tokenizer.json"),
        statistics=loading.action_statistics(statistics, config.unnorm_key),
    )


def _weights(
    module: OpenVlaOft, config: OpenVlaOftConfig, context: ModelContext
) -> dict[str, torch.Tensor]:
    if config.path:
        return loading.read_state(
            Path(config.path),
            module,
            device=context.device,
            dtype=context.dtype,
            seed=context.seed,
        )
    state = random_state(module, context.seed)
    return {name: value.to(context.device, context.dtype) for name, value in state.items()}


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
    if context.lora_rank:
        raise ConfigError(
            "openvla-oft cannot train adapters yet", hint="set lora.rank = 0 to train all weights"
        )
