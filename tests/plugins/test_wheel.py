"""The wheel works without the checkout: built, unpacked elsewhere and used from /."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel_site(tmp_path_factory, pytestconfig) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", folder, pytestconfig.rootpath]
    subprocess.run([sys.executable, *map(str, build)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    install = ["-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run([sys.executable, *map(str, install)], check=True, capture_output=True)
    return site


def from_root(site: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


@pytest.mark.slow
@pytest.mark.dist
def test_the_wheel_trains_from_anywhere(wheel_site, tmp_path):
    where = from_root(wheel_site, "-c", "import vlactl, vlactl_toy; print(vlactl, vlactl_toy)")
    assert where.count(str(wheel_site)) == 2
    presets = from_root(wheel_site, "-m", "vlactl.cli.app", "presets", "list")
    assert {"libero_10_grpo", "libero_object_tiny_vla_grpo"} <= set(presets.split())
    listed = from_root(wheel_site, "-m", "vlactl.cli.app", "plugins", "list")
    assert {"openvla-oft", "tiny-vla"} <= set(listed.split())
    assert "vlactl (built-in)" in listed
    weights = wheel_site / "vlactl_tiny_vla" / "weights"
    assert {"base", "rl"} <= {path.parent.name for path in weights.glob("*/model.safetensors")}
    options = ["--set", "train.max_steps=1", "--runs-dir", str(tmp_path)]
    from_root(wheel_site, "-m", "vlactl.cli.app", "train", "--preset", "toy_grpo", *options)
    (metrics,) = tmp_path.glob("*/*/metrics.jsonl")
    assert len(metrics.read_text().splitlines()) == 1
    from_root(wheel_site, "-m", "vlactl.cli.app", "report", str(metrics.parent), "--films", "0")
    assert "<h2>Success</h2>" in (metrics.parent / "report.html").read_text()
