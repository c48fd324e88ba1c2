"""OpenVLA-OFT with discrete action tokens: pictures and prompt in, logits of 56 action tokens out.

One forward pass predicts a whole chunk. The sequence is

    <s>, picture tokens, padding and prompt, 56 placeholders, (</s>)

where placeholders are zero vectors that only their position tells apart. Every token attends to
every token that is not padding, later ones included. As in any language model the prediction of a
token is read one position earlier: at the last prompt token and at the first 55 placeholders.

Parameter names are those of published checkpoints. Everything that touches a parameter happens
inside `forward` of the module that owns it or of the root, so that sharding wrappers see every use.

Shapes: B observations, L prompt slots, N pictures, P patches, T sequence, H hidden, V = 256 bins.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vlactl.api.contracts import Recomputation
from vlactl_openvla_oft.architecture import (
    NUM_ACTION_TOKENS,
    STOP_ID,
    VALUE_HIDDEN,
    Architecture,
    LanguageConfig,
)
from vlactl_openvla_oft.vision import VisionBackbone


class Prediction(NamedTuple):
    """float32 logits [B, 56, V] of the action tokens, and values [B, outputs] with a value head."""

    logits: torch.Tensor
    values: torch.Tensor | None


class Projector(nn.Module):
    """Patch features -> embeddings of the language model."""

    def __init__(self, vision_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_dim, 4 * vision_dim)
        self.fc2 = nn.Linear(4 * vision_dim, hidden_size)
        self.fc3 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.fc3(functional.gelu(self.fc2(functional.gelu(self.fc1(features)))))


class ProprioProjector(nn.Module):
    """Normalised state [B, P] -> one token [B, 1, H]."""

    def __init__(self, state_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(state_dim, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.fc2(functional.gelu(self.fc1(state))).unsqueeze(1)


class SomeRows(nn.Linear):
    """A linear map without bias of which only some outputs are computed."""

    def __init__(
        self, num_inputs: int, num_outputs: int, rows: slice, *, device: str | None = None
    ) -> None:
        super().__init__(num_inputs, num_outputs, bias=False, device=device)
        self.rows = rows

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return functional.linear(inputs, self.weight[self.rows])


class LanguageModel(nn.Module):
    """Llama with attention in both directions."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        language = architecture.language
        actions = slice(architecture.action_start, architecture.action_end)
        self.model = LlamaModel(llama_config(language))
        self.lm_head = SomeRows(language.hidden_size, language.vocab_size, actions)

    def forward(self, embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Final hidden states [B, T, H]; `mask` bool [B, T] is False at padding."""
        num_tokens = mask.shape[1]
        # Given two dimensions, transformers would make the mask causal; four are taken as they are.
        attention_mask = mask[:, None, None, :].expand(-1, 1, num_tokens, num_tokens)
        return self.model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            position_ids=(mask.long().cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state

    def vocabulary_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the whole vocabulary, where `lm_head` gives those of action tokens."""
        parts = [part for part in self.lm_head.modules() if isinstance(part, SomeRows)]
        computed = [part.rows for part in parts]
        for part in parts:
            part.rows = slice(None)
        try:
            return self.lm_head(hidden)
        finally:
            for part, rows in zip(parts, computed, strict=True):
                part.rows = rows


class ValueHead(nn.Module):
    """State values from the hidden state that also predicts the first action token."""

    def __init__(self, hidden_size: int, num_outputs: int) -> None:
        super().__init__()
        wide, narrow = VALUE_HIDDEN
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, wide),
            nn.GELU(),
            nn.Linear(wide, narrow),
            nn.GELU(),
            nn.Linear(narrow, num_outputs, bias=False),
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.mlp(hidden)


