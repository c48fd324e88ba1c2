"""The paired difference of two evaluations: which episodes count, and how sure it is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlactl.evaluate.paired import Paired, pair
from vlactl.evaluate.results import EpisodeResult


def episode(task: int, trial: int, success: bool, repeat: int = 0) -> EpisodeResult:
    return EpisodeResult(
        task=task,
        trial=trial,
        repeat=repeat,
        success=success,
        num_steps=3,
        episode_return=0.0,
        seed=1,
    )


def test_only_episodes_of_both_are_compared():
    before = [episode(0, 0, False), episode(0, 1, True), episode(1, 0, True), episode(5, 0, True)]
    after = [
        *(episode(0, 0, True), episode(0, 1, True), episode(1, 0, False)),
        *(episode(0, 0, True, repeat=1), episode(7, 0, True)),
    ]
    assert pair(before, after) == Paired(pairs=3, gained=1, lost=1)


def test_without_pairs_nothing_is_known():
    nothing = pair([], [episode(0, 0, True)])
    assert nothing.difference is None
    assert nothing.interval() == (-1.0, 1.0)


def test_interval_by_hand():
    """(20 + 1)/102 - (5 + 1)/102 = 0.14706, of variance (27/102 - 0.14706^2)/102 = 0.0023831."""
    paired = Paired(pairs=100, gained=20, lost=5)
    assert paired.difference == pytest.approx(0.15)
    assert paired.interval() == pytest.approx((0.147059 - 0.095682, 0.147059 + 0.095682), abs=2e-5)


@given(st.integers(0, 80), st.integers(0, 80), st.integers(0, 80))
def test_the_interval_holds_the_difference_and_turns_with_it(gained, lost, equal):
    paired = Paired(pairs=gained + lost + equal, gained=gained, lost=lost)
    low, high = paired.interval()
    assert -1 <= low <= (paired.difference or 0.0) <= high <= 1
    turned = Paired(pairs=paired.pairs, gained=lost, lost=gained)
    assert turned.interval() == pytest.approx((-high, -low))


@pytest.mark.parametrize(("gained", "lost"), [(0.3, 0.1), (0.05, 0.02), (0.5, 0.5), (0.1, 0.0)])
@pytest.mark.parametrize("pairs", [20, 100])
def test_the_interval_covers_the_truth(gained, lost, pairs):
    draws = np.random.default_rng(1).multinomial(
        pairs, [gained, lost, 1 - gained - lost], size=2000
    )
    intervals = [Paired(pairs=pairs, gained=int(g), lost=int(n)).interval() for g, n, _ in draws]
    covered = np.mean([low <= gained - lost <= high for low, high in intervals])
    assert covered >= 0.935
