"""Which plugins are installed, which may be used, and what is wrong with the others.

Plugins are found through entry points. An entry point is loaded only when it is listed or wanted,
so a broken plugin harms nobody but the preset that names it. Built-ins take the same road: they
are the entry points of the distribution `vlactl`. On shared machines the environment variable
`VLACTL_PLUGINS` names the distributions that may be used (comma-separated; empty = built-ins
only; unset = all).
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from vlactl.api.contracts import API_VERSION
from vlactl.api.plugins import (
    AlgorithmConfig,
    AlgorithmPlugin,
    Descriptor,
    EnvironmentConfig,
    EnvironmentPlugin,
    ModelConfig,
    ModelPlugin,
    PluginConfig,
    Requirement,
    SinkPlugin,
    load_object,
)
from vlactl.errors import ConfigError, EnvironmentNotReadyError, UserError

BUILT_IN = "vlactl"
ALLOW_VARIABLE = "VLACTL_PLUGINS"
PRESET_GROUP = "vlactl.presets"
KINDS: dict[str, type[Descriptor]] = {
    "environment": EnvironmentPlugin,
    "model": ModelPlugin,
    "algorithm": AlgorithmPlugin,
    "sink": SinkPlugin,
}
_CONFIG_BASES: dict[str, type[PluginConfig]] = {
    "environment": EnvironmentConfig,
    "model": ModelConfig,
    "algorithm": AlgorithmConfig,
    "sink": PluginConfig,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """An entry point of some distribution, not loaded yet.

    Attributes:
        kind: key of `KINDS`.
        name: of the entry point.
        reference: "module:attribute" of the descriptor.
        distribution: that registered it.
        version: of that distribution.
    """

    kind: str
    name: str
    reference: str
    distribution: str
    version: str

    @property
    def source(self) -> str:
        """The distribution as people read it."""
        return f"{BUILT_IN} (built-in)" if self.distribution == BUILT_IN else self.distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A plugin with its verdict; `install` is the command that cures a missing requirement."""

    plugin: Installed
    status: str
    install: str = ""
    summary: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PresetFolder:
    """A folder of presets that a distribution ships."""

    distribution: str
    path: Path


class _Unusable(Exception):  # noqa: N818 - a verdict on its way to a status line, not an error
    """Why a plugin cannot be used, as its status line says it."""


# --------------------------------------------------------------------------------------------
# Entry points
# --------------------------------------------------------------------------------------------
def installed(kind: str) -> list[Installed]:
    """All entry points of a kind, built-ins first, none of them loaded."""
    entries = [
        Installed(
            kind=kind,
            name=entry.name,
            reference=entry.value,
            distribution=_distribution(entry),
            version=(entry.dist.version if entry.dist else "") or "?",
        )
        for entry in metadata.entry_points(group=KINDS[kind].group)
    ]
    return sorted(entries, key=lambda e: (e.distribution != BUILT_IN, e.name, e.distribution))


def names(kind: str) -> list[str]:
    """Names that `find` may know, without loading anything."""
    return sorted({plugin.name for plugin in installed(kind) if is_allowed(plugin.distribution)})


def is_allowed(distribution: str) -> bool:
    """Whether `VLACTL_PLUGINS` lets this distribution's plugins in."""
    allowed = os.environ.get(ALLOW_VARIABLE)
    if allowed is None or distribution == BUILT_IN:
        return True
    return canonicalize_name(distribution) in map(canonicalize_name, _split(allowed))


def preset_folders() -> Iterator[PresetFolder]:
    """Folders with presets of all allowed distributions, built-ins first."""
    entries = sorted(
        metadata.entry_points(group=PRESET_GROUP), key=lambda e: _distribution(e) != BUILT_IN
    )
    for entry in entries:
        distribution = _distribution(entry)
        package = _package_folder(entry.value)
        if package is None or not is_allowed(distribution):
            continue
        candidates = [package / "_presets", package / "presets"]
        if distribution == BUILT_IN:
            candidates.append(package.parent / "presets")  # editable install: the checkout's folder
        path = next(filter(Path.is_dir, candidates), None)
        if path is not None:
            yield PresetFolder(distribution=distribution, path=path.resolve())


def _split(text: str) -> Iterator[str]:
    return filter(None, (part.strip() for part in text.split(",")))


