"""From the options of `vlactl demos` to a data set, or to a table of the expert's successes."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from rich.console import Console

from vlactl import __version__
from vlactl.api import registry
from vlactl.api.contracts import DemonstrationContext, EnvSpec
from vlactl.api.plugins import EnvironmentConfig, EnvironmentPlugin, load_object
from vlactl.cli.environments import read_section, suite_of
from vlactl.cli.output import print_table, print_text
from vlactl.config import presets
from vlactl.config.compose import compose
from vlactl.config.run import RunConfig, SupervisedConfig, read_indices
from vlactl.demonstrations.dataset import INFO, RECORD, Source, write_dataset
from vlactl.demonstrations.make import Setting, make_demonstrations, measure, usable_workers
from vlactl.demonstrations.samples import check_fits
from vlactl.demonstrations.staging import Attempt
from vlactl.errors import EXIT_OK, ConfigError, IntegrityError, UserError
from vlactl.evaluate.results import TABLE_HEADER, summarise, table
from vlactl.launch.hardware import detect
from vlactl.launch.plan import environment_spec
from vlactl.launch.progress import DEMONSTRATIONS, EVALUATION, Progress, make_progress
from vlactl.launch.rundir import create_run_dir, lock_run
from vlactl.launch.status import Beat
from vlactl.report.atomic import check_writable, write_json
from vlactl.rollout.episodes import select_pairs

STAGING = ".staging"
REQUEST = "request.json"
_HEADER = ("task", "instruction", "demonstrations", "attempts", "steps")
_DEVICES = ("auto", "cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """A command line of `vlactl demos`, but for what it is to do."""

    suite: str
    tasks: str | None
    cameras: str | None
    image_size: int | None
    bursts: float
    seed: int
    workers: int | None
    device: str
    env: str | None
    sets: Sequence[str]
    json_file: Path | None


def make(options: Options, per_task: int, out: Path) -> int:
    """Make a data set, or the rest of it; returns the exit code.

    Raises:
        UserError: it cannot be made.
    """
    if options.json_file is not None:
        check_writable(options.json_file, "--json")
    plugin, config, spec = _find(options)
    tasks = _tasks(options, spec)
    cameras = _cameras(options, spec)
    request = _request(options, config, tasks, cameras, per_task)
    if (out / INFO).is_file():
        record = _read_json(out / RECORD, _Record)
        _check_same(out, record["request"], request)
        print_text(f" {out} is complete")
        shutil.rmtree(out / STAGING, ignore_errors=True)
        _show(record, out, options.json_file)
        return EXIT_OK
    staging = _claim(out, request)
    setting = _setting(options, plugin, config, spec, cameras, per_task * len(tasks))
    print_table(
        [
            ("suite", suite_of(config)),
            ("demonstrations", f"{per_task} of each of {len(tasks)} tasks"),
            ("pictures", ", ".join(f"{name} {_size(spec, name)}" for name in cameras)),
            ("processes", setting.num_workers),
            ("folder", out),
        ]
    )
    with lock_run(staging) as taken_over, _interruptible(), _watching(DEMONSTRATIONS) as watch:
        if taken_over:
            watch.note(taken_over)
        attempts = make_demonstrations(setting, tasks, per_task, options.seed, staging, watch)
        if not any(attempt.success for attempt in attempts):
            raise ConfigError(
                f"the expert has never succeeded in {len(attempts)} attempts",
                hint="other tasks may go better: see `vlactl demos --rates 5`",
            )
        record = {
            "vlactl": __version__,
            "suite": suite_of(config),
            "request": request,
            "tasks": _count(attempts, tasks, spec, per_task),
        }
        source = Source(
            environment=plugin.name,
            suite=suite_of(config),
            spec=spec,
            cameras=cameras,
            record=record,
        )
        write_dataset(out, staging, attempts, source)
    shutil.rmtree(staging)
    _show(record, out, options.json_file)
    return EXIT_OK


def show_rates(options: Options, trials: int) -> int:
    """Measure how often the expert succeeds, print and keep the table; returns the exit code.

    Raises:
        UserError: it cannot be measured.
    """
    if options.json_file is not None:
        check_writable(options.json_file, "--json")
    plugin, config, spec = _find(options)
    tasks = _tasks(options, spec)
    select_pairs(
        [replace(task, num_trials=len(task.eval_trials)) for task in spec.tasks],
        tasks,
        range(trials),
    )
    setting = _setting(options, plugin, config, spec, (), trials * len(tasks))
    with _watching(EVALUATION) as watch:
        results = measure(setting, tasks, trials, watch)
    summary = {
        "vlactl": __version__,
        "suite": suite_of(config),
        "policy": "scripted expert",
        "trials": f"official initial states 0-{trials - 1}",
        "env": config.model_dump(mode="json"),
        **summarise(results, spec.tasks),
    }
    print_text(f"\n success rate of the scripted expert, {suite_of(config)}")
    print_table(table(summary), TABLE_HEADER)
    if options.json_file is not None:
        write_json(options.json_file, summary)
    return EXIT_OK


# --------------------------------------------------------------------------------------------
# What is asked for
# --------------------------------------------------------------------------------------------
def _find(options: Options) -> tuple[EnvironmentPlugin, EnvironmentConfig, EnvSpec]:
    """The environment, its section and what it offers.

    Raises:
        UserError: there is none, or an option is wrong.
    """
    if options.device not in _DEVICES:
        raise ConfigError(f'--device {options.device}: choose "auto" or "cpu"')
    candidates = list(_with_demonstrator())
    if options.env is not None:
        chosen = registry.find("environment", options.env)
        candidates = [plugin for plugin in candidates if plugin.name == chosen.name]
    if not candidates:
        names = ", ".join(plugin.name for plugin in _with_demonstrator())
        raise ConfigError(
            f"no demonstrations of {options.env or 'any environment'}: it has no expert",
            hint=f"environments with one: {names or 'none'}",
        )
    first_error: UserError | None = None
    for plugin in candidates:
        try:
            config = _section(plugin, options)
        except ConfigError as error:
            first_error = first_error or error
            continue
        if not config.allow_untested_versions:
            registry.require(plugin)
        return plugin, config, load_object(plugin.spec)(config)
    assert first_error is not None
    raise first_error


def _with_demonstrator() -> Iterator[EnvironmentPlugin]:
    for name in registry.names("environment"):
        with suppress(UserError):  # a broken plugin is no candidate
            plugin = registry.find("environment", name)
            if isinstance(plugin, EnvironmentPlugin) and plugin.demonstrator:
                yield plugin


def _section(plugin: EnvironmentPlugin, options: Options) -> EnvironmentConfig:
    keys = {
        "--suite": ("suite", options.suite),
        "--image-size": ("image_size", options.image_size),
    }
    return read_section(plugin, keys, options.sets)


def _tasks(options: Options, spec: EnvSpec) -> tuple[int, ...]:
    wanted = None if options.tasks is None else read_indices(options.tasks)
    return tuple(dict.fromkeys(task for task, _ in select_pairs(spec.tasks, wanted, [0])))


def _cameras(options: Options, spec: EnvSpec) -> tuple[str, ...]:
    if options.cameras is None:
        chosen = tuple(spec.cameras)
    else:
        chosen = tuple(dict.fromkeys(name.strip() for name in options.cameras.split(",")))
    for name in chosen:
        if name not in spec.cameras:
            raise ConfigError(
                f'--cameras: there is no camera "{name}"',
                hint=f"cameras: {', '.join(spec.cameras)}",
            )
        if any(length % 2 for length in spec.cameras[name]):
            raise ConfigError(
                f"pictures of {_size(spec, name)} pixels cannot be recorded: H.264 needs even sizes"
            )
    return chosen


def _size(spec: EnvSpec, camera: str) -> str:
    height, width = spec.cameras[camera]
    return f"{height} x {width}"


def _setting(
    options: Options,
    plugin: EnvironmentPlugin,
    config: EnvironmentConfig,
    spec: EnvSpec,
    cameras: tuple[str, ...],
    num_episodes: int,
) -> Setting:
    hardware = detect()
    context = DemonstrationContext(
        cameras=cameras,
        device_index=0 if hardware.gpus and options.device == "auto" else -1,
        bursts=options.bursts,
    )
    setting = Setting(plugin=plugin, config=config, spec=spec, context=context, num_workers=1)
    workers = options.workers or usable_workers(setting, hardware, len(spec.tasks), num_episodes)
    return replace(setting, num_workers=workers)


def _request(
    options: Options,
    config: EnvironmentConfig,
    tasks: Sequence[int],
    cameras: Sequence[str],
    per_task: int,
) -> dict[str, Any]:
    """What decides which demonstrations are made."""
    does_not_matter = set(config.incidental_keys - config.picture_keys)
    return {
        "env": config.model_dump(mode="json", exclude=does_not_matter),
        "tasks": list(tasks),
        "per_task": per_task,
        "cameras": list(cameras),
        "bursts": options.bursts,
        "seed": options.seed,
    }


# --------------------------------------------------------------------------------------------
# Folder
# --------------------------------------------------------------------------------------------
def _claim(out: Path, request: dict[str, Any]) -> Path:
    """Make the folder, or check that it was begun by the same command; where attempts are kept."""
    staging = out / STAGING
    if (staging / REQUEST).is_file():
        _check_same(out, _read_json(staging / REQUEST, _Asked), request)
    else:
        create_run_dir(out, way_out="choose another --out")
        write_json(staging / REQUEST, request)
    return staging


def _check_same(out: Path, before: dict[str, Any], request: dict[str, Any]) -> None:
    old, new = _flat(before), _flat(request)
    if differences := [f"{key} (was {old.get(key)})" for key in new if old.get(key) != new[key]]:
        raise ConfigError(
            f"{out} holds other demonstrations: they differ in {', '.join(differences)}",
            hint="continue them with the options they were begun with, or choose another --out",
        )


def _flat(request: dict[str, Any]) -> dict[str, Any]:
    """With the environment's keys beside the others."""
    environment = {f"env.{key}": value for key, value in request["env"].items()}
    return environment | {key: value for key, value in request.items() if key != "env"}


