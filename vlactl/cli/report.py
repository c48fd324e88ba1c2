"""`vlactl report`: its options. What they lead to is in `vlactl.cli.reporting`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[
        Path | None, typer.Argument(help="Run of vlactl train; default: the newest run.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The page; default: report.html in the run.")
    ] = None,
    before: Annotated[
        Path | None,
        typer.Option(help="Evaluation to compare with; default: the run's first."),
    ] = None,
    after: Annotated[
        Path | None, typer.Option(help="Evaluation of the result; default: the run's last.")
    ] = None,
    films: Annotated[int, typer.Option(min=0, max=50, help="Films in the page; 0 = none.")] = 4,
    runs_dir: Annotated[
        Path | None, typer.Option(help="Folder of all runs; default: VLACTL_RUNS, or runs.")
    ] = None,
) -> None:
    """Write one HTML file about a run: curves, tables, times, configuration and films.

    It needs no network and no other file, and may be mailed or archived. Films are episodes of the
    last evaluation, or else of the last rollout, played again: as many failures as successes where
    there are enough.

    \b
    Examples:
      vlactl report                                          the newest run
      vlactl report runs/NAME/TIME --out report.html --films 0
      vlactl report runs/NAME/TIME --before evals/SUITE/T1 --after evals/SUITE/T2
    """  # noqa: D301
    from vlactl.cli.reporting import find_run, write_report

    write_report(find_run(run, runs_dir), out=out, before=before, after=after, films=films)
