"""The network: convolutions with keypoints, then a transformer whose last tokens are the actions.

A picture becomes a grid of feature tokens and one token of keypoints (the expected places of
learned features: spatial softmax, Levine et al. 2016, arXiv:1504.00702), which tell where things
are far more precisely than a grid does. Together with one token of the robot's state and the words
of the instruction they are attended to by 56 learned queries, one per action token, all at once.

Shapes: B observations, N pictures of an observation, W words, P numbers of the state, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from vlactl_tiny_vla.plugin import NUM_ACTION_TOKENS, NUM_BINS, TinyVlaConfig
from vlactl_tiny_vla.words import MAX_WORDS, NUM_BUCKETS, NUM_HASHES

GRID_STRIDE = 16
MLP_RATIO = 4


class Inputs(NamedTuple):
    """What the network takes.

    pixels float [B, N, 3, S, S] in [-1, 1]; state float [B, P]; words int64 [B, W, hashes], -1
    behind the end of an instruction.
    """

    pixels: torch.Tensor
    state: torch.Tensor
    words: torch.Tensor


class Prediction(NamedTuple):
    """float32 logits [B, 56, 256] of the action tokens, and values where there is a head."""

    logits: torch.Tensor
    values: torch.Tensor | None


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2), nn.GroupNorm(8, outputs), nn.GELU()
    )


class Eye(nn.Module):
    """Pictures [M, 3, S, S] to tokens [M, 1 + (S / 16)^2, D]: keypoints, then the grid."""

    def __init__(self, config: TinyVlaConfig) -> None:
        super().__init__()
        self.fine = nn.Sequential(
            _convolution(5, 32, 5, 2), _convolution(32, 64, 3, 2), _convolution(64, 64, 3, 1)
        )
        self.coarse = nn.Sequential(
            _convolution(64, 128, 3, 2), nn.Conv2d(128, config.width, 3, 2, 1)
        )
        self.heatmaps = nn.Conv2d(64, config.num_keypoints, 1)
        self.log_sharpness = nn.Parameter(torch.ones(1))  # FSDP2 takes no scalars
        self.places = nn.Sequential(
            nn.Linear(2 * config.num_keypoints, config.width),
            nn.GELU(),
            nn.Linear(config.width, config.width),
        )
        num_cells = (config.image_size // GRID_STRIDE) ** 2
        self.positions = nn.Parameter(0.02 * torch.randn(1 + num_cells, config.width))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        xy = _coordinates(pictures.shape[-1], pictures.device).to(pictures.dtype)
        features = self.fine(torch.cat([pictures, xy.expand(len(pictures), -1, -1, -1)], dim=1))
        keypoints = self.places(self._keypoints(features)).unsqueeze(1)
        grid = self.coarse(features).flatten(2).transpose(1, 2)
        return torch.cat([keypoints, grid], dim=1) + self.positions

    def _keypoints(self, features: torch.Tensor) -> torch.Tensor:
        """Expected (x, y) of each heat map, [M, 2 * keypoints] in [-1, 1]."""
        heat = self.heatmaps(features).flatten(2).float()
        weights = (heat * self.log_sharpness.float().exp()).softmax(-1)
        places = weights @ _coordinates(features.shape[-1], features.device).flatten(1).T
        return places.flatten(1).to(features.dtype)


def _coordinates(size: int, device: torch.device) -> torch.Tensor:
    """X and y of every pixel in [-1, 1], float32 [2, size, size]."""
    line = torch.linspace(-1, 1, size, device=device)
    return torch.stack([line.expand(size, size), line.unsqueeze(1).expand(size, size)])


class TinyVla(nn.Module):
    """The whole network; `num_values` 0 = no value head."""

    def __init__(self, config: TinyVlaConfig, *, state_dim: int, num_values: int) -> None:
        super().__init__()
        width = config.width
        self.eye = Eye(config)
        self.cameras = nn.Parameter(0.02 * torch.randn(len(config.cameras), 1, width))
        self.state = nn.Sequential(nn.Linear(state_dim, width), nn.GELU(), nn.Linear(width, width))
        self.words = nn.Embedding(NUM_BUCKETS, width)
        self.word_positions = nn.Parameter(0.02 * torch.randn(MAX_WORDS, width))
        self.queries = nn.Parameter(0.02 * torch.randn(NUM_ACTION_TOKENS, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                config.num_heads,
                MLP_RATIO * width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, NUM_BINS)
        self.value_head = (
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, num_values))
            if num_values
            else None
        )

    def forward(self, pixels: torch.Tensor, state: torch.Tensor, words: torch.Tensor) -> Prediction:
        """See `Inputs`."""
        batch_size, num_pictures = pixels.shape[:2]
        seen = self.eye(pixels.flatten(0, 1)).unflatten(0, (batch_size, num_pictures))
        read = self.words(words.clamp(min=0)).sum(2) / NUM_HASHES**0.5 + self.word_positions
        parts = [
            (seen + self.cameras).flatten(1, 2),
            self.state(state).unsqueeze(1),
            read,
            self.queries.expand(batch_size, -1, -1),
        ]
        tokens = torch.cat(parts, dim=1)
        is_padding = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        first_word = parts[0].shape[1] + 1
        is_padding[:, first_word : first_word + MAX_WORDS] = words[:, :, 0] < 0
        for layer in self.layers:
            tokens = layer(tokens, src_key_padding_mask=is_padding)
        answers = self.norm(tokens[:, -NUM_ACTION_TOKENS:])
        values = None if self.value_head is None else self.value_head(answers.mean(1)).float()
        return Prediction(self.head(answers).float(), values)
