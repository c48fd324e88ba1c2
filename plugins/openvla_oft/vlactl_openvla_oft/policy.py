"""OpenVLA-OFT as a vlactl policy: observations in, action chunks and log-probabilities out.

Shapes: B (or S) observations, K actions of a chunk, A dimensions of an action. Tokens that leave
this module are ids of the model's whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call

from vlactl.api.contracts import (
    ActionChunks,
    Greedy,
    ModelContext,
    ObservationBatch,
    Policy,
    PolicyOutput,
    Sample,
    SupervisedBatch,
    TrainBatch,
)
from vlactl.api.sampling import draw_tokens, token_logprobs
from vlactl.errors import ConfigError
from vlactl_openvla_oft import codec, loading, lora, self_test
from vlactl_openvla_oft.architecture import ACTION_DIM, CHUNK_LENGTH, VALUE_OUTPUTS
from vlactl_openvla_oft.export import export_policy
from vlactl_openvla_oft.l1 import make_l1_policy
from vlactl_openvla_oft.model import OpenVlaOft, Prediction
from vlactl_openvla_oft.parts import Blueprint, make_blueprint, make_module, make_processor
from vlactl_openvla_oft.plugin import OpenVlaOftConfig
from vlactl_openvla_oft.processor import Inputs, Processor
from vlactl_openvla_oft.supervised import action_loss, supervised_loss


class OpenVlaOftPolicy:
    """Implements `vlactl.api.contracts.Policy`.

    Args:
        module: the network, with its weights.
        processor: makes the network's inputs.
        blueprint: what else the policy is made of.
        size: its name in the configuration.
        source: directory that its weights came from.
        reference: values that parameters had in the initial policy, where they may change.
    """

    def __init__(
        self,
        module: OpenVlaOft,
        processor: Processor,
        blueprint: Blueprint,
        size: str,
        *,
        source: Path | None = None,
        reference: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.module = module
        self._processor = processor
        self._blueprint = blueprint
        self._size = size
        self._source = source
        self._reference = reference

    @torch.no_grad()
    def act(
        self, batch: ObservationBatch, mode: Sample | Greedy, noise_keys: Sequence[int]
    ) -> ActionChunks:
        """Choose an action chunk per observation."""
        prediction = self._predict(batch)
        bins, logprobs = draw_tokens(prediction.logits, mode, noise_keys)
        tokens_BKA = _by_action(bins + self._blueprint.architecture.action_start).cpu().numpy()
        normalized_BKA = codec.decode(tokens_BKA, self._blueprint.architecture.action_end)
        values = prediction.values
        return ActionChunks(
            actions_BKA=codec.to_simulator(self._blueprint.actions.unnormalize(normalized_BKA)),
            tokens_BKA=tokens_BKA,
            logprobs_BKA=_by_action(logprobs).cpu().numpy(),
            values_BK=None if values is None else values.cpu().numpy(),
        )

    def evaluate_actions(self, batch: TrainBatch) -> PolicyOutput:
        """Log-probabilities, entropy and values of given tokens, with gradient."""
        prediction = self._predict(batch.observations)
        logprobs, entropy = self._judge(prediction, batch)
        return PolicyOutput(
            logprobs_SKA=_by_action(logprobs),
            entropy_SKA=_by_action(entropy),
            values_SK=prediction.values,
        )

    @torch.no_grad()
    def reference_logprobs(self, batch: TrainBatch) -> torch.Tensor:
        """Log-probabilities of given tokens under the initial policy."""
        assert self._reference is not None, "built without ModelContext.reference"
        inputs = self._encode(batch.observations)
        prediction = functional_call(self.module, dict(self._reference), tuple(inputs))
        return _by_action(self._judge(prediction, batch)[0])

    def supervised_loss(self, batch: SupervisedBatch) -> torch.Tensor:
        """The published loss where `</s>` is kept, else the one of the action tokens alone."""
        inputs = self._encode(batch.observations)
        actions = self._blueprint.actions.normalize(codec.from_simulator(batch.actions_SKA))
        end = self._blueprint.architecture.action_end
        tokens = torch.from_numpy(codec.encode(actions, end)).to(inputs.pixels.device).flatten(1)
        if not self.module.keep_stop_token:
            bins = tokens - self._blueprint.architecture.action_start
            valid = torch.from_numpy(batch.valid_SK).to(tokens.device)
            valid = valid.repeat_interleave(ACTION_DIM, 1)
            return action_loss(self.module, inputs, bins, valid, batch.label_width)
        if batch.label_width or not batch.valid_SK.all():
            raise ConfigError(
                "the published loss of OpenVLA-OFT knows whole chunks and single bins only",
                hint="set sft.label_width = 0 and sft.whole_chunks = true, "
                "or model.keep_stop_token = false",
            )
        return supervised_loss(self.module, inputs, tokens)

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
        """All parameters that influence an action or a value; of adapted networks, adapters."""
        trained = [item for item in self.module.named_parameters() if item[1].requires_grad]
        if not trained:
            raise ConfigError(
                "model.quantization: quantised weights cannot be trained",
                hint="set lora.rank, for instance to 32: adapters on top of them can",
            )
        return iter(trained)

    def export(self, directory: Path, *, adapter_only: bool) -> None:
        """Write a directory in the published layout, or an adapter in PEFT's."""
        export_policy(
            self.module,
            directory,
            source=self._source,
            built_in=self._size,
            statistics=self._blueprint.statistics,
            adapter_only=adapter_only,
        )

    def _predict(self, batch: ObservationBatch) -> Prediction:
        return self.module(*self._encode(batch))

    def _encode(self, batch: ObservationBatch) -> Inputs:
        return self._processor.encode(batch, next(self.module.parameters()).device)

    def _judge(
        self, prediction: Prediction, batch: TrainBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        bins = batch.tokens_SKA.flatten(1) - self._blueprint.architecture.action_start
        return token_logprobs(prediction.logits, bins, batch.temperature)


def _by_action(values: torch.Tensor) -> torch.Tensor:
    return values.unflatten(1, (CHUNK_LENGTH, ACTION_DIM))


def make_policy(config: OpenVlaOftConfig, context: ModelContext) -> Policy:
    """Build the policy on this rank: from a checkpoint directory, or `tiny` from its seed."""
    if config.head == "l1":
        return make_l1_policy(config, context)
    blueprint = make_blueprint(config, context, value_outputs=VALUE_OUTPUTS[context.values])
    module = make_module(config, context, blueprint.architecture)
    if config.path and not context.for_export:
        self_test.check(module, num_pictures=len(config.cameras))
    return OpenVlaOftPolicy(
        module,
        make_processor(config, context, blueprint),
        blueprint,
        config.size,
        source=Path(config.path) if config.path else None,
        reference=_reference(module, context) if context.reference else None,
    )


def _reference(module: OpenVlaOft, context: ModelContext) -> dict[str, torch.Tensor]:
    """Values with which the network stays what it is now, however it is trained."""
    if context.lora is not None and not context.lora.adapter:
        return lora.silent_state(module)
    return {
        name: parameter.detach().clone()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and not name.startswith(loading.VALUE_HEAD)
    }
