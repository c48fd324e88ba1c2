"""`vlactl eval --compare A B`: two finished evaluations, episode by episode."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlactl.cli.output import print_markdown, print_table, print_text
from vlactl.evaluate.compare import (
    COMPARISON_HEADER,
    compare,
    comparison_table,
    describe_p,
    read_evaluation,
)
from vlactl.evaluate.results import SHORT_HASH, describe_mode
from vlactl.report.atomic import check_writable, write_json


def compare_evaluations(
    first: Path, second: Path, json_file: Path | None, *, markdown: bool
) -> None:
    """Print by how much the second evaluation is better than the first.

    Raises:
        UserError: one of them is missing or damaged, or they cannot be paired.
    """
    if json_file is not None:
        check_writable(json_file, "--json")
    comparison = compare(read_evaluation(first), read_evaluation(second))
    rows = [(name, *_side(comparison[name.lower()])) for name in ("A", "B")]
    print_rows = print_markdown if markdown else print_table
    print_rows(rows, ("", "policy", "mode", "weights", "evaluation"))
    print_text()
    if differing := _differing(comparison):
        print_rows(differing, ("differs", "A", "B"))
        print_text()
    print_rows(comparison_table(comparison), COMPARISON_HEADER)
    print_text()
    for line in _verdict(comparison):
        print_text(f"{line}\n" if markdown else f" {line}")
    if json_file is not None:
        write_json(json_file, comparison)


def _side(side: Mapping[str, Any]) -> tuple[str, ...]:
    weights = side["policy"].get("sha256") or "?"
    return side["policy"]["label"], describe_mode(side), weights[:SHORT_HASH], side["path"]


def _differing(comparison: Mapping[str, Any]) -> list[tuple[str, ...]]:
    said = {"mode", "temperature", "top_k"}
    return [
        (key, *("-" if value in (None, "") else str(value) for value in values))
        for key, values in comparison["differs"].items()
        if key not in said
    ]


def _verdict(comparison: Mapping[str, Any]) -> list[str]:
    total = comparison["total"]
    several = total["pairs"] > total["initial_states"]
    test = "exact test, passes of a pair taken together" if several else "McNemar's exact test"
    lower, upper = total["interval"]
    points = f"{100 * lower:+.1f} to {100 * upper:+.1f}"
    p = describe_p(total["p"])
    lines = [
        f"B - A: {100 * total['difference']:+.1f} points, 95 % interval {points}; {p} ({test})"
    ]
    for side in "ab":
        if unpaired := comparison[side]["unpaired"]:
            lines.append(f"{unpaired} episodes are in {side.upper()} only and were left out")
    weights = {comparison[side]["policy"].get("sha256") for side in "ab"}
    if len(weights) == 1 and None not in weights:
        lines.append("A and B were played with the same weights")
    return lines
