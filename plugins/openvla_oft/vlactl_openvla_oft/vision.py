"""The two vision towers, under the published parameter names.

The feature of a patch is what the last block but one puts out. The last block, the final norm and
the attention pool belong to the checkpoint but influence nothing: they are neither computed nor
trained.

Shapes: B observations, N pictures of an observation, P patches of a picture, D features.
"""

from __future__ import annotations

from dataclasses import asdict
from itertools import pairwise

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vlactl_openvla_oft.architecture import CHANNELS_PER_IMAGE, TowerConfig, VisionConfig

STEM_GROUPS = 8


class LayerScale(nn.Module):
    """timm's LayerScale with the parameter name that published checkpoints have."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.full((dim,), value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale_factor


class ConvolutionalStem(nn.Module):
    """Pictures [B, 3, H, W] to patches [B, P, D], in the place of timm's PatchEmbed."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        assert 2 ** (len(config.stem) + 1) == config.patch_size, "every layer halves the picture"
        self.num_patches, self.img_size = config.num_patches, (config.img_size,) * 2
        inputs = (3, *config.stem)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, 2, 1),
                    nn.GroupNorm(STEM_GROUPS, after),
                    nn.GELU(),
                )
                for before, after in pairwise(inputs)
            ),
            nn.Conv2d(inputs[-1], config.embed_dim, 3, 2, 1),
        )

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.layers(pictures).flatten(2).transpose(1, 2)


class Tower(VisionTransformer):
    """A timm vision transformer that returns patch features."""

    def __init__(self, config: TowerConfig) -> None:
        sizes = asdict(config)
        del sizes["stem"]
        super().__init__(**sizes, num_classes=0)
        if config.stem:
            self.patch_embed = ConvolutionalStem(config)
        if config.init_values is not None:
            for block in self.blocks:
                block.ls1 = LayerScale(config.embed_dim, config.init_values)
                block.ls2 = LayerScale(config.embed_dim, config.init_values)
        self.freeze_unused()

    @property
    def unused(self) -> list[nn.Module]:
        """Parts that are stored, but that no feature depends on."""
        parts = (self.blocks[-1], self.norm, self.fc_norm, self.attn_pool)
        return [part for part in parts if part is not None]

    def freeze_unused(self) -> None:
        """Leave what would never get a gradient out of training."""
        for part in self.unused:
            part.requires_grad_(False)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        (features,) = self.forward_intermediates(
            pictures,
            indices=[len(self.blocks) - 2],
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return features


class VisionBackbone(nn.Module):
    """Patch features of all pictures of an observation."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.featurizer = Tower(config.featurizer)
        self.fused_featurizer = Tower(config.fused_featurizer)

    @property
    def towers(self) -> tuple[Tower, Tower]:
        """Both, in the order of the picture's channels."""
        return self.featurizer, self.fused_featurizer

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 6N, H, W] -> [B, N*P, D]."""
        pictures = pixels.unflatten(1, (-1, CHANNELS_PER_IMAGE)).flatten(0, 1)
        first, second = pictures.split(CHANNELS_PER_IMAGE // 2, dim=1)
        features = torch.cat([self.featurizer(first), self.fused_featurizer(second)], dim=-1)
        return features.reshape(pixels.shape[0], -1, features.shape[-1])
