"""`vlactl export`: its options. What they lead to is in `vlactl.cli.exporting`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to write, new or empty.", metavar="DIR")
    ],
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT",
            help="Run, checkpoint or model directory; default: newest run.",
        ),
    ] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Only the LoRA adapters, in PEFT's format.")
    ] = False,
    preset: Annotated[
        str | None,
        typer.Option(help="Configuration of a model directory; alone: what it starts from."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16 or float32; default: as it was trained.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, as for `vlactl train`.")
    ] = None,
    runs_dir: Annotated[
        Path | None, typer.Option(help="Folder of all runs; default: VLACTL_RUNS, or runs.")
    ] = None,
) -> None:
    """Write a trained policy as a Hugging Face directory, adapters merged into the weights.

    \b
    Examples:
      vlactl export --out my_policy
      vlactl export runs/NAME/TIME --out my_policy
      vlactl export runs/NAME/TIME --out my_adapter --adapter-only
    """  # noqa: D301
    from vlactl.cli.exporting import find_request, write

    request = find_request(
        source,
        preset=preset,
        dtype=dtype,
        adapter_only=adapter_only,
        overrides=set_ or [],
        runs_dir=runs_dir,
    )
    write(request, out)
