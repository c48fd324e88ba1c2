"""Is this machine ready? Checks of the engine's own needs, and of every plugin's.

Nothing heavy is imported: versions come from package metadata, GPUs from `nvidia-smi`. A finding
belongs to the plugin that made it: a broken simulator concerns only the presets that use it.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet

from vlactl.api import registry
from vlactl.api.plugins import Finding, load_object
from vlactl.config.run import RunConfig
from vlactl.errors import UserError
from vlactl.launch.hardware import GIB, Hardware, detect, readable
from vlactl.launch.memory import saved_bytes
from vlactl.launch.plan import make_plan, model_footprint, spilled_bytes

OK, WARN, FAIL = "ok", "warn", "FAIL"
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where the system keeps shared memory
SHARED_BYTES = 64 * 2**20
_DISK_BASE = 2 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """A finding and whom it concerns: `plugin` is "environment libero", or "" = everybody."""

    finding: Finding
    plugin: str = ""

    def concerns(self, config: RunConfig) -> bool:
        """Whether a run with this configuration meets it."""
        used = (
            ("environment", config.env.name),
            ("model", config.model.name),
            ("algorithm", config.algorithm.name),
            *(("sink", name) for name in config.sinks),
        )
        return not self.plugin or self.plugin in {_label(*plugin) for plugin in used}


def examine(config: RunConfig | None, runs: Path) -> list[Diagnosis]:
    """All findings; the sizes of a given configuration make some of them exact."""
    hardware = detect()
    own = [
        _python(),
        _torch(hardware),
        _machine(hardware),
        _shared_memory(),
        _disk(config, hardware, runs),
        _ffmpeg(),
        *_model(config),
    ]
    return [Diagnosis(finding=finding) for finding in own] + list(_plugins(config))


def blockers(config: RunConfig) -> list[Diagnosis]:
    """Why the configuration cannot be started on this machine, as its plan says."""
    try:
        reasons = make_plan(config, detect(), gpus=None).blockers
    except UserError as error:
        reasons = (error.message,)
    return [
        Diagnosis(finding=Finding(level=FAIL, subject="plan", detail=reason)) for reason in reasons
    ]


def _python() -> Finding:
    version = platform.python_version()
    wanted = metadata.metadata("vlactl")["Requires-Python"] or ""
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding(level=OK, subject="python", detail=version)
    fix = f"make a virtual environment with Python {wanted}"
    return Finding(level=FAIL, subject="python", detail=version, fix=fix)


def _torch(hardware: Hardware) -> Finding:
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        fix = "pip install torch"
        return Finding(level=FAIL, subject="torch", detail="is not installed", fix=fix)
    count = len(hardware.gpus)
    if count and version.endswith("+cpu"):
        return Finding(
            level=FAIL,
            subject="torch",
            detail=f"{version} cannot use the {count} GPUs of this machine",
            fix="reinstall torch with CUDA: https://pytorch.org/get-started",
        )
    found = f"{count} GPUs" if count else "no GPU: runs on the CPU"
    return Finding(level=OK, subject="torch", detail=f"{version}, {found}")


def _machine(hardware: Hardware) -> Finding:
    gpus = "".join(f", {gpu.name} {gpu.memory_bytes / GIB:.0f} GiB" for gpu in hardware.gpus)
    detail = f"{hardware.cores} cores, {hardware.ram_bytes / GIB:.0f} GiB{gpus}"
    return Finding(level=OK, subject="machine", detail=detail)


def _shared_memory() -> Finding:
    """Used by NCCL between GPUs, not by simulators; containers get 64 MiB unless told otherwise."""
    if not SHARED_MEMORY.is_dir():
        return Finding(level=OK, subject="shared memory", detail="is not limited here")
    free = shutil.disk_usage(SHARED_MEMORY).free
    detail = f"{readable(free)} free, ranks need about {readable(SHARED_BYTES)}"
    if free >= SHARED_BYTES:
        return Finding(level=OK, subject=str(SHARED_MEMORY), detail=detail)
    return Finding(
        level=WARN, subject=str(SHARED_MEMORY), detail=detail, fix="docker run --shm-size=8g"
    )


def _disk(config: RunConfig | None, hardware: Hardware, runs: Path) -> Finding:
    folder = next(path for path in (runs.absolute(), *runs.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    need = _DISK_BASE
    if config is not None:
        # One more than stay: the oldest goes only when the newest is complete.
        checkpoints = config.checkpoint.keep + 1
        need += checkpoints * saved_bytes(config, model_footprint(config))
        need += _spilled(config, hardware)
    detail = f"{readable(free)} free in {folder}, a run needs about {readable(need)}"
    if free >= need:
        return Finding(level=OK, subject="disk", detail=detail)
    fix = "free some, or name another place: VLACTL_RUNS, --runs-dir"
    return Finding(level=WARN, subject="disk", detail=detail, fix=fix)


def _spilled(config: RunConfig, hardware: Hardware) -> int:
    """Pictures that memory does not hold; a run that cannot be planned is told elsewhere."""
    try:
        return spilled_bytes(config, make_plan(config, hardware, gpus=None))
    except UserError:
        return 0


def _ffmpeg() -> Finding:
    fix = "pip install --force-reinstall imageio-ffmpeg"
    try:
        import imageio_ffmpeg  # type: ignore[import-untyped]

        program = imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        return Finding(level=WARN, subject="ffmpeg", detail=f"no films: {error}", fix=fix)
    return Finding(level=OK, subject="ffmpeg", detail=program)


def _model(config: RunConfig | None) -> list[Finding]:
    """The weights that a run would start from; the plan tells when they are missing."""
    path = getattr(config.model, "path", "") if config else ""
    is_here = bool(path) and Path(path).is_dir()
    return [Finding(level=OK, subject="model", detail=path)] if is_here else []


def _plugins(config: RunConfig | None) -> Iterator[Diagnosis]:
    for listed in registry.listing():
        plugin = _label(listed.plugin.kind, listed.plugin.name)
        if listed.status == "ok":
            finding = Finding(level=OK, subject=plugin, detail=listed.plugin.version)
        else:
            # Nobody has every service that metrics can be mirrored to.
            is_wanted = listed.plugin.kind != "sink" or _uses_sink(config, listed.plugin.name)
            level = FAIL if is_wanted or not listed.status.startswith("missing") else WARN
            finding = Finding(level=level, subject=plugin, detail=listed.status, fix=listed.install)
        yield Diagnosis(finding=finding, plugin=plugin)
        for finding in _own_checks(listed.plugin.kind, listed.plugin.name):
            yield Diagnosis(finding=finding, plugin=plugin)


def _uses_sink(config: RunConfig | None, name: str) -> bool:
    return config is not None and name in config.sinks


def _own_checks(kind: str, name: str) -> list[Finding]:
    """What a plugin finds itself; one that cannot be loaded finds nothing, its status says why."""
    try:
        descriptor = registry.find(kind, name)
    except UserError:
        return []
    if not descriptor.checks:
        return []
    try:
        check: Callable[[], list[Finding]] = load_object(descriptor.checks)
        return check()
    except Exception as error:
        detail = f"its checks failed: {type(error).__name__}: {error}"
        return [Finding(level=FAIL, subject=_label(kind, name), detail=detail)]


def _label(kind: str, name: str) -> str:
    return f"{kind} {name}"
