"""Descriptor and configuration of OpenVLA-OFT. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from vlactl.api.plugins import ModelConfig, ModelPlugin

REGRESSION_HEAD_FILES = (
    "*action_head*checkpoint.pt",
    "*action_head*.safetensors",
    "l1_extras.safetensors",
)
"""Any of them lies beside the weights of a checkpoint with a regression head."""


class OpenVlaOftConfig(ModelConfig):
    """Section `model` for OpenVLA-OFT with discrete action tokens."""

    name: Literal["openvla-oft"] = "openvla-oft"
    size: Literal["full", "small", "tiny"] = Field(
        "full",
        description="full: 7.5 B parameters of a checkpoint; small: 13 M for one GPU, from "
        "`vlactl sft`; tiny: 1.7 M random ones for CPUs.",
    )
    checkpoint: str = Field(
        "",
        description="Published checkpoint to start from, as `vlactl download` lists it; it also "
        "decides the defaults of the keys below.",
    )
    path: str = Field(
        "",
        description="Directory of a checkpoint in the published layout; empty = where "
        "`vlactl download` has put model.checkpoint.",
    )
    head: Literal["tokens", "l1"] = Field(
        "tokens",
        description="tokens: 256-way action tokens; l1: regression with proprioception, for "
        "evaluation only.",
    )
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
        "none", description="Of the frozen weights of the Llama's layers, with LoRA on top."
    )

    def blockers(self) -> list[str]:
        """What stands between this configuration and a start."""
        if self.path and not Path(self.path).is_dir():
            return [
                f"model.path: there is no directory {self.path}; if it has moved: "
                "--set model.path=DIR"
            ]
        if self.size != "full" or self.path:
            return []
        if self.checkpoint:
            return [
                f"the model {self.checkpoint} is not here: vlactl download {self.checkpoint}, "
                "or set model.path to a directory that has it"
            ]
        return ["model.path is not set: name the directory of an OpenVLA-OFT checkpoint"]

    def training_blockers(self, *, has_adapters: bool) -> list[str]:
        """Why such a policy can be evaluated but not trained."""
        reasons = []
        if self.head == "l1" or self.has_regression_head():
            reasons.append(
                'model.head = "l1" predicts actions without probabilities, so there is nothing to '
                "reinforce, and its token head was never trained: "
                "start from a checkpoint with action tokens"
            )
        if self.quantization != "none" and not has_adapters:
            reasons.append(
                f'model.quantization = "{self.quantization}": quantised weights cannot be trained, '
                "adapters on top of them can: set lora.rank, for instance to 32"
            )
        return reasons

    def imitation_blockers(self, *, label_width: float, whole_chunks: bool) -> list[str]:
        """With `</s>` the loss is the published one."""
        if self.keep_stop_token and (label_width or not whole_chunks):
            return [
                "the published loss of OpenVLA-OFT knows whole chunks and single bins only: set "
                "sft.label_width = 0 and sft.whole_chunks = true, or model.keep_stop_token = false"
            ]
        return []

    def has_regression_head(self) -> bool:
        """Whether the directory holds a checkpoint for `head = "l1"`, whatever `head` says."""
        if not self.path:
            return False
        return any(any(Path(self.path).glob(pattern)) for pattern in REGRESSION_HEAD_FILES)


PLUGIN = ModelPlugin(
    name="openvla-oft",
    summary="OpenVLA-OFT: DINOv2 + SigLIP + Llama, 8x7 discrete action tokens",
    config=OpenVlaOftConfig,
    factory="vlactl_openvla_oft.policy:make_policy",
    footprint="vlactl_openvla_oft.footprint:footprint",
    api_version=1,
)
