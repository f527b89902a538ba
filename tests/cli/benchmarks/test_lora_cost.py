"""`deepseek-moe bench lora`, run small, and its bad input."""

import json

import pytest

from deepseek_cli.benchmarks import lora_cost
from deepseek_cli.benchmarks.step_cost import Shape
from deepseek_cli.main import main


def test_the_table_and_the_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lora_cost, "SHAPE", Shape(8, 2, 64, 32, batch_size=1, sequence_length=16))
    monkeypatch.setattr(lora_cost, "BATCHES", {16: (1, 16)})
    assert main(["bench", "lora", "--rounds", "1", "--rank", "2", "--output", str(tmp_path / "lora")]) == 0
    figures = json.loads((tmp_path / "lora" / "results.json").read_text())["16"]
    assert figures["seconds"].keys() == set(lora_cost.KINDS)
    kept = figures["kept_bytes"]
    # Two layers of 8 experts: the merged copies, and two columns for each of the 32 rows and both projections.
    assert kept["fold"] - kept["frozen"] >= 2 * 8 * 3 * 64 * 32 * 4 - 8192
    assert kept["lora"] - kept["frozen"] < 2 * 2 * 32 * 2 * 4 + 8192
    assert "| 16 |" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--rounds", "--rank", "--threads"])
def test_nothing_to_measure_is_refused(option, tmp_path, capsys):
    assert main(["bench", "lora", option, "0", "--output", str(tmp_path / "lora")]) == 2
    assert f"{option[2:]}: got 0, expected at least 1" in capsys.readouterr().err