def _distribution(entry: metadata.EntryPoint) -> str:
    return canonicalize_name((entry.dist.name if entry.dist else "") or "unknown")


def _package_folder(package: str) -> Path | None:
    """Where a package lies. Its own code is not run, only that of packages it is nested in."""
    try:
        spec = util.find_spec(package)
    except (ImportError, ValueError):
        return None
    locations = list(spec.submodule_search_locations or ()) if spec else []
    return Path(locations[0]) if locations else None


# --------------------------------------------------------------------------------------------
# Verdicts
# --------------------------------------------------------------------------------------------
def listing() -> list[Listed]:
    """Every installed plugin with its status; loads all that are allowed, and never raises."""
    return [_judge(plugin, twins) for kind in KINDS for plugin, twins in _with_twins(kind)]


def find(kind: str, name: str) -> Descriptor:
    """The descriptor that `name` refers to; hyphens and underscores are the same.

    Raises:
        ConfigError: no such plugin, two plugins of that name, or one that is not allowed.
        EnvironmentNotReadyError: the plugin is broken or made for another version of vlactl.
    """
    same_name = [plugin for plugin in installed(kind) if _same(plugin.name, name)]
    candidates = [plugin for plugin in same_name if is_allowed(plugin.distribution)]
    if not same_name:
        raise ConfigError(f'unknown {kind} "{name}"', hint=_suggestion(kind, name))
    if not candidates:
        raise ConfigError(
            f'{kind} "{name}" of distribution "{same_name[0].distribution}" is not allowed here',
            hint=f"the environment variable {ALLOW_VARIABLE} lists the distributions that are",
        )
    if len(candidates) > 1:
        raise ConfigError(
            f'{kind} "{name}" is a duplicate: {_join(p.distribution for p in candidates)} have it',
            hint=_choice([plugin.distribution for plugin in candidates]),
        )
    try:
        return _load(candidates[0])
    except _Unusable as reason:
        raise EnvironmentNotReadyError(
            f'{kind} "{name}" of distribution "{candidates[0].distribution}" is {reason}',
            hint=_cure(
                candidates[0].distribution, candidates[0].reference if reason.__cause__ else ""
            ),
        ) from reason.__cause__


def require(descriptor: Descriptor) -> None:
    """Check that what a plugin needs is installed.

    Raises:
        EnvironmentNotReadyError: something is missing or has the wrong version.
    """
    for requirement in descriptor.requirements:
        problem = unmet(requirement)
        if problem:
            raise EnvironmentNotReadyError(
                f'"{descriptor.name}" cannot run here: {problem}',
                hint=requirement.install or f"pip install {_pip_argument(requirement)}",
            )


def unmet(requirement: Requirement) -> str:
    """What is wrong with a required distribution: "missing: ..." or "" when all is well."""
    wanted = f"missing: {requirement.distribution} {requirement.specifier}".rstrip()
    try:
        version = metadata.version(requirement.distribution)
    except metadata.PackageNotFoundError:
        return wanted
    if SpecifierSet(requirement.specifier).contains(version, prereleases=True):
        return ""
    return f"{wanted} ({version} is installed)"


def load_factory(descriptor: Descriptor) -> Callable[..., Any]:
    """Import the implementation; only workers call this.

    Raises:
        EnvironmentNotReadyError: the implementation, or something it imports, is not there.
    """
    try:
        factory = load_object(descriptor.factory)
    except (ImportError, UserError) as error:
        raise EnvironmentNotReadyError(
            f'"{descriptor.name}" cannot be loaded from {descriptor.factory}: {error}',
            hint=_cure(_origin(descriptor), descriptor.factory),
        ) from error
    return factory  # type: ignore[no-any-return]


def _with_twins(kind: str) -> Iterator[tuple[Installed, list[str]]]:
    """Each plugin with the distributions that have one of the same kind and name."""
    plugins = installed(kind)
    for plugin in plugins:
        yield (
            plugin,
            [
                twin.distribution
                for twin in plugins
                if _same(twin.name, plugin.name) and is_allowed(twin.distribution)
            ],
        )


