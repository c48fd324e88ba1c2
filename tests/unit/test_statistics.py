"""Intervals and tests against published values, enumeration and simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlactl.evaluate.statistics import (
    clustered_wilson,
    effective_trials,
    exact_paired_p,
    paired_difference,
    wilson,
)


def paired(both: int, first_only: int, second_only: int, neither: int):
    """Outcomes of two policies on the same episodes, one pass."""
    first = [1] * (both + first_only) + [0] * (second_only + neither)
    second = [1] * both + [0] * first_only + [1] * second_only + [0] * neither
    return first, second, [1] * len(first)


@pytest.mark.parametrize(
    ("cells", "interval"),
    [
        # Newcombe 1998, Statistics in Medicine 17, 2635-2650, method 10
        ((36, 12, 2, 0), (0.0569, 0.3404)),
        # Fagerland, Lydersen and Laake 2014, Statistics in Medicine 33, 2850-2875: the asthma data
        ((1, 1, 7, 12), (-0.507, -0.026)),
        # Altman et al. 2000, Statistics with Confidence, table 6.2
        ((14, 5, 0, 22), (0.011, 0.226)),
    ],
)
def test_published_intervals_of_a_paired_difference(cells, interval):
    first, second, sizes = paired(*cells)
    assert paired_difference(second, first, sizes) == pytest.approx(interval, abs=5e-4)
    lower, upper = paired_difference(first, second, sizes)
    assert (-upper, -lower) == pytest.approx(interval, abs=5e-4)


@pytest.mark.parametrize("cells", [(0, 0, 0, 9), (9, 0, 0, 0), (4, 0, 0, 5), (0, 9, 0, 0)])
def test_extreme_differences_keep_an_interval_of_some_width(cells):
    first, second, sizes = paired(*cells)
    lower, upper = paired_difference(first, second, sizes)
    difference = (sum(second) - sum(first)) / len(sizes)
    assert -1 <= lower <= difference <= upper <= 1
    assert upper - lower > 0.1


def test_nothing_played_says_nothing():
    assert paired_difference([], [], []) == (-1.0, 1.0)
    assert clustered_wilson([], []) == (0.0, 1.0)
    assert exact_paired_p([]) == 1.0


@given(st.integers(0, 60), st.integers(0, 60))
def test_with_one_pass_the_test_is_mcnemars(first_only, second_only):
    """Twice the smaller tail of a fair binomial over the pairs that differ."""
    number = first_only + second_only
    tail = sum(math.comb(number, k) for k in range(min(first_only, second_only) + 1)) / 2**number
    found = exact_paired_p([1] * second_only + [-1] * first_only + [0] * 5)
    assert found == pytest.approx(min(1, 2 * tail), rel=1e-9)


@given(st.lists(st.integers(-3, 3), max_size=9))
def test_with_passes_it_exchanges_sides_of_whole_clusters(differences):
    """Against all 2^K ways of exchanging them."""
    sums = [
        abs(sum(sign * each for sign, each in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    expected = np.mean([total >= abs(sum(differences)) for total in sums])
    assert exact_paired_p(differences) == pytest.approx(expected, rel=1e-9)


def test_the_largest_evaluation_is_tested_at_once():
    assert exact_paired_p([1, -1] * 3250) == 1.0
    assert exact_paired_p([1] * 1000) == pytest.approx(2 * 0.5**1000)
    assert exact_paired_p([2, 1, -1] * 2166) == 0.0  # too small for a number


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60))
def test_effective_number_lies_between_clusters_and_episodes(drawn):
    sizes = [solved + failed + 1 for solved, failed in drawn]
    successes = [solved for solved, _ in drawn]
    assert len(sizes) <= effective_trials(successes, sizes) <= sum(sizes)
    lower, upper = clustered_wilson(successes, sizes)
    rate = sum(successes) / sum(sizes)
    assert 0 <= lower <= rate + 1e-12
    assert rate - 1e-12 <= upper <= 1


@given(st.lists(st.booleans(), min_size=1, max_size=80))
def test_one_pass_and_equal_passes_give_wilsons_interval_of_the_pairs(outcomes):
    """A greedy policy in a simulator without chance repeats itself: a second pass adds nothing."""
    expected = wilson(sum(outcomes), len(outcomes))
    for passes in (1, 2, 5):
        successes, sizes = [passes * each for each in outcomes], [passes] * len(outcomes)
        assert clustered_wilson(successes, sizes) == pytest.approx(expected, abs=1e-12)
        lower, upper = paired_difference(successes, successes, sizes)
        assert lower == pytest.approx(-upper)


def test_passes_that_differ_most_count_fully():
    """Each pair is solved in one of two passes."""
    assert clustered_wilson([1] * 50, [2] * 50) == pytest.approx(wilson(50, 100))


@pytest.mark.parametrize("spread", [0.0, 0.2, 0.45])
def test_intervals_with_two_passes_cover_what_they_promise(spread):
    """500 evaluations of 50 pairs, two passes, whose chances differ from pair to pair."""
    random = np.random.default_rng(0)
    hits = differences = 0
    for _ in range(500):
        chances = random.choice([0.5 - spread, 0.5 + spread], 50)
        first, second = random.binomial(2, chances), random.binomial(2, chances)
        lower, upper = clustered_wilson(first.tolist(), [2] * 50)
        hits += lower <= 0.5 <= upper
        lower, upper = paired_difference(first.tolist(), second.tolist(), [2] * 50)
        differences += lower <= 0 <= upper
    assert 0.93 <= hits / 500 <= 0.985
    assert differences / 500 >= 0.93
