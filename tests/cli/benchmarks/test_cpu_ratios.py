"""Ratios by processor time on the smallest grid."""

from deepseek_cli.benchmarks import cpu_ratios


def test_every_cell_and_mode_has_a_line_and_the_mean_is_theirs(capsys):
    assert cpu_ratios.main(["--grid", "quick", "--seconds", "0.02"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    ratios = [float(line.split(" times")[0].rpartition(" ")[2]) for line in lines]
    assert len(lines) == 6 and last.startswith("6 rows: geometric mean ")
    assert f"lowest {min(ratios):.2f}" in last and all(ratio > 0 for ratio in ratios)
    assert [("products alone" in line, "eager" in line) for line in lines] == [(True, True), (False, False)] * 3
    assert all("grouped_mm" in line for line in lines)
