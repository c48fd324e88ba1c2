"""How commands print: plain ASCII columns on stdout, errors on stderr; nothing else prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO


def print_text(text: str = "", *, file: TextIO | None = None) -> None:
    """Write one block of text; characters that the terminal cannot show become '?'."""
    stream = file or sys.stdout
    if stream is None:  # the standard stream was closed
        return
    encoding = stream.encoding or "ascii"
    stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
    stream.flush()


def print_error(message: str, hint: str = "") -> None:
    """Write ` error: ...` with the way out indented below it."""
    lines = [*message.splitlines(), *hint.splitlines()] or [""]
    text = "\n".join([f" error: {lines[0]}", *(f"        {line}" for line in lines[1:])])
    print_text(text, file=sys.stderr)


def print_json(value: Any) -> None:
    """Write a value for machines."""
    print_text(json.dumps(value, indent=2, sort_keys=True))


def print_table(rows: Iterable[Sequence[object]], header: Sequence[str] = ()) -> None:
    """Write left-aligned columns, each as wide as its widest cell."""
    cells = [[str(cell) for cell in row] for row in ([header] if header else []) + list(rows)]
    widths = [
        max((len(row[i]) for row in cells if i < len(row)), default=0)
        for i in range(max(map(len, cells), default=0))
    ]
    for row in cells:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        print_text((" " + "  ".join(padded)).rstrip())


def print_markdown(rows: Iterable[Sequence[object]], header: Sequence[str]) -> None:
    """Write a table for a README."""
    for row in (header, ["---"] * len(header), *rows):
        cells = (str(cell).replace("|", "\\|") for cell in row)
        print_text(f"| {' | '.join(cells)} |")
