"""`vlactl doctor`: is this machine ready, and if not, what to type."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlactl.cli.output import print_json, print_table, print_text
from vlactl.errors import EXIT_ENVIRONMENT

if TYPE_CHECKING:
    from vlactl.launch.doctor import Diagnosis


def doctor(
    preset: Annotated[
        str, typer.Option("--preset", "-p", metavar="NAME", help="Check what this preset needs.")
    ] = "",
    runs_dir: Annotated[
        Path | None, typer.Option("--runs-dir", help="Where runs will be written.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Check this machine; exit code 3 when something fails that the preset needs."""
    from vlactl.config.compose import compose
    from vlactl.hub.models import with_downloaded
    from vlactl.launch.doctor import FAIL, blockers, examine
    from vlactl.launch.rundir import runs_root

    config = with_downloaded(compose(preset).config) if preset else None
    found = examine(config, runs_root(runs_dir))
    found += [] if config is None else blockers(config)
    serious = [
        diagnosis
        for diagnosis in found
        if config is not None and diagnosis.finding.level == FAIL and diagnosis.concerns(config)
    ]
    if as_json:
        print_json(
            {
                "ready": not serious,
                "findings": [asdict(each.finding) | {"plugin": each.plugin} for each in found],
            }
        )
    else:
        print_table(map(_row, found))
        print_text(_verdict(preset, serious))
    if serious:
        raise typer.Exit(EXIT_ENVIRONMENT)


def _row(diagnosis: Diagnosis) -> tuple[str, ...]:
    finding = diagnosis.finding
    return (
        finding.level.ljust(4),
        f"{finding.subject} {finding.detail}".rstrip(),
        f"fix: {finding.fix}" if finding.fix else "",
    )


def _verdict(preset: str, serious: list[Diagnosis]) -> str:
    if not preset:
        return " next: vlactl doctor --preset NAME, or vlactl presets list"
    if serious:
        return f" {preset} cannot run here yet: {len(serious)} to fix"
    return f" {preset} can run here: vlactl train --preset {preset}"
