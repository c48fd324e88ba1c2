"""`vlactl eval`: its options. What they lead to is in `vlactl.cli.evaluating`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    suite: Annotated[
        str | None, typer.Option(help="Suite, e.g. libero-spatial; default: the run's own.")
    ] = None,
    perturbation: Annotated[
        str | None,
        typer.Option(
            help="LIBERO-PRO's variant of the suite: lan, object, swap, task, with_mug...; none = "
            "the suite itself; default: as the run."
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            min=1, help="Initial states per task, the first of eval.trials; default: all of them."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help='Task indices, e.g. "0-3,7"; default: all of --suite, or those of the run.'
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            "--model",
            "--run",
            help="Run, checkpoint or model directory; default: newest run.",
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Configuration of a model directory, or an untrained policy.")
    ] = None,
    greedy: Annotated[
        bool | None, typer.Option("--greedy/--sampled", help="Default: as the preset says.")
    ] = None,
    repeats: Annotated[
        int, typer.Option("--passes", min=1, help="Episodes per (task, trial).")
    ] = 1,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Devices (CPU ranks without GPUs).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; the same folder again continues.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write eval.json to this file.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, as for `vlactl train`.")
    ] = None,
    runs_dir: Annotated[
        Path | None, typer.Option(help="Folder of all runs; default: VLACTL_RUNS, or runs.")
    ] = None,
) -> None:
    """Measure a policy: every (task, trial) once, a table with 95 % intervals, eval.json.

    \b
    Examples:
      vlactl eval --suite libero-spatial --trials 5
      vlactl eval --suite libero-spatial --perturbation swap --greedy
      vlactl eval --suite libero-90 --greedy --checkpoint runs/NAME/TIME --json out.json
      vlactl eval --preset libero_spatial_tiny_grpo --tasks 0,3 --trials 2
    """  # noqa: D301
    from vlactl.cli.evaluating import find_request, measure

    request = find_request(
        suite=suite,
        perturbation=perturbation,
        tasks=tasks,
        trials=trials,
        repeats=repeats,
        checkpoint=checkpoint,
        preset=preset,
        greedy=greedy,
        overrides=set_ or [],
        runs_dir=runs_dir,
    )
    raise typer.Exit(measure(request, out, gpus, json_file))
