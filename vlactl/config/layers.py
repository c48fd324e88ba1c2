"""Layers of configuration before they are typed: what a file or `--set` says, and where it says it.

A layer is a tree of tables whose leaves know their origin, so that merging layers merges
provenance too. Only TOML is read here. Dotted keys (`optim.lr`) name leaves everywhere outside
this module.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from vlactl.api.registry import BUILT_IN
from vlactl.errors import ConfigError

SET = "--set"
_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


@dataclass(frozen=True, slots=True)
class Leaf:
    """A value and where it was written.

    Attributes:
        value: as TOML or JSON gave it.
        origin: "presets/x.toml:14", "--set" or another option.
        text: the value as typed on the command line.
        replaced: the leaf of a lower layer that this one took the place of.
    """

    value: Any
    origin: str
    text: str = ""
    replaced: Leaf | None = None


Tree: TypeAlias = "dict[str, Tree | Leaf]"
Override: TypeAlias = "str | Tree"
"""What changes a configuration: "key=value" as after `--set`, or a layer of another origin."""


def read_toml(path: Path, label: str) -> Tree:
    """Read a file; origins are "label:line".

    Raises:
        ConfigError: it cannot be read, or is not TOML.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read {label}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{label} is not valid TOML: {error}") from error
    lines = key_lines(text)
    tree: Tree = grow(values, lambda key: f"{label}:{lines[key]}" if key in lines else label)
    return tree


def shipped_label(distribution: str, inside: str) -> str:
    """How messages and provenance call a file of a distribution's preset folder."""
    folder = "" if distribution == BUILT_IN else f"{distribution}:"
    return f"{folder}presets/{inside}"


def as_layer(override: Override) -> Tree:
    """An override as a layer.

    Raises:
        ConfigError: it is text, and not of the form "key=value".
    """
    return parse_override(override) if isinstance(override, str) else override


def parse_override(argument: str, origin: str = SET) -> Tree:
    """The layer that one `--set key=value` stands for, or an option that is short for it.

    The value is read as TOML; what is no TOML value is taken as text, so quotes are seldom needed.

    Raises:
        ConfigError: it is not of that form.
    """
    key, equals, text = (part.strip() for part in argument.partition("="))
    if not equals or not _KEY.fullmatch(key) or not _is_unicode(text):
        raise ConfigError(
            f"{origin} {argument!r} is not of the form key=value",
            hint="for example: --set optim.lr=1e-5   --set rollout.tasks=0-3",
        )
    return nest(key, grow(_value(text), lambda _: origin, text))


def merge(base: Tree, top: Tree) -> Tree:
    """`top` over `base`: tables merge key by key, everything else (lists too) is replaced."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            merged[key] = merge(below, value)
        elif isinstance(below, Leaf) and isinstance(value, Leaf):
            merged[key] = replace(value, replaced=below)
        else:
            merged[key] = value
    return merged


def nest(key: str, node: Tree | Leaf) -> Tree:
    """A tree with `node` at a dotted key and nothing else."""
    first, _, rest = key.partition(".")
    return {first: nest(rest, node) if rest else node}


def grow(value: Any, origin: Callable[[str], str], text: str = "", prefix: str = "") -> Any:
    """A tree from nested dicts, or a leaf from anything else; `origin` maps dotted keys."""
    if not isinstance(value, Mapping):
        return Leaf(value, origin(prefix), text)
    return {
        key: grow(item, origin, text, f"{prefix}.{key}" if prefix else key)
        for key, item in value.items()
    }


def plain(tree: Tree) -> dict[str, Any]:
    """The values without their origins."""
    return {
        key: plain(value) if isinstance(value, dict) else value.value for key, value in tree.items()
    }


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Leaf]]:
    """All leaves with their dotted keys, in the order of the tree."""
    for name, value in tree.items():
        key = f"{prefix}.{name}" if prefix else name
        if isinstance(value, dict):
            yield from leaves(value, key)
        else:
            yield key, value


def look_up(tree: Tree, path: Sequence[str | int]) -> tuple[str, Tree | Leaf | None]:
    """What lies at `path`, or the leaf on the way to it, with its dotted key; None = nothing."""
    node: Tree | Leaf | None = tree
    parts: list[str] = []
    for part in map(str, path):
        if not isinstance(node, dict):
            break
        node = node.get(part)
        parts.append(part)
    return ".".join(parts), node


def origin_of(node: Tree | Leaf | None) -> str:
    """Where a leaf, or the first leaf of a table, was written."""
    if isinstance(node, Leaf):
        return node.origin
    return next((leaf.origin for _, leaf in leaves(node or {})), "")


def key_lines(text: str) -> dict[str, int]:
    """The line of every dotted key in a valid TOML document.

    A statement is the shortest run of lines that is a document of its own; TOML's own parser thus
    decides where strings and lists that span several lines end.
    """
    found: dict[str, int] = {}
    table = ""
    pending: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        pending.append(line)
        try:
            statement = tomllib.loads("\n".join(pending))
        except ValueError:
            continue
        first = number - len(pending) + 1
        pending.clear()
        if line.lstrip().startswith("[") and first == number:
            table = _table_name(statement)
        else:
            tree = grow({table: statement} if table else statement, lambda _: "")
            found.update((key, first) for key, _ in leaves(tree))
    return found


def _table_name(header: Mapping[str, Any]) -> str:
    parts: list[str] = []
    node: Any = header
    while isinstance(node, Mapping) and node:
        key = next(iter(node))
        parts.append(key)
        node = node[key]
    return ".".join(parts)


def _value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
