"""`vlactl train`: its options. What they lead to is in `vlactl.cli.training`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    preset: Annotated[
        str, typer.Option("--preset", "-p", metavar="NAME", help="Preset name or .toml file.")
    ] = "",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one key; may be repeated."),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus",
            metavar="N",
            help="GPUs to use, or CPU ranks where there is no GPU.",
            show_default="all, or one rank",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and start nothing.")
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="RUN|auto",
            help="Go on with a run; auto = the newest (of --preset, or a new one).",
        ),
    ] = None,
    run_name: Annotated[
        str,
        typer.Option("--run-name", help="Folder under runs/.", show_default="the preset's name"),
    ] = "",
    runs_dir: Annotated[
        Path | None,
        typer.Option("--runs-dir", help="Folder of all runs.", show_default="VLACTL_RUNS, or runs"),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", help="Exactly this folder.", show_default="RUNS/NAME/start time"),
    ] = None,
) -> None:
    """Train a policy with a preset, or go on with a run that was stopped.

    Look at the plan first: vlactl train --preset NAME --dry-run
    """
    from vlactl.cli.training import find_request, start
    from vlactl.launch.rundir import runs_root

    sets = [*(overrides or ()), *([f"run_name={run_name}"] if run_name else [])]
    request = find_request(preset, sets, resume, runs_root(runs_dir), run_dir)
    raise typer.Exit(start(request, gpus=gpus, dry_run=dry_run))
