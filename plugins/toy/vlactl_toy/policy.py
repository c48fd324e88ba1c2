"""A two-layer network on picture and state, with one categorical token per action."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from vlactl.api.contracts import (
    ActionChunks,
    Greedy,
    ModelContext,
    ObservationBatch,
    PolicyOutput,
    Sample,
    SupervisedBatch,
    TrainBatch,
)
from vlactl.api.sampling import draw_tokens, spread_labels, token_logprobs
from vlactl.errors import ConfigError, IntegrityError
from vlactl_toy.plugin import ToyModelConfig

WEIGHTS = "model.safetensors"


def make_policy(config: ToyModelConfig, context: ModelContext) -> ToyPolicy:
    """The toy policy with weights drawn from the context's seed."""
    if context.lora is not None:
        raise ConfigError("the toy model has no adapters", hint="set lora.rank = 0")
    height, width = context.env.cameras[config.cameras[0]]
    num_values = {"none": 0, "chunk": 1, "action": config.chunk_length}[context.values]
    with torch.random.fork_rng():
        torch.manual_seed(context.seed)
        module = ToyNetwork(
            num_inputs=3 * height * width * len(config.cameras) + context.env.state_dim,
            hidden=config.hidden,
            num_logits=config.chunk_length * context.env.action_dim * config.num_bins,
            num_values=num_values,
        )
    if config.path:
        _load(module, Path(config.path) / WEIGHTS)
    return ToyPolicy(module.to(context.device, context.dtype), config, context)


def _load(module: nn.Module, path: Path) -> None:
    try:
        missing, unexpected = module.load_state_dict(load_file(path), strict=False)
    except Exception as error:  # the library raises nothing narrower
        raise IntegrityError(f"{path} is not of this network: {error}") from None
    if unexpected or any("value_head" not in name for name in missing):
        raise IntegrityError(f"{path} is not of this network: {[*missing, *unexpected]}")


class ToyNetwork(nn.Module):
    """Inputs [B, I] to logits, and to values where `num_values` is not 0."""

    def __init__(self, *, num_inputs: int, hidden: int, num_logits: int, num_values: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(num_inputs, hidden), nn.Tanh())
        self.head = nn.Linear(hidden, num_logits)
        self.value_head = nn.Linear(hidden, num_values) if num_values else None

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        features = self.body(inputs)
        values = None if self.value_head is None else self.value_head(features).float()
        return self.head(features), values


class ToyPolicy:
    """See `vlactl.api.contracts.Policy`."""

    def __init__(self, module: ToyNetwork, config: ToyModelConfig, context: ModelContext) -> None:
        self.module = module
        self._reference = copy.deepcopy(module) if context.reference else None
        self._config = config
        self._device, self._dtype = context.device, context.dtype
        self._chunk_shape = (config.chunk_length, context.env.action_dim)

    @torch.no_grad()
    def act(
        self, batch: ObservationBatch, mode: Sample | Greedy, noise_keys: Sequence[int]
    ) -> ActionChunks:
        """Draw tokens; bin i of n is the action -1 + 2 i / (n - 1)."""
        logits_BTV, values = self._predict(self.module, batch)
        tokens_BT, logprobs_BT = draw_tokens(logits_BTV, mode, noise_keys)
        tokens_BKA = tokens_BT.reshape(-1, *self._chunk_shape).cpu().numpy()
        return ActionChunks(
            actions_BKA=-1.0 + 2.0 * tokens_BKA / (self._config.num_bins - 1),
            tokens_BKA=tokens_BKA,
            logprobs_BKA=logprobs_BT.reshape(-1, *self._chunk_shape).cpu().numpy(),
            values_BK=None if values is None else values.cpu().numpy(),
        )

    def evaluate_actions(self, batch: TrainBatch) -> PolicyOutput:
        """Judge given tokens again."""
        return self._evaluate(self.module, batch)

    @torch.no_grad()
    def reference_logprobs(self, batch: TrainBatch) -> torch.Tensor:
        """Log-probabilities under the initial weights."""
        assert self._reference is not None, "built without context.reference"
        return self._evaluate(self._reference, batch).logprobs_SKA

    def supervised_loss(self, batch: SupervisedBatch) -> torch.Tensor:
        """Cross-entropy of the bins that demonstrated actions fall into."""
        logits, _ = self._predict(self.module, batch.observations)
        num_bins = self._config.num_bins
        bins = np.rint((batch.actions_SKA.clip(-1, 1) + 1) / 2 * (num_bins - 1)).astype(np.int64)
        labels = spread_labels(torch.from_numpy(bins).to(self._device), num_bins, batch.label_width)
        losses = functional.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
        valid_SKA = np.broadcast_to(batch.valid_SK[..., None], bins.shape).copy()
        valid = torch.from_numpy(valid_SKA).to(self._device).flatten()
        return (losses * valid).sum() / valid.sum()

    def shard_units(self) -> Sequence[nn.Module]:
        """The layers."""
        return list(self.module.children())

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Everything."""
        return self.module.named_parameters()

    def export(self, directory: Path, *, adapter_only: bool) -> None:
        """Write the weights."""
        if adapter_only:
            raise ConfigError("the toy model has no adapters", hint="leave out --adapter-only")
        state = {name: value.detach().cpu() for name, value in self.module.state_dict().items()}
        save_file(state, directory / WEIGHTS)

    def _evaluate(self, module: nn.Module, batch: TrainBatch) -> PolicyOutput:
        logits_BTV, values = self._predict(module, batch.observations)
        tokens_BT = batch.tokens_SKA.flatten(1)
        logprobs, entropy = token_logprobs(logits_BTV, tokens_BT, batch.temperature)
        return PolicyOutput(
            logprobs_SKA=logprobs.reshape(-1, *self._chunk_shape),
            entropy_SKA=entropy.reshape(-1, *self._chunk_shape),
            values_SK=values,
        )

    def _predict(
        self, module: nn.Module, batch: ObservationBatch
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        pictures = [
            batch.images[name].reshape(len(batch), -1) / 255.0 for name in self._config.cameras
        ]
        inputs = torch.from_numpy(np.concatenate([*pictures, batch.state], axis=1))
        logits, values = module(inputs.to(self._device, self._dtype))
        return logits.reshape(len(batch), -1, self._config.num_bins), values
