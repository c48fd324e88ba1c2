"""Placement strings against recorded results of a reference parser."""

import json
from pathlib import Path

import pytest

from vlactl.errors import ConfigError
from vlactl.launch.placement import check_overlaps, join_ranges, parse_placement


def test_recorded_strings(goldens: Path) -> None:
    cases = json.loads((goldens / "algorithms" / "placement.json").read_text())
    for case in cases:
        # The reference takes any first number, against its documentation: processes count from 0.
        starts_at_0 = "0" in case.get("process_to_resources", {})
        if not case["ok"] or not starts_at_0:
            with pytest.raises(ConfigError, match="placement"):
                parse_placement(case["string"], case["total"])
            continue
        processes = parse_placement(case["string"], case["total"])
        found = {str(rank): list(devices) for rank, devices in enumerate(processes)}
        assert found == case["process_to_resources"], case["string"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "neither a number nor a range"),
        ("0-", "neither a number nor a range"),
        ("a-b", "neither a number nor a range"),
        ("3-1", "runs backwards"),
        ("0,all", "overlaps or precedes"),
        ("8", "visible devices are 0-7"),
        ("0-3:1-4", "0 comes here, not 1"),
        ("0-2:0-1", "neither divides the other"),
    ],
)
def test_mistakes_are_explained(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_placement(text, 8)


def test_roles_may_be_equal_disjoint_or_nested() -> None:
    check_overlaps({"env": [0, 1], "rollout": [0, 1], "actor": [0, 1]}, range(4))
    check_overlaps({"env": [0], "rollout": [1], "actor": [2, 3]}, range(4))
    check_overlaps({"env": [0, 1], "rollout": [2, 3], "actor": [0, 1, 2, 3]}, range(4))


def test_half_way_overlap_names_the_devices() -> None:
    with pytest.raises(ConfigError) as caught:
        check_overlaps({"env": [0, 1, 2], "actor": [2, 3]}, range(4))
    assert "placement.env (0-2) and placement.actor (2-3) overlap half-way, on 2" in str(
        caught.value
    )
    assert "visible devices: 0-3" in caught.value.hint


def test_join_ranges() -> None:
    assert join_ranges([8, 0, 1, 2, 3, 3]) == "0-3,8"
    assert join_ranges([]) == ""
