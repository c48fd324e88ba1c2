"""From the options of `vlactl download` to models that are here: listing, loading, verifying."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from vlactl.cli.output import print_json, print_table, print_text
from vlactl.config import catalogue
from vlactl.config.compose import compose, flatten
from vlactl.errors import ConfigError
from vlactl.hub.manifest import is_complete
from vlactl.hub.models import (
    Installed,
    ModelName,
    home,
    installed,
    parse_name,
    read,
    readable,
    verify,
)

if TYPE_CHECKING:  # the hub's library takes a second to import
    from vlactl.hub.download import Plan

_LINE_SECONDS = 10.0


def find_names(names: Sequence[str], preset: str, destination: Path | None) -> list[ModelName]:
    """The models that a command line names.

    Raises:
        ConfigError: one of them cannot be a model, or the preset needs none.
    """
    wanted = [parse_name(each) for each in [*names, *_of_preset(preset)]]
    if destination is not None and len(wanted) != 1:
        raise ConfigError("--dest takes exactly one model", hint="vlactl download NAME --dest DIR")
    return wanted


def _of_preset(preset: str) -> list[str]:
    """What a preset starts from."""
    if not preset:
        return []
    checkpoint = flatten(compose(preset).config).get("model.checkpoint")
    if not checkpoint:
        raise ConfigError(
            f"{preset} needs no download: it names no model.checkpoint",
            hint=f"vlactl train --preset {preset}",
        )
    return [str(checkpoint)]


# --------------------------------------------------------------------------------------------
# List and verify
# --------------------------------------------------------------------------------------------
def show_known(*, as_json: bool) -> None:
    """Print the catalogue, and what is here."""
    rows = _known()
    if as_json:
        print_json(rows)
        return
    header = ("model", "size", "licence", "revision", "here", "")
    print_table([_row(row) for row in rows], header)
    print_text()
    print_text(f" here means below {home()}; get one: vlactl download NAME")


def _known() -> list[dict[str, Any]]:
    """The catalogue, and what else is here."""
    here: dict[str, Installed] = {}
    for each in installed():
        if is_complete(each.path):
            here.setdefault(each.repo, each)
    rows: list[dict[str, Any]] = [
        {
            "name": entry.repo,
            "size": entry.size,
            "licence": entry.licence,
            "revision": entry.revision,
            "summary": entry.summary,
        }
        for entry in catalogue.entries()
    ]
    listed = {row["name"] for row in rows}
    for repo, each in here.items():
        if repo not in listed:
            rows.append(_unlisted(each))
    return [row | {"path": _path(here.get(row["name"]))} for row in rows]


def _unlisted(model: Installed) -> dict[str, Any]:
    return {
        "name": model.repo,
        "size": sum(file["size"] for file in model.manifest["files"].values()),
        "licence": str(model.manifest.get("licence", "none is stated")),
        "revision": "",
        "summary": "not in the catalogue",
    }


def _path(model: Installed | None) -> str | None:
    return str(model.path) if model else None


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    pinned = row["revision"][:12] or "unpinned"
    here = "yes" if row["path"] else ""
    return (row["name"], readable(row["size"]), row["licence"], pinned, here, row["summary"])


def verify_all(wanted: Sequence[ModelName], destination: Path | None, *, as_json: bool) -> None:
    """Compare the hashes of what is here; without names, of everything.

    Raises:
        ConfigError: a model is not here.
        IntegrityError: a file is damaged.
    """
    found = list(filter(None, [read(destination)])) if destination else installed()
    chosen = [each for each in found if not wanted or any(map(each.fits, wanted))]
    missing = [name for name in wanted if not any(each.fits(name) for each in found)]
    if missing:
        raise ConfigError(f"{missing[0]} is not here", hint=f"vlactl download {missing[0]} gets it")
    say = _quiet if as_json else print_text
    for model in chosen:
        say(f" {model.repo} {model.commit[:12]} in {model.path}")
        verify(model, lambda file: say(f"   ok  {file}"))
    if as_json:
        print_json([_described(each) for each in chosen])
    elif not chosen:
        print_text(" nothing is here yet")


def _quiet(_: str) -> None:
    pass


def _described(model: Installed) -> dict[str, Any]:
    return {"name": model.repo, "revision": model.commit, "path": str(model.path)}


# --------------------------------------------------------------------------------------------
# Download
# --------------------------------------------------------------------------------------------
def fetch(
    wanted: Sequence[ModelName],
    endpoint: str,
    destination: Path | None,
    *,
    offline: bool,
    as_json: bool,
) -> None:
    """Bring models here, one after the other.

    Raises:
        UserError: one cannot be had.
    """
    from vlactl.hub.download import download

    done = []
    for name in wanted:
        with _watch(as_json) as watch:
            model = download(
                name, endpoint=endpoint, destination=destination, offline=offline, watch=watch
            )
        done.append(model)
        if not as_json:
            print_table(_summary(name, model, watch.has_loaded, destination))
    if as_json:
        print_json([_described(each) for each in done])


def _summary(
    name: ModelName, model: Installed, has_loaded: bool, destination: Path | None
) -> list[tuple[str, str]]:
    rows = [("complete" if has_loaded else "here", f"{model.repo} in {model.path}")]
    if not name.revision:
        rows.append(("commit", f"{model.commit} (newest: vlactl download {model.repo}@main)"))
    if destination is not None:
        rows.append(("use it", f"--set model.path={model.path}"))
    return rows


@contextmanager
def _watch(as_json: bool) -> Iterator[_Lines | _Bars]:
    if as_json:
        yield _Lines(lambda text: print_text(text, file=sys.stderr))
    elif not sys.stdout.isatty():
        yield _Lines(print_text)
    else:
        with _bars() as bars:
            yield _Bars(bars)


def _describe(plan: Plan) -> list[tuple[str, str]]:
    listing = plan.listing
    size = f"{readable(listing.size)} in {len(listing.files)} files"
    begun = f", {readable(listing.size - plan.missing)} of it here already"
    pinned = "" if listing.revision == listing.commit else f" ({listing.revision}; not pinned)"
    return [
        ("model", f"{listing.repo} from {listing.endpoint}"),
        ("commit", f"{listing.commit}{pinned}"),
        ("licence", listing.licence),
        ("size", size + (begun if plan.missing < listing.size else "")),
        ("to", f"{plan.target} ({readable(plan.free)} free)"),
    ]


class _Lines:
    """A line now and then."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._lock = threading.Lock()
        self._positions: dict[str, int] = {}
        self._total = 0
        self._next_line = 0.0
        self.has_loaded = False

    def planned(self, plan: Plan) -> None:
        """Say what is coming."""
        self.has_loaded = True
        self._total = plan.listing.size
        for what, value in _describe(plan):
            self._write(f" {what:8} {value}")
        self._next_line = time.monotonic() + _LINE_SECONDS

    def note(self, text: str) -> None:
        """Write a line of its own."""
        self._write(f" {text}")

    def moved(self, file: str, position: int) -> None:
        """Write a line when the last one is some time ago."""
        with self._lock:
            self._positions[file] = position
            if time.monotonic() < self._next_line:
                return
            self._next_line = time.monotonic() + _LINE_SECONDS
            done = sum(self._positions.values())
        self._write(f" {readable(done)} of {readable(self._total)}")


def _bars() -> Progress:
    return Progress(
        TextColumn(" {task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )


class _Bars:
    """A bar per file."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self.has_loaded = False

    def planned(self, plan: Plan) -> None:
        """Say what is coming, and draw the bars."""
        self.has_loaded = True
        for what, value in _describe(plan):
            self._say(f" {what:8} {value}")
        for file in plan.listing.files:
            self._tasks[file.name] = self._bars.add_task(file.name, total=file.size)

    def note(self, text: str) -> None:
        """Write a line above the bars."""
        self._say(f" {text}")

    def moved(self, file: str, position: int) -> None:
        """Draw the bar of a file."""
        self._bars.update(self._tasks[file], completed=position)

    def _say(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
