"""Descriptor and configuration of the tiny VLA. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from vlactl.api.contracts import ValueLevel
from vlactl.api.plugins import Footprint, FootprintContext, ModelConfig, ModelPlugin

ACTION_DIM = 7
CHUNK_LENGTH = 8
NUM_ACTION_TOKENS = CHUNK_LENGTH * ACTION_DIM
NUM_BINS = 256
VALUE_OUTPUTS: dict[ValueLevel, int] = {"none": 0, "chunk": 1, "action": CHUNK_LENGTH}
SHAPES = ("cameras", "image_size", "width", "depth", "num_heads", "num_keypoints")
"""Keys of the configuration that weights fit to."""
WEIGHTS = Path(__file__).parent / "weights"


class TinyVlaConfig(ModelConfig):
    """Section `model` for the tiny VLA."""

    name: Literal["tiny-vla"] = "tiny-vla"
    path: str = Field(
        "", description="Directory that `vlactl sft` or `vlactl export` wrote; empty = none."
    )
    shipped: Literal["none", "base", "rl"] = Field(
        "none",
        description="Where there is no path, weights for LIBERO-Object that come with vlactl: base "
        "= supervised, rl = the same after reinforcement learning; none = random weights.",
    )
    cameras: tuple[str, ...] = Field(("agentview",), min_length=1)
    chunk_length: Literal[8] = 8
    image_size: int = Field(
        128, ge=32, le=256, multiple_of=16, description="Pixels to which pictures are resized."
    )
    width: int = Field(192, ge=32, multiple_of=32, description="Of tokens.")
    depth: int = Field(4, ge=1, description="Transformer layers.")
    num_heads: int = Field(6, ge=1, description="Of attention.")
    num_keypoints: int = Field(32, ge=1, description="Places per picture that are looked for.")

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is no multiple of num_heads {self.num_heads}")
        return self

    @property
    def directory(self) -> Path | None:
        """Where weights come from; None = from a seed."""
        if self.path:
            return Path(self.path)
        return None if self.shipped == "none" else WEIGHTS / self.shipped

    def built_in(self) -> str:
        """See `ModelConfig`."""
        return "" if self.path or self.shipped == "none" else f"tiny-vla {self.shipped}"

    def blockers(self) -> list[str]:
        """A directory that is not there, or sizes that the shipped weights do not have."""
        if self.path:
            if Path(self.path).is_dir():
                return []
            return [
                f"model.path: there is no directory {self.path}; if it has moved: "
                "--set model.path=DIR"
            ]
        usual = TinyVlaConfig()
        return [
            f'model.{key} = {getattr(self, key)}: with model.shipped = "{self.shipped}" it is '
            f"{getattr(usual, key)}"
            for key in SHAPES
            if self.shipped != "none" and getattr(self, key) != getattr(usual, key)
        ]


def footprint(config: TinyVlaConfig, context: FootprintContext) -> Footprint:
    """An estimate of the network's size; it is small in any case."""
    width, patches = config.width, (config.image_size // 16) ** 2
    layer = 12 * width**2 + 13 * width
    stem = 140_000 + 130 * 9 * width
    tables = (patches + NUM_ACTION_TOKENS + 1200) * width
    heads = NUM_BINS * width + (VALUE_OUTPUTS[context.values] > 0) * 2 * width**2
    parameters = config.depth * layer + stem + tables + heads + 3 * width**2
    tokens = len(config.cameras) * (patches + 1) + NUM_ACTION_TOKENS + 32
    pictures = len(config.cameras) * config.image_size**2 * 60
    return Footprint(
        parameters=parameters,
        trainable=parameters,
        bytes_per_parameter=context.bytes_per_value,
        activation_bytes=context.bytes_per_value
        * (config.depth * tokens * 18 * width + pictures + NUM_ACTION_TOKENS * NUM_BINS * 4),
        largest_unit=parameters,
    )


PLUGIN = ModelPlugin(
    name="tiny-vla",
    summary="2.5 M parameters for CPUs: picture, instruction, proprioception to 8x7 tokens",
    config=TinyVlaConfig,
    factory="vlactl_tiny_vla.policy:make_policy",
    footprint="vlactl_tiny_vla.plugin:footprint",
    api_version=1,
)