class _Asked(BaseModel):
    env: dict[str, Any]


class _Made(BaseModel):
    task: int
    instruction: str
    wanted: int
    demonstrations: int
    attempts: int
    mean_steps: float | None


class _Record(BaseModel):
    request: _Asked
    tasks: list[_Made]


def _read_json(path: Path, kind: type[BaseModel]) -> dict[str, Any]:
    """What a file says, after a check of what is read from it here."""
    try:
        content = path.read_bytes()
        kind.model_validate_json(content, strict=True)
    except (OSError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise IntegrityError(f"{path} is damaged: {reason}", hint="choose another --out") from error
    value: dict[str, Any] = json.loads(content)
    return value


# --------------------------------------------------------------------------------------------
# What a person sees
# --------------------------------------------------------------------------------------------
class _Watch:
    """Passes on how far the work is."""

    def __init__(self, progress: Progress, phase: str) -> None:
        self._progress, self._phase = progress, phase

    def count(self, done: int, total: int) -> None:
        """Move the bar."""
        beat = Beat(
            rank=0,
            pid=os.getpid(),
            phase=self._phase,
            step=0,
            done=done,
            total=total,
            count=done,
        )
        self._progress.beats([beat])

    def note(self, text: str) -> None:
        """Say it."""
        self._progress.note(f" {text}")


@contextmanager
def _watching(phase: str) -> Iterator[_Watch]:
    progress = make_progress(print_text, 1, Console())
    try:
        yield _Watch(progress, phase)
    finally:
        progress.close()


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print_text(" what is finished is kept; the same command continues", file=sys.stderr)
        raise


def _count(
    attempts: Sequence[Attempt], tasks: Sequence[int], spec: EnvSpec, per_task: int
) -> list[dict[str, Any]]:
    """How many attempts each task took, and what they gave."""
    counted = []
    for task in tasks:
        tried = [attempt for attempt in attempts if attempt.task == task]
        steps = [attempt.num_steps for attempt in tried if attempt.success]
        counted.append(
            {
                "task": task,
                "instruction": spec.tasks[task].instruction,
                "wanted": per_task,
                "demonstrations": len(steps),
                "attempts": len(tried),
                "lost_to_failures": sum(bool(attempt.failure) for attempt in tried),
                "mean_steps": sum(steps) / len(steps) if steps else None,
            }
        )
    return counted


def _show(record: dict[str, Any], out: Path, json_file: Path | None) -> None:
    tasks: list[dict[str, Any]] = record["tasks"]
    rows = [
        (
            each["task"],
            each["instruction"],
            f"{each['demonstrations']}/{each['wanted']}",
            each["attempts"],
            "-" if each["mean_steps"] is None else f"{each['mean_steps']:.0f}",
        )
        for each in tasks
    ]
    print_text()
    print_table(rows, _HEADER)
    if short := [each["task"] for each in tasks if each["demonstrations"] < each["wanted"]]:
        print_text(
            f"\n fewer than wanted of task {', '.join(map(str, short))}: the expert fails too often"
        )
    if json_file is not None:
        write_json(json_file, record)
    print_text()
    print_table([("data set", out), ("train on it", f"vlactl sft {suggestion_for(record, out)}")])


def suggestion_for(record: dict[str, Any], out: Path) -> str:
    """What learns from the data set: preferably a preset that says how to imitate."""
    env = record["request"]["env"]
    fitting = [(name, config) for name, config in _of_suite(env) if _can_learn(config, out)]
    if not fitting:
        return f"--preset NAME --data {out}"
    name, config = min(fitting, key=lambda item: item[1].sft == SupervisedConfig())
    variant = f" --set env.perturbation={env['perturbation']}" if env.get("perturbation") else ""
    fewer = _fewer(config.sft.demos_per_task, record["tasks"])
    return f"--preset {name} --data {out}{variant}{fewer}"


def _fewer(wanted: int | Sequence[int] | None, tasks: Sequence[dict[str, Any]]) -> str:
    """The option that takes what the preset wants of each task, where there is not as much."""
    if wanted is None:
        return ""
    made = {each["task"]: each["demonstrations"] for each in tasks if each["demonstrations"]}
    made = dict(sorted(made.items()))  # as the data set has them
    if isinstance(wanted, int):
        numbers = [min(wanted, count) for count in made.values()]
        is_enough = all(number == wanted for number in numbers)
    else:
        numbers = [min(wanted[task], count) for task, count in made.items()]
        is_enough = numbers == list(wanted)
    if is_enough or not numbers:
        return ""
    shown = numbers[:1] if len(set(numbers)) == 1 else numbers
    return f" --set sft.demos_per_task={','.join(map(str, shown))}"


def _of_suite(env: dict[str, Any]) -> Iterator[tuple[str, RunConfig]]:
    """Shipped presets of the same environment and suite."""
    for preset in presets.shipped():
        with suppress(UserError):  # a broken preset is no suggestion
            config = compose(preset.name).config
            values = config.env.model_dump(mode="json")
            if all(values.get(key) == env.get(key) for key in ("name", "suite")):
                yield preset.name, config


def _can_learn(config: RunConfig, out: Path) -> bool:
    if config.model.blockers():
        return False
    try:
        check_fits(out, environment_spec(config), config.model.cameras)
    except UserError:
        return False
    return True
