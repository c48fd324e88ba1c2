"""From the options of `vlactl sft` to a run: new or resumed, planned, checked, supervised."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from vlactl.api.contracts import EnvSpec
from vlactl.cli.output import print_table, print_text
from vlactl.cli.training import Request, check_startable
from vlactl.config.compose import compose, load_resolved, override
from vlactl.config.layers import Leaf, Override, nest
from vlactl.config.run import RESUMABLE_KEYS, RunConfig
from vlactl.demonstrations.dataset import INFO, SUITE_TASK
from vlactl.demonstrations.samples import check_fits, chosen_episodes, fingerprint
from vlactl.errors import EXIT_OK, ConfigError, IntegrityError
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
from vlactl.report.atomic import atomic_path

SUFFIX = "_sft"
DATA = "data.sha256"
"""The data sets that a run learns from: a line with fingerprint and folder for each."""


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
        if preset or run_dir:
            raise ConfigError(
                "--resume reads preset and place of the run that it goes on with",
                hint="leave out --preset and --run-dir",
            )
        return _resumed(resume, [*sets, *_named(data)])
    if not preset:
        raise ConfigError(
            "which preset?", hint="vlactl presets list shows them; their [sft] says how to imitate"
        )
    composed = compose(preset, [*sets, *_named(data)])
    config = _with_absolute_paths(with_downloaded(composed.config))
    if not config.sft.data:
        raise ConfigError(
            "nothing to learn from",
            hint="--data DIR, which vlactl demos --suite SUITE --per-task 50 --out DIR makes",
        )
    _check(config)
    place = run_dir or new_run_dir(runs_root(runs_dir), f"{config.run_name}{SUFFIX}")
    return Request(config=config, run_dir=place, provenance=dict(composed.provenance))


def _named(data: Sequence[Path]) -> list[Override]:
    """What `--data` sets."""
    return [nest("sft.data", Leaf([str(folder) for folder in data], "--data"))] if data else []


def _resumed(run: Path, sets: Sequence[Override]) -> Request:
    if not (run / CONFIG).is_file():
        raise ConfigError(f"{run} is not a run: it has no {CONFIG}", hint="runs/NAME_sft/TIME")
    before = load_resolved(run / CONFIG)
    if not before.sft.data:
        raise ConfigError(f"{run} is no supervised run", hint=f"vlactl train --resume {run}")
    config = override(before, sets, RESUMABLE_KEYS | {"sft.data"})
    for folder in config.sft.data:
        if not (Path(folder).expanduser() / INFO).is_file():
            raise ConfigError(
                f"{folder} does not hold the demonstrations of this run any more",
                hint=f"where are they now?  vlactl sft --resume {run} --data FOLDER",
            )
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
    places = _places(folders, config.sft.demos_per_task, spec)
    if not isinstance(config.sft.demos_per_task, int | None):
        _check_order(folders, places)


def _places(
    folders: Sequence[Path], demos_per_task: int | Sequence[int] | None, spec: EnvSpec
) -> list[list[int | None]]:
    """Which task of the environment each task of each data set is, by its instruction.

    Where tasks share one, it is the first that comes behind the task before. None = no task.
    """
    places: list[list[int | None]] = []
    last = -1
    for episodes in chosen_episodes(folders, demos_per_task):
        told = {episode[SUITE_TASK]: episode["tasks"][0] for episode in episodes}
        places.append([])
        for instruction in told.values():
            same = [each.index for each in spec.tasks if each.instruction == instruction]
            place = next((index for index in same if index > last), min(same, default=None))
            places[-1].append(place)
            last = last if place is None else place
    return places


def _check_order(folders: Sequence[Path], places: Sequence[Sequence[int | None]]) -> None:
    """Numbers for each task go by the order of the data: is it that of the environment's tasks?

    Tasks that the environment does not have come last.
    """
    flat = [place for each in places for place in each]
    if all(place is None for place in flat):
        raise ConfigError(
            "sft.demos_per_task has a number for each task of the environment, and the data is of "
            "other tasks",
            hint="the preset of the data's suite, or one number for all tasks",
        )
    order = [math.inf if place is None else place for place in flat]
    if order != sorted(order):
        first = [min((p for p in each if p is not None), default=math.inf) for each in places]
        as_tasks = sorted(range(len(folders)), key=first.__getitem__)
        raise ConfigError(
            "sft.demos_per_task has a number for each task, in the order of the environment's "
            "tasks, and the data is in another order",
            hint="one number for all tasks, or: "
            + " ".join(f"--data {folders[i]}" for i in as_tasks),
        )


def _note_other_tasks(config: RunConfig) -> None:
    """Say where demonstrations are of tasks that the environment does not have."""
    folders = list(map(Path, config.sft.data))
    places = _places(folders, config.sft.demos_per_task, environment_spec(config))
    for folder, each in zip(folders, places, strict=True):
        if unknown := each.count(None):
            print_text(
                f" note: {unknown} of {len(each)} tasks of {folder} are not the environment's"
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
    _note_other_tasks(config)
    if request.is_new:
        create_run_dir(run)
    with lock_run(run) as taken_over:
        if taken_over:
            print_text(f" {taken_over}")
        _claim_data(run, config)
        write_run(run, config, plan, request.provenance, hardware)
        progress = make_progress(print_text, config.sft.steps, Console())
        code = supervise(run, plan, "sft", config=config, progress=progress)
    _say_what_next(request, code)
    return code


def _claim_data(run: Path, config: RunConfig) -> None:
    """Write down which data a run learns from, or check that it is the same as before.

    Raises:
        ConfigError: it is not.
        IntegrityError: a file cannot be read.
    """
    found = [(folder, fingerprint(Path(folder))) for folder in config.sft.data]
    if not (run / DATA).is_file():
        with atomic_path(run / DATA) as temporary:
            temporary.write_text("".join(f"{each}  {folder}\n" for folder, each in found))
        return
    lines = (run / DATA).read_text(errors="replace").splitlines()
    before = [line.partition(" ")[0] for line in lines]
    if not all(re.fullmatch("[0-9a-f]{64}", each) for each in before):
        raise IntegrityError(
            f"{run / DATA} is damaged, so it cannot be told whether the data is still the same",
            hint="delete it if you know that it is, or begin a new run",
        )
    if before != [each for _, each in found]:
        raise ConfigError(
            f"{run} has learned from other demonstrations than are in "
            f"{', '.join(config.sft.data)} now",
            hint=f"where are they?  vlactl sft --resume {run} --data FOLDER; or begin a new run",
        )


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
