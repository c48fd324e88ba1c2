"""`vlactl plugins`: what is installed, whether it works, and whether it keeps the contract."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlactl.cli.output import print_json, print_table, print_text
from vlactl.errors import EXIT_ENVIRONMENT, ConfigError

if TYPE_CHECKING:
    from vlactl.api.plugins import Finding
    from vlactl.api.registry import Listed

NEXT = """Next:
  vlactl plugins check NAME              does a plugin keep the contract?
  vlactl plugins new environment NAME    a package to start your own from
  vlactl presets list                    what can be trained with them
The environment variable VLACTL_PLUGINS limits which distributions may be used."""

app = typer.Typer(
    help="List and check environments, models, algorithms and sinks.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """List and check environments, models, algorithms and sinks."""
    if context.invoked_subcommand is None:
        list_plugins(as_json=False)
        print_text(f"\n{NEXT}")


@app.command("list")
def list_plugins(
    as_json: Annotated[bool, typer.Option("--json", help="For machines, with modules.")] = False,
) -> None:
    """List all installed plugins and whether they can be used."""
    from vlactl.api.registry import listing

    listed = listing()
    if as_json:
        print_json([_record(item) for item in listed])
        return
    print_table(
        [
            (
                item.plugin.kind,
                item.plugin.name,
                item.plugin.version,
                item.plugin.source,
                f"{item.status}   {item.install}",
            )
            for item in listed
        ],
        header=("kind", "name", "version", "source", "status"),
    )


@app.command("check")
def check(name: Annotated[str, typer.Argument(help="Name of a plugin.")]) -> None:
    """Check that a plugin keeps the contract; exit 3 if it does not."""
    from vlactl.api import conformance, registry

    kinds = [kind for kind in registry.KINDS if name in registry.names(kind)]
    if not kinds:
        available = sorted({known for kind in registry.KINDS for known in registry.names(kind)})
        raise ConfigError(
            f'no plugin is called "{name}"', hint=f"installed: {', '.join(available)}"
        )
    findings = [(kind, finding) for kind in kinds for finding in conformance.check(kind, name)]
    print_table([_row(kind, finding) for kind, finding in findings])
    if conformance.failed([finding for _, finding in findings]):
        raise typer.Exit(EXIT_ENVIRONMENT)


@app.command("new")
def new(
    kind: Annotated[str, typer.Argument(help='What to write: "environment".')],
    name: Annotated[str, typer.Argument(help="Its name, such as my-robot.")],
    into: Annotated[
        Path, typer.Option("--into", metavar="DIR", help="Folder to write into.")
    ] = Path(),
) -> None:
    """Write a working package to start from: an environment, a preset and a test."""
    from vlactl.cli import skeleton

    if kind not in {"environment", "env"}:
        raise ConfigError(
            f'there is no skeleton for "{kind}"', hint="vlactl plugins new environment NAME"
        )
    folder = skeleton.write_environment(name, into)
    # pip takes a bare folder name for the name of a distribution.
    place = folder if folder.is_absolute() else f"./{folder}"
    print_text(f""" wrote {folder}
Next:
  pip install -e {place}
  vlactl plugins check {name}
  vlactl train --preset {name.replace("-", "_")}_grpo --dry-run""")


def _row(kind: str, finding: Finding) -> tuple[str, ...]:
    fix = f"   fix: {finding.fix}" if finding.fix else ""
    return finding.level, kind, finding.subject, f"{finding.detail}{fix}"


def _record(item: Listed) -> dict[str, str]:
    plugin = item.plugin
    return {
        "kind": plugin.kind,
        "name": plugin.name,
        "version": plugin.version,
        "source": plugin.source,
        "module": plugin.reference,
        "status": item.status,
        "install": item.install,
        "summary": item.summary,
    }
