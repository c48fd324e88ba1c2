"""Checkpoint directories that prove they are complete.

A directory counts when its MANIFEST.json exists and every file it names has the recorded size
(and, for small files, hash). The manifest is written last and the directory renamed into place
after that, so a kill at any moment leaves either no directory or a complete one. Order is by step
number, never by time.

Hashes of large files, where the manifest has them, take a second per GiB and more: they are
compared by who reads the file (`verify_large_files`), not by who lists directories.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlactl.errors import IntegrityError

MANIFEST = "MANIFEST.json"
CHECKPOINTS = "checkpoints"
HASHED_BYTES = 64 * 2**20
STEP_PATTERN = re.compile(r"step-(\d{6,})")
HASHING_THREADS = 4

Description = dict[str, Any]
"""`size` in bytes, and `sha256` where it is known."""
Verify = Callable[[Path], dict[str, Any]]
"""Returns the manifest of a directory, or raises IntegrityError."""


def step_name(step: int) -> str:
    """Directory name of a checkpoint."""
    return f"step-{step:06d}"


def step_of(directory: Path) -> int:
    """Finished steps that a checkpoint directory is named for."""
    return int(directory.name.rpartition("-")[2])


def write_manifest(
    directory: Path, header: dict[str, Any], described: Mapping[str, Description] | None = None
) -> None:
    """Record all files of a directory, durably.

    Args:
        directory: to describe.
        header: what else the manifest says.
        described: files that are described already; large ones get no hash otherwise.
    """
    known = described or {}
    files = {name: known.get(name) or _describe(directory / name) for name in _names(directory)}
    path = directory / MANIFEST
    path.write_text(json.dumps({**header, "files": files}, indent=1))
    for name in (*files, MANIFEST):
        _sync(directory / name)
    _sync(directory)


def describe_share(directory: Path, index: int, size: int) -> dict[str, Description]:
    """Sizes and hashes of every `size`-th file of a directory, from the `index`-th on."""
    names = _names(directory)[index::size]
    return {name: _describe(directory / name, hashed=True) for name in names}


def read_manifest(directory: Path) -> dict[str, Any]:
    """What a manifest says; nothing is compared with it.

    Raises:
        IntegrityError: there is none.
    """
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
        return {**manifest, "files": dict(manifest["files"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{directory} is not a complete checkpoint: no {MANIFEST}") from error


def verify_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a complete directory; hashes of large files are not compared.

    Raises:
        IntegrityError: something is missing or differs; names it.
    """
    manifest = read_manifest(directory)
    for name, wanted in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            raise IntegrityError(f"{directory} is not a complete checkpoint: {name} is missing")
        with _readable(path):
            found = _describe(path)
        if not isinstance(wanted, dict) or found != {key: wanted.get(key) for key in found}:
            raise _damaged(path)
    return manifest


def verify_large_files(
    directory: Path, manifest: Mapping[str, Any], index: int = 0, size: int = 1
) -> None:
    """Compare the hashes that `verify_manifest` leaves out.

    Args:
        directory: complete, as far as `verify_manifest` sees.
        manifest: of the directory.
        index: which share of the files is looked at, of `size` equal ones.
        size: see `index`.

    Raises:
        IntegrityError: a file differs; names it.
    """
    large = sorted(
        name
        for name, wanted in manifest["files"].items()
        if wanted["size"] > HASHED_BYTES and "sha256" in wanted
    )[index::size]
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        hashes = {name: pool.submit(_sha256, directory / name) for name in large}
        for name, sha256 in hashes.items():
            with _readable(directory / name):
                found = sha256.result()
            if found != manifest["files"][name]["sha256"]:
                raise _damaged(directory / name)


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, directory) of everything that was renamed into place, oldest first; not verified."""
    found = []
    for path in (run_dir / CHECKPOINTS).glob("step-*"):
        match = STEP_PATTERN.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def newest_checkpoint(
    run_dir: Path, verify: Verify = verify_manifest
) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a run, and why newer ones were passed over."""
    skipped = []
    for _, path in reversed(list_checkpoints(run_dir)):
        try:
            verify(path)
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


def resume_point(run_dir: Path, verify: Verify = verify_manifest) -> tuple[Path | None, list[str]]:
    """As `newest_checkpoint`, for a run that goes on.

    Raises:
        IntegrityError: there are checkpoints, but none is complete: going on would start anew.
    """
    path, skipped = newest_checkpoint(run_dir, verify)
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


def _names(directory: Path) -> list[str]:
    """All files but the manifest, which cannot describe itself."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return sorted({str(path.relative_to(directory)) for path in files} - {MANIFEST})


def _describe(path: Path, *, hashed: bool = False) -> Description:
    """Size, and the hash of a small file, or of any file where that is asked for."""
    size = path.stat().st_size
    if size > HASHED_BYTES and not hashed:
        return {"size": size}
    return {"size": size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What the system cannot read is as damaged as what differs."""
    try:
        yield
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error}") from error


def _damaged(path: Path) -> IntegrityError:
    return IntegrityError(f"{path} is damaged: its size or hash differs from {MANIFEST}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
