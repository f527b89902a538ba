"""The host's cost per call, measured small on a CPU."""

import json

from deepseek_cli.benchmarks import host_cost


def test_the_table_and_the_figures(tmp_path, capsys):
    host_cost.main(["--tokens", "3", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "host_cost.json").read_text())["rows"]
    parts = [part for parts in host_cost.PARTS.values() for part in parts]
    assert [(row["implementation"], row["part"]) for row in rows] == [(n, p) for n in host_cost.NAMES for p in parts]
    assert all(row["host_us"] > 0 and row["device_us"] > 0 for row in rows)
    # Of a step with gradients the last part says how long all of it took.
    assert [row["step_us"] is None for row in rows] == [False, True, False] * 2
    assert "| 3 | backward | fused_moe |" in capsys.readouterr().out
