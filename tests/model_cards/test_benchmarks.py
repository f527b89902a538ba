from dataclasses import replace

import numpy as np
import pytest

from deepseek_model_cards.benchmarks import chance_level, compare_to_chance
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
    row = Result(dataset="mmlu", metric="acc", value=value, stderr=stderr, n=114)
    assert chance_level(row) == 0.25
    assert compare_to_chance(row, 0.25).startswith(reading)


def test_an_error_is_taken_from_the_count_else_from_the_standard_error():
    row = Result(dataset="cais/mmlu", metric="acc", value=0.3)
    assert compare_to_chance(row, 0.25) == "no error known, so not compared"
    assert compare_to_chance(replace(row, stderr=0.02), 0.25) == "above chance"
    assert compare_to_chance(replace(row, n=57), 0.25) == "at chance"
    assert compare_to_chance(replace(row, n=5700), 0.25) == "above chance"


def test_none_solved_says_what_that_bounds():
    row = Result(dataset="humaneval", metric="pass_at_1", value=0.0, stderr=0.0, n=164)
    # 0.982^164 = 0.05: at a true rate of 1.8 %, 164 failures in a row happen one time in twenty.
    assert compare_to_chance(row, chance_level(row)) == "none solved (under 1.8% at 95 % confidence)"
    assert compare_to_chance(replace(row, value=0.05, stderr=0.017), 0.0) == "above chance"


def test_chance_is_not_guessed_for_other_data_or_metrics():
    assert chance_level(Result(dataset="books", metric="acc", value=0.5)) is None
    assert chance_level(Result(dataset="mmlu", metric="perplexity", value=9.0)) is None
    assert chance_level(Result(dataset="own", metric="acc", value=0.6, chance=0.5)) == 0.5
