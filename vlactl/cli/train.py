"""`vlactl train`: its options. What they lead to is in `vlactl.cli.machines`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Launcher(StrEnum):
    """Who starts the processes."""

    LOCAL = "local"
    SLURM = "slurm"


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
    nnodes: Annotated[
        int, typer.Option("--nnodes", metavar="N", help="Machines that run it together.")
    ] = 1,
    node_rank: Annotated[
        int | None,
        typer.Option(
            "--node-rank", metavar="R", help="Of this machine; 0 leads.", show_default="0"
        ),
    ] = None,
    rdzv: Annotated[
        str,
        typer.Option(
            "--rdzv", metavar="HOST:PORT", help="Node 0, as others reach it, and a free port on it."
        ),
    ] = "",
    interface: Annotated[
        str,
        typer.Option(
            "--interface",
            metavar="NAME",
            help="Network interface of gloo and NCCL.",
            show_default="the way to HOST",
        ),
    ] = "",
    launcher: Annotated[
        Launcher,
        typer.Option(
            "--launcher", help="slurm = write a batch script for sbatch instead of starting."
        ),
    ] = Launcher.LOCAL,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            "--sbatch",
            metavar="OPTION",
            help='Option for Slurm, e.g. "--partition=gpu"; may be repeated.',
        ),
    ] = None,
) -> None:
    """Train a policy with a preset, or go on with a run that was stopped.

    Look at the plan first: vlactl train --preset NAME --dry-run

    Several machines: the same command on each, with --nnodes, --rdzv, its own --node-rank, and a
    --run-dir on a disk that all of them share.

    SIGTERM, to any machine or rank, saves and ends the run: exit code 75, start it again with
    --resume; a second one within 5 s ends it at once. Ctrl-C ends it without saving. Exit codes: 0
    finished, 1 bug in vlactl, 2 usage, 3 this machine is not ready, 4 training failed, 5 damaged
    file, 75 saved after SIGTERM, 130 Ctrl-C.
    """
    from vlactl.cli.machines import Options, run

    sets = [*(overrides or ()), *([f"run_name={run_name}"] if run_name else [])]
    options = Options(
        preset=preset,
        sets=sets,
        resume=resume,
        runs_dir=runs_dir,
        run_dir=run_dir,
        gpus=gpus,
        nnodes=nnodes,
        node_rank=node_rank,
        rdzv=rdzv,
        interface=interface,
        sbatch=sbatch or (),
    )
    raise typer.Exit(run(options, dry_run=dry_run, slurm=launcher is Launcher.SLURM))
