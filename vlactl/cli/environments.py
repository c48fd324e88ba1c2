"""The environment's section: from options, for commands that need no preset; its suite in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlactl.errors import ConfigError

if TYPE_CHECKING:
    from vlactl.api.plugins import EnvironmentConfig, EnvironmentPlugin
    from vlactl.config.layers import Tree


def read_section(
    plugin: EnvironmentPlugin,
    options: Mapping[str, tuple[str, Any]],
    overrides: Sequence[str],
) -> EnvironmentConfig:
    """The environment's section from command line options, which map to (key, value or None).

    Raises:
        ConfigError: an option or override is wrong.
    """
    from pydantic import ValidationError

    from vlactl.config.explain import explain
    from vlactl.config.layers import Leaf, merge, parse_override, plain
    from vlactl.config.schema import known_keys

    given: Tree = {k: Leaf(v, origin) for origin, (k, v) in options.items() if v is not None}
    tree: Tree = {"env": {"name": Leaf(plugin.name, "--env"), **given}}
    for argument in overrides:
        tree = merge(tree, parse_override(argument))
    _check_section(tree)
    try:
        return plugin.config.model_validate_json(  # type: ignore[return-value]
            json.dumps(plain(tree)["env"], default=str)
        )
    except ValidationError as error:
        findings = error.errors(include_url=False)
        for finding in findings:
            finding["loc"] = ("env", *finding["loc"])
        raise explain(findings, tree, list(known_keys(plugin.config, "env."))) from error


def suite_of(config: EnvironmentConfig) -> str:
    """The suite of an environment with its perturbation, where it has these; else its name."""
    names = [getattr(config, "suite", config.name), getattr(config, "perturbation", "")]
    return "_".join(filter(None, names))


def _check_section(tree: Tree) -> None:
    strangers = [key for key in tree if key != "env"]
    if strangers or not isinstance(tree["env"], dict):
        raise ConfigError(
            f'this command has no key "{next(iter(strangers), "env")}"',
            hint="for example: --set env.wait_steps=10",
        )
