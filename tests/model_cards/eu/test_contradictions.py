import datetime

import pytest

from deepseek_model_cards.eu.contradictions import check_names, check_no, check_not_before, check_number, numbers_in


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("1,702,976 parameters", [1_702_976]),
        ("1.7 million, of 3 layers", [1.7e6, 3]),
        ("about 1.7M", [1.7e6]),
        ("7.3*10^10", [7.3e10]),
        ("7.3 x 10^10 or 2.4e22", [7.3e10, 2.4e22]),
        ("154B", [154e9]),
        ("none known", []),
        ("v2b and x1", []),
    ],
)
def test_numbers_are_read_as_people_write_them(text, numbers):
    assert numbers_in(text) == pytest.approx(numbers)


@pytest.mark.parametrize(
    ("answer", "agrees"),
    [("1.7 million", True), ("1,702,976", True), ("a small model", True), ("17 million", False), ("1.9M", False)],
)
def test_a_number_agrees_when_it_is_the_file_s_but_for_rounding(answer, agrees):
    assert (check_number(1_702_976, "a.json")(answer) == "") is agrees


def test_names_days_and_no():
    assert check_names(["org/base"], "a.json")("made from Org/Base, v1") == ""
    assert check_names(["org/base"], "a.json")("N/A") == "a.json names org/base"
    before = check_not_before("2026-03-04T10:00:00+0000", "a.json")
    assert before(datetime.date(2026, 3, 4)) == "" and before(datetime.date(2026, 3, 3)) == "a.json says 2026-03-04"
    assert check_not_before(None, "a.json") is None
    assert check_no("books", "a.json")(False) == "a.json says books" and check_no("books", "a.json")(True) == ""
