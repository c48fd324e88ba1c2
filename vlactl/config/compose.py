"""From a preset's name and some `--set` to a typed, frozen configuration.

Layers, later ones win: defaults of the typed sections, the preset's bases, the preset, `--set`.
Below the layer that names a published checkpoint lies that checkpoint's dialect, as the catalogue
knows it (see `vlactl.config.catalogue`).
The resolved configuration is plain JSON (`dump`), and reads back as the same object
(`load_resolved`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from vlactl.api import registry
from vlactl.api.plugins import PluginConfig
from vlactl.config import presets
from vlactl.config.catalogue import with_dialect
from vlactl.config.explain import explain, render
from vlactl.config.layers import (
    Leaf,
    Override,
    Tree,
    as_layer,
    grow,
    leaves,
    look_up,
    merge,
    nest,
    origin_of,
    plain,
)
from vlactl.config.run import LoraConfig, RunConfig
from vlactl.config.schema import SECTION_KINDS, known_keys, typed_run
from vlactl.errors import ConfigError, EnvironmentNotReadyError, IntegrityError

DEFAULT = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """A resolved preset.

    Attributes:
        config: the typed configuration.
        provenance: dotted key -> "presets/x.toml:14", "--set" (or another option) or "default".
        preset: its name.
        files: that were read, bases first.
    """

    config: RunConfig
    provenance: Mapping[str, str]
    preset: str
    files: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """A key that differs between two configurations; `sign` is "~", "+" (only after) or "-"."""

    sign: str
    key: str
    before: Any = None
    after: Any = None

    def __str__(self) -> str:
        sides = [render(self.before)] * (self.sign != "+") + [render(self.after)] * (
            self.sign != "-"
        )
        return f"{self.key}: {' -> '.join(sides)}"


def compose(preset: str, overrides: Sequence[Override] = ()) -> Composed:
    """Resolve a preset (a name, or the path of a .toml file) with `--set` overrides on top.

    Raises:
        ConfigError: there is no such preset, or it is wrong; all mistakes are listed.
        EnvironmentNotReadyError: a plugin that it uses is broken.
    """
    found = presets.locate(preset)
    tree, files = presets.read(found)
    tree = merge({"run_name": Leaf(found.name, DEFAULT)}, _with_overrides(tree, overrides))
    config = _build(tree)
    origins = {key: leaf.origin for key, leaf in leaves(tree)}
    provenance = {key: origins.get(key, DEFAULT) for key in flatten(config)}
    return Composed(config=config, provenance=provenance, preset=found.name, files=files)


def override(
    config: RunConfig, overrides: Sequence[Override], allowed: frozenset[str] | None = None
) -> RunConfig:
    """Apply `--set` to a configuration that is already resolved.

    Args:
        config: for example that of a run to be resumed.
        overrides: "key=value", or layers.
        allowed: keys that may change; None = all.

    Raises:
        ConfigError: an override is wrong, or changes a key that may not change.
    """
    tree: Tree = grow(dump(config), lambda _: "the run's config")
    changed = _build(_with_overrides(tree, overrides))
    refused = [
        change
        for change in diff(config, changed)
        if allowed is not None and change.key not in allowed
    ]
    if allowed is not None and refused:
        raise ConfigError(
            "these keys cannot change in a run that has begun:\n" + "\n".join(map(str, refused)),
            hint=f"keys that can: {', '.join(sorted(allowed))}",
        )
    return changed


def dump(config: RunConfig) -> dict[str, Any]:
    """The configuration as JSON types."""
    return config.model_dump(mode="json")


def load_resolved(path: Path) -> RunConfig:
    """Read the `config.json` of a run.

    Raises:
        IntegrityError: it cannot be read, or is not a configuration of this version of vlactl.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(values, dict):
        raise IntegrityError(f"{path} holds no configuration: a table was expected")
    _check_plugins(values, path)
    try:
        return _build(grow(values, lambda _: str(path)))
    except ConfigError as error:
        raise IntegrityError(
            f"{path} does not fit this version of vlactl:\n{error.message}", hint=error.hint
        ) from error


