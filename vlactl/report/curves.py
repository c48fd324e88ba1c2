"""Curves and stacked bars as SVG that is pasted into a page and takes the page's colours.

Matplotlib draws; what it writes is cut down to the <svg> element, and colours become CSS variables
(--ink, --muted, --grid, --c0, --c1, ...), so that one drawing fits a light and a dark page.
Importing this module imports no matplotlib.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS, MAX_BARS = 200, 60
"""More are averaged in equal shares: a page has no room to show them."""
_MARKED = 60
"""More points in a curve are shown as a line only."""
NUM_COLOURS = 8
_INK, _MUTED, _GRID = "#010101", "#020202", "#030303"
_COLOURS = tuple(f"#0c0c{index:02x}" for index in range(NUM_COLOURS))
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--grid"} | {
    colour: f"--c{index}" for index, colour in enumerate(_COLOURS)
}
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: readable aloud, and in the page's font
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve: finished steps, values (NaN = a gap), and the interval around each if any."""

    steps: Sequence[float]
    values: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def shares(count: int, most: int) -> list[slice]:
    """Runs of points of one length, the last maybe shorter, and at most `most` of them."""
    size = max(1, -(-count // most))
    return [slice(start, start + size) for start in range(0, count, size)]


def curve(series: Series, *, percent: bool = False, marks: bool = False, colour: int = 0) -> str:
    """A line with a band for its interval; with `marks`, points with bars instead of the band.

    Args:
        series: what to draw.
        percent: values are shares of 1, and the axis shows 0 to 100 %.
        marks: each point stands for itself, as an evaluation does.
        colour: which of the page's.
    """

    def draw(axes: Axes) -> None:
        steps, values = list(series.steps), list(series.values)
        ink = _COLOURS[colour]
        axes.plot(steps, values, color=ink, marker=_marker(len(steps), marks))
        if series.low and marks:
            axes.vlines(steps, list(series.low), list(series.high), color=ink, linewidth=1.2)
        elif series.low:
            axes.fill_between(
                steps, list(series.low), list(series.high), color=ink, alpha=0.18, linewidth=0
            )
        if percent:
            axes.set_ylim(-0.02, 1.02)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")

    return _svg(draw)


def stack(steps: Sequence[float], layers: Sequence[Sequence[float]]) -> str:
    """A bar per step, made of layers from below in the page's colours."""

    def draw(axes: Axes) -> None:
        width = 0.9 * min((b - a for a, b in itertools.pairwise(steps)), default=1.0)
        bottom = [0.0] * len(steps)
        for layer, colour in zip(layers, itertools.cycle(_COLOURS), strict=False):
            axes.bar(steps, layer, width, bottom, color=colour, linewidth=0)
            bottom = [a + b for a, b in zip(bottom, layer, strict=True)]
        axes.set_ylabel("seconds")

    return _svg(draw)


def _marker(count: int, marks: bool) -> str | None:
    """Points that stand alone are no line: they show where there are few."""
    return "o" if marks else "." if count <= _MARKED else None


def _svg(draw: Callable[[Axes], None]) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    text = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 2.6), layout="constrained")
        axes = figure.add_subplot()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("finished steps")
        draw(axes)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return _for_page(text.getvalue())


def _for_page(document: str) -> str:
    """The <svg> element alone, in variables, without names that several drawings would share."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)[\")]", svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1).replace(
        "<svg ", '<svg aria-hidden="true" focusable="false" ', 1
    )
