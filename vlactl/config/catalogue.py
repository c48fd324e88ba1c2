"""Published checkpoints that presets name: where they are, and which dialect they speak.

A folder of presets may hold a file `_models.toml` with one table per checkpoint, named for its
repository on the hub. `model` in such a table holds defaults of the section `model` that fit the
checkpoint. They lie just below the layer that names it first, so that whoever names another
checkpoint gets its dialect too, and whoever writes a key beside `model.checkpoint` keeps it.
"""

from __future__ import annotations

import difflib
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlactl.api.registry import preset_folders
from vlactl.config.layers import Leaf, Tree, look_up, merge, plain, read_toml, shipped_label
from vlactl.errors import ConfigError

FILE_NAME = "_models.toml"
CHECKPOINT_KEY = ("model", "checkpoint")
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Entry(BaseModel):
    """A checkpoint of the catalogue."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """On the hub: "owner/name"."""
    summary: str
    licence: str
    revision: str = Field("", pattern=r"^([0-9a-f]{40})?$")
    """The commit that is meant; empty = not pinned."""
    size: int = Field(gt=0)
    """Of the files that are needed, in bytes, roughly."""
    also: tuple[str, ...] = ()
    """Patterns of files that are needed beside safetensors, JSON and the tokenizer."""
    sha256: dict[str, Sha256] = Field(default_factory=dict)
    """By file, where known."""
    model: dict[str, Any] = Field(default_factory=dict)
    """Defaults of the section `model`: a tree whose leaves know where they were written."""


def entries() -> list[Entry]:
    """All checkpoints that installed distributions know; the first to name one decides.

    Raises:
        ConfigError: a catalogue is wrong.
    """
    found: dict[str, Entry] = {}
    for folder in preset_folders():
        path = folder.path / FILE_NAME
        if path.is_file():
            label = shipped_label(folder.distribution, FILE_NAME)
            for entry in _read(path, label, path.stat().st_mtime_ns):
                found.setdefault(entry.repo, entry)
    return list(found.values())


def find(name: str) -> Entry | None:
    """The checkpoint called "owner/name", or "name" where only one is called so."""
    wanted = _spelled(name)
    known = entries()
    exact = [entry for entry in known if _spelled(entry.repo) == wanted]
    short = [entry for entry in known if _spelled(entry.repo.partition("/")[2]) == wanted]
    return exact[0] if exact else short[0] if len(short) == 1 else None


def near(name: str) -> list[str]:
    """Checkpoints that a misspelt name may have meant."""
    known = {_spelled(entry.repo): entry.repo for entry in entries()}
    known |= {repo.partition("/")[2]: known[repo] for repo in list(known)}
    close = difflib.get_close_matches(_spelled(name), list(known), n=4, cutoff=0.7)
    found = dict.fromkeys(known[match] for match in close)
    return [repo for repo in found if repo != name][:3]


def with_dialect(below: Tree, layer: Tree) -> Tree:
    """`below`, with what the checkpoint that `layer` names wants of the section `model`."""
    _, checkpoint = look_up(layer, CHECKPOINT_KEY)
    if not isinstance(checkpoint, Leaf) or not isinstance(checkpoint.value, str):
        return below
    _, named_below = look_up(below, CHECKPOINT_KEY)
    if isinstance(named_below, Leaf) and named_below.value == checkpoint.value:
        return below
    entry = find(checkpoint.value.partition("@")[0])
    return merge(_without_dialect(below), {"model": entry.model if entry else {}})


def _without_dialect(tree: Tree) -> Tree:
    """Take back what a catalogue said about the checkpoint of a lower layer."""
    section = tree.get("model", {})
    if isinstance(section, Leaf):
        return tree
    kept: Tree = {}
    for key, node in section.items():
        below = node.replaced if isinstance(node, Leaf) and FILE_NAME in node.origin else node
        if below is not None:
            kept[key] = below
    return {**tree, "model": kept}


def _spelled(name: str) -> str:
    return name.strip().replace("_", "-").lower()


@lru_cache(maxsize=32)
def _read(path: Path, label: str, changed_ns: int) -> list[Entry]:
    """The entries of one file; `changed_ns` tells its versions apart."""
    found = []
    for repo, table in read_toml(path, label).items():
        fields = table if isinstance(table, dict) else {"": table}
        dialect = fields.get("model", {})
        try:
            rest = plain({key: node for key, node in fields.items() if key != "model"})
            found.append(Entry.model_validate({**rest, "repo": repo, "model": dialect}))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join([repo, *map(str, first["loc"])])
            raise ConfigError(f"{label}: {where}: {first['msg']}") from error
    return found
