"""A two-layer network on picture and state, with one categorical token per action."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
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
from vlactl_toy.plugin import ToyModelConfig


def make_policy(config: ToyModelConfig, context: ModelContext) -> ToyPolicy:
    """The toy policy with weights drawn from the context's seed."""
    height, width = context.env.cameras[config.cameras[0]]
    num_inputs = 3 * height * width * len(config.cameras) + context.env.state_dim
    num_tokens = config.chunk_length * context.env.action_dim
    with torch.random.fork_rng():
        torch.manual_seed(context.seed)
        module = nn.Sequential(
            nn.Linear(num_inputs, config.hidden),
            nn.Tanh(),
            nn.Linear(config.hidden, num_tokens * config.num_bins),
        )
    return ToyPolicy(module.to(context.device, context.dtype), config, context)


class ToyPolicy:
    """See `vlactl.api.contracts.Policy`."""

    def __init__(self, module: nn.Module, config: ToyModelConfig, context: ModelContext) -> None:
        self.module = module
        self._config = config
        self._device, self._dtype = context.device, context.dtype
        self._chunk_shape = (config.chunk_length, context.env.action_dim)

    @torch.no_grad()
    def act(
        self, batch: ObservationBatch, mode: Sample | Greedy, noise_keys: Sequence[int]
    ) -> ActionChunks:
        """Draw tokens; bin i of n is the action -1 + 2 i / (n - 1)."""
        tokens_BT, logprobs_BT = draw_tokens(self._logits_BTV(batch), mode, noise_keys)
        tokens_BKA = tokens_BT.reshape(-1, *self._chunk_shape).cpu().numpy()
        return ActionChunks(
            actions_BKA=-1.0 + 2.0 * tokens_BKA / (self._config.num_bins - 1),
            tokens_BKA=tokens_BKA,
            logprobs_BKA=logprobs_BT.reshape(-1, *self._chunk_shape).cpu().numpy(),
        )

    def evaluate_actions(self, batch: TrainBatch) -> PolicyOutput:
        """Judge given tokens again."""
        logits_BTV = self._logits_BTV(batch.observations)
        tokens_BT = batch.tokens_SKA.flatten(1)
        logprobs, entropy = token_logprobs(logits_BTV, tokens_BT, batch.temperature)
        return PolicyOutput(
            logprobs_SKA=logprobs.reshape(-1, *self._chunk_shape),
            entropy_SKA=entropy.reshape(-1, *self._chunk_shape),
        )

    def shard_units(self) -> Sequence[nn.Module]:
        """The layers."""
        return list(self.module.children())

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Everything."""
        return self.module.named_parameters()

    def _logits_BTV(self, batch: ObservationBatch) -> torch.Tensor:
        pictures = [
            batch.images[name].reshape(len(batch), -1) / 255.0 for name in self._config.cameras
        ]
        inputs = torch.from_numpy(np.concatenate([*pictures, batch.state], axis=1))
        logits = self.module(inputs.to(self._device, self._dtype))
        return logits.reshape(len(batch), -1, self._config.num_bins)
