"""Rules that import-linter cannot express."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import vlactl

PACKAGE = Path(vlactl.__file__).parent
HEAVY = {"torch", "transformers", "mujoco", "gymnasium", "robosuite", "timm", "tensorboard"}
HEAVY |= {"peft", "huggingface_hub", "PIL"}
MAY_IMPORT_TORCH_DISTRIBUTED = {
    "distributed/exchange.py",
    "distributed/messages.py",
    "distributed/roles.py",
    "distributed/sharding.py",
    "train/checkpoint.py",
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_process_groups_are_used_in_one_place():
    users = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(name.startswith("torch.distributed") for name in imported(path))
    }
    assert users == MAY_IMPORT_TORCH_DISTRIBUTED


@pytest.mark.parametrize(
    "module",
    [
        "vlactl.cli.app",
        "vlactl.launch.supervise",
        "vlactl.api.simulators",
        "vlactl.evaluate.films",
        "vlactl.cli.downloading",
        "vlactl.cli.exporting",
        "vlactl.cli.demonstrating",
        "vlactl.demonstrations.player",
        "vlactl.demonstrations.samples",
        "vlactl.cli.comparing",
        "vlactl_libero.plugin",
        "vlactl_openvla_oft.plugin",
        "vlactl_policy_gradient.config",
        "vlactl_grpo.plugin",
        "vlactl_ppo.plugin",
        "vlactl_rft.plugin",
        "vlactl_toy.plugin",
    ],
)
def test_no_heavy_library_is_imported_by(module):
    code = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(json.loads(out.stdout))


def test_the_loop_is_readable_in_one_sitting():
    assert len((PACKAGE / "train" / "loop.py").read_text().splitlines()) <= 350


def test_no_module_prints():
    for path in PACKAGE.rglob("*.py"):
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not any(getattr(call.func, "id", "") == "print" for call in calls), path
