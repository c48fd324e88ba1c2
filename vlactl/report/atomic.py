"""Files that exist completely or not at all, whatever interrupts their writing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from vlactl.errors import ConfigError


@contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A path to write to: it becomes `path` when the block ends, and vanishes if the block fails.

    It lies in the same folder, which is created, and has the same ending. Unless `durable`, a power
    cut may still lose the content; waiting for the disk costs milliseconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        if durable:
            _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path, option: str) -> None:
    """Look before the work whether `atomic_path` can write a file; its folder is created.

    Args:
        path: of the file.
        option: that names it.

    Raises:
        ConfigError: it cannot.
    """
    way_out = f"choose another {option}"
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "not a regular file"
        raise ConfigError(f"cannot write {path}: it is {what}", hint=way_out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", hint=way_out) from error


def _sync(path: Path) -> None:
    """Return when the file's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write a value as strict JSON, indented for people: NaN and infinity are errors."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
