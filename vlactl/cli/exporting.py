"""From the options of `vlactl export` to a directory: which policy, its process, its model card.

The directory is written under another name beside its place and moved there when it is complete, so
an export that fails leaves nothing that could be taken for one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vlactl import __version__
from vlactl.cli.output import print_table, print_text
from vlactl.cli.policies import find_policy
from vlactl.config.compose import compose, diff, dump, without_places
from vlactl.config.layers import parse_override
from vlactl.config.run import RunConfig
from vlactl.errors import ConfigError, IntegrityError, TrainingError, UserError
from vlactl.hub.manifest import publish, step_of
from vlactl.launch.plan import policy_blockers
from vlactl.launch.processes import ProcessTree, process_tree
from vlactl.launch.rundir import CONFIG, EXPORTED_CONFIG, preset_of, runs_root
from vlactl.launch.status import SUPERVISOR_VARIABLE, read_failures, read_heartbeats
from vlactl.report.atomic import write_json

EXPORT_MODULE = "vlactl.export"
MODEL_CARD = "README.md"
UNKNOWN_PRESET = "NAME"
_LOG = "export.log"
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 5.0
_LOCATIONS = ("model.path", "model.checkpoint", "model.shipped", "lora.adapter")
"""Keys that say where weights come from, which an export answers itself."""
_PHASES = {
    "start": "starting",
    "build": "building the policy",
    "load": "reading the checkpoint",
    "write": "writing",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be exported.

    Attributes:
        config: with the weights' type that is wanted.
        checkpoint: of a run; None = the weights that the configuration names.
        label: for people.
        preset: that the policy can be used with; "" = unknown.
        adapter_only: leave out what the adapters are applied to.
    """

    config: RunConfig
    checkpoint: Path | None
    label: str
    preset: str
    adapter_only: bool

    @property
    def run(self) -> Path | None:
        """Directory of the run that trained the policy."""
        return self.checkpoint and self.checkpoint.parent.parent


def find_request(
    source: Path | None,
    *,
    preset: str | None,
    dtype: str | None,
    adapter_only: bool,
    overrides: Sequence[str],
    runs_dir: Path | None,
) -> Request:
    """Find the policy.

    Raises:
        UserError: there is none, it is damaged, or it cannot be exported like this.
    """
    wanted = [] if dtype is None else [parse_override(f"train.dtype={dtype}", "--dtype")]
    found = find_policy(source, preset, runs_root(runs_dir), [*wanted, *overrides])
    checkpoint = Path(found.checkpoint) if found.checkpoint else None
    if adapter_only and not found.config.lora.rank:
        raise ConfigError(
            f"{found.label} has no adapters: all of its weights were trained",
            hint="leave out --adapter-only",
        )
    if blockers := policy_blockers(found.config):
        raise ConfigError("this policy cannot be exported:\n" + "\n".join(blockers))
    return Request(
        config=found.config,
        checkpoint=checkpoint,
        label=found.label,
        preset=preset or (preset_of(checkpoint.parent.parent) if checkpoint else ""),
        adapter_only=adapter_only,
    )