def _check_plugins(values: Mapping[str, Any], path: Path) -> None:
    for section, kind in SECTION_KINDS.items():
        name = values[section].get("name") if isinstance(values.get(section), dict) else None
        if isinstance(name, str) and name not in registry.names(kind):
            raise EnvironmentNotReadyError(
                f'{path.parent} needs the {kind} plugin "{name}", which is not installed',
                hint="install the distribution that it comes from; vlactl plugins list",
            )


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> JSON value, in the order of the sections; lists and empty tables are values."""
    return dict(_flat(dump(config)))


def diff(before: RunConfig, after: RunConfig) -> list[Change]:
    """What changed, by key."""
    old, new = flatten(before), flatten(after)
    changes = []
    for key in {**old, **new}:
        if key not in new:
            changes.append(Change("-", key, before=old[key]))
        elif key not in old:
            changes.append(Change("+", key, after=new[key]))
        elif old[key] != new[key]:
            changes.append(Change("~", key, old[key], new[key]))
    return changes


def _flat(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in table.items():
        key = f"{prefix}{name}"
        flat += _flat(value, f"{key}.") if isinstance(value, dict) and value else [(key, value)]
    return flat


def _with_overrides(tree: Tree, overrides: Sequence[Override]) -> Tree:
    top: Tree = {}
    for each in overrides:
        top = merge(top, as_layer(each))
    return merge(with_dialect(tree, top), top)


# --------------------------------------------------------------------------------------------
# Typing
# --------------------------------------------------------------------------------------------
def _build(tree: Tree) -> RunConfig:
    """Type a merged tree: the plugins that its sections name give the classes."""
    classes: dict[str, type[PluginConfig]] = {}
    for section, kind in SECTION_KINDS.items():
        tree, classes[section] = _choose_plugin(tree, section, kind)
    model = typed_run(classes["env"], classes["model"], classes["algorithm"])
    typed = _validate(tree, model)
    # Back to the plain class, so that configurations compare and pickle independently of plugins.
    return RunConfig.model_validate({name: getattr(typed, name) for name in RunConfig.model_fields})


def _choose_plugin(tree: Tree, section: str, kind: str) -> tuple[Tree, type[PluginConfig]]:
    """The class of a plugin's section; the tree gets the name as the plugin spells it."""
    _, table = look_up(tree, (section,))
    if isinstance(table, Leaf):
        raise ConfigError(
            f"{section} = {render(table.value)} (from {table.origin}): wanted a table",
            hint=f"to choose the {kind}: {section}.name=...",
        )
    choice = (table or {}).get("name")
    if not isinstance(choice, Leaf) or not isinstance(choice.value, str):
        raise ConfigError(
            f"no {kind} is chosen: {section}.name must be a text"
            + (f" (from {origin_of(choice)})" if choice else ""),
            hint=f"{section}.name is one of: {', '.join(registry.names(kind))}",
        )
    try:
        plugin = registry.find(kind, choice.value)
    except ConfigError as error:
        raise ConfigError(
            f"{error.message} ({section}.name from {choice.origin})", hint=error.hint
        ) from error
    # Hyphens and underscores are the same in names; the section's class knows one spelling.
    spelled = replace(choice, value=plugin.name)
    return {**tree, section: {**(table or {}), "name": spelled}}, plugin.config


def _validate(tree: Tree, model: type[RunConfig]) -> RunConfig:
    """Validate; where that fails, try the second reading of the values it failed on."""
    typed, first = _read(tree, model)
    if typed is None:
        typed, second = _read(_reread(tree, first), model)
        # A value that fits neither way is reported as it was written.
        as_written = {look_up(tree, finding["loc"])[0]: finding for finding in first}
        first = [as_written.get(look_up(tree, finding["loc"])[0], finding) for finding in second]
    if typed is None:
        raise explain(first, tree, list(known_keys(model)))
    return typed


def _read(tree: Tree, model: type[RunConfig]) -> tuple[RunConfig | None, list[ErrorDetails]]:
    """The typed tree, or what is wrong with it."""
    try:
        typed = model.model_validate_json(json.dumps(plain(tree), default=str))
    except ValidationError as error:
        return None, error.errors(include_url=False)
    findings = _numbers_from_booleans(tree, typed)
    return (None, findings) if findings else (typed, [])


def _numbers_from_booleans(tree: Tree, typed: RunConfig) -> list[ErrorDetails]:
    """Pydantic reads true as 1; nobody means that."""
    values = flatten(typed)
    return [
        ErrorDetails(
            type="number_type",
            loc=tuple(key.split(".")),
            msg="Input should be a number",
            input=leaf.value,
        )
        for key, leaf in leaves(tree)
        if isinstance(leaf.value, bool)
        and isinstance(values.get(key), int | float)
        and not isinstance(values[key], bool)
    ]


def _reread(tree: Tree, findings: Sequence[ErrorDetails]) -> Tree:
    """Second readings: "none" means nothing, and `--set placement.actor=0` may have meant text."""
    for finding in findings:
        key, node = look_up(tree, finding["loc"])
        if not isinstance(node, Leaf):
            continue
        if node.value == "none":
            tree = merge(tree, nest(key, Leaf(None, node.origin)))
        elif node.text and not isinstance(node.value, str):
            tree = merge(tree, nest(key, Leaf(node.text, node.origin, node.text)))
    return tree


def without_places(config: RunConfig) -> dict[str, Any]:
    """The configuration that goes with a whole model: no adapters, and no place on this disk."""
    values = dump(config)
    values["lora"] = LoraConfig().model_dump(mode="json")
    values["sft"]["data"] = []
    values["model"] |= {"path": ""} if "path" in values["model"] else {}
    return values
