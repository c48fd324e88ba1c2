"""Intervals and a test for success rates, where several episodes may start from the same state.

Episodes of one (task, trial) pair, the passes of an evaluation, are not independent: a cluster.
With one pass every cluster is one episode, and everything here is the textbook's:

    interval of a rate           Wilson 1927; the cluster's correlation enters through an effective
                                 number of episodes (Kish 1965; with Wilson: Dean and Pagano 2015)
    interval of a difference     Newcombe 1998, Statistics in Medicine 17, 2635-2650, method 10,
                                 from both Wilson intervals and their correlation; with clusters:
                                 Zou and Donner 2008 (MOVER)
    p of a difference            exact test that exchanges the sides of every cluster at random;
                                 with one pass McNemar's exact test

Shapes: K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_Z = 1.959963984540054


def wilson(successes: float, trials: float) -> tuple[float, float]:
    """95 % Wilson score interval of a success rate; (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    rate = successes / trials
    scale = 1 + _Z**2 / trials
    centre = (rate + _Z**2 / (2 * trials)) / scale
    margin = _Z / scale * math.sqrt(rate * (1 - rate) / trials + (_Z / (2 * trials)) ** 2)
    # Rounding must not push the rate itself out of an interval that ends at 0 or 1.
    return max(0.0, min(rate, centre - margin)), min(1.0, max(rate, centre + margin))


def clustered_wilson(successes_K: Sequence[int], sizes_K: Sequence[int]) -> tuple[float, float]:
    """Wilson interval of a success rate over clusters of episodes.

    Args:
        successes_K: successes in each cluster.
        sizes_K: episodes of each cluster.
    """
    trials = sum(sizes_K)
    if trials == 0:
        return wilson(0, 0)
    effective = effective_trials(successes_K, sizes_K)
    return wilson(sum(successes_K) / trials * effective, effective)


def effective_trials(successes_K: Sequence[int], sizes_K: Sequence[int]) -> float:
    """How many independent episodes tell as much about the rate as these.

    At least the number of clusters (all episodes of a cluster end alike) and at most the number of
    episodes. Where all failed or all succeeded nothing is known about their correlation: then the
    number of clusters.
    """
    num_clusters, trials = len(sizes_K), sum(sizes_K)
    rate = sum(successes_K) / trials
    residuals_K = _residuals(successes_K, sizes_K)
    spread = float(residuals_K @ residuals_K)
    if num_clusters < 2 or rate in (0, 1):
        return num_clusters
    if spread == 0:  # every cluster has the same mixed outcome
        return trials
    variance = num_clusters / (num_clusters - 1) * spread / trials**2
    return min(max(rate * (1 - rate) / variance, num_clusters), trials)


def paired_difference(
    first_K: Sequence[int], second_K: Sequence[int], sizes_K: Sequence[int]
) -> tuple[float, float]:
    """95 % interval of the second success rate minus the first, over the same clusters.

    Args:
        first_K: successes of the first policy in each cluster.
        second_K: successes of the second one.
        sizes_K: episodes that each of them has played in each cluster.
    """
    trials = sum(sizes_K)
    if trials == 0:
        return -1.0, 1.0
    first, second = sum(first_K) / trials, sum(second_K) / trials
    first_low, first_high = clustered_wilson(first_K, sizes_K)
    second_low, second_high = clustered_wilson(second_K, sizes_K)
    correlation = _correlation(first_K, second_K, sizes_K)
    below = _combine(second - second_low, first_high - first, correlation)
    above = _combine(second_high - second, first - first_low, correlation)
    return max(-1.0, second - first - below), min(1.0, second - first + above)


def exact_paired_p(differences_K: Sequence[int]) -> float:
    """Two-sided p of the sum of differences, if in every cluster either sign were as likely.

    Args:
        differences_K: successes of one policy minus those of the other, in each cluster.
    """
    sizes = [abs(difference) for difference in differences_K if difference]
    likelihoods = np.ones(1)  # of the sums -sum(sizes) ... sum(sizes)
    for size in sizes:
        either = np.zeros(2 * size + 1)
        either[[0, -1]] = 0.5
        likelihoods = np.convolve(likelihoods, either)
    as_far = likelihoods[sum(sizes) + abs(sum(differences_K)) :]
    return min(1.0, 2 * float(as_far.sum()))


def _residuals(successes_K: Sequence[int], sizes_K: Sequence[int]) -> np.ndarray:
    """Successes of each cluster beyond those that the common rate lets expect."""
    rate = sum(successes_K) / sum(sizes_K)
    residuals_K: np.ndarray = np.asarray(successes_K) - rate * np.asarray(sizes_K)
    return residuals_K


def _correlation(first_K: Sequence[int], second_K: Sequence[int], sizes_K: Sequence[int]) -> float:
    """Of both policies' rates over clusters, if positive less Newcombe's continuity correction."""
    mean_size = sum(sizes_K) / len(sizes_K)
    residuals = _residuals(first_K, sizes_K), _residuals(second_K, sizes_K)
    first_rates_K, second_rates_K = (each / mean_size for each in residuals)
    scale = math.sqrt(float(first_rates_K @ first_rates_K) * float(second_rates_K @ second_rates_K))
    common = float(first_rates_K @ second_rates_K)
    if common > 0:
        common = max(0.0, common - 0.5)
    return common / scale if scale else 0.0


def _combine(margin: float, other: float, correlation: float) -> float:
    return math.sqrt(max(0.0, margin**2 - 2 * correlation * margin * other + other**2))
