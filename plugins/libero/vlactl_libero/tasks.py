"""LIBERO's tasks, read from the installed package's data files without importing its simulator.

A suite is an ordered list of task names; a task's name is also the stem of its BDDL file and of its
file of initial states, and it spells the instruction. "libero_130" is no suite of LIBERO's: it is
all five of them in LIBERO's own order, each task name once.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vlactl.api.contracts import EnvSpec, Task
from vlactl.errors import EnvironmentNotReadyError
from vlactl_libero.init_states import count_states, find_init_file
from vlactl_libero.plugin import CAMERAS, DEFAULT_MAX_EPISODE_STEPS, LiberoConfig

STATE_DIM = 8  # end effector position and axis-angle, two finger joints
ACTION_DIM = 7  # end effector translation and rotation, gripper
CONTROL_HZ = 20

_ALL_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_90", "libero_10")
_SCENE_PREFIX = re.compile(r"[A-Z][A-Z_]*SCENE\d+_")


@dataclass(frozen=True, slots=True, kw_only=True)
class LiberoTask:
    """One task: its suite and name, what the robot is told, and the files that define it."""

    suite: str
    name: str
    instruction: str
    bddl_file: Path
    init_file: Path


def make_spec(config: LiberoConfig) -> EnvSpec:
    """What the configured suite offers; starts no simulator."""
    size = (config.image_size, config.image_size)
    return EnvSpec(
        cameras=dict.fromkeys(CAMERAS, size),
        state_dim=STATE_DIM,
        action_dim=ACTION_DIM,
        max_episode_steps=max_episode_steps(config),
        control_hz=CONTROL_HZ,
        tasks=tuple(
            Task(
                index=index,
                name=task.name,
                instruction=task.instruction,
                num_trials=count_states(task.init_file),
            )
            for index, task in enumerate(suite_tasks(config.suite))
        ),
    )


def max_episode_steps(config: LiberoConfig) -> int:
    """The horizon: the configured one, or the suite's usual length."""
    return config.max_episode_steps or DEFAULT_MAX_EPISODE_STEPS[config.suite]


@cache
def suite_tasks(suite: str) -> tuple[LiberoTask, ...]:
    """The tasks of a suite in LIBERO's order.

    Raises:
        EnvironmentNotReadyError: LIBERO is not installed.
    """
    root = package_root()
    names = _task_names(root)
    suites = _ALL_SUITES if suite == "libero_130" else (suite,)
    first_suite: dict[str, str] = {}
    for member in suites:
        for name in names[member]:
            first_suite.setdefault(name, member)
    return tuple(_task(root, member, name) for name, member in first_suite.items())


def package_root() -> Path:
    """Folder of the installed `libero.libero` package, found without importing it.

    Raises:
        EnvironmentNotReadyError: it is not there.
    """
    spec = importlib.util.find_spec("libero")
    for location in (spec and spec.submodule_search_locations) or ():
        root = Path(location) / "libero"
        if (root / "benchmark" / "libero_suite_task_map.py").is_file():
            return root
    raise EnvironmentNotReadyError(
        "LIBERO is not installed", hint='install it with: pip install "vlactl[libero]"'
    )


def instruction_of(name: str) -> str:
    """The instruction that a task's name spells, without the scene it may start with."""
    return _SCENE_PREFIX.sub("", name, count=1).replace("_", " ")


def _task(root: Path, suite: str, name: str) -> LiberoTask:
    return LiberoTask(
        suite=suite,
        name=name,
        instruction=instruction_of(name),
        bddl_file=root / "bddl_files" / suite / f"{name}.bddl",
        init_file=find_init_file(root / "init_files" / suite, name),
    )


def _task_names(root: Path) -> dict[str, list[str]]:
    """Suite -> task names, from the package's own table: a module of plain data."""
    path = root / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("vlactl_libero._suite_task_map", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names: dict[str, list[str]] = module.libero_task_map
    return names
