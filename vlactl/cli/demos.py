"""`vlactl demos`: its options. What they lead to is in `vlactl.cli.demonstrating`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demos(
    suite: Annotated[str, typer.Option(help="Suite, e.g. libero-object.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the data set; the same command again continues it."),
    ] = None,
    per_task: Annotated[
        int | None, typer.Option(min=1, help="Demonstrations of each task.", show_default="50")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help='Task indices, e.g. "0-3,7"; default: all.')
    ] = None,
    cameras: Annotated[
        str | None, typer.Option(help='What to record, e.g. "agentview,wrist"; default: all.')
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=2, help="Height and width of pictures.")
    ] = None,
    bursts: Annotated[
        float,
        typer.Option(
            "--perturbations",
            "-b",
            min=0,
            max=4,
            help="How often the arm is pushed in 100 steps, about, by a random action held for 3 "
            "to 8 of them; then the expert recovers. At most 4 times in an episode, and never in "
            "a quarter of the episodes.",
        ),
    ] = 2.0,
    seed: Annotated[int, typer.Option(min=0, help="Of initial states and bursts.")] = 0,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes.", show_default="as cores and memory allow"),
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto = draw on a GPU if there is one, or cpu.")
    ] = "auto",
    rates: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Record nothing: how often is the expert successful in the first N official "
            "initial states of each task?",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the table here.")
    ] = None,
    env: Annotated[
        str | None, typer.Option(help="Environment; default: the one that has the suite.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="env.KEY=VALUE, as for `vlactl train`.")
    ] = None,
) -> None:
    """Let a scripted expert demonstrate tasks: a data set for `vlactl sft`, in LeRobot's layout.

    Initial states come from the tasks' own samplers, never from those that policies are evaluated
    on. Only successes are kept. The same seed gives the same data set, whatever the number of
    processes, and an interrupted command goes on when it is given again.

    \b
    Examples:
      vlactl demos --suite libero-object --per-task 50 --out data/object
      vlactl demos --suite libero-spatial --tasks 0,3 --per-task 10 --cameras agentview \
--image-size 128 --out data/two-tasks
      vlactl demos --suite libero-goal --rates 20 --json rates.json
    """  # noqa: D301
    from vlactl.cli.demonstrating import Options, make, show_rates

    options = Options(
        suite=suite,
        tasks=tasks,
        cameras=cameras,
        image_size=image_size,
        bursts=bursts,
        seed=seed,
        workers=workers,
        device=device,
        env=env,
        sets=set_ or [],
        json_file=json_file,
    )
    if rates is not None:
        if any(option is not None for option in (out, per_task, cameras)):
            raise typer.BadParameter(
                "--rates records nothing: leave out --out, --per-task and --cameras"
            )
        raise typer.Exit(show_rates(options, rates))
    if out is None:
        raise typer.BadParameter("where to? --out FOLDER, or --rates N to record nothing")
    raise typer.Exit(make(options, 50 if per_task is None else per_task, out))
