"""The contract's checks: built-ins keep it, and each way to break it is found."""

from __future__ import annotations

import pytest

from vlactl.api import conformance, registry

HEAD = """
    {imports}
    from pydantic import BaseModel, ConfigDict, Field
    from vlactl.api.contracts import EnvSpec, Task
    from vlactl.api.plugins import EnvironmentConfig, EnvironmentPlugin

    class Config(EnvironmentConfig):
        name: str = "{name}"
        {fields}

    def spec(config):
        {body}
        tasks = ({tasks})
        return EnvSpec(
            cameras={{"front": (8, 8)}}, state_dim=1, action_dim={action_dim},
            max_episode_steps=8, control_hz=1.0, tasks=tasks,
        )

    PLUGIN = EnvironmentPlugin(
        name="{name}", summary="made up", config=Config, factory="{factory}",
        spec="{name}_module:spec", api_version=1,
    )
"""
TASK = 'Task(index=0, name="a", instruction="do a", num_trials=1),'


@pytest.fixture
def findings(fake_distribution):
    """Install a plugin with something wrong in it, and what the checks say about it."""

    def examine(name, **changes):
        parts = {
            "imports": "",
            "fields": "",
            "body": "",
            "tasks": TASK,
            "action_dim": 1,
            "factory": "nowhere:make",
        }
        source = HEAD.format(name=name, **(parts | changes))
        entry_points = {"vlactl.environments": {name: f"{name}_module:PLUGIN"}}
        fake_distribution(f"{name}-dist", entry_points, {f"{name}_module.py": source})
        found = conformance.check("environment", name)
        assert conformance.failed(found) == any(finding.level == "FAIL" for finding in found)
        return [f"{f.subject}: {f.detail}" for f in found if f.level != "ok"]

    return examine


BUILT_INS = [(kind, name) for kind in registry.KINDS for name in registry.names(kind)]


@pytest.mark.parametrize(("kind", "name"), BUILT_INS)
def test_built_ins_keep_the_contract(kind, name):
    found = conformance.check(kind, name)
    assert not conformance.failed(found), found


def test_a_correct_plugin_passes(findings):
    assert findings("fine") == []


def test_a_descriptor_that_imports_torch_is_named(findings):
    assert findings("heavy", imports="import torch") == [
        "descriptor heavy_module: imports torch",
        "spec: imports torch",
    ]


def test_a_spec_that_imports_something_heavy_is_named(findings):
    pretended = "import sys; sys.modules['jax'] = sys"
    assert findings("slow", body=pretended) == ["spec: imports jax"]


@pytest.mark.parametrize(
    ("number", "changes", "expected"),
    [
        (0, {"tasks": ""}, "spec: tasks: at least one"),
        (1, {"tasks": TASK * 2}, "spec: tasks: indices must be"),
        (2, {"action_dim": 0}, "spec: action_dim"),
        (3, {"body": "return None"}, "spec: returns a NoneType, not an EnvSpec"),
        (4, {"body": "raise ValueError(3)"}, "spec: ValueError: 3"),
        (5, {"factory": "no colon"}, 'factory: "no colon"'),
        (6, {"fields": "path: str"}, "config Config: cannot be built from defaults: path"),
        (7, {"fields": "size: int = 3"}, "config Config: keys without a description: size"),
        (
            8,
            {"fields": "model_config = ConfigDict(extra='allow')"},
            "config Config: Config accepts unknown keys",
        ),
        (
            9,
            {"fields": "model_config = ConfigDict(frozen=False)"},
            "config Config: Config is not frozen",
        ),
    ],
)
def test_each_mistake_is_found(findings, number, changes, expected):
    assert any(line.startswith(expected) for line in findings(f"wrong{number}", **changes))


def test_a_plugin_that_cannot_be_loaded_fails():
    [finding] = conformance.check("environment", "nowhere-to-be-found")
    assert finding.level == "FAIL"
