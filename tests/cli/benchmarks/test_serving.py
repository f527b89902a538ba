"""`deepseek-moe bench serving`: its prompts and table, its bad input, and marked slow a whole small run."""

import json

import pytest
from endpoint_server import make_model, make_tokenizer

from deepseek_cli.benchmarks import serving
from deepseek_cli.main import main


def test_prompts_are_different_and_short():
    prompts = serving.make_prompts(64)
    assert len(set(prompts)) == 64
    assert {len(prompt.split()) for prompt in prompts} == set(range(4, 20))


def test_a_text_that_differs_is_counted():
    loop = [serving.Answer("a", 4, 1.0), serving.Answer("b", 4, 3.0)]
    other = [serving.Answer("a", 4, 0.5), serving.Answer("c", 4, 0.5)]
    kinds = {serving.LOOP: (1, loop.__getitem__), "serve": (2, other.__getitem__)}
    figures = serving.measure(kinds, [0, 1], rounds=1)
    assert (figures[serving.LOOP]["num_equal"], figures["serve"]["num_equal"]) == (2, 1)
    assert figures[serving.LOOP]["p95_s"] == 3.0
    assert "| 1 of 2 |" in serving.format_table(figures, 2)


def test_no_round_is_refused(tmp_path, capsys):
    assert main(["bench", "serving", "nothing", "--rounds", "0", "--output", str(tmp_path / "out")]) == 2
    assert "--rounds: got 0, expected at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_whole_run(tmp_path, capsys):
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    make_model("ours").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    words = ["--prompts", "8", "--max-tokens", "8", "--rounds", "1", "--output", str(tmp_path / "out")]
    assert main(["bench", "serving", str(tmp_path / "model"), *words]) == 0
    figures = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["num_equal"] for row in figures.values()] == [8] * 4
    assert "| serve, 16 clients |" in capsys.readouterr().out
