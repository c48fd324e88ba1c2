"""The page that shows a run: one HTML file that needs no network and runs no script.

`Page` says what there is to show, in words, tables and drawings that are ready; the template
`page.html.j2` lays it out. Everything that comes from a run is escaped; drawings (made by
`vlactl.report.curves`) and the template's own style are not. The page forbids itself scripts and
every kind of request.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlactl.report.atomic import atomic_path

TEMPLATE = "page.html.j2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A rate with its interval, as text and as a small drawing; all are shares of 1."""

    text: str
    rate: float
    low: float
    high: float


Cell = str | Bar


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of cells below a header; columns are aligned right unless named in `words`.

    `total` sets the last row apart.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: frozenset[int] = frozenset()
    total: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A drawing, the sentence below it, and what it shows for those who cannot see it.

    `key` names its colours in their order, where there are several.
    """

    title: str
    svg: str
    caption: str
    alt: str
    key: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """A film of one episode."""

    title: str
    success: bool
    note: str
    path: Path

    @property
    def source(self) -> str:
        """The film itself, as an address."""
        return "data:video/mp4;base64," + base64.b64encode(self.path.read_bytes()).decode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A number at the top of the page, and what it is."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page: text, then tiles, charts, films and tables, those that there are.

    `folded` tables are closed until the reader opens them.
    """

    title: str
    text: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    clips: Sequence[Clip] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = ()

    @property
    def anchor(self) -> str:
        """Its name in links."""
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """All of it: `state` is one word ("finished"), `good` whether that is well."""

    title: str
    summary: str
    state: str
    good: bool
    state_note: str
    facts: Sequence[tuple[str, str]]
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    made_by: str


def write_page(path: Path, page: Page) -> None:
    """Write the page, completely or not at all."""
    text = render(page)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def render(page: Page) -> str:
    """The page as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vlactl.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["bar"] = lambda cell: isinstance(cell, Bar)
    return environment.get_template(TEMPLATE).render(page=page)
