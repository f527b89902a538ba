"""Robustness, preference for letters and frequency bands, by hand and against numpy."""

import numpy as np
import pytest

from deepseek_eval.metrics.loading import load_metric


def test_differences_are_paired_and_flips_counted():
    # Question a: right, then wrong. b: wrong, then right. c: wrong, then wrong otherwise. d: right, stays.
    result = load_metric("robustness").compute(
        predictions=[0, 1, 1, 0, 1, 0, 2, 0],
        references=[0, 0, 0, 0, 0, 0, 0, 0],
        variants=["original"] * 4 + ["typos"] * 4,
        questions=["a", "b", "c", "d"] * 2,
    )
    typos = result["variants"]["typos"]
    assert (result["acc_original"], typos["acc"], typos["difference"]) == (0.5, 0.5, 0.0)
    assert typos["flip_rate"] == 0.75
    assert typos["difference_stderr"] == pytest.approx(np.std([-1, 1, 0, 0], ddof=1) / 2)
    assert (result["worst_variant"], result["max_flip_rate"]) == ("typos", 0.75)


def test_only_questions_asked_in_both_forms_are_compared():
    result = load_metric("robustness").compute(
        predictions=[0, 1, 1],
        references=[0, 0, 0],
        variants=["original", "original", "typos"],
        questions=["a", "b", "a"],
    )
    assert result["variants"]["typos"]["difference"] == -1.0
    assert result["variants"]["typos"]["n"] == 1
    assert result["n"] == 2


def test_several_orders_count_as_one_question():
    result = load_metric("robustness").compute(
        predictions=[0, 0, 1, 2],
        references=[0, 0, 0, 0],
        variants=["original"] + ["reordered"] * 3,
        questions=["a"] * 4,
    )
    assert result["variants"]["reordered"]["acc"] == pytest.approx(1 / 3)
    assert result["variants"]["reordered"]["flip_rate"] == pytest.approx(2 / 3)
    assert result["variants"]["reordered"]["n"] == 1


def test_one_who_always_says_a_is_found_out():
    n = 400
    gold = [index % 4 for index in range(n)]
    result = load_metric("position_bias").compute(predictions=[0] * n, references=gold)
    assert result["letters"]["A"] == {"predicted": 1.0, "gold": 0.25, "recall": 1.0}
    assert result["rstd"] == pytest.approx(np.std([1, 0, 0, 0]))
    # (400 - 100)^2 / 100 + 3 * 100^2 / 100
    assert result["chi2"] == pytest.approx(900 + 300)
    assert result["chi2_p"] < 1e-100
    assert result["rstd_by_chance"] < 0.1


def test_one_without_preference_is_not():
    generator = np.random.default_rng(0)
    gold = generator.integers(4, size=4000)
    letters = np.where(generator.random(4000) < 0.5, gold, generator.integers(4, size=4000))
    result = load_metric("position_bias").compute(predictions=letters, references=gold)
    assert result["chi2_p"] > 0.01
    # What is left is chance: 0.625 right, a thousand questions a letter.
    assert result["rstd"] == pytest.approx(result["rstd_by_chance"], abs=3 * result["rstd_stderr"])
    assert result["rstd"] < 0.04
    assert result["rstd_stderr"] < 0.01


def test_the_bootstrap_error_of_rstd_is_the_spread_over_fresh_questions():
    generator = np.random.default_rng(1)

    def draw():
        gold = generator.integers(4, size=600)
        chances = np.array([0.8, 0.5, 0.4, 0.3])[gold]
        return np.where(generator.random(600) < chances, gold, 0), gold

    def rstd(letters, gold):
        return np.std([np.mean(letters[gold == letter] == letter) for letter in range(4)])

    spread = np.std([rstd(*draw()) for _ in range(300)], ddof=1)
    letters, gold = draw()
    result = load_metric("position_bias").compute(predictions=letters, references=gold)
    assert result["rstd"] == pytest.approx(rstd(letters, gold))
    assert result["rstd_stderr"] == pytest.approx(spread, rel=0.25)


def test_bands_by_hand():
    result = load_metric("frequency_bands").compute(
        predictions=[1, 1, 0, 0, 1, 0, 0],
        references=[1] * 7,
        frequencies=[5.0, 4.0, 0.5, 0.1, 3.0, 0.3, None],
        num_bands=2,
    )
    assert (result["acc_head"], result["acc_tail"], result["drop"]) == (1.0, 0.0, 1.0)
    assert (result["n"], result["num_without_frequency"]) == (6, 1)
    assert [band["n"] for band in result["bands"]] == [3, 3]
    assert (result["acc_head_n"], result["acc_tail_n"], result["drop_n"]) == (3, 3, 6)
    assert (result["bands"][0]["lowest"], result["bands"][1]["highest"]) == (0.1, 5.0)


def test_a_drop_between_subjects_is_none_within_them():
    """Two subjects, one rare and hard, one common and easy; inside each, frequency decides nothing."""
    generator = np.random.default_rng(2)
    frequencies = np.concatenate([generator.random(500), 10 + generator.random(500)])
    hits = np.concatenate([generator.random(500) < 0.2, generator.random(500) < 0.9]).astype(int)
    result = load_metric("frequency_bands").compute(
        predictions=hits, references=[1] * 1000, frequencies=frequencies, groups=["hard"] * 500 + ["easy"] * 500
    )
    assert result["drop"] > 0.6
    assert abs(result["drop_within_groups"]) < 3 * result["drop_within_groups_stderr"]
    assert result["drop_within_groups_stderr"] < 0.06


def test_a_real_long_tail_is_found_within_subjects():
    generator = np.random.default_rng(3)
    frequencies = generator.random(2000)
    hits = (generator.random(2000) < 0.3 + 0.5 * frequencies).astype(int)
    result = load_metric("frequency_bands").compute(
        predictions=hits, references=[1] * 2000, frequencies=frequencies, groups=[i % 5 for i in range(2000)]
    )
    # Fifths lie at 0.1 and 0.9 on average: 0.5 * 0.8 apart.
    assert result["drop"] == pytest.approx(0.4, abs=3 * result["drop_stderr"])
    assert result["drop_within_groups"] == pytest.approx(0.4, abs=3 * result["drop_within_groups_stderr"])


@pytest.mark.parametrize(
    ("metric", "inputs", "message"),
    [
        ("robustness", {"predictions": [0], "references": [0]}, "expected variants and questions"),
        (
            "robustness",
            {"predictions": [0], "references": [0], "variants": ["typos"], "questions": ["a"]},
            "hold no 'original'",
        ),
        (
            "robustness",
            {"predictions": [0], "references": [0], "variants": ["original"], "questions": ["a"]},
            "no variant beside",
        ),
        ("frequency_bands", {"predictions": [0], "references": [0]}, "expected frequencies"),
        ("frequency_bands", {"predictions": [0], "references": [0], "frequencies": [1.0]}, "expected at least 5"),
    ],
)
def test_what_is_missing_is_named(metric, inputs, message):
    with pytest.raises(ValueError, match=message):
        load_metric(metric).compute(**inputs)
