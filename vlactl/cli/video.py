"""`vlactl video`: its options. What they lead to is in `vlactl.cli.filming`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlactl.errors import ConfigError


def video(
    source: Annotated[
        Path | None, typer.Argument(help="Run or evaluation; default: the newest of both.")
    ] = None,
    run: Annotated[Path | None, typer.Option("--run", help="The same as SOURCE.")] = None,
    tasks: Annotated[str | None, typer.Option("--task", "--tasks", help='Tasks, e.g. "5".')] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Failures only.")] = False,
    succeeded: Annotated[bool, typer.Option("--succeeded", help="Successes only.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Films at most.")] = 9,
    size: Annotated[int, typer.Option(min=64, max=1024, help="Pixels of a side.")] = 256,
    suite: Annotated[str | None, typer.Option(help="Play new episodes of this suite.")] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="New episodes per task; default: 1.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", "--model", help="Policy of new episodes.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Policy of new episodes: what it starts from.")
    ] = None,
    greedy: Annotated[
        bool | None, typer.Option("--greedy/--sampled", help="How new episodes are played.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the films.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE.")] = None,
    runs_dir: Annotated[
        Path | None, typer.Option(help="Folder of all runs; default: VLACTL_RUNS, or runs.")
    ] = None,
) -> None:
    """Make films: one MP4 per episode, named by task and outcome, and a grid of all.

    Recorded episodes are played again action by action, so any of them can be filmed afterwards.

    \b
    Examples:
      vlactl video                                           the newest run or evaluation
      vlactl video --run runs/NAME/TIME --task 5 --failed
      vlactl video --suite libero-spatial --task 3 --trials 2 --checkpoint runs/NAME/TIME
    """  # noqa: D301
    if failed and succeeded:
        raise ConfigError(
            "--failed and --succeeded exclude each other", hint="give neither for both"
        )
    new = [suite, checkpoint, preset, trials, greedy]
    is_new = any(option is not None for option in new)
    if (source is not None) + (run is not None) + is_new > 1:
        raise ConfigError(
            "SOURCE, --run and the options of new episodes exclude each other",
            hint="films of recorded episodes: vlactl video RUN_OR_EVALUATION\n"
            "films of new ones: vlactl video --suite SUITE --checkpoint RUN",
        )
    from vlactl.cli.filming import film, newest_recording, play_new

    overrides = set_ or []
    if is_new:
        recording = play_new(
            suite=suite,
            tasks=tasks,
            trials=trials or 1,
            checkpoint=checkpoint,
            preset=preset,
            greedy=greedy,
            overrides=overrides,
            runs_dir=runs_dir,
        )
    else:
        recording = source or run or newest_recording(runs_dir)
    film(
        recording,
        out=out,
        tasks=tasks,
        success=True if succeeded else False if failed else None,
        limit=limit,
        size=size,
        overrides=() if is_new else overrides,
    )
