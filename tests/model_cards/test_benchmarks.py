from dataclasses import replace

import numpy as np
import pytest

from deepseek_model_cards.benchmarks import compare_to_chance, score_interval
from deepseek_records.statistics import wilson_interval
from deepseek_records.summary import Result


@pytest.mark.parametrize(("successes", "n"), [(0, 164), (30, 114), (1, 7), (164, 164)])
def test_the_interval_solves_the_score_equation(successes, n):
    """Witness: a bound p of Wilson's interval satisfies |share - p| = z sqrt(p (1 - p) / n)."""
    share = successes / n
    for bound in wilson_interval(share, n):
        assert abs(share - bound) == pytest.approx(1.96 * np.sqrt(bound * (1 - bound) / n), abs=1e-9)


@pytest.mark.parametrize(
    ("value", "stderr", "reading"),
    [
        (0.263, 0.041, "at chance"),
        (0.40, 0.041, "above chance"),
        (0.10, 0.041, "below chance"),
        (0.3, None, "at chance"),
    ],
)
def test_a_score_is_read_against_guessing(value, stderr, reading):
    row = Result(metric="acc", value=value, stderr=stderr, n=114, chance=0.25, is_share=True)
    assert compare_to_chance(row).startswith(reading)


def test_an_error_is_taken_from_the_count_else_from_the_standard_error():
    row = Result(metric="acc", value=0.3, chance=0.25, is_share=True)
    assert compare_to_chance(row) == "no error known, so not compared"
    assert compare_to_chance(replace(row, stderr=0.02)) == "above chance"
    assert compare_to_chance(replace(row, n=57)) == "at chance"
    assert compare_to_chance(replace(row, n=5700)) == "above chance"


def test_none_solved_says_what_that_bounds():
    row = Result(metric="pass@1", value=0.0, stderr=0.0, n=164, chance=0.0, is_share=True)
    # 0.982^164 = 0.05: at a true rate of 1.8 %, 164 failures in a row happen one time in twenty.
    assert compare_to_chance(row) == "none solved (under 1.8% at 95 % confidence)"
    assert compare_to_chance(replace(row, value=0.05, stderr=0.017)) == "above chance"


def test_a_perfect_and_a_zero_score_have_an_interval():
    for value in (0.0, 1.0):
        low, high = score_interval(Result(metric="acc", value=value, stderr=0.0, n=57, is_share=True))
        assert 0.05 < high - low < 0.08 and low <= value <= high
    assert score_interval(Result(metric="gap", value=0.1, stderr=0.1)) == pytest.approx((-0.096, 0.296))
    assert score_interval(Result(metric="gap", value=0.1)) is None


def test_chance_is_not_guessed():
    assert compare_to_chance(Result(metric="acc", value=0.5, n=100, is_share=True)) == ""
