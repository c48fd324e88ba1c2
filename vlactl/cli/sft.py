"""`vlactl sft`: its options. What they lead to is in `vlactl.cli.imitating`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sft(
    preset: Annotated[
        str, typer.Option("--preset", "-p", metavar="NAME", help="Preset name or .toml file.")
    ] = "",
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            metavar="DIR",
            help="From `vlactl demos`; may be repeated. With --resume: where it is now.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one key; may be repeated."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="RUN", help="Go on with a run.")
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
    runs_dir: Annotated[
        Path | None,
        typer.Option("--runs-dir", help="Folder of all runs.", show_default="VLACTL_RUNS, or runs"),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            "--run-dir", help="Exactly this folder.", show_default="RUNS/NAME_sft/start time"
        ),
    ] = None,
) -> None:
    """Teach a policy by demonstrations, as the start of reinforcement learning.

    The preset's section [sft] says how. With sft.eval_every it is measured now and then, and
    sft.stop_at ends it at a wanted success rate. The result is the folder `model` of the run.

    \b
    Examples:
      vlactl demos --suite libero-object --per-task 10 --out demos/object
      vlactl sft --preset libero_object_small_grpo --data demos/object
      vlactl train --preset libero_object_small_grpo --set model.path=RUN/model
    """  # noqa: D301
    from vlactl.cli.imitating import find_request, start

    request = find_request(preset, data or (), overrides or (), resume, runs_dir, run_dir)
    raise typer.Exit(start(request, gpus))