class OpenVlaOft(nn.Module):
    """The whole network.

    Args:
        architecture: its sizes.
        keep_stop_token: put `</s>` behind the placeholders, for checkpoints that were trained so.
    """

    def __init__(self, architecture: Architecture, *, keep_stop_token: bool = False) -> None:
        super().__init__()
        hidden_size = architecture.language.hidden_size
        self.keep_stop_token = keep_stop_token
        self.vision_backbone = VisionBackbone(architecture.vision)
        self.projector = Projector(architecture.vision.embed_dim, hidden_size)
        self.proprio_projector = (
            ProprioProjector(architecture.state_dim, hidden_size)
            if architecture.state_dim
            else None
        )
        self.language_model = LanguageModel(architecture)
        self.value_head = (
            ValueHead(hidden_size, architecture.value_outputs)
            if architecture.value_outputs
            else None
        )

    def forward(
        self,
        pixels: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        state: torch.Tensor | None = None,
        *,
        whole_answer: bool = False,
    ) -> Prediction:
        """Predict action tokens; arguments are those of `hidden_states`.

        With `whole_answer` logits are [B, 57, vocabulary]: of the token behind the actions, too.
        """
        num_positions = NUM_ACTION_TOKENS + whole_answer
        hidden = self.hidden_states(
            pixels, input_ids, attention_mask, state, num_positions=num_positions
        )
        if whole_answer:
            return Prediction(self.language_model.vocabulary_logits(hidden).float(), None)
        values = None if self.value_head is None else self.value_head(hidden[:, 0]).float()
        return Prediction(self.language_model.lm_head(hidden).float(), values)

    def hidden_states(
        self,
        pixels: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        state: torch.Tensor | None = None,
        *,
        extra_tokens: torch.Tensor | None = None,
        placeholders: torch.Tensor | None = None,
        num_positions: int = NUM_ACTION_TOKENS,
    ) -> torch.Tensor:
        """Final hidden states [B, num_positions, H], from which action token 0 and on are read.

        Args:
            pixels: [B, 6N, size, size].
            input_ids: [B, L]; column 0 is `<s>`, padding follows, and the text ends in the last.
            attention_mask: [B, L], False at padding.
            state: normalised, [B, P]; of networks whose architecture has one.
            extra_tokens: [B, n, H], which go behind the picture tokens.
            placeholders: [B, 56, H] instead of zeros.
            num_positions: one more than there are action tokens also gives the one that
                predicts what follows them.
        """
        pictures = self.projector(self.vision_backbone(pixels))
        if state is not None and self.proprio_projector is not None:
            extra_tokens = self.proprio_projector(state)
        if extra_tokens is not None:
            pictures = torch.cat([pictures, extra_tokens.to(pictures.dtype)], dim=1)
        embeddings, mask = self._sequence(pictures, input_ids, attention_mask.bool(), placeholders)
        start = pictures.shape[1] + input_ids.shape[1] - 1
        return self.language_model(embeddings, mask)[:, start : start + num_positions]

    def recompute_activations(self, how: Recomputation) -> None:
        """Keep only the inputs of layers for the backward pass, and compute the rest again.

        Args:
            how: of every layer ("full"), or of every second one ("selective").
        """
        towers = (tower.blocks for tower in self.vision_backbone.towers)
        for stack in (*towers, self.language_model.model.layers):
            for layer in list(stack)[:: 1 if how == "full" else 2]:
                layer.forward = partial(
                    checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
                )

    def _sequence(
        self,
        pictures: torch.Tensor,
        input_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        placeholders: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        prompt = self.language_model.model.embed_tokens(input_ids)
        batch_size, _, hidden_size = prompt.shape
        tail = prompt.new_zeros(batch_size, NUM_ACTION_TOKENS, hidden_size)
        if placeholders is not None:
            tail = placeholders.to(prompt.dtype)
        if self.keep_stop_token:
            stop = self.language_model.model.embed_tokens(input_ids.new_tensor([STOP_ID]))
            tail = torch.cat([tail, stop.expand(batch_size, 1, -1)], dim=1)
        embeddings = torch.cat([prompt[:, :1], pictures, prompt[:, 1:], tail], dim=1)
        attended_pictures = prompt_mask.new_ones(pictures.shape[:2])
        attended_tail = prompt_mask.new_ones(tail.shape[:2])
        mask = [prompt_mask[:, :1], attended_pictures, prompt_mask[:, 1:], attended_tail]
        return embeddings, torch.cat(mask, dim=1)


def llama_config(language: LanguageConfig) -> LlamaConfig:
    """Hugging Face's form of the sizes."""
    sizes = asdict(language)
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    return LlamaConfig(**sizes, rope_parameters=rope, attn_implementation="sdpa", use_cache=False)


def build(architecture: Architecture, *, keep_stop_token: bool = False) -> OpenVlaOft:
    """The network without storage for its parameters: `materialise` gives it some."""
    with torch.device("meta"):
        return OpenVlaOft(architecture, keep_stop_token=keep_stop_token)


def materialise(module: OpenVlaOft, state: dict[str, torch.Tensor]) -> None:
    """Make the tensors of `state` the parameters of `module`: all that have no storage yet."""
    unexpected = module.load_state_dict(state, assign=True, strict=False).unexpected_keys
    assert not unexpected, f"not of this network: {unexpected}"
    missing = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    assert not missing, f"without storage: {missing}"
    llama = module.language_model.model
    # Its frequencies are no parameters, and stay in float32 whatever the parameters are.
    llama.rotary_emb = LlamaRotaryEmbedding(llama.config).to(llama.embed_tokens.weight.device)
