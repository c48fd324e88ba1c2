"""Sizes by formula against the network itself, and the published figures."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from vlactl_openvla_oft import lora
from vlactl_openvla_oft.architecture import FULL, SMALL, TINY, VALUE_OUTPUTS
from vlactl_openvla_oft.footprint import count, count_adapters, count_head, count_used, footprint
from vlactl_openvla_oft.model import build
from vlactl_openvla_oft.plugin import OpenVlaOftConfig
from vlactl_openvla_oft.policy import OpenVlaOftPolicy

from vlactl.api.contracts import LoraContext
from vlactl.api.plugins import FootprintContext

NO_PREFIX = replace(
    TINY.vision.featurizer, class_token=False, reg_tokens=0, init_values=None, global_pool="map"
)
FEWER_KEYS = replace(
    TINY,
    vision=replace(TINY.vision, featurizer=NO_PREFIX),
    language=replace(TINY.language, num_key_value_heads=2),
)


@pytest.mark.parametrize(
    "architecture", [TINY, SMALL, FEWER_KEYS, FULL], ids=["tiny", "small", "other", "full"]
)
def test_formula_counts_the_network(architecture):
    parameters = list(build(architecture).parameters())
    assert count(architecture) == sum(p.numel() for p in parameters)
    assert count_used(architecture) == sum(p.numel() for p in parameters if p.requires_grad)


def test_published_figures():
    assert len(build(FULL).state_dict()) == 982
    assert count(FULL) == 7_541_237_184
    assert count_adapters(FULL, 32, only_used=False) == 110_828_288
    assert count_head(replace(FULL, value_outputs=8)) == 2_164_352
    assert count_head(replace(FULL, value_outputs=1)) == 2_163_456


@pytest.mark.parametrize("architecture", [TINY, FULL], ids=["tiny", "full"])
@pytest.mark.parametrize("values", ["none", "chunk", "action"])
@pytest.mark.parametrize("targets", ["effective", "published"])
def test_footprint_counts_adapters(architecture, values, targets):
    module = build(replace(architecture, value_outputs=VALUE_OUTPUTS[values]))
    context = LoraContext(rank=32, alpha=32.0, targets=targets)
    lora.inject(module, lora.target_layers(module, context), context)
    size = footprint(
        OpenVlaOftConfig(size="full" if architecture is FULL else "tiny"),
        FootprintContext(lora_rank=32, lora_targets=targets, values=values),
    )
    parameters = list(module.parameters())
    assert size.parameters == sum(p.numel() for p in parameters)
    assert size.trainable == sum(p.numel() for p in parameters if p.requires_grad)


def test_footprint_follows_the_configuration():
    full, tiny = (OpenVlaOftConfig(size=size) for size in ("full", "tiny"))
    context = FootprintContext()
    assert footprint(full, context).parameters == count(FULL)
    assert footprint(tiny, context).trainable == count_used(TINY)
    two_cameras = full.model_copy(update={"cameras": ("agentview", "wrist")})
    kept = footprint(full, context).activation_bytes
    assert footprint(two_cameras, context).activation_bytes > kept
    # Measured: 32 samples without recomputation need some 3 GB each.
    assert 2e9 < kept < 4e9
    recomputed = footprint(full, FootprintContext(activation_checkpointing="full")).activation_bytes
    assert recomputed < kept / 10


@pytest.mark.parametrize(("kind", "gigabytes"), [("none", 15.1), ("int8", 8.6), ("nf4", 5.5)])
def test_footprint_of_quantised_weights(kind, gigabytes):
    size = footprint(OpenVlaOftConfig(quantization=kind), FootprintContext())
    assert size.parameters * size.bytes_per_parameter == pytest.approx(gigabytes * 1e9, rel=0.02)


@pytest.mark.parametrize("values", ["none", "action"])
@pytest.mark.parametrize("architecture", [TINY, FULL], ids=["tiny", "full"])
def test_footprint_knows_the_largest_unit_that_is_sharded(architecture, values):
    module = build(replace(architecture, value_outputs=VALUE_OUTPUTS[values]))
    units = OpenVlaOftPolicy(module, None, None, "any").shard_units()
    sizes = [sum(p.numel() for p in unit.parameters()) for unit in units]
    rest = sum(p.numel() for p in module.parameters()) - sum(sizes)
    config = OpenVlaOftConfig(size="full" if architecture is FULL else "tiny")
    found = footprint(config, FootprintContext(values=values)).largest_unit
    assert found == max(*sizes, rest)


@pytest.mark.parametrize("lora_rank", [0, 32])
def test_footprint_of_recomputation(lora_rank):
    nothing, selective, full = (
        footprint(
            OpenVlaOftConfig(),
            FootprintContext(activation_checkpointing=mode, lora_rank=lora_rank),
        ).activation_bytes
        for mode in ("none", "selective", "full")
    )
    assert full < selective < nothing
    assert 0.4 < selective / nothing < 0.95


@pytest.mark.parametrize(("mode", "samples", "gigabytes"), [("full", 32, 23), ("none", 16, 66)])
def test_footprint_is_what_an_h100_measured(mode, samples, gigabytes):
    """Peak memory of updates with adapters of rank 32."""
    size = footprint(
        OpenVlaOftConfig(), FootprintContext(activation_checkpointing=mode, lora_rank=32)
    )
    adapters = 3 * 2 * size.trainable  # gradients and two moments
    total = size.parameters * 2 + adapters + samples * size.activation_bytes
    assert total / 1e9 == pytest.approx(gigabytes, rel=0.05)


def test_values_are_as_wide_as_the_policy_computes():
    narrow, wide = (
        footprint(OpenVlaOftConfig(), FootprintContext(bytes_per_value=n)) for n in (2, 4)
    )
    assert wide.activation_bytes == 2 * narrow.activation_bytes
    assert wide.bytes_per_parameter == 2 * narrow.bytes_per_parameter


def test_footprint_imports_no_torch():
    code = "import sys, vlactl_openvla_oft.footprint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_blockers_tell_the_way_out(tmp_path):
    assert OpenVlaOftConfig(size="tiny").blockers() == []
    assert OpenVlaOftConfig(path=str(tmp_path)).blockers() == []
    assert "model.path" in OpenVlaOftConfig().blockers()[0]
    assert "vlactl download some-model" in OpenVlaOftConfig(checkpoint="some-model").blockers()[0]
    missing = str(tmp_path / "missing")
    assert missing in OpenVlaOftConfig(size="tiny", path=missing).blockers()[0]


def test_regression_heads_are_not_trained():
    assert OpenVlaOftConfig().training_blockers(has_adapters=False) == []
    (reason,) = OpenVlaOftConfig(head="l1").training_blockers(has_adapters=False)
    assert "nothing to reinforce" in reason
    quantized = OpenVlaOftConfig(quantization="nf4")
    assert "set lora.rank" in quantized.training_blockers(has_adapters=False)[0]
    assert quantized.training_blockers(has_adapters=True) == []


@pytest.mark.parametrize("file", ["action_head--50000_checkpoint.pt", "l1_extras.safetensors"])
def test_regression_heads_are_not_trained_as_tokens_either(tmp_path, file):
    config = OpenVlaOftConfig(path=str(tmp_path))
    assert config.training_blockers(has_adapters=False) == []
    (tmp_path / file).touch()
    expected = OpenVlaOftConfig(head="l1").training_blockers(has_adapters=False)
    assert config.training_blockers(has_adapters=False) == expected
