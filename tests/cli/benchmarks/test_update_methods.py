"""The table of updates in sequence: its figures by hand, and one short sequence behind the gate."""

import json

import pytest

from deepseek_cli.benchmarks.update_methods import TEXTS, figures_of, format_gate
from deepseek_cli.benchmarks.update_sequence import METHODS, Updated
from deepseek_cli.benchmarks.update_texts import FIRST, LATER, read_lesson
from deepseek_cli.main import main


def rows(*table):
    return [Updated(dict(zip(TEXTS, row, strict=True))) for row in table]


def test_figures_by_hand():
    """Each text falls by 1 when it is taught, rises by 0.1 with each later update, and by 0.2 before its own."""
    before = [3.0] * len(TEXTS)
    table = [before]
    for taught in range(1, len(TEXTS)):
        row = [value + 0.1 for value in table[-1]]
        row[taught] = before[taught] - 1
        for later in range(taught + 1, len(TEXTS)):
            row[later] = table[-1][later] + 0.2
        table.append(row)
    found = figures_of(rows(before)[0], rows(*table[1:]))
    assert found["learned"] == pytest.approx(1.0)
    # Text 0 rises five times, text j 5 - j times.
    assert found["forgotten"] == pytest.approx(0.1 * (5 + 4 + 3 + 2 + 1) / 5)
    # Text j has met j - 1 updates before its own, each a loss of 0.2.
    assert found["forward"] == pytest.approx(-0.2 * (1 + 2 + 3 + 4) / 4)
    assert found["final"] == pytest.approx(sum(table[-1]) / len(TEXTS))
    assert figures_of(rows(before)[0], rows(table[-1])) == {"final": pytest.approx(found["final"])}


def test_the_gate_reads_other_text_than_the_table():
    for name in (FIRST, *LATER):
        lesson = read_lesson(name)
        shown, deciding = set(lesson.held_out), set(lesson.of_gate)
        assert shown and deciding and not shown & deciding, name
        assert not (shown | deciding) & set(lesson.train), name


@pytest.mark.slow
def test_a_sequence_behind_the_gate(tmp_path, capsys):
    methods = ["naive", "replay + gate"]
    words = ["--methods", *methods, "--seeds", "1", "--steps", "2", "--first-steps", "4"]
    assert main(["bench", "update", *words, "--output", str(tmp_path / "bench")]) == 0
    told = json.loads((tmp_path / "bench" / "results.json").read_text())
    naive, gated = (told["runs"]["0"][name] for name in methods)
    assert len(naive) == len(gated) == len(LATER)
    before, taught = told["runs"]["0"]["before"][0]["bits"], {FIRST}
    for name, one in zip(LATER, gated, strict=True):
        gate = one["gate"]
        asked = {finding["dataset"] for finding in gate["findings"] if finding["kind"] == "loss"}
        assert asked == taught and gate["alpha"] in (0.25, 0.5, 0.75, 1.0)
        if gate["accepted"]:
            taught.add(name)
            assert one["bits"] != before and any(one["drift"].values())
        else:  # the old model stays, to the last bit, and its routers too
            assert gate["why"] and one["bits"] == pytest.approx(before, abs=1e-9)
            assert all(value == pytest.approx(0.0, abs=1e-12) for value in one["drift"].values())
        before = one["bits"]
    assert not any(one["gate"] for one in naive)
    printed = capsys.readouterr().out
    assert "| routers moved, nats | books |" in printed and "| update | kept at alpha, by seed |" in printed


def test_what_the_gate_said_is_told():
    kept = Updated({}, {}, {"accepted": True, "alpha": 0.5, "why": [], "findings": []})
    refused = Updated({}, {}, {"accepted": False, "alpha": 1.0, "why": ["books: lost"], "findings": []})
    name = next(name for name, method in METHODS.items() if method.is_gated)
    table = format_gate({"0": {name: [kept] * 5}, "1": {name: [refused] * 5}}, [name])
    assert "| books | 0.5, refused | books: lost |" in table
    assert format_gate({}, ["naive"]) == ""
