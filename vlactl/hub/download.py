"""Bringing a model here: resumable, in parallel, and never half a model that looks whole.

Files are loaded into a directory beside the final one and checked against the hashes that the hub
states; then its manifest is written and it is renamed into place. A second process that wants the
same model waits for the first. The hub library's own downloader is not used, because it throws
away what an interrupted process had loaded; its session, which knows proxies and redirects, is.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import httpx2
from huggingface_hub import get_session, hf_raise_for_status
from huggingface_hub.errors import HfHubHTTPError

from vlactl.errors import ConfigError, EnvironmentNotReadyError, IntegrityError
from vlactl.hub import remote
from vlactl.hub.manifest import MANIFEST, is_complete, publish, write_manifest
from vlactl.hub.models import (
    HOME_VARIABLE,
    PARTIAL,
    Installed,
    ModelName,
    folder,
    git_blob_sha1,
    installed,
    read,
    readable,
    sha256,
)
from vlactl.hub.remote import Listing, RemoteFile

BACK_OFF_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Pauses between attempts that bring a file no further."""
PATIENCE_SECONDS = 60
"""A hub that asks for a longer pause is not waited for."""
_WORKERS = 4
_PASSING = frozenset({408, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is going to be loaded, and where to."""

    listing: Listing
    target: Path
    missing: int
    """Bytes that are not here yet."""
    free: int
    """Bytes that the disk has left."""


class Watch(Protocol):
    """Follows a download; the last two methods are called by several threads."""

    def planned(self, plan: Plan) -> None:
        """The transfer begins."""

    def note(self, text: str) -> None:
        """Something happened that a person should know."""

    def moved(self, file: str, position: int) -> None:
        """This many bytes of a file are here."""


class _StoppedError(Exception):
    """Another file has failed, or the person wants to stop."""


def download(
    name: ModelName, *, endpoint: str, destination: Path | None, offline: bool, watch: Watch
) -> Installed:
    """Make sure that a model is here, in the common folder of models or in a folder of its own.

    Raises:
        UserError: it is not, and why; what has been loaded so far stays for the next attempt.
    """
    offline = offline or remote.is_offline()
    if destination is not None:
        destination = destination.expanduser().resolve()
    moves = bool(name.revision) and not name.is_pinned  # a branch: only the hub knows where it is
    if (offline or not moves) and (here := _here(name, destination)):
        return here
    if offline:
        raise EnvironmentNotReadyError(
            f"{name} is not here, and --offline or HF_HUB_OFFLINE forbids to load it",
            hint=f"where there is a network: vlactl download {name}",
        )
    if destination is not None and not _here(ModelName(name.repo), destination):
        _check_movable(destination)
    listing = remote.describe(name, remote.address(endpoint))
    target = destination or folder(listing.repo) / listing.commit
    try:
        with _lock(target, watch):
            return _ready(target, listing) or _load(target, listing, watch)
    except OSError as error:
        raise remote.explain(error, name, listing.endpoint) from error


def _here(name: ModelName, destination: Path | None) -> Installed | None:
    if destination is None:
        fitting = (each for each in installed(name.repo) if each.fits(name))
    else:
        fitting = (each for each in [read(destination)] if each and each.fits(name))
    return next((each for each in fitting if is_complete(each.path)), None)


def _check_movable(destination: Path) -> None:
    """Refuse, before anything is loaded, a place that no directory can be renamed to.

    Raises:
        ConfigError: it is one.
    """
    if os.path.ismount(destination) or destination == Path.cwd():
        raise ConfigError(
            f"--dest {destination} is a mount point or the current directory, which a finished "
            "download cannot take the place of",
            hint=f"choose a folder in it: --dest {destination / 'model'}",
        )


def _ready(target: Path, listing: Listing) -> Installed | None:
    found = read(target)
    is_it = found is not None and (found.repo, found.commit) == (listing.repo, listing.commit)
    return found if is_it and is_complete(target) else None


@contextmanager
def _lock(target: Path, watch: Watch) -> Iterator[None]:
    """Be the only process that loads into a directory; the system drops a dead holder's lock."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            watch.note("another process is loading this model: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _load(target: Path, listing: Listing, watch: Watch) -> Installed:
    staging = _staging(target, listing)
    transfer = _Transfer(listing, staging, watch)
    missing, free = transfer.missing(), shutil.disk_usage(staging).free
    watch.planned(Plan(listing=listing, target=target, missing=missing, free=free))
    if free < missing:
        raise EnvironmentNotReadyError(
            f"{listing.repo} needs {readable(missing)} more, and {staging.parent} has "
            f"{readable(free)} free",
            hint=f"free some, or choose another place: {HOME_VARIABLE}, or --dest DIR",
        )
    hashes = transfer.run()
    header = {
        "repo": listing.repo,
        "commit": listing.commit,
        "revision": listing.revision,
        "licence": listing.licence,
        "endpoint": listing.endpoint,
        "downloaded": datetime.now(UTC).isoformat(timespec="seconds"),
        "sha256": hashes,
    }
    write_manifest(staging, header)
    publish(staging, target)
    return Installed(path=target, manifest=header)


def _staging(target: Path, listing: Listing) -> Path:
    """The directory to load into, with what earlier attempts or a damaged download left there.

    Raises:
        ConfigError: the target is taken by something else, or holds files of somebody else.
    """
    commit = listing.commit
    stem = target.name if target.name == commit else f"{target.name}.{commit[:12]}"
    staging = target.with_name(stem + PARTIAL)
    found = read(target)
    if found and (found.repo, found.commit) == (listing.repo, commit):
        _check_only_ours(found)
        shutil.rmtree(staging, ignore_errors=True)
        os.replace(target, staging)
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(
            f"{target} exists and is not this model",
            hint="delete it, or choose another place with --dest DIR",
        )
    staging.mkdir(exist_ok=True)
    wanted = {file.name for file in listing.files}
    for path in staging.iterdir():
        if path.name not in wanted:  # also the manifest: this is no longer a whole model
            path.unlink()
    return staging


def _check_only_ours(found: Installed) -> None:
    """Check that a damaged download has no files but its own, as a repair deletes what is old."""
    ours = {MANIFEST, *found.manifest["sha256"]}
    others = sorted(
        path.name
        for path in found.path.iterdir()
        if path.name not in ours or (path.is_dir() and not path.is_symlink())
    )
    if others:
        raise ConfigError(
            f"{found.path} is damaged and has to be loaded again, but holds what is not of "
            f"{found.repo}: {', '.join(others)}",
            hint="move that elsewhere, or choose an empty --dest DIR",
        )


# --------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------
class _Transfer:
    """Loads the files of a listing into a directory."""

    def __init__(self, listing: Listing, staging: Path, watch: Watch) -> None:
        self._listing = listing
        self._name = ModelName(listing.repo)
        self._staging = staging
        self._watch = watch
        self._stop = threading.Event()

    def missing(self) -> int:
        """Bytes that are not here yet."""
        return sum(max(0, file.size - self._position(file)) for file in self._listing.files)

    def run(self) -> dict[str, str]:
        """Load and check all files, large ones first; returns their hashes.

        Raises:
            UserError: a file cannot be had, or is not what it should be.
        """
        files = sorted(self._listing.files, key=lambda file: -file.size)
        with ThreadPoolExecutor(_WORKERS) as pool:
            futures = {pool.submit(self._load, file): file for file in files}
            try:
                hashes = {futures[each].name: each.result() for each in as_completed(futures)}
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return dict(sorted(hashes.items()))

    def _load(self, file: RemoteFile) -> str:
        try:
            self._fetch(file)
            return self._check(file)
        except (httpx2.HTTPError, OSError) as error:
            raise remote.explain(error, self._name, self._listing.endpoint, file.name) from error

    def _fetch(self, file: RemoteFile) -> None:
        """Load what is missing of a file, again and again while that leads further."""
        if file.size == 0:
            self._path(file).touch()  # nothing is missing of it, so nothing would create it
        pauses = iter(BACK_OFF_SECONDS)
        furthest = self._position(file)
        while self._position(file) != file.size:
            try:
                self._stream(file)
            except httpx2.HTTPError as error:
                if self._position(file) > furthest:
                    furthest = self._position(file)
                    pauses = iter(BACK_OFF_SECONDS)
                pause = _pause(error, next(pauses, None))
                if pause is None:
                    raise
                self._watch.note(f"{file.name}: {_reason(error)}; again in {pause:g} s")
                if self._stop.wait(pause):
                    raise _StoppedError from error

    def _stream(self, file: RemoteFile) -> None:
        """One request for the rest of a file."""
        position = self._position(file)
        if position > file.size:
            position = 0
        headers = remote.headers(self._listing.endpoint) | (
            {"Range": f"bytes={position}-"} if position else {}
        )
        url = remote.file_url(self._listing, file)
        with get_session().stream("GET", url, headers=headers, timeout=remote.TIMEOUT) as response:
            if response.is_error:
                response.read()
            hf_raise_for_status(response)
            goes_on = response.status_code == httpx2.codes.PARTIAL_CONTENT
            self._write(file, response, position if goes_on else 0)

    def _write(self, file: RemoteFile, response: httpx2.Response, position: int) -> None:
        with self._path(file).open("ab" if position else "wb") as out:
            for block in response.iter_bytes():
                out.write(block)
                position += len(block)
                self._watch.moved(file.name, position)
                if self._stop.is_set():
                    raise _StoppedError
                if position > file.size:
                    break
        if position < file.size:
            raise httpx2.RemoteProtocolError(f"the transfer ended {file.size - position} B early")
        if position > file.size:
            raise self._refuse(file, f"it is longer than {file.size} B")

    def _check(self, file: RemoteFile) -> str:
        """Compare a file with the hash that was announced; returns its SHA-256."""
        path = self._path(file)
        self._watch.moved(file.name, file.size)
        found = sha256(path)
        if file.sha256 and found != file.sha256:
            raise self._refuse(file, f"its sha256 is {found}, not {file.sha256}")
        if not file.sha256 and git_blob_sha1(path) != file.git_sha1:
            raise self._refuse(file, f"its git hash is not {file.git_sha1}")
        self._watch.note(f"ok  {file.name}")
        return found

    def _refuse(self, file: RemoteFile, why: str) -> IntegrityError:
        self._path(file).unlink()
        return IntegrityError(
            f"{file.name} of {self._listing.repo} is not what {self._listing.endpoint} announces: "
            f"{why}; deleted",
            hint="repeat the command: it loads this file again; if that does not help, try "
            "another mirror or network",
        )

    def _path(self, file: RemoteFile) -> Path:
        return self._staging / file.name

    def _position(self, file: RemoteFile) -> int:
        path = self._path(file)
        return path.stat().st_size if path.exists() else 0


def _pause(error: httpx2.HTTPError, usual: float | None) -> float | None:
    """How long to wait before the next attempt; None = it is useless."""
    if usual is None or isinstance(error, httpx2.TransportError):
        return usual
    if not isinstance(error, HfHubHTTPError) or error.response.status_code not in _PASSING:
        return None
    asked = remote.seconds_to_wait(error)
    if asked is None:
        return usual
    return float(asked) if asked <= PATIENCE_SECONDS else None


def _reason(error: httpx2.HTTPError) -> str:
    if isinstance(error, HfHubHTTPError):
        return f"the hub answers {error.response.status_code}"
    return str(error) or type(error).__name__
