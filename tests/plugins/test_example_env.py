"""The third-party road: install the example's distribution, list it, check it, train on it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

EXAMPLE = "plugins/example-env"


@pytest.fixture(scope="module")
def vlactl(pytestconfig, tmp_path_factory):
    """Install the example into a folder of its own, and run vlactl where it is visible."""
    site, work = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("work")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    install += ["--no-build-isolation", "--target", str(site), str(pytestconfig.rootpath / EXAMPLE)]
    subprocess.run(install, check=True, timeout=120)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def run(*arguments, **extra):
        return subprocess.run(
            [sys.executable, "-m", "vlactl.cli.app", *arguments],
            cwd=work,
            env={**environment, **extra},
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )

    return run


@pytest.mark.slow
@pytest.mark.dist
def test_the_example_is_listed_checked_and_trained_on(vlactl):
    listed = vlactl("plugins", "list").stdout
    assert re.search(r"example-reach +0\.1\.0 +vlactl-example-env +ok", listed), listed
    assert "not allowed" in vlactl("plugins", "list", VLACTL_PLUGINS="").stdout
    assert "example_reach_grpo" in vlactl("presets", "list").stdout

    checked = vlactl("plugins", "check", "example-reach")
    assert checked.returncode == 0, checked.stdout
    assert "FAIL" not in checked.stdout
    assert "warn" not in checked.stdout

    options = ["--set", "train.max_steps=1", "--set", "rollout.episodes_per_step=16"]
    options += ["--set", "env.num_envs=2", "--set", "sinks=[]"]
    trained = vlactl("train", "--preset", "example_reach_grpo", *options)
    assert trained.returncode == 0, trained.stderr
    assert "step 1/1" in trained.stdout + trained.stderr


def test_the_tutorial_shows_the_files_that_are_there(pytestconfig):
    folder = pytestconfig.rootpath / EXAMPLE
    text = (folder / "README.md").read_text()
    blocks = re.findall(r"`([\w./]+)`:\n\n```\w+\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    for name, shown in blocks:
        assert (folder / name).read_text() == shown, name
