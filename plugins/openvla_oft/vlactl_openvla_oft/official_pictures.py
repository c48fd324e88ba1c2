"""Camera pictures as the official evaluation prepares them, without TensorFlow.

A picture goes through JPEG, as the training data did, is resized with a Lanczos kernel, and the
middle nine tenths of its area are blown up to the whole, since training cropped at random. Both
resizes are linear along each axis: one matrix per axis, computed once. Results are TensorFlow's,
but for a level here and there where a sum is rounded the other way.

Shapes: B observations; H, W sides of a camera's picture; S and D the length of an axis before and
after a resize.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from vlactl_openvla_oft import jpeg

LANCZOS_RADIUS = 3
CROPPED_AREA = 0.9
UNIT_TO_LEVEL = 255.5
"""From [0, 1] to whole levels by truncation: almost what rounding does."""


class OfficialResize:
    """uint8 [B, H, W, 3] -> whole levels, float32 [B, 3, size, size]."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._size = size
        self._device = device

    def __call__(self, picture: np.ndarray) -> torch.Tensor:
        levels = torch.from_numpy(picture).to(self._device).permute(0, 3, 1, 2)
        return self.crop(self.shrink(jpeg.recompress(levels)))

    def shrink(self, levels: torch.Tensor) -> torch.Tensor:
        """Whole levels [B, 3, H, W] at the network's size."""
        rows, columns = self._weights(lanczos, levels)
        return (rows @ levels.float() @ columns.T).round().clamp(0, 255)

    def crop(self, levels: torch.Tensor) -> torch.Tensor:
        """The middle of whole levels [B, 3, H, W], at the network's size."""
        rows, columns = self._weights(centre, levels)
        return (rows @ (levels / 255) @ columns.T * UNIT_TO_LEVEL).floor().clamp(0, 255)

    def _weights(
        self, kernel: Callable[[int, int], torch.Tensor], levels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = (kernel(side, self._size).to(self._device) for side in levels.shape[2:])
        return rows, columns


@cache
def lanczos(source: int, target: int) -> torch.Tensor:
    """Antialiasing Lanczos resize of one axis, float32 [D, S].

    Pixels are areas: their centres lie at halves. When shrinking, the kernel is stretched so that
    it spans as many pixels of the target as it otherwise does of the source; a kernel that reaches
    over the edge has the rest of its weight rescaled.
    """
    scale = source / target
    stretch = max(scale, 1.0)
    centres_D = (np.arange(target) + 0.5) * scale
    offsets_DS = (np.arange(source) + 0.5 - centres_D[:, None]) / stretch
    kernel_DS = np.sinc(offsets_DS) * np.sinc(offsets_DS / LANCZOS_RADIUS)
    kernel_DS[np.abs(offsets_DS) >= LANCZOS_RADIUS] = 0.0
    return _float32(kernel_DS / kernel_DS.sum(axis=1, keepdims=True))


@cache
def centre(source: int, target: int) -> torch.Tensor:
    """Bilinear resize of the middle of one axis, float32 [D, S].

    Pixels are points: the first and last of the target fall on the borders of the crop.
    """
    side = math.sqrt(CROPPED_AREA)
    positions_D = np.linspace((1 - side) / 2, (1 + side) / 2, target) * (source - 1)
    distances_DS = np.abs(positions_D[:, None] - np.arange(source))
    return _float32(np.maximum(1.0 - distances_DS, 0.0))


def _float32(weights: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(weights.astype(np.float32))
