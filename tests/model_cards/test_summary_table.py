import re

from deepseek_model_cards.summary_table import COLUMNS, summary_rows, summary_table
from deepseek_records.run_folder import RunFolder


def test_every_result_and_every_check_is_in_the_table(finished_run):
    rows = [row.cells() for row in summary_rows(finished_run)]
    stages = [RunFolder(finished_run / name).summary for name in ("pretrain", "adapt", "align", "evaluate")]
    measured = {(s.stage, r.metric, r.dataset) for s in stages for r in s.results}
    checks = [check for s in stages for check in s.checks]
    assert len(rows) == len(measured) + len(checks)
    assert [row[1] for row in rows if row[5]] == [check.name for check in checks]
    assert [row[5] for row in rows if row[5]] == ["yes" if check.passed else "no" for check in checks]


def test_before_and_after_share_a_line_and_a_baseline_is_named(finished_run):
    cells = {row.what: row for row in summary_rows(finished_run)}
    domain = cells["bits per byte, medicine, validation"]
    assert (domain.before, domain.after) == ("3.100 \u00b1 0.030", "2.500 \u00b1 0.030")
    general = next(row for row in summary_rows(finished_run) if row.stage == "pretrain")
    assert general.before == "3.300 (bigram)"
    assert cells["below the bigram"].target == "< 3.300"


def test_the_columns_of_the_text_line_up(finished_run):
    lines = summary_table(finished_run).splitlines()
    # A column starts where the rule below the header starts.
    starts = [match.start() for match in re.finditer(r"-+", lines[1])]
    assert len(starts) == len(COLUMNS)
    for line in lines:
        assert all(line[start - 1 : start] in (" ", "") for start in starts[1:])
        assert line == line.rstrip()
    assert [lines[0][start:].split("  ")[0].strip() for start in starts] == list(COLUMNS)


def test_a_single_stage_has_a_table_too(finished_run):
    assert "medicine" in summary_table(finished_run / "adapt")
