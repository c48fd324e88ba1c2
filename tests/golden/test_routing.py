"""How a batch is split between groups of ranks, against recorded results of a reference."""

import json
from pathlib import Path

import pytest

from vlactl.errors import ConfigError
from vlactl.launch.routing import routes


def test_recorded_routes(goldens: Path) -> None:
    cases = json.loads((goldens / "algorithms" / "routing.json").read_text())
    assert cases
    for case in cases:
        batch, src_world, dst_world = case["batch"], case["src_world"], case["dst_world"]
        assert as_lists(routes(batch, src_world, dst_world)) == case["dst_of_src"], case
        assert as_lists(routes(batch, dst_world, src_world)) == case["src_of_dst"], case


def as_lists(of_ranks: tuple[tuple[tuple[int, int], ...], ...]) -> list[list[list[int]]]:
    return [[list(route) for route in of_rank] for of_rank in of_ranks]


@pytest.mark.parametrize(("src_world", "dst_world"), [(3, 4), (4, 3), (0, 1), (1, 0)])
def test_uneven_shares_are_refused(src_world: int, dst_world: int) -> None:
    with pytest.raises(ConfigError, match=r"8 rows cannot be split evenly over [03] ranks"):
        routes(8, src_world, dst_world)
