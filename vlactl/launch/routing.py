"""Who sends which rows to whom when one batch lies on two groups of ranks.

Both groups own the batch in contiguous intervals of equal length, in the order of their ranks, so
every pair of ranks exchanges at most one piece, and the pieces of a rank in the order of its peers
are its interval.
"""

from __future__ import annotations

from vlactl.errors import ConfigError

Route = tuple[int, int]
"""Rank on the other side, and number of rows."""


def routes(batch: int, src_world: int, dst_world: int) -> tuple[tuple[Route, ...], ...]:
    """What each source rank sends: destinations, ascending, with the number of rows for each.

    Reversed, `routes(batch, dst_world, src_world)` says from whom each destination receives.

    Raises:
        ConfigError: the batch does not fall into equal parts on both sides.
    """
    for world in (src_world, dst_world):
        if world < 1 or batch % world:
            raise ConfigError(
                f"{batch} rows cannot be split evenly over {world} ranks",
                hint=f"use a multiple of both {src_world} and {dst_world} rows",
            )
    return tuple(
        tuple(_cut(rank * batch // src_world, (rank + 1) * batch // src_world, batch // dst_world))
        for rank in range(src_world)
    )


def _cut(start: int, stop: int, length: int) -> list[Route]:
    """Pieces of the interval [start, stop) that lie in intervals of the given length."""
    pieces = []
    while start < stop:
        owner = start // length
        end = min(stop, (owner + 1) * length)
        pieces.append((owner, end - start))
        start = end
    return pieces
