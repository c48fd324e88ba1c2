"""The third-party road: install the example's distribution, list it, check it, train on it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from vlactl.cli.skeleton import write_environment
from vlactl.errors import ConfigError

EXAMPLE = "plugins/example-env"
PIP = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]


def python(folder, *arguments, **environment):
    """Run a module in `folder`; distributions installed in `folder`/site are visible to it."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}
        | environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def vlactl(folder, *arguments, **environment):
    return python(folder, "vlactl.cli.app", *arguments, **environment)


def install(folder, source):
    done = python(folder, *PIP, "--target", folder / "site", source)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.dist
def test_the_example_is_listed_checked_and_trained_on(tmp_path, pytestconfig):
    install(tmp_path, pytestconfig.rootpath / EXAMPLE)
    listed = vlactl(tmp_path, "plugins", "list").stdout
    assert re.search(r"example-reach +0\.1\.0 +vlactl-example-env +ok", listed), listed
    assert "not allowed" in vlactl(tmp_path, "plugins", "list", VLACTL_PLUGINS="").stdout
    assert "example_reach_grpo" in vlactl(tmp_path, "presets", "list").stdout

    checked = vlactl(tmp_path, "plugins", "check", "example-reach")
    assert checked.returncode == 0, checked.stdout
    assert "FAIL" not in checked.stdout
    assert "warn" not in checked.stdout

    options = ["--set", "train.max_steps=1", "--set", "rollout.episodes_per_step=16"]
    options += ["--set", "env.num_envs=2", "--set", "sinks=[]"]
    trained = vlactl(tmp_path, "train", "--preset", "example_reach_grpo", *options)
    assert trained.returncode == 0, trained.stderr
    assert "step 1/1" in trained.stdout + trained.stderr


def test_the_tutorial_shows_the_files_that_are_there(pytestconfig):
    folder = pytestconfig.rootpath / EXAMPLE
    text = (folder / "README.md").read_text()
    blocks = re.findall(r"`([\w./]+)`:\n\n```\w+\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    for name, shown in blocks:
        assert (folder / name).read_text() == shown, name


@pytest.mark.slow
def test_a_new_environment_works_at_once(tmp_path):
    new = ["plugins", "new", "environment", "my-robot"]
    assert "pip install -e ./vlactl-my-robot" in vlactl(tmp_path, *new).stdout
    again = vlactl(tmp_path, *new)
    assert again.returncode == 2
    assert "is there already" in again.stderr

    install(tmp_path, "./vlactl-my-robot")
    tested = python(tmp_path, "pytest", "-q", "-p", "no:cacheprovider", "vlactl-my-robot/tests")
    assert "2 passed" in tested.stdout, tested.stdout
    shown = vlactl(tmp_path, "presets", "show", "my-robot-grpo")
    assert re.search(r"env\.name +my-robot ", shown.stdout), shown.stderr
    files = [path for path in (tmp_path / "vlactl-my-robot").rglob("*") if path.suffix != ".pyc"]
    written = "".join(f"{path} {path.read_text()}" for path in files if path.is_file())
    assert not re.search("example[-_](reach|env)", written)


@pytest.mark.parametrize("name", ["", "My", "a_b", "../x", "a b", "toy", "-a"])
def test_names_that_no_environment_can_have(name, tmp_path):
    with pytest.raises(ConfigError):
        write_environment(name, tmp_path)
    assert list(tmp_path.iterdir()) == []
