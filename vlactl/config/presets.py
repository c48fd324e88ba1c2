"""Where presets are, and what they extend.

A preset is named (`libero_10_grpo`; hyphens and underscores are the same) or given as the path of
a .toml file. Shipped presets lie in the folders that the entry-point group `vlactl.presets`
names. `extends` lists bases, later ones win: entries that end in ".toml" are files beside or
below the preset's own root folder, other entries are names of shipped presets or bases. No file
outside those folders is ever read.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlactl.api.registry import preset_folders
from vlactl.config.catalogue import with_dialect
from vlactl.config.layers import Leaf, Tree, merge, read_toml, shipped_label
from vlactl.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*(/[A-Za-z0-9_][A-Za-z0-9_-]*)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A preset file.

    Attributes:
        name: as `presets list` shows it.
        path: of the file, resolved.
        root: folder that `extends` may not leave, resolved.
        distribution: that ships it; "" for a user's own file.
    """

    name: str
    path: Path
    root: Path
    distribution: str = ""

    @property
    def label(self) -> str:
        """How messages and provenance call the file."""
        inside = self.path.relative_to(self.root).as_posix()
        if self.distribution:
            return shipped_label(self.distribution, inside)
        here = Path.cwd()
        return str(self.path.relative_to(here) if self.path.is_relative_to(here) else self.path)


def shipped() -> list[Preset]:
    """All presets that installed distributions offer, without their bases."""
    return [
        Preset(name=path.stem, path=path, root=folder.path, distribution=folder.distribution)
        for folder in preset_folders()
        for path in sorted(folder.path.glob("*.toml"), key=lambda p: _natural(p.stem))
        if not path.name.startswith(("_", "."))
    ]


def summary(preset: Preset) -> str:
    """The one line that a preset says about itself."""
    try:
        value = tomllib.loads(preset.path.read_text(encoding="utf-8")).get("summary", "")
    except (OSError, ValueError) as error:
        return f"broken: {error}"
    return value if isinstance(value, str) else ""


def locate(preset: str) -> Preset:
    """The preset that a user asked for, by name or by path.

    Raises:
        ConfigError: there is none, or several of that name.
    """
    if not preset.endswith(".toml"):
        return _by_name(preset)
    path = Path(preset).expanduser()
    if not path.is_file():
        raise ConfigError(f"preset file {preset!r} does not exist", hint=_offer(path.stem))
    path = path.resolve()
    for folder in preset_folders():
        if path.is_relative_to(folder.path):
            return Preset(
                name=path.stem, path=path, root=folder.path, distribution=folder.distribution
            )
    return Preset(name=path.stem, path=path, root=path.parent)


def read(preset: Preset, chain: tuple[Preset, ...] = ()) -> tuple[Tree, tuple[Path, ...]]:
    """A preset merged over everything it extends, and the files that were read.

    Raises:
        ConfigError: a file is missing, unreadable, extends itself or leaves its folder.
    """
    if preset.path in {link.path for link in chain}:
        raise ConfigError(f"presets extend each other in a circle: {_chain(chain, preset.label)}")
    tree = read_toml(preset.path, preset.label)
    chain = (*chain, preset)
    merged: Tree = {}
    files: list[Path] = []
    for entry in _bases(tree.pop("extends", None), preset):
        base, base_files = read(_base(entry, chain), chain)
        merged = merge(merged, base)
        files.extend(base_files)
    return merge(with_dialect(merged, tree), tree), (*files, preset.path)


def _bases(extends: Tree | Leaf | None, preset: Preset) -> list[str]:
    value = extends.value if isinstance(extends, Leaf) else extends
    entries = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ConfigError(
            f'"extends" in {preset.label} is neither a text nor a list of texts',
            hint='for example: extends = ["libero_10_grpo", "shared.toml"]',
        )
    return entries


def _base(entry: str, chain: tuple[Preset, ...]) -> Preset:
    """What an entry of the last file's `extends` refers to."""
    child = chain[-1]
    if not entry.endswith(".toml"):
        try:
            return _by_name(entry)
        except ConfigError as error:
            raise ConfigError(
                f"{error.message}, extended by {_chain(chain)}", hint=error.hint
            ) from error
    path = (child.path.parent / entry).resolve()
    if Path(entry).is_absolute() or not path.is_relative_to(child.root):
        raise ConfigError(
            f"{_chain(chain, entry)}: a base may not lie outside the preset's folder",
            hint=f"put it below {child.root}, or extend a shipped preset by its name",
        )
    if not path.is_file():
        raise ConfigError(
            f"{_chain(chain, entry)}: there is no such file", hint=f"looked at {path}"
        )
    return Preset(name=path.stem, path=path, root=child.root, distribution=child.distribution)


def _by_name(name: str) -> Preset:
    wanted = name.strip().replace("-", "_").lower()
    found = list(_candidates(wanted)) if _NAME.fullmatch(wanted) else []
    if not found:
        raise ConfigError(f"unknown preset {name!r}", hint=_offer(wanted))
    if len(found) > 1:
        owners = " and ".join(f'"{preset.distribution}"' for preset in found)
        raise ConfigError(
            f"preset {name!r} is ambiguous: {owners} both ship it",
            hint="give the path of the file that you mean",
        )
    return found[0]


def _candidates(wanted: str) -> Iterator[Preset]:
    parent, _, stem = wanted.rpartition("/")
    for folder in preset_folders():
        for path in (folder.path / parent).glob("*.toml"):
            if path.stem.replace("-", "_").lower() == stem:
                yield Preset(
                    name=path.stem,
                    path=path.resolve(),
                    root=folder.path,
                    distribution=folder.distribution,
                )


def _offer(wanted: str) -> str:
    available = [preset.name for preset in shipped()]
    near = difflib.get_close_matches(wanted.replace("-", "_").lower(), available, n=3)
    guess = "did you mean " + " or ".join(f'"{name}"' for name in near) + "?  " if near else ""
    return f"{guess}All presets: vlactl presets list"


def _chain(chain: tuple[Preset, ...], last: str = "") -> str:
    return " -> ".join([*(link.label for link in chain), *filter(None, [last])])


def _natural(name: str) -> list[tuple[str, int]]:
    """Sort key that puts libero_10 before libero_90 before libero_130."""
    return [(text, int(part or 0)) for text, part in re.findall(r"(\D*)(\d*)", name)]
