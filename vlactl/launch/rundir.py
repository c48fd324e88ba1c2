"""Run directories: one folder per run, owned by one supervisor at a time.

runs/<run_name>/<YYYY-mm-ddTHH-MM-SS>/
  config.json      the resolved configuration; what workers and `--resume` read
  plan.json        the numbers derived from it and the hardware
  provenance.json  where each value of the configuration came from
  machine.json     what the last start ran on: hardware, versions of libraries
  lock.json        who runs it now
  status/          heartbeats, failures and the result of the current attempt
  logs/attempt-N/  output of the N-th start
  nodes/           what machines tell each other, where there are several
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import psutil
from pydantic import TypeAdapter, ValidationError

from vlactl.config import presets
from vlactl.config.compose import dump, load_resolved
from vlactl.config.run import NAME_PATTERN, RunConfig
from vlactl.errors import ConfigError, IntegrityError
from vlactl.launch.hardware import Hardware
from vlactl.launch.plan import Plan
from vlactl.logs import versions
from vlactl.report.atomic import write_json

RUNS_VARIABLE = "VLACTL_RUNS"
EXPORTED_CONFIG = "vlactl_config.json"
"""Beside a whole model: the configuration it is used with."""
MODEL = "model"
"""Folder of a supervised run that its result is in."""
CONFIG, PLAN, PROVENANCE, LOCK = "config.json", "plan.json", "provenance.json", "lock.json"
MACHINE = "machine.json"
_TIME_FORMAT = "%Y-%m-%dT%H-%M-%S"


def runs_root(option: Path | None = None) -> Path:
    """Folder of all runs: the option, else the environment variable VLACTL_RUNS, else ./runs."""
    return option or Path(os.environ.get(RUNS_VARIABLE) or "runs")


def new_run_dir(root: Path, run_name: str) -> Path:
    """Where a run that starts now belongs; nothing is created.

    Raises:
        ConfigError: the name cannot be a folder name.
    """
    if not NAME_PATTERN.fullmatch(run_name):
        raise ConfigError(
            f"run name {run_name[:100]!r} cannot be used",
            hint="1 to 80 letters, digits, '.', '_' or '-', starting with a letter or digit",
        )
    return root / run_name / datetime.now().astimezone().strftime(_TIME_FORMAT)


def create_run_dir(path: Path, way_out: str = "") -> None:
    """Make the folder of a new run; `way_out` replaces the advice when it is taken.

    Raises:
        ConfigError: it is there already with something in it, or cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        occupied = any(path.iterdir())
    except OSError as error:
        raise ConfigError(
            f"cannot create the folder {path}: {error.strerror}",
            hint=way_out or f"choose another place with --runs-dir or {RUNS_VARIABLE}",
        ) from error
    if occupied:
        raise ConfigError(
            f"the folder {path} exists and is not empty",
            hint=way_out or f"go on with it: --resume {path}\nor start another: --run-name NAME",
        )


def write_run(
    run_dir: Path,
    config: RunConfig,
    plan: Plan,
    provenance: Mapping[str, str] | None = None,
    hardware: Hardware | None = None,
) -> None:
    """Write what workers read, and where it came from; a resumed run keeps its provenance."""
    write_json(run_dir / CONFIG, dump(config))
    write_json(run_dir / PLAN, json.loads(plan.to_json()))
    if provenance is not None:
        write_json(run_dir / PROVENANCE, dict(provenance))
    if hardware is not None:
        write_json(run_dir / MACHINE, {"hardware": asdict(hardware), "versions": versions()})


def read_run(run_dir: Path) -> tuple[RunConfig, Plan]:
    """What `write_run` wrote.

    Raises:
        UserError: a file is missing or damaged.
    """
    config = load_resolved(run_dir / CONFIG)
    try:
        return config, Plan.from_json((run_dir / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"cannot read the plan {run_dir / PLAN}: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the last start of a run had: the hardware, and versions of libraries."""

    hardware: Hardware
    versions: dict[str, str]


def read_machine(run_dir: Path) -> Machine | None:
    """What `write_run` wrote about the machine; None for a run that did not record it.

    Raises:
        IntegrityError: the file is damaged.
    """
    path = run_dir / MACHINE
    if not path.is_file():
        return None
    try:
        return TypeAdapter(Machine).validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise IntegrityError(f"{path} is damaged: {where}: {first['msg']}") from error


def preset_of(run_dir: Path) -> str:
    """The preset that a run was started with: each has a summary of its own. "" = unknown."""
    try:
        origin = json.loads((run_dir / PROVENANCE).read_text(encoding="utf-8"))["summary"]
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    file, _, line = str(origin).rpartition(":")
    if not line.isdigit():
        return ""
    name = Path(file).stem
    return name if name in {preset.name for preset in presets.shipped()} else file


def newest_run(root: Path, run_name: str = "*") -> Path | None:
    """The run that was started last, by its name; None where there is none."""
    runs = [config.parent for config in root.glob(f"{run_name}/*/{CONFIG}")]
    return max(runs, key=lambda run: (run.name, run.parent.name), default=None)


@contextmanager
def lock_run(run_dir: Path) -> Iterator[str]:
    """Own a run directory; yields a line about a lock that a dead process left, or "".

    The operating system drops the lock when its holder dies, however it dies.

    Raises:
        ConfigError: another process owns it, or may own it on another machine.
    """
    path = run_dir / LOCK
    with path.open("a+", encoding="utf-8") as file:
        _take(file, path)
        left_by = _owner(file)
        if left_by and not _is_dead(left_by):
            raise ConfigError(
                f"{run_dir} was locked by {_describe(left_by)} and never released",
                hint=f"if that process is gone, delete {path}",
            )
        _write_owner(file)
        try:
            yield f"took over {run_dir}: {_describe(left_by)} died" if left_by else ""
        finally:
            file.truncate(0)


def owner_of(run_dir: Path) -> str:
    """The process that runs it, as far as one can tell from here; "" = none, or one that died."""
    path = run_dir / LOCK
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8") as file:
        owner = _owner(file)
    is_here = owner.get("host") == socket.gethostname()
    if not owner or (is_here and not psutil.pid_exists(int(owner.get("pid", 0)))):
        return ""
    return _describe(owner)


def _take(file: TextIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"{path.parent} is in use by {_describe(_owner(file))}",
            hint="wait for it, stop it, or choose another folder",
        ) from error
    except OSError as error:
        raise ConfigError(
            f"cannot lock {path}: {error.strerror}",
            hint=f"choose another place with --runs-dir or {RUNS_VARIABLE}",
        ) from error


def _owner(file: TextIO) -> dict[str, Any]:
    file.seek(0)
    try:
        owner = json.loads(file.read() or "{}")
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_dead(owner: Mapping[str, Any]) -> bool:
    """Whether a process that no longer holds the lock has died, as far as one can tell from here.

    On this machine the lock says so. A batch system ends a job everywhere before it runs the same
    job again, maybe on other machines.
    """
    job, start = _batch_job()
    was_started_again = bool(job) and owner.get("job") == job and owner.get("start") != start
    return owner.get("host") == socket.gethostname() or was_started_again


def _batch_job() -> tuple[str, str]:
    """Id of the batch job that this process belongs to, and how often the job was requeued."""
    return os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")


def _write_owner(file: TextIO) -> None:
    job, start = _batch_job()
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "job": job,
        "start": start,
    }
    file.truncate(0)
    json.dump(owner, file)
    file.flush()


def _describe(owner: Mapping[str, Any]) -> str:
    if not owner:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')}, started {owner.get('started')}"
