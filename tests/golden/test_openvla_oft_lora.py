"""OpenVLA-OFT with adapters that PEFT 0.11 wrote, against numbers recorded with them.

Rank, layers and sizes differ from set to set and are read from it.
"""

from __future__ import annotations

import json
import lzma
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from vlactl_openvla_oft import loading, lora
from vlactl_openvla_oft.architecture import VALUE_OUTPUTS, Architecture, TowerConfig, VisionConfig
from vlactl_openvla_oft.model import OpenVlaOft, build, materialise

from vlactl.api.contracts import LoraContext
from vlactl.api.sampling import token_logprobs

TOLERANCE = 1e-4
TEMPERATURE = 1.6
PLACE = {"device": torch.device("cpu"), "dtype": torch.float32, "seed": 0}
LEVELS = {"action_level": "action", "chunk_level": "chunk"}


@dataclass
class Recorded:
    """A recorded checkpoint and an adapter of it, both unpacked."""

    folder: Path
    checkpoint: Path
    adapter: Path
    architecture: Architecture

    def context(self):
        config = json.loads((self.adapter / "adapter_config.json").read_text())
        return LoraContext(rank=config["r"], alpha=config["lora_alpha"], adapter=str(self.adapter))

    def module(self):
        module = build(self.architecture)
        materialise(module, loading.read_state(self.checkpoint, module, **PLACE))
        return module

    def adapted(self):
        module = self.module()
        lora.attach(module, self.context(), **PLACE)
        return module


def unpack(packed, path):
    path.write_bytes(lzma.decompress(packed.read_bytes()))


@pytest.fixture(scope="module")
def recorded(goldens, tmp_path_factory):
    folder = goldens / "openvla_oft"
    checkpoint, adapter = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("adapter")
    shutil.copyfile(folder / "config.json", checkpoint / "config.json")
    unpack(folder / "state_dict.safetensors.xz", checkpoint / "model.safetensors")
    shutil.copyfile(folder / "lora" / "adapter_config.json", adapter / "adapter_config.json")
    packed = folder / "lora" / "adapter_model.safetensors.xz"
    unpack(packed, adapter / "adapter_model.safetensors")
    vision = json.loads((folder / "tiny_vision.json").read_text())
    names = TowerConfig.__dataclass_fields__.keys() - {"stem"}
    towers = {t["role"]: TowerConfig(**{name: t[name] for name in names}) for t in vision["vit"]}
    level = LEVELS[vision["runtime"]["value_type"]]
    architecture = loading.read_architecture(
        checkpoint, vision=VisionConfig(**towers), value_outputs=VALUE_OUTPUTS[level]
    )
    return Recorded(folder, checkpoint, adapter, architecture)


@pytest.fixture(scope="module")
def case(recorded):
    return dict(np.load(recorded.folder / "lora" / "forward_lora_1img.npz"))


@pytest.fixture(scope="module")
def adapted(recorded):
    return recorded.adapted()


def merged(recorded):
    module = recorded.module()
    module.load_state_dict(lora.merged_state(recorded.adapted()))
    return module


def close(actual, expected):
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def check(module: OpenVlaOft, recorded, case):
    """Compare logits of sample 0, which alone are recorded, and what all samples have."""
    inputs = dict(np.load(recorded.folder / "forward_1img.npz"))
    names = ("pixel_values", "input_ids", "attention_mask")
    prediction = module(*(torch.from_numpy(inputs[name]) for name in names))
    bins = torch.from_numpy(inputs["given_tokens"]).flatten(1) - recorded.architecture.action_start
    logprobs, entropy = token_logprobs(prediction.logits, bins, TEMPERATURE)
    close(prediction.logits[: len(case["action_logits"])], case["action_logits"])
    close(logprobs, case["given_logprobs"])
    close(entropy, case["given_entropy"])
    close(prediction.values, case["given_values"])


def test_adapters_beside_the_weights(recorded, adapted, case):
    check(adapted, recorded, case)


def test_adapters_merged_into_the_weights(recorded, case):
    check(merged(recorded), recorded, case)


def test_without_adapters_the_numbers_are_others(recorded, case):
    with pytest.raises(AssertionError):
        check(recorded.module(), recorded, case)


def test_adapted_layers(recorded, adapted, case):
    layers = lora.adapter_config(adapted)["target_modules"]
    assert set(layers) == set(case["lora_module_names"].tolist())
    fresh = LoraContext(rank=1, alpha=1.0, targets="published")
    assert lora.target_layers(recorded.module(), fresh) == set(layers)


def test_what_is_written_is_what_was_read(recorded, adapted):
    stored = loading.read_all(recorded.adapter / "adapter_model.safetensors")
    written = lora.adapter_state(adapted)
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in stored.items())
