"""Every figure on the pages is registered in docs/claims.yaml, and holds when it is measured again.

`dev/figures_in_markdown.py` says what a figure is. The check's messages hold the entries to paste.
"""

import dataclasses

import claims
import pytest
from figures_in_markdown import find_blocks, find_figures, find_tables

REGISTER = claims.load_register()


@pytest.mark.parametrize("page", claims.pages())
def test_the_page_shows_what_is_registered_and_nothing_else(page):
    complaints = claims.check_page(page, REGISTER)
    assert not complaints, "\n\n".join(complaints)


def test_values_are_those_that_the_pages_show():
    assert not claims.check_values(REGISTER)


def test_a_miss_names_its_goal_and_what_can_run_says_how_long():
    for claim in REGISTER.claims:
        assert not claim.can_run or claim.seconds < float("inf"), f"{claim.id}: seconds"


def rerun_parameters() -> list[object]:
    """The claims that take under a minute; but for those under five seconds they are marked slow."""
    quick = [claim for claim in REGISTER.claims if claim.can_run and claim.seconds < 60]
    return [
        pytest.param(claim, id=claim.id, marks=[] if claim.seconds < 5 else [pytest.mark.slow]) for claim in quick
    ] or [pytest.param(None, marks=pytest.mark.skip(reason="no claim takes under a minute"))]


@pytest.mark.parametrize("claim", rerun_parameters())
def test_measured_again_it_holds(claim):
    holds, line = claims.run_claim(claim)
    assert holds, line


# The rule itself.
PAGE = """# Results of 3.5 GB

It is 1.48 times as fast (lowest 0.96), at 2.098 ± 0.008 bits per byte; 0 of 14,042 differ; 29.2 % better,
in 4 min 48 s. Set `learning_rate=0.001`, use torch 2.13.0, arXiv 2412.19437, section 2.1.2, 24 November 2026,
the 7.7b preset, [a link](x_1.5.md) and https://a.b/1.5. It took 700 steps of 8 samples and 3e-7 of error.

| setting | value |
| --- | --- |
| speed | 1.2x |

```python
x = 0.5
```

```
deepseek-moe pretrain x --lr 0.5
loss 2.25
```
"""


def test_the_rule_finds_figures_and_only_them():
    found = [figure.text for figure in find_figures(PAGE)]
    assert found == [
        "3.5 GB",
        "1.48 times",
        "0.96",
        "2.098 ± 0.008",
        "0 of 14,042",
        "29.2 %",
        "4 min",
        "48 s",
        "3e-7",
        "1.2x",
        "2.25",
    ]
    assert [PAGE[f.start : f.end] for f in find_figures(PAGE)] == found
    assert [region.first_line for region in find_tables(PAGE)] == ["| setting | value |"]
    assert [region.first_line for region in find_blocks(PAGE)] == ["deepseek-moe pretrain x --lr 0.5"]


@pytest.fixture
def small_register(tmp_path, monkeypatch):
    """A register of one claim about one page, and that page."""
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text("It is 1.5 times as\nfast.\n\n| a | b |\n| --- | --- |\n| 1 | 2.25 |\n")
    claim = claims.Claim(
        id="speed",
        command="printf 'ratio 1.52 of 3'",
        machine="any",
        date="2026-11-26",
        versions="2026-11",
        value=(1.5,),
        tolerance=("relative", 0.05),
        status="measured",
        shown=(claims.Place("page.md", text="1.5 times as fast"),),
        reads=r"ratio (\S+)",
        seconds=1,
    )
    return claims.Register((claim,), (claims.Place("page.md", table="| a |"),))


def test_a_registered_page_is_quiet(small_register):
    assert claims.check_page("page.md", small_register) == [] == claims.check_values(small_register)


def test_an_unregistered_figure_is_told_with_its_entry(small_register):
    (complaint,) = claims.check_page("page.md", claims.Register(small_register.claims, ()))
    assert "page.md:4" in complaint and 'table: "| a | b |"' in complaint and "- id:" in complaint


def test_a_figure_that_is_shown_no_more_is_told(small_register, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(page.read_text().replace("1.5 times", "1.6 times"))
    complaints = claims.check_page("page.md", small_register)
    assert "no longer shows '1.5 times as fast' of speed" in complaints[0] and "value: [1.6]" in complaints[1]
    assert claims.check_values(small_register) == ["speed: registers [1.5], which none of its places shows"]


def test_a_changed_cell_of_a_registered_table_is_told(small_register, tmp_path):
    page = tmp_path / "page.md"
    text = page.read_text()
    digest = claims.digest_of(text, claims.find_place(text, claims.Place("page.md", table="| a |")))
    claim = dataclasses.replace(
        small_register.claims[0], value=(2.25,), shown=(claims.Place("page.md", table="| a |", digest=digest),)
    )
    register = claims.Register((claim,), (claims.Place("page.md", text="1.5 times"),))
    assert claims.check_page("page.md", register) == []
    page.write_text(text.replace("| 1 |", "| 4 |"))
    assert "changed" in claims.check_page("page.md", register)[0]


def test_a_figure_in_a_registered_text_is_among_the_values(small_register):
    claim = dataclasses.replace(small_register.claims[0], value=())
    assert "1.5 times" in claims.check_values(claims.Register((claim,), ()))[0]


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({}, True),
        ({"tolerance": ("relative", 0.01)}, False),
        ({"tolerance": ("absolute", 0.03)}, True),
        ({"tolerance": ("exact", 0.0)}, False),
        ({"tolerance": ("at least", 1.52)}, True),
        ({"tolerance": ("at most", 1.5)}, False),
        ({"reads": "nothing like (it)"}, False),
        ({"command": "echo ratio 1.5; exit 3"}, False),
        ({"command": "true", "reads": "", "asserts": True}, True),
        ({"command": "false", "reads": "", "asserts": True}, False),
    ],
)
def test_measuring_again_tells_whether_it_holds(small_register, change, holds):
    assert claims.run_claim(dataclasses.replace(small_register.claims[0], **change))[0] is holds


ENTRY = (
    "{id: x, command: x, machine: any, date: x, versions: v, value: 1, tolerance: {exact: 0}, status: measured, "
    "shown: []}"
)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (f"claims: [{ENTRY}, {ENTRY}]\nnot_claims: []", "id x twice"),
        (f"claims: [{ENTRY.replace('any', 'nowhere')}]\nnot_claims: []", "machine nowhere"),
        (f"claims: [{ENTRY.replace('exact: 0', 'some: 1')}]\nnot_claims: []", "tolerance some"),
        (f"claims: [{ENTRY.replace('measured', 'not reached')}]\nnot_claims: []", "expected a goal"),
        (f"claims: [{ENTRY.replace('date: x, ', '')}]\nnot_claims: []", "date"),
        ("claims: []\nnot_claims: [{page: a.md, text: x, why: because}]", "why: because"),
    ],
)
def test_a_wrong_entry_is_one_line(entries, message, tmp_path):
    path = tmp_path / "claims.yaml"
    path.write_text(f"machines: {{any: a}}\nversions: {{v: a}}\n{entries}\n")
    with pytest.raises(ValueError, match=message) as raised:
        claims.load_register(path)
    assert "\n" not in str(raised.value)