def _judge(plugin: Installed, twins: list[str]) -> Listed:
    if not is_allowed(plugin.distribution):
        return Listed(plugin=plugin, status=f"not allowed: {ALLOW_VARIABLE}")
    if len(twins) > 1:
        return Listed(plugin=plugin, status=f"duplicate: {_join(twins)}")
    try:
        descriptor = _load(plugin)
    except _Unusable as reason:
        return Listed(plugin=plugin, status=str(reason))
    for requirement in descriptor.requirements:
        problem = unmet(requirement)
        if problem:
            return Listed(
                plugin=plugin,
                status=problem,
                install=requirement.install,
                summary=descriptor.summary,
            )
    return Listed(plugin=plugin, status="ok", summary=descriptor.summary)


def _load(plugin: Installed) -> Descriptor:
    """Import a plugin's descriptor and check that it is what its entry point promises.

    Raises:
        _Unusable: it is not.
    """
    try:
        value = metadata.EntryPoint(plugin.name, plugin.reference, KINDS[plugin.kind].group).load()
    except (Exception, SystemExit) as error:
        cause = " ".join(str(error).split())
        raise _Unusable(f"broken: {type(error).__name__}: {cause}") from error
    if not isinstance(value, Descriptor):
        raise _Unusable(f"broken: {plugin.reference} is no plugin descriptor")
    if value.api_version != API_VERSION:
        raise _Unusable(f"incompatible: plugin api {value.api_version}, vlactl has {API_VERSION}")
    problem = _mistake(plugin, value)
    if problem:
        raise _Unusable(f"broken: {problem}")
    return value


def _mistake(plugin: Installed, descriptor: Descriptor) -> str:
    """What the author of a descriptor got wrong, or ""."""
    wanted, base = KINDS[plugin.kind], _CONFIG_BASES[plugin.kind]
    if not isinstance(descriptor, wanted):
        return f"{plugin.reference} is a {type(descriptor).__name__}, not a {wanted.__name__}"
    if descriptor.name != plugin.name:
        return f'its descriptor is called "{descriptor.name}"'
    if not isinstance(descriptor.config, type) or not issubclass(descriptor.config, base):
        return f"its config class does not derive from {base.__name__}"
    for requirement in descriptor.requirements:
        try:
            SpecifierSet(requirement.specifier)
        except InvalidSpecifier:
            return f'"{requirement.specifier}" is no version specifier'
    return ""


def _same(name: str, other: str) -> bool:
    return name.replace("_", "-") == other.replace("_", "-")


def _suggestion(kind: str, name: str) -> str:
    available = names(kind)
    near = difflib.get_close_matches(name, available, n=1)
    guess = f'did you mean "{near[0]}"?  ' if near else ""
    return f"{guess}installed: {', '.join(available) or 'none'}   (vlactl plugins list)"


def _choice(distributions: list[str]) -> str:
    """The way out of a duplicate. Built-ins are always allowed: only the others can give way."""
    others = [name for name in distributions if name != BUILT_IN]
    if len(others) < len(distributions):
        return f"uninstall {', '.join(others)}, or set {ALLOW_VARIABLE}= to use the built-in one"
    return f"uninstall one of them, or name the wanted one in {ALLOW_VARIABLE}"


def _cure(distribution: str, reference: str) -> str:
    """The way out of a broken plugin, and what shows its author why `reference` fails."""
    cure = (
        "reinstall vlactl" if distribution == BUILT_IN else f"upgrade or uninstall {distribution}"
    )
    module, _, attribute = reference.partition(":")
    if not attribute:
        return cure
    return f"{cure}; its author sees why with: python -c 'from {module} import {attribute}'"


def _origin(descriptor: Descriptor) -> str:
    """The distribution that a descriptor came from."""
    plugins = (
        p for kind, base in KINDS.items() if isinstance(descriptor, base) for p in installed(kind)
    )
    found = (
        p.distribution for p in plugins if p.name == descriptor.name and is_allowed(p.distribution)
    )
    return next(found, "its distribution")


def _join(distributions: Iterable[str]) -> str:
    """Distributions by name; one that registers a name twice is said to do so."""
    counts = Counter(distributions)
    return " and ".join(f'"{name}"' + " twice" * (count > 1) for name, count in counts.items())


def _pip_argument(requirement: Requirement) -> str:
    return f'"{requirement.distribution}{requirement.specifier}"'
