"""Checkpoint directories that prove they are complete.

A directory counts when its MANIFEST.json exists and every file it names has the recorded size
(and, for small files, hash). The manifest is written last and the directory renamed into place
after that, so a kill at any moment leaves either no directory or a complete one. Order is by step
number, never by time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from vlactl.errors import IntegrityError

MANIFEST = "MANIFEST.json"
CHECKPOINTS = "checkpoints"
HASHED_BYTES = 64 * 2**20
STEP_PATTERN = re.compile(r"step-(\d{6,})")


def step_name(step: int) -> str:
    """Directory name of a checkpoint."""
    return f"step-{step:06d}"


def step_of(directory: Path) -> int:
    """Finished steps that a checkpoint directory is named for."""
    return int(directory.name.rpartition("-")[2])


def write_manifest(directory: Path, header: dict[str, Any]) -> None:
    """Record all files of a directory, durably."""
    files = {
        str(path.relative_to(directory)): _describe(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    path = directory / MANIFEST
    path.write_text(json.dumps({**header, "files": files}, indent=1))
    for name in (*files, MANIFEST):
        _sync(directory / name)
    _sync(directory)


def verify_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a complete directory.

    Raises:
        IntegrityError: something is missing or differs; names it.
    """
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{directory} is not a complete checkpoint: no {MANIFEST}") from error
    for name, wanted in files.items():
        path = directory / name
        if not path.is_file():
            raise IntegrityError(f"{directory} is not a complete checkpoint: {name} is missing")
        if _describe(path) != wanted:
            raise IntegrityError(f"{path} is damaged: its size or hash differs from {MANIFEST}")
    return manifest


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, directory) of everything that was renamed into place, oldest first; not verified."""
    found = []
    for path in (run_dir / CHECKPOINTS).glob("step-*"):
        match = STEP_PATTERN.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def newest_checkpoint(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a run, and why newer ones were passed over."""
    skipped = []
    for _, path in reversed(list_checkpoints(run_dir)):
        try:
            verify_manifest(path)
        except IntegrityError as error:
            skipped.append(error.message)
            continue
        return path, skipped
    return None, skipped


def is_complete(directory: Path) -> bool:
    """Whether the directory's manifest verifies."""
    try:
        verify_manifest(directory)
    except IntegrityError:
        return False
    return True


def resume_point(run_dir: Path) -> tuple[Path | None, list[str]]:
    """As `newest_checkpoint`, for a run that goes on.

    Raises:
        IntegrityError: there are checkpoints, but none is complete: going on would start anew.
    """
    path, skipped = newest_checkpoint(run_dir)
    if path is None and skipped:
        raise IntegrityError(
            "no checkpoint of this run is complete:\n" + "\n".join(skipped),
            hint=f"restore one, or delete {run_dir / CHECKPOINTS} to start from the beginning",
        )
    return path, skipped


def publish(temporary: Path, final: Path) -> None:
    """Rename a finished directory into place, durably."""
    os.replace(temporary, final)
    _sync(final.parent)


def _describe(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > HASHED_BYTES:
        return {"size": size}
    return {"size": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
