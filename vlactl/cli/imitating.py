"""From the options of `vlactl sft` to a run: new or resumed, planned, checked, supervised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from vlactl.api.contracts import EnvSpec
from vlactl.cli.output import print_table, print_text
from vlactl.cli.training import Request, check_startable
from vlactl.config.compose import compose, load_resolved, override
from vlactl.config.layers import Leaf, nest
from vlactl.config.run import RESUMABLE_KEYS, RunConfig
from vlactl.demonstrations.samples import check_fits, chosen_episodes
from vlactl.errors import EXIT_OK, ConfigError
from vlactl.hub.manifest import resume_point, step_of
from vlactl.hub.models import with_absolute_paths, with_downloaded
from vlactl.launch.hardware import detect
from vlactl.launch.plan import describe, environment_spec, make_plan
from vlactl.launch.progress import make_progress
from vlactl.launch.rundir import (
    CONFIG,
    MODEL,
    create_run_dir,
    lock_run,
    new_run_dir,
    preset_of,
    runs_root,
    write_run,
)
from vlactl.launch.supervise import supervise

SUFFIX = "_sft"


def find_request(
    preset: str,
    data: Sequence[Path],
    sets: Sequence[str],
    resume: Path | None,
    runs_dir: Path | None,
    run_dir: Path | None,
) -> Request:
    """The run that a command line asks for.

    Raises:
        ConfigError: it asks for nothing, for too much, or for what does not exist.
        IntegrityError: a data set is damaged.
    """
    if resume is not None:
        if preset or data or run_dir:
            raise ConfigError(
                "--resume reads preset, data and place of the run that it goes on with",
                hint="leave out --preset, --data and --run-dir",
            )
        return _resumed(resume, sets)
    if not preset:
        raise ConfigError(
            "which preset?", hint="vlactl presets list shows them; their [sft] says how to imitate"
        )
    here = [nest("sft.data", Leaf([str(folder) for folder in data], "--data"))]
    composed = compose(preset, [*sets, *(here if data else ())])
    config = _with_absolute_paths(with_downloaded(composed.config))
    if not config.sft.data:
        raise ConfigError(
            "nothing to learn from",
            hint="--data DIR, which vlactl demos --suite SUITE --per-task 50 --out DIR makes",
        )
    _check(config)
    place = run_dir or new_run_dir(runs_root(runs_dir), f"{config.run_name}{SUFFIX}")
    return Request(config=config, run_dir=place, provenance=dict(composed.provenance))


def _resumed(run: Path, sets: Sequence[str]) -> Request:
    if not (run / CONFIG).is_file():
        raise ConfigError(f"{run} is not a run: it has no {CONFIG}", hint="runs/NAME_sft/TIME")
    config = override(load_resolved(run / CONFIG), sets, RESUMABLE_KEYS)
    if not config.sft.data:
        raise ConfigError(f"{run} is no supervised run", hint=f"vlactl train --resume {run}")
    _check(config)
    return Request(config=_with_absolute_paths(config), run_dir=run, provenance=None)


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    folders = [str(Path(folder).expanduser().resolve()) for folder in config.sft.data]
    return override(with_absolute_paths(config), [nest("sft.data", Leaf(folders, ""))])


def _check(config: RunConfig) -> None:
    """What can be said about data and keys before anything is started."""
    if config.sft.stop_at is not None and not config.sft.eval_every:
        raise ConfigError(
            "sft.stop_at is a success rate, and sft.eval_every = 0 never measures one",
            hint="set sft.eval_every, for instance to 1000",
        )
    sft = config.sft
    blockers = config.model.imitation_blockers(
        label_width=sft.label_width, whole_chunks=sft.whole_chunks
    )
    if blockers:
        raise ConfigError("\n".join(["this policy cannot imitate like that:", *blockers]))
    spec = environment_spec(config)
    folders = list(map(Path, config.sft.data))
    for folder in folders:
        check_fits(folder, spec, config.model.cameras)
    chosen = chosen_episodes(folders, config.sft.demos_per_task)
    if not isinstance(config.sft.demos_per_task, int | None):
        _check_order(folders, chosen, spec)


def _check_order(
    folders: Sequence[Path], chosen: Sequence[Sequence[Mapping[str, Any]]], spec: EnvSpec
) -> None:
    """Numbers for each task go by the order of the data: is it that of the environment's tasks?

    Tasks that the environment does not have come last.
    """
    unknown = len(spec.tasks)
    index_of = {task.instruction: task.index for task in reversed(spec.tasks)}
    first = [
        min((index_of.get(told, unknown) for e in episodes for told in e["tasks"]), default=unknown)
        for episodes in chosen
    ]
    if first != sorted(first):
        order = sorted(range(len(folders)), key=first.__getitem__)
        raise ConfigError(
            "sft.demos_per_task has a number for each task, in the order of the environment's "
            "tasks, and the data is in another order",
            hint=" ".join(f"--data {folders[i]}" for i in order),
        )


def start(request: Request, gpus: int | None) -> int:
    """Plan the run, show the plan and run it; returns the exit code.

    Raises:
        UserError: it cannot be planned or started, or it failed.
    """
    config, run = request.config, request.run_dir
    hardware = detect()
    plan = make_plan(config, hardware, gpus=gpus, simulators=config.sft.eval_every > 0)
    _check_shares(config, len(plan.roles["actor"]))
    check_startable(request, plan)
    if not request.is_new and _nothing_left(run, config):
        return EXIT_OK
    shown = [line for line in describe(plan, run) if line.split()[0] in ("ranks", "run")]
    for line in shown:
        print_text(f" {line}")
    sets = ", ".join(config.sft.data)
    print_table([("data", sets), ("steps", f"{config.sft.steps} of {config.sft.batch_size}")])
    if request.is_new:
        create_run_dir(run)
    with lock_run(run) as taken_over:
        if taken_over:
            print_text(f" {taken_over}")
        write_run(run, config, plan, request.provenance, hardware)
        progress = make_progress(print_text, config.sft.steps, Console())
        code = supervise(run, plan, "sft", config=config, progress=progress)
    _say_what_next(request, code)
    return code


def _check_shares(config: RunConfig, num_actors: int) -> None:
    """Every backward pass of sharded weights is a collective: actors need as many of them."""
    if config.sft.batch_size % num_actors:
        nearest = -(-config.sft.batch_size // num_actors) * num_actors
        raise ConfigError(
            f"{num_actors} actors cannot share sft.batch_size = {config.sft.batch_size} equally",
            hint=f"nearest: --set sft.batch_size={nearest}, or another --gpus",
        )


def _nothing_left(run: Path, config: RunConfig) -> bool:
    """Say so where all steps are done and what was learned is written."""
    checkpoint, _ = resume_point(run)
    if checkpoint is None or step_of(checkpoint) < config.sft.steps:
        return False
    if not (run / MODEL).is_dir():
        return False
    print_text(f" {run} is finished: {run / MODEL}")
    return True


def _say_what_next(request: Request, code: int) -> None:
    run = request.run_dir
    if code != EXIT_OK:
        print_table([("go on", f"vlactl sft --resume {run}")])
        return
    preset, model = preset_of(run) or "NAME", run / MODEL
    print_table(
        [
            ("finished", model),
            ("measure", f"vlactl eval --run {run}"),
            ("improve", f"vlactl train --preset {preset} --set model.path={model}"),
        ]
    )
