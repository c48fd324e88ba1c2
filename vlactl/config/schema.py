"""What may be written in a preset: known keys, and a JSON schema for editors.

The sections `env`, `model` and `algorithm` have as many forms as there are plugins.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, cast

from pydantic import BaseModel, TypeAdapter, create_model
from pydantic.json_schema import models_json_schema

from vlactl.api import registry
from vlactl.api.plugins import PluginConfig
from vlactl.config.run import RunConfig
from vlactl.errors import UserError

SECTION_KINDS = {"env": "environment", "model": "model", "algorithm": "algorithm"}
SCHEMA_TITLE = "vlactl preset"


@cache
def typed_run(
    env: type[PluginConfig], model: type[PluginConfig], algorithm: type[PluginConfig]
) -> type[RunConfig]:
    """`RunConfig` with its plugin sections narrowed to these classes."""
    fields: dict[str, Any] = {
        "env": (env, ...),
        "model": (model, ...),
        "algorithm": (algorithm, ...),
    }
    return cast("type[RunConfig]", create_model("TypedRun", __base__=RunConfig, **fields))


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys, in the order of their definition."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from known_keys(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def preset_schema(*, built_in_only: bool = False) -> dict[str, Any]:
    """JSON schema of a preset file: nothing is required, since bases may provide it."""
    sections = {section: _classes(kind, built_in_only) for section, kind in SECTION_KINDS.items()}
    plugin_models = [model for models in sections.values() for model in models]
    models: list[type[BaseModel]] = [RunConfig, *dict.fromkeys(plugin_models)]
    references, schema = models_json_schema(
        [(model, "validation") for model in models],
        title=SCHEMA_TITLE,
        ref_template="#/$defs/{model}",
    )
    definitions = schema["$defs"]
    run = definitions.pop(references[RunConfig, "validation"]["$ref"].rpartition("/")[2])
    for section, classes in sections.items():
        run["properties"][section] = {
            "anyOf": [references[model, "validation"] for model in classes]
        }
    run["properties"]["extends"] = _EXTENDS
    definitions = {name: _partial(body) for name, body in definitions.items()}
    used = _reachable(run, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_partial(run),
        "title": SCHEMA_TITLE,
        "$defs": {name: definitions[name] for name in sorted(used)},
    }


_EXTENDS = TypeAdapter(str | list[str]).json_schema() | {
    "description": "Bases, later ones win: names of shipped presets, or .toml files of this folder."
}


def _classes(kind: str, built_in_only: bool) -> list[type[PluginConfig]]:
    found = []
    for plugin in registry.installed(kind):
        if built_in_only and plugin.distribution != registry.BUILT_IN:
            continue
        try:
            found.append(registry.find(kind, plugin.name).config)
        except UserError:
            continue  # `plugins list` says what is wrong with it
    return found


def _partial(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != "required"}


def _reachable(node: Any, definitions: dict[str, Any], seen: set[str] | None = None) -> set[str]:
    """Names of the definitions that a schema refers to, directly or not."""
    seen = set() if seen is None else seen
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    if isinstance(node, dict) and isinstance(node.get("$ref"), str):
        name = node["$ref"].rpartition("/")[2]
        if name not in seen:
            seen.add(name)
            _reachable(definitions[name], definitions, seen)
    for child in children:
        _reachable(child, definitions, seen)
    return seen
