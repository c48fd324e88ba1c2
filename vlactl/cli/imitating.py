"""From the options of `vlactl sft` to a run: new or resumed, planned, checked, supervised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from vlactl.cli.output import print_table, print_text
from vlactl.cli.training import Request, cannot_start
from vlactl.config.compose import compose, load_resolved, override
from vlactl.config.layers import Leaf, nest
from vlactl.config.run import RESUMABLE_KEYS
from vlactl.demonstrations.samples import read_info
from vlactl.errors import EXIT_OK, ConfigError
from vlactl.hub.models import with_absolute_paths, with_downloaded
from vlactl.launch.hardware import detect
from vlactl.launch.plan import describe, make_plan
from vlactl.launch.preflight import check_machine
from vlactl.launch.progress import make_progress
from vlactl.launch.rundir import (
    CONFIG,
    create_run_dir,
    lock_run,
    new_run_dir,
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
    here = [nest("sft.data", Leaf([str(folder.resolve()) for folder in data], "--data"))]
    composed = compose(preset, [*sets, *(here if data else ())])
    config = with_absolute_paths(with_downloaded(composed.config))
    if not config.sft.data:
        raise ConfigError(
            "nothing to learn from",
            hint="--data DIR, which vlactl demos --suite SUITE --per-task 50 --out DIR makes",
        )
    for folder in config.sft.data:
        read_info(Path(folder))
    place = run_dir or new_run_dir(runs_root(runs_dir), f"{config.run_name}{SUFFIX}")
    return Request(config=config, run_dir=place, provenance=dict(composed.provenance))


def _resumed(run: Path, sets: Sequence[str]) -> Request:
    if not (run / CONFIG).is_file():
        raise ConfigError(f"{run} is not a run: it has no {CONFIG}", hint="runs/NAME_sft/TIME")
    config = override(load_resolved(run / CONFIG), sets, RESUMABLE_KEYS)
    if not config.sft.data:
        raise ConfigError(f"{run} is no supervised run", hint=f"vlactl train --resume {run}")
    return Request(config=with_absolute_paths(config), run_dir=run, provenance=None)


def start(request: Request, gpus: int | None) -> int:
    """Plan the run, show the plan and run it; returns the exit code.

    Raises:
        UserError: it cannot be planned or started, or it failed.
    """
    config, run = request.config, request.run_dir
    plan = make_plan(config, detect(), gpus=gpus)
    if plan.blockers:
        raise cannot_start(request, plan)
    check_machine(config, plan)
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
        write_run(run, config, plan, request.provenance)
        progress = make_progress(print_text, config.sft.steps, Console())
        code = supervise(run, plan, "sft", config=config, progress=progress)
    _say_what_next(request, code)
    return code


def _say_what_next(request: Request, code: int) -> None:
    run = request.run_dir
    if code != EXIT_OK:
        print_table([("go on", f"vlactl sft --resume {run}")])
        return
    print_table(
        [
            ("finished", run / "model"),
            ("measure", f"vlactl eval --run {run}"),
            ("improve", f"vlactl train --preset NAME --set model.path={run / 'model'}"),
        ]
    )
