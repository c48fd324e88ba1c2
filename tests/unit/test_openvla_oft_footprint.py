"""Sizes by formula against the network itself, and the published figures."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from vlactl_openvla_oft.architecture import FULL, TINY
from vlactl_openvla_oft.footprint import count, count_adapters, count_used, footprint
from vlactl_openvla_oft.model import build
from vlactl_openvla_oft.plugin import OpenVlaOftConfig

NO_PREFIX = replace(
    TINY.vision.featurizer, class_token=False, reg_tokens=0, init_values=None, global_pool="map"
)
FEWER_KEYS = replace(
    TINY,
    vision=replace(TINY.vision, featurizer=NO_PREFIX),
    language=replace(TINY.language, num_key_value_heads=2),
)


@pytest.mark.parametrize("architecture", [TINY, FEWER_KEYS, FULL], ids=["tiny", "other", "full"])
def test_formula_counts_the_network(architecture):
    parameters = list(build(architecture).parameters())
    assert count(architecture) == sum(p.numel() for p in parameters)
    assert count_used(architecture) == sum(p.numel() for p in parameters if p.requires_grad)


def test_published_figures():
    assert len(build(FULL).state_dict()) == 982
    assert count(FULL) == 7_541_237_184
    assert count_adapters(FULL, 32) == 110_828_288


def test_footprint_follows_the_configuration():
    full, tiny = (OpenVlaOftConfig(size=size) for size in ("full", "tiny"))
    assert footprint(full, 0).parameters == count(FULL)
    assert footprint(full, 32).trainable == count_adapters(FULL, 32)
    assert footprint(tiny, 0).trainable == count_used(TINY)
    two_cameras = full.model_copy(update={"cameras": ("agentview", "wrist")})
    assert footprint(two_cameras, 0).activation_bytes > footprint(full, 0).activation_bytes
    # Measured: 32 samples without recomputation need some 3 GB each.
    assert 2e9 < footprint(full, 0).activation_bytes < 4e9


def test_footprint_imports_no_torch():
    code = "import sys, vlactl_openvla_oft.footprint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_blockers_name_what_is_not_built():
    assert OpenVlaOftConfig(size="tiny").blockers() == []
    assert "model.path" in OpenVlaOftConfig().blockers()[0]
    config = OpenVlaOftConfig(size="tiny", image_pipeline="official", quantization="int8")
    assert len(config.blockers()) == 2
