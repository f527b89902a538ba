"""The fields stand for the whole of what the annexes, the form and the template ask, and each says where."""

import re
from pathlib import Path

import pytest

from deepseek_model_cards.eu.entries import CATEGORY_KEY
from deepseek_model_cards.eu.fields import fields_of, read_forms
from deepseek_model_cards.eu.finders import FINDERS
from deepseek_model_cards.eu.write_docs import fields_table, with_table

ALL = ("technical", "summary", "high_risk")
POINTS = {
    "technical": [
        *(f"Annex XI Section 1 point 1({letter})" for letter in "abcdef"),
        *(f"Annex XI Section 1 point 2({letter})" for letter in "abcde"),
        *(f"Annex XI Section 2 point {number}" for number in (1, 2, 3)),
        *(f"Annex XII point 1({letter})" for letter in "abcfh"),
        *("Annex XII points 1(d) and 2(a)", "Annex XII points 1(e) and 2(a)", "Annex XII points 1(g) and 2(b)"),
        "Annex XII point 2(c)",
        *(
            f"Model Documentation Form section {section} item {item}"
            for section, items in enumerate((6, 5, 2, 6, 2, 8, 3, 4), start=1)
            for item in range(1, items + 1)
        ),
    ],
    "summary": [
        f"Template {part}"
        for part in ("1.1", "1.2", "1.3", "2.1", "2.2.1", "2.2.2", "2.3", "2.4", "2.5", "2.6", "3.1", "3.2", "3.3")
    ],
    "high_risk": [
        *(f"Annex IV point {part}({letter})" for part in (1, 2) for letter in "abcdefgh"),
        *(f"Annex IV point {number}" for number in range(3, 10)),
    ],
}
CITED = re.compile(
    r"Article \d+(\(\d+\)(\([a-z]\))?(\([ivx]+\))?)?|Annex (IV|XI|XII)( Section \d)? points? [\d()a-h and]+|"
    r"Model Documentation Form (head|section \d item \d)|Template (head|\d(\.\d){1,2})"
)


@pytest.mark.parametrize("name", ALL)
def test_every_point_is_asked(name):
    cited = [law for field in read_forms()[name].fields for law in field.law]
    assert not [point for point in POINTS[name] if point not in cited]


@pytest.mark.parametrize("name", ALL)
def test_each_field_cites_names_and_conditions_that_exist(name):
    form = read_forms()[name]
    known = fields_of(ALL)
    keys = [field.key for field in form.fields]
    assert len(keys) == len(set(keys))
    for field in form.fields:
        assert all(CITED.fullmatch(law) for law in field.law), field.law
        assert field.finder is None or field.finder in FINDERS
        assert all(known[key].kind == "yes_no" for key in field.conditions)
        assert not field.more or field.finder, field.key


def test_a_question_that_two_documents_ask_is_of_one_kind():
    kinds = {}
    for name in ALL:
        for field in read_forms()[name].fields:
            assert kinds.setdefault(field.key, field.kind) == field.kind
    assert kinds[CATEGORY_KEY] == "categories"


def test_every_finder_fills_a_field():
    used = {field.finder for name in ALL for field in read_forms()[name].fields}
    assert set(FINDERS) == used - {None}


def test_the_page_shows_the_fields_as_they_are():
    page = (Path(__file__).resolve().parents[3] / "docs" / "documents_for_regulators.md").read_text(encoding="utf-8")
    assert fields_table() in page and with_table(page) == page
