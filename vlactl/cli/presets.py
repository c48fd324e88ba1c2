"""`vlactl presets`: what can be trained, with which values, and where they come from."""

from __future__ import annotations

import json
import re
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlactl.cli.output import print_json, print_table, print_text

if TYPE_CHECKING:
    from vlactl.config.compose import Composed

NEXT = """Next:
  vlactl presets show NAME                  every key, its value and where it comes from
  vlactl presets diff NAME OTHER.toml       what differs
  vlactl train --preset NAME --dry-run      what a run would do on this machine
A preset of your own is a .toml file: extends = "NAME", then the keys that differ."""
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_OF_THE_FILE = frozenset({"summary", "run_name"})

app = typer.Typer(
    help="List, show and compare presets.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]


class Format(StrEnum):
    """How `presets show` writes a preset."""

    TABLE = "table"
    TOML = "toml"
    JSON = "json"


@app.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """List, show and compare presets."""
    if context.invoked_subcommand is None:
        list_presets(as_json=False)
        print_text(f"\n{NEXT}")


@app.command("list")
def list_presets(as_json: AsJson = False) -> None:
    """List what can be trained."""
    from vlactl.api.registry import BUILT_IN
    from vlactl.config import presets

    found = [(preset, presets.summary(preset)) for preset in presets.shipped()]
    if as_json:
        print_json(
            [
                {"name": p.name, "summary": s, "source": p.distribution, "path": str(p.path)}
                for p, s in found
            ]
        )
        return
    rows = [
        (p.name, s if p.distribution == BUILT_IN else f"{s}  (from {p.distribution})")
        for p, s in found
    ]
    print_table(rows, header=("preset", "summary"))


@app.command("show")
def show(
    preset: Annotated[str, typer.Argument(help="Name, or path of a .toml file.")],
    overrides: Overrides = None,
    style: Annotated[Format, typer.Option("--format", help="How to write it.")] = Format.TABLE,
    provenance: Annotated[
        bool, typer.Option("--provenance", help="Also say in TOML and JSON where values come from.")
    ] = False,
) -> None:
    """Show every key of a preset; the table says where each value comes from."""
    from vlactl.config.compose import compose, dump, flatten

    composed = compose(preset, overrides or ())
    if style is Format.TABLE:
        values = flatten(composed.config)
        print_table([(key, _cell(values[key]), composed.provenance[key]) for key in values])
    elif style is Format.TOML:
        print_text(_toml(composed, provenance))
    elif provenance:
        values = flatten(composed.config)
        print_json({k: {"value": v, "from": composed.provenance[k]} for k, v in values.items()})
    else:
        print_json(dump(composed.config))


@app.command("diff")
def diff_presets(
    before: Annotated[str, typer.Argument(help="Name, or path of a .toml file.")],
    after: Annotated[str, typer.Argument(help="Name, or path of a .toml file.")],
    as_json: AsJson = False,
) -> None:
    """Show which keys differ between two presets."""
    from vlactl.config.compose import compose, diff

    changes = [
        change
        for change in diff(compose(before).config, compose(after).config)
        if change.key not in _OF_THE_FILE
    ]
    if as_json:
        print_json({c.key: {"before": c.before, "after": c.after} for c in changes})
        return
    texts = {
        "~": lambda c: f"{_cell(c.before)} -> {_cell(c.after)}",
        "+": lambda c: _cell(c.after),
        "-": lambda c: _cell(c.before),
    }
    print_table([(f"{c.sign} {c.key}", texts[c.sign](c)) for c in changes])
    if not changes:
        print_text(" no difference")


@app.command("schema")
def schema(
    built_in: Annotated[
        bool, typer.Option("--built-in", help="Leave out plugins of other distributions.")
    ] = False,
) -> None:
    """Print the JSON schema of preset files, for editors."""
    from vlactl.config.schema import preset_schema

    print_json(preset_schema(built_in_only=built_in))


def _cell(value: Any) -> str:
    from vlactl.config.explain import render

    if value is None:
        return "none"
    return value if isinstance(value, str) and value else render(value)


def _toml(composed: Composed, provenance: bool) -> str:
    """A preset file that resolves to the same configuration."""
    from vlactl.config.compose import dump

    origins = composed.provenance if provenance else {}
    return "\n".join(_toml_table(dump(composed.config), "", origins)).strip()


def _toml_table(table: dict[str, Any], prefix: str, origins: Any) -> list[str]:
    lines = [f"\n[{prefix}]"] if prefix else []
    for key, value in table.items():
        if not isinstance(value, dict):
            origin = origins.get(f"{prefix}.{key}" if prefix else key)
            comment = f"  # {origin}" if origin else ""
            lines.append(f"{_toml_key(key)} = {_toml_value(value)}{comment}")
    for key, value in table.items():
        if isinstance(value, dict):
            name = f"{prefix}.{_toml_key(key)}" if prefix else _toml_key(key)
            lines += _toml_table(value, name, origins)
    return lines


def _toml_key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    # JSON's scalars and lists are TOML's, but for null and characters beyond 16 bits.
    text = json.dumps("none" if value is None else value, ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")
