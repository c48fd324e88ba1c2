"""Models that are on this machine: where downloads lie, and how a run finds them.

    ~/.cache/vlactl/models/OWNER--NAME/COMMIT/            complete, with a MANIFEST.json
    ~/.cache/vlactl/models/OWNER--NAME/COMMIT.partial/    what an unfinished download has so far

VLACTL_HOME takes the place of ~/.cache/vlactl. Nothing here uses the network.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlactl.config import catalogue
from vlactl.config.compose import dump, flatten, override
from vlactl.config.layers import Leaf, nest
from vlactl.config.run import RunConfig
from vlactl.errors import ConfigError, IntegrityError
from vlactl.hub.manifest import MANIFEST, is_complete

HOME_VARIABLE = "VLACTL_HOME"
PATH_KEY = "model.path"
ADAPTER_KEY = "lora.adapter"
DOWNLOADED = "vlactl download"
PARTIAL = ".partial"
COMMIT_PATTERN = re.compile(r"[0-9a-f]{40}")
FILE_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,199}")
"""Files of a model: all lie in its top folder, so no name can lead out of it."""
_REPO_PATTERN = re.compile(r"(?!.*(--|\.\.))[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)
_MANIFEST_KEYS = {"repo", "commit", "revision", "downloaded", "sha256"}
_REVISION_PATTERN = re.compile(r"[\w][\w./+-]{0,199}", re.ASCII)
_BLOCK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class ModelName:
    """A repository on the hub, and which revision of it: a commit, a branch, or "" = any."""

    repo: str
    revision: str = ""

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo

    @property
    def is_pinned(self) -> bool:
        """Whether it can only mean one state of the repository."""
        return COMMIT_PATTERN.fullmatch(self.revision) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """A download that was completed, and may have been damaged since."""

    path: Path
    manifest: dict[str, Any]

    @property
    def repo(self) -> str:
        """Where it is from."""
        return str(self.manifest["repo"])

    @property
    def commit(self) -> str:
        """Which state of the repository it is."""
        return str(self.manifest["commit"])

    def fits(self, name: ModelName) -> bool:
        """Whether it is what a name asks for."""
        asked = {"", self.commit, str(self.manifest["revision"])}
        return self.repo == name.repo and name.revision in asked


def parse_name(text: str) -> ModelName:
    """The model that "owner/name", "owner/name@revision" or a name of the catalogue means.

    Raises:
        ConfigError: it cannot be a model.
    """
    name, at, revision = text.strip().partition("@")
    entry = catalogue.find(name)
    repo = entry.repo if entry else name
    if not _REPO_PATTERN.fullmatch(repo) or (at and not _REVISION_PATTERN.fullmatch(revision)):
        raise ConfigError(
            f'"{text}" is neither a model of the catalogue nor of the form owner/name[@revision]',
            hint=suggest(name) or "vlactl download lists the catalogue",
        )
    return ModelName(repo, revision or (entry.revision if entry else ""))


def suggest(name: str) -> str:
    """Models of the catalogue that a name may have meant, or ""."""
    close = catalogue.near(name)
    return f"did you mean {' or '.join(close)}?" if close else ""


def home() -> Path:
    """Folder of all models: below VLACTL_HOME, else in the user's cache.

    Raises:
        ConfigError: neither can be told.
    """
    if place := os.environ.get(HOME_VARIABLE):
        return Path(place).expanduser().absolute() / "models"
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise ConfigError(
            "this user has no home folder", hint=f"say where models go: {HOME_VARIABLE}=/some/place"
        ) from error
    return Path(cache, "vlactl", "models").absolute()


def folder(repo: str) -> Path:
    """Folder of all downloaded states of a repository."""
    return home() / repo.replace("/", "--")


def read(directory: Path) -> Installed | None:
    """The download in a directory, or None when none was ever completed there."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Installed(path=directory, manifest=manifest) if _is_known(manifest) else None


def _is_known(manifest: Any) -> bool:
    """Whether a manifest is one of ours, and names nothing outside its directory."""
    if not isinstance(manifest, dict) or not manifest.keys() >= _MANIFEST_KEYS:
        return False
    hashes = manifest["sha256"]
    if not isinstance(hashes, dict) or not isinstance(manifest.get("files"), dict):
        return False
    return all(FILE_PATTERN.fullmatch(name) for name in hashes) and all(
        isinstance(each, str) for each in hashes.values()
    )


def installed(repo: str = "") -> list[Installed]:
    """Downloads of all repositories or of one, the newest of each first."""
    places = [folder(repo)] if repo else sorted(home().glob("*--*"))
    found = [each for place in places for path in place.glob("*") if (each := read(path))]
    found = [each for each in found if COMMIT_PATTERN.fullmatch(each.path.name)]
    found.sort(key=lambda each: str(each.manifest["downloaded"]), reverse=True)
    return sorted(found, key=lambda each: each.repo.lower())


def find(text: str) -> Path | None:
    """Directory of a downloaded model, or None when it is not here.

    Raises:
        ConfigError: the text cannot name a model.
    """
    name = parse_name(text)
    fitting = (each.path for each in installed(name.repo) if each.fits(name))
    return next(filter(is_complete, fitting), None)


def with_downloaded(config: RunConfig) -> RunConfig:
    """The configuration with `model.path` set to where its checkpoint was downloaded to.

    It stays as it is when it names no checkpoint or its own path, when the checkpoint is not here,
    and when the model can be built without, as small random ones can.
    """
    section = dump(config)["model"]
    checkpoint = section.get("checkpoint", "")
    if not checkpoint or section.get("path") or not config.model.blockers():
        return config
    path = find(checkpoint)
    return override(config, [nest(PATH_KEY, Leaf(str(path), DOWNLOADED))]) if path else config


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration with directories that mean the same from wherever a run is gone on with."""
    values = flatten(config)
    given = {key: str(values.get(key) or "") for key in (PATH_KEY, ADAPTER_KEY)}
    layers = [
        nest(key, Leaf(str(Path(path).expanduser().absolute()), ""))
        for key, path in given.items()
        if path and not Path(path).is_absolute()
    ]
    return override(config, layers) if layers else config


def verify(model: Installed, checked: Callable[[str], None]) -> None:
    """Read all files again and compare their hashes, telling the name of each that is sound.

    Raises:
        IntegrityError: files are gone, or differ and were deleted; the next download gets them.
    """
    damaged = []
    for file, wanted in model.manifest["sha256"].items():
        path = model.path / file
        if path.is_file() and sha256(path) == wanted:
            checked(file)
            continue
        damaged.append(file)
        if not path.is_dir():  # a folder was never loaded: it is somebody else's
            path.unlink(missing_ok=True)
    if damaged:
        raise IntegrityError(
            f"{model.repo} is damaged in {model.path}: wrong hash, so deleted, or already gone: "
            + ", ".join(damaged),
            hint=f"get what is missing: vlactl download {model.repo}@{model.commit}",
        )


def readable(size: int) -> str:
    """A number of bytes for people, in the decimal units of the hub."""
    for unit, bytes_each in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_each:
            return f"{size / bytes_each:.1f} {unit}"
    return f"{size} B"


def sha256(path: Path) -> str:
    """Hash of a file of any size."""
    return _digest(path, hashlib.sha256())


def git_blob_sha1(path: Path) -> str:
    """The name that git gives to a file's content."""
    header = f"blob {path.stat().st_size}\0".encode()
    return _digest(path, hashlib.sha1(header, usedforsecurity=False))


def _digest(path: Path, digest: hashlib._Hash) -> str:
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
