"""`vlactl plugins new`: a copy of the example environment under a name of the author's choice."""

from __future__ import annotations

import re
from pathlib import Path

import vlactl
from vlactl.api import registry
from vlactl.errors import ConfigError, EnvironmentNotReadyError

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_LONGEST_NAME = 60
_COPIED = frozenset({".md", ".py", ".toml"})


def write_environment(name: str, parent: Path) -> Path:
    """Write a working distribution with an environment, a preset and a test.

    Args:
        name: of the environment, as `env.name` will refer to it.
        parent: existing folder to write into.

    Raises:
        ConfigError: the name cannot be used, or the folder is taken.
    """
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise ConfigError(
            f"{name!r} is no name for an environment",
            hint="use up to 60 lower-case letters, digits and hyphens, such as my-robot",
        )
    if name in registry.names("environment"):
        raise ConfigError(
            f'an environment "{name}" is installed already', hint="choose another name"
        )
    target = parent / f"vlactl-{name}"
    if not parent.is_dir() or target.exists():
        problem = "is there already" if target.exists() else "cannot be made: no such folder"
        raise ConfigError(f"{target} {problem}", hint="--into DIR chooses an existing folder")
    template = _template()
    for source in sorted(template.rglob("*")):
        if source.suffix in _COPIED and source.is_file():
            copy = target / _renamed(source.relative_to(template).as_posix(), name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(_renamed(source.read_text(encoding="utf-8"), name), encoding="utf-8")
    return target


def _template() -> Path:
    """The example's folder: inside the wheel, or beside the engine in a checkout."""
    package = Path(vlactl.__file__).parent
    for folder in (package / "_example_env", package.parent / "plugins/example-env"):
        if folder.is_dir():
            return folder
    raise EnvironmentNotReadyError(
        "this installation came without the example environment", hint="reinstall vlactl"
    )


def _renamed(text: str, name: str) -> str:
    identifier = name.replace("-", "_")
    class_name = "".join(part.capitalize() for part in name.split("-"))
    names = {
        "vlactl-example-env": f"vlactl-{name}",
        "vlactl_example_env": f"vlactl_{identifier}",
        "example-reach": name,
        "example_reach": identifier,
        "test_reach": f"test_{identifier}",
        "ReachConfig": f"{class_name}Config",
        "ReachSimulator": f"{class_name}Simulator",
    }
    return re.sub("|".join(names), lambda match: names[match[0]], text)
