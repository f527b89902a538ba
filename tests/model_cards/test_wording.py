from dataclasses import replace

import pytest

from deepseek_model_cards.wording import format_bytes, format_count, format_seconds, format_value, label_dataset
from deepseek_records.summary import Result


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (0.26315, 0.0411, "0.263 \u00b1 0.041"),
        (12.3456, 0.5, "12.35 \u00b1 0.50"),
        (1234.5, 30.0, "1234 \u00b1 30"),
        (0.0, 0.0, "0"),  # no failure left no error to show
        (2.41, None, "2.410"),
        (1e-9, 1e-9, "0"),  # the KL of a model to itself, in fp32
        (-0.19, None, "-0.1900"),
        (99999.4, None, "99999"),
        (1e-5, None, "1e-05"),
        (float("inf"), None, "inf"),
        (14042, None, "14,042"),
        (True, None, "yes"),
        (None, None, "-"),
        ("<= 4 %", None, "<= 4 %"),
    ],
)
def test_values_carry_as_many_digits_as_their_error_allows(value, stderr, text):
    assert format_value(value, stderr) == text


def test_counts_times_and_sizes_read_as_words():
    assert [format_count(n) for n in (812, 3_020_000, 154.1e9)] == ["812", "3.02 M", "154.1 B"]
    assert [format_seconds(s) for s in (None, 42.2, 59.6, 185, 7800)] == [
        *("not recorded", "42 s", "1 min 00 s", "3 min 05 s", "2 h 10 min"),
    ]
    assert [format_bytes(b) for b in (None, 12, 4_100_000)] == ["-", "12 B", "4.1 MB"]


def test_data_sets_are_named_with_their_split():
    row = Result(metric="acc", value=0.3, dataset="cais/mmlu", split="test")
    assert label_dataset(row) == "cais/mmlu, test"
    assert label_dataset(replace(row, label="MMLU")) == "MMLU, test"
    assert label_dataset(Result(metric="acc", value=0.3)) == ""
