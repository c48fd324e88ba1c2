"""`vlactl download`: its options. What they lead to is in `vlactl.cli.downloading`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def download(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...", help="Of the list, or any OWNER/NAME[@REVISION] of the hub."
        ),
    ] = None,
    preset: Annotated[
        str, typer.Option("--preset", "-p", metavar="NAME", help="The model of this preset.")
    ] = "",
    endpoint: Annotated[
        str,
        typer.Option(metavar="URL", help="A mirror of the hub.", show_default="HF_ENDPOINT"),
    ] = "",
    destination: Annotated[
        Path | None,
        typer.Option(
            "--dest", metavar="DIR", help="Exactly this folder.", show_default="below VLACTL_HOME"
        ),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Use no network: is the model here?")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read what is here again and compare the hashes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Bring a published model here, or list what there is.

    \b
    Examples:
      vlactl download
      vlactl download --preset libero_10_grpo
      vlactl download openvla/openvla-7b --endpoint https://a-mirror.example
    """  # noqa: D301
    from vlactl.cli.downloading import fetch, find_names, show_known, verify_all

    wanted = find_names(names or (), preset, destination)
    if verify:
        verify_all(wanted, destination, as_json=as_json)
    elif wanted:
        fetch(wanted, endpoint, destination, offline=offline, as_json=as_json)
    else:
        show_known(as_json=as_json)