# --------------------------------------------------------------------------------------------
# The process
# --------------------------------------------------------------------------------------------
def write(request: Request, out: Path) -> None:
    """Export to a new or empty directory, and say what to type next.

    Raises:
        UserError: the directory is taken, the disk is too small, or the export failed.
    """
    place = out.resolve()  # what a link leads to is written, not the link
    _check_place(out, place)
    print_table([("policy", request.label), ("precision", request.config.train.dtype)])
    with _staging(place) as staging:
        _run(request, staging)
        (staging / MODEL_CARD).write_text(model_card(request), encoding="utf-8")
        if not request.adapter_only:
            write_json(staging / EXPORTED_CONFIG, without_places(request.config))
        publish(staging, place)
    files = [path for path in out.iterdir() if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print_text()
    print_table(
        [
            ("written", f"{out}: {len(files)} files, {_readable(size)}"),
            *((what, command) for what, command in _commands(request, str(out), request.preset)),
        ]
    )


def _check_place(out: Path, place: Path) -> None:
    if os.path.ismount(place) or place == Path.cwd():
        raise ConfigError(
            f"{out} is a mount point or the current directory, which an export cannot take the "
            "place of",
            hint=f"choose a folder in it: --out {out / 'policy'}",
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty", hint="choose another --out")


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A directory beside `out`, without what a killed export left, that is gone afterwards."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.partial")
    with _lock(out):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Be the only process that exports to a place; the system drops a dead holder's lock."""
    path = out.with_name(f".{out.name}.export.lock")
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have finished and deleted the file after it was opened here.
            is_held = path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except BlockingIOError:
            is_held = False
        if not is_held:
            raise ConfigError(
                f"another process is exporting to {out}",
                hint="wait for it, or choose another --out",
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _run(request: Request, staging: Path) -> None:
    """Have a process with torch write the weights and what belongs to them."""
    with tempfile.TemporaryDirectory(prefix="vlactl-export-") as folder:
        job = Path(folder)
        write_json(job / CONFIG, dump(request.config))
        command = [*(sys.executable, "-m", EXPORT_MODULE, "--job-dir", str(job))]
        command += ["--out", str(staging)]
        command += [] if request.checkpoint is None else ["--checkpoint", str(request.checkpoint)]
        command += ["--adapter-only"] if request.adapter_only else []
        variables = {SUPERVISOR_VARIABLE: str(os.getpid())}
        with process_tree(command, variables, job / _LOG, grace=_GRACE_SECONDS) as tree:
            phase = _follow(tree, job)
        if tree.exit_code() != 0:
            raise _failure(job, tree.exit_code(), phase)


def _follow(tree: ProcessTree, job: Path) -> str:
    """Tell the phases of the process until it ends; returns the last one."""
    phase = "start"
    while True:
        is_over = tree.exit_code() is not None
        for beat in read_heartbeats(job):
            if beat.phase != phase:
                phase = beat.phase
                print_text(f" {_PHASES[phase]}")
        if is_over:
            return phase
        time.sleep(_POLL_SECONDS)


def _failure(job: Path, exit_code: int | None, phase: str) -> UserError:
    """What the process said that the user can fix, or where it fell."""
    failures = read_failures(job)
    if failures and (error := failures[0].user_error()):
        return error
    how = f"left with exit code {exit_code}"
    advice = ""
    if failures:
        how = f"failed: {failures[0].kind}: {failures[0].message}"
    elif exit_code is not None and exit_code < 0:
        how = f"was killed by signal {-exit_code}"
        advice = "out of memory? all weights are held in main memory\n"
    with tempfile.NamedTemporaryFile(
        "wb", prefix="vlactl-export-", suffix=".log", delete=False
    ) as log:
        log.write((job / _LOG).read_bytes())
    return TrainingError(
        f"the export process {how} (while {_PHASES[phase]})", hint=f"{advice}log: {log.name}"
    )


# --------------------------------------------------------------------------------------------
# What to say about it
# --------------------------------------------------------------------------------------------
def model_card(request: Request) -> str:
    """README of the directory: how it was made, and what can be done with it."""
    config = request.config
    base = _base_model(config)
    preset = Path(request.preset).name  # the folder of a file is nobody else's business
    header = ["library_name: vlactl", "pipeline_tag: robotics", "tags: [reinforcement-learning]"]
    header += [f"base_model: {base}"] if "/" in base else []
    rows = [
        *_training_rows(request),
        ("preset", preset),
        ("environment", " ".join([config.env.name, str(getattr(config.env, "suite", ""))])),
        ("algorithm", config.algorithm.name),
        ("started from", base or config.model.built_in() or "random weights"),
        ("adapters", _adapters(request)),
        ("precision", config.train.dtype),
        ("written by", f"vlactl {__version__}"),
    ]
    table = [f"| {name} | {value.strip()} |" for name, value in rows if value.strip()]
    commands = [command for _, command in _commands(request, "DIR", preset)]
    parts = [
        ["---", *header, "---", "", f"# {config.run_name}", ""],
        ["| | |", "|---|---|", *table, ""],
        ["To use it, with this directory as DIR:", "", "```", *commands, "```", ""],
    ]
    return "\n".join(line for part in parts for line in part)


def _training_rows(request: Request) -> list[tuple[str, str]]:
    """Which training made the policy; nothing for one that was not trained here."""
    if request.checkpoint is None or request.run is None:
        return []
    run = request.run
    return [("run", f"{run.parent.name} {run.name}"), ("steps", str(step_of(request.checkpoint)))]


def _base_model(config: RunConfig) -> str:
    """The model that training started from, without the place where it lay; "" = none."""
    path = str(getattr(config.model, "path", ""))
    return str(getattr(config.model, "checkpoint", "")) or (Path(path).name if path else "")


def _adapters(request: Request) -> str:
    lora = request.config.lora
    if not lora.rank:
        return ""
    place = "this directory" if request.adapter_only else "merged into the weights"
    return f"rank {lora.rank}, {place}"


def _commands(request: Request, directory: str, preset: str) -> list[tuple[str, str]]:
    """What can be done with the directory, with the settings that the preset would not give.

    A whole model knows its configuration.
    """
    place = shlex.quote(directory)
    named = f"--set {'lora.adapter' if request.adapter_only else 'model.path'}={place}"
    usual = f"--preset {shlex.quote(preset or UNKNOWN_PRESET)}"
    options = " ".join([usual, named, *_settings(request)])
    evaluated = options if request.adapter_only else f"--model {place}"
    return [
        ("evaluate", f"vlactl eval {evaluated}"),
        ("train on", f"vlactl train {options}"),
    ]


def _settings(request: Request) -> list[str]:
    """`--set` for what the policy depends on and its run had otherwise than the preset."""
    if not request.preset:
        return []
    try:
        usual = compose(request.preset).config
    except (ConfigError, IntegrityError):  # a preset that has changed or gone since
        return []
    sections = ("model.", "lora.") if request.adapter_only else ("model.",)
    return [
        f"--set {shlex.quote(f'{change.key}={_as_text(change.after)}')}"
        for change in diff(usual, request.config)
        if change.key.startswith(sections) and change.key not in _LOCATIONS
    ]


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _readable(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
