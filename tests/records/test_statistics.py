"""Error bars by hand, against resampling, and by how often they cover the truth."""

import math

import numpy as np
import pytest

from deepseek_records.statistics import (
    chi_square_p,
    difference_with_error,
    mean_with_error,
    pooled_mean_with_error,
    ratio_with_error,
    share_error,
)


def test_the_error_of_a_share_is_the_binomial_one():
    share, error = mean_with_error([1.0, 1.0, 1.0, 0.0])
    assert share == 0.75
    assert error == pytest.approx(math.sqrt(0.75 * 0.25 / 3)) == share_error(0.75, 4)
    assert share_error(1.0, 1) is None


def test_a_pooled_error_takes_the_spread_within_groups():
    """By hand: deviations of 0.5 about 0.5 in the one group, none in the other, 5 - 2 degrees of freedom."""
    mean, error = pooled_mean_with_error([[0, 1], [1, 1, 1]])
    assert mean == 0.8 and error == pytest.approx(math.sqrt(0.5 / 3 / 5))
    assert pooled_mean_with_error([[0], [1]]) == (0.5, None)


def test_one_item_or_one_cluster_has_no_error():
    assert mean_with_error([1.0]) == (1.0, None)
    assert mean_with_error([1.0, 0.0, 1.0], ["a", "a", "a"])[1] is None
    assert difference_with_error((0.5, None), (0.2, 0.1)) == (0.3, None)
    assert difference_with_error((0.5, 0.3), (0.2, 0.4)) == (0.3, pytest.approx(0.5))


def test_copies_of_an_item_add_no_certainty():
    values = [1.0, 0.0, 0.0, 1.0, 0.0]
    copied = [value for value in values for _ in range(10)]
    clusters = [index for index in range(5) for _ in range(10)]
    assert mean_with_error(copied, clusters) == pytest.approx(mean_with_error(values))
    assert mean_with_error(copied)[1] < 0.5 * mean_with_error(values)[1]


def test_the_error_of_a_ratio_is_that_of_resampling():
    generator = np.random.default_rng(0)
    b = (generator.random(600) < 0.6).astype(float)
    a = b * (generator.random(600) < 0.7)
    clusters = np.arange(600) // 3
    ratio, error = ratio_with_error(a, b, clusters.tolist())
    draws = []
    for _ in range(1000):
        rows = (generator.integers(200, size=200)[:, None] * 3 + np.arange(3)).ravel()
        draws.append(a[rows].sum() / b[rows].sum())
    assert ratio == a.sum() / b.sum()
    assert error == pytest.approx(np.std(draws), rel=0.1)


def test_clustered_errors_cover_the_truth_and_plain_ones_do_not():
    generator = np.random.default_rng(1)
    covered = {"clustered": 0, "plain": 0}
    for _ in range(200):
        chances = generator.beta(1, 1, size=40)  # Templates differ widely; their items agree.
        hits = (generator.random((40, 25)) < chances[:, None]).astype(float).ravel()
        for name, clusters in (("clustered", (np.arange(1000) // 25).tolist()), ("plain", None)):
            share, error = mean_with_error(hits.tolist(), clusters)
            covered[name] += abs(share - 0.5) < 2 * error
    assert covered["clustered"] / 200 > 0.9
    assert covered["plain"] / 200 < 0.7


@pytest.mark.parametrize(
    ("statistic", "freedom", "p"),
    # From printed tables of the distribution.
    [(3.841, 1, 0.05), (5.991, 2, 0.05), (7.815, 3, 0.05), (11.345, 3, 0.01), (9.488, 4, 0.05), (11.070, 5, 0.05)],
)
def test_chi_square_probabilities(statistic, freedom, p):
    assert chi_square_p(statistic, freedom) == pytest.approx(p, rel=2e-3)
    assert chi_square_p(0.0, freedom) == pytest.approx(1.0)
