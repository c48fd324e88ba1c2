"""Descriptor and configuration of OpenVLA-OFT. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from vlactl.api.plugins import ModelConfig, ModelPlugin


class OpenVlaOftConfig(ModelConfig):
    """Section `model` for OpenVLA-OFT with discrete action tokens."""

    name: Literal["openvla-oft"] = "openvla-oft"
    size: Literal["full", "tiny"] = Field(
        "full", description="full: 7.5 B parameters of a checkpoint; tiny: random weights for CPUs."
    )
    path: str = Field("", description="Directory of a checkpoint in the published layout.")
    cameras: tuple[str, ...] = Field(("agentview",), min_length=1)
    chunk_length: Literal[8] = 8
    unnorm_key: str = Field("", description="Which dataset's action statistics to undo.")
    max_prompt_length: int = Field(
        50, ge=8, le=2048, description="Prompt tokens after padding; LIBERO needs at most 38."
    )
    keep_stop_token: bool = Field(
        False, description="SimpleVLA-RL and official dialect: attend to </s>."
    )
    image_pipeline: Literal["rlinf", "official"] = Field(
        "rlinf", description="How camera pictures become 224 pixel inputs."
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        "none", description="Of the frozen base weights, with LoRA on top (CUDA)."
    )

    def blockers(self) -> list[str]:
        """What stands between this configuration and a start."""
        reasons = []
        if self.size == "full" and not self.path:
            reasons.append("model.path is not set: name the directory of an OpenVLA-OFT checkpoint")
        if self.image_pipeline != "rlinf":
            reasons.append(f'model.image_pipeline = "{self.image_pipeline}" is not built yet')
        if self.path and not Path(self.path).is_dir():
            reasons.append(f"model.path: there is no directory {self.path}")
        if self.quantization != "none":
            reasons.append(f'model.quantization = "{self.quantization}" is not built yet')
        return reasons


PLUGIN = ModelPlugin(
    name="openvla-oft",
    summary="OpenVLA-OFT: DINOv2 + SigLIP + Llama, 8x7 discrete action tokens",
    config=OpenVlaOftConfig,
    factory="vlactl_openvla_oft.policy:make_policy",
    footprint="vlactl_openvla_oft.footprint:footprint",
    api_version=1,
)
