"""What changed between two evaluations of the same episodes, with an interval.

Two policies that play the same (task, trial, repeat) see the same initial state, so an episode of
one is compared with its twin. Only episodes that ended differently tell the policies apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from vlactl.evaluate.results import EpisodeResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """Episodes that both evaluations hold.

    Attributes:
        pairs: how many.
        gained: that failed before and succeeded after.
        lost: that succeeded before and failed after.
    """

    pairs: int
    gained: int
    lost: int

    @property
    def difference(self) -> float | None:
        """Success rate after minus before; None without pairs."""
        return (self.gained - self.lost) / self.pairs if self.pairs else None

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Adjusted Wald interval of the difference; z = 1.96 is 95 % confidence.

        Half an episode is added to each of the four outcomes of a pair. Source: Bonett and Price,
        Adjusted Wald confidence interval for a difference of binomial proportions based on paired
        data, J. Educ. Behav. Stat. 37 (2012). Without pairs it is (-1, 1).
        """
        if not self.pairs:
            return -1.0, 1.0
        gained, lost = ((count + 1) / (self.pairs + 2) for count in (self.gained, self.lost))
        centre = gained - lost
        margin = z * math.sqrt((gained + lost - centre**2) / (self.pairs + 2))
        return max(-1.0, centre - margin), min(1.0, centre + margin)


def pair(before: Iterable[EpisodeResult], after: Iterable[EpisodeResult]) -> Paired:
    """Compare the episodes that both evaluations have played."""
    was = {result.key: result.success for result in before}
    pairs = [(was[result.key], result.success) for result in after if result.key in was]
    return Paired(
        pairs=len(pairs), gained=pairs.count((False, True)), lost=pairs.count((True, False))
    )
