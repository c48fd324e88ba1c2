"""Observations -> tensors for the network: prompt, its padded layout, and pictures.

Shapes: B observations, L prompt slots, N pictures of an observation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from vlactl.api.contracts import ObservationBatch
from vlactl.errors import ConfigError
from vlactl_openvla_oft.codec import Range
from vlactl_openvla_oft.official_pictures import OfficialResize
from vlactl_openvla_oft.tokenizer import PromptTokenizer


class Inputs(NamedTuple):
    """What `OpenVlaOft.forward` takes."""

    pixels: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    state: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureConfig:
    """Size of the towers' input, and each tower's mean and deviation per colour."""

    size: int
    means: tuple[tuple[float, ...], tuple[float, ...]]
    stds: tuple[tuple[float, ...], tuple[float, ...]]


# ImageNet's numbers after a round trip through bfloat16, as the published files have them.
PUBLISHED_MEANS = ((0.484375, 0.455078125, 0.40625), (0.5, 0.5, 0.5))
PUBLISHED_STDS = ((0.228515625, 0.2236328125, 0.224609375), (0.5, 0.5, 0.5))


def prompt_text(instruction: str) -> str:
    """The question that the model was trained on; the blank at the end belongs to it."""
    return f"In: What action should the robot take to {instruction.lower()}?\nOut: "


def pad_prompt(ids: Sequence[int], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [L] with the padding behind `<s>`, and the mask [L] of real tokens."""
    num_pads = length - len(ids)
    return (
        np.array([*ids[:1], *[pad_id] * num_pads, *ids[1:]], dtype=np.int64),
        np.array([True] + [False] * num_pads + [True] * (len(ids) - 1)),
    )


class PromptEncoder:
    """Instructions -> padded prompts; each instruction is encoded once."""

    def __init__(self, tokenizer: PromptTokenizer, length: int, pad_id: int) -> None:
        self._tokenizer = tokenizer
        self._length = length
        self._pad_id = pad_id
        self._known: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def encode(self, instructions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids int64 [B, L] and attention_mask bool [B, L]."""
        rows = [self._row(instruction) for instruction in instructions]
        ids_BL, mask_BL = (np.stack(column) for column in zip(*rows, strict=True))
        return torch.from_numpy(ids_BL), torch.from_numpy(mask_BL)

    def _row(self, instruction: str) -> tuple[np.ndarray, np.ndarray]:
        if instruction not in self._known:
            ids = self._tokenizer.encode(prompt_text(instruction))
            if len(ids) > self._length:
                raise ConfigError(
                    f'the prompt of "{instruction}" has {len(ids)} tokens, '
                    f"model.max_prompt_length is {self._length}",
                    hint=f"set model.max_prompt_length to {len(ids)} or more",
                )
            self._known[instruction] = pad_prompt(ids, self._length, self._pad_id)
        return self._known[instruction]


class PictureEncoder:
    """Camera pictures -> normalised pixels, once per tower.

    Args:
        config: of the towers.
        resize: uint8 [B, H, W, 3] -> whole levels, float32 [B, 3, size, size].
        device: of the pixels.
        dtype: of the pixels.
    """

    def __init__(
        self,
        config: PictureConfig,
        resize: Callable[[np.ndarray], torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._resize = resize
        self._dtype = dtype
        self._means = _per_channel(config.means, device)
        self._stds = _per_channel(config.stds, device)

    def encode(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        """N arrays uint8 [B, H, W, 3] -> [B, 6N, size, size]."""
        return torch.cat([self._camera(picture) for picture in pictures], dim=1)

    def _camera(self, picture: np.ndarray) -> torch.Tensor:
        colours = (self._resize(picture) / 255).repeat(1, 2, 1, 1)
        return ((colours - self._means) / self._stds).to(self._dtype)


def make_picture_encoder(
    pipeline: Literal["rlinf", "official"],
    config: PictureConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> PictureEncoder:
    """Pictures as RLinf's policies or the official ones have seen them in training."""
    resize = RlinfResize if pipeline == "rlinf" else OfficialResize
    return PictureEncoder(config, resize(config.size, device), device, dtype)


class RlinfResize:
    """uint8 [B, H, W, 3] -> whole levels, float32 [B, 3, size, size]; nothing is cropped.

    It computes in float and then rounds to whole levels, as when the published policies were
    trained; libraries that resize in integers differ by up to 20 levels.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._size = [size, size]
        self._device = device

    def __call__(self, picture: np.ndarray) -> torch.Tensor:
        levels = torch.from_numpy(picture).to(self._device).permute(0, 3, 1, 2).float()
        resized = functional.interpolate(levels, self._size, mode="bicubic", antialias=True)
        return resized.round().clamp(0, 255)


def _per_channel(values: tuple[tuple[float, ...], ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, device=device).reshape(1, -1, 1, 1)


class Processor:
    """Everything between an observation and the network.

    Args:
        prompts: encodes instructions.
        pictures: encodes pictures.
        cameras: whose pictures the network takes.
        states: range of the proprioceptive state; None = the network takes none.
    """

    def __init__(
        self,
        prompts: PromptEncoder,
        pictures: PictureEncoder,
        cameras: tuple[str, ...],
        states: Range | None = None,
    ) -> None:
        self._prompts = prompts
        self._pictures = pictures
        self._cameras = cameras
        self._states = states

    def encode(self, batch: ObservationBatch, device: torch.device) -> Inputs:
        """The network's inputs on `device`."""
        ids, mask = self._prompts.encode(batch.instructions)
        pixels = self._pictures.encode([batch.images[camera] for camera in self._cameras])
        state = None
        if self._states is not None:
            normalized = self._states.normalize(batch.state.astype(np.float64))
            state = torch.from_numpy(normalized).to(device, pixels.dtype)
        return Inputs(pixels, ids.to(device), mask.to(device), state)
