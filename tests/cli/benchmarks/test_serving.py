"""`deepseek-moe bench serving`: its prompts, load, tables and bad input, and marked slow a whole small run."""

import json
from contextlib import contextmanager

import pytest

from deepseek_cli.benchmarks import serving, serving_load, serving_peers, serving_table
from deepseek_cli.main import main


def test_prompts_are_different_and_short():
    prompts = serving_load.make_prompts(64)
    assert len(set(prompts)) == 64
    assert {len(prompt.split()) for prompt in prompts} == set(range(4, 20))


def answers(values):
    """A server that knows each prompt's answer; its times are 1, 2, 3 ... seconds."""

    @contextmanager
    def start():
        yield lambda prompt: serving_load.Answer(values[prompt], 4, prompt + 1.0)

    return start


def test_figures_of_a_round_and_what_differs_or_is_absent(capsys):
    @contextmanager
    def absent():
        raise serving_peers.AbsentError("not here")
        yield

    kinds = {"ours": answers(["a", "b", "c"]), "other": answers(["a", "b", "x"]), "none": absent}
    figures = serving.measure(kinds, [0, 1, 2], ["a", "b", "c"], clients=[1, 2], rounds=2)
    assert (figures["ours"]["2"]["num_equal"], figures["other"]["1"]["num_equal"]) == (3, 2)
    assert (figures["ours"]["1"]["p50_s"], figures["ours"]["1"]["p99_s"]) == (2.0, 3.0)
    row = figures["ours"]["1"]
    assert row["tokens_per_second"] == pytest.approx(4 * row["requests_per_second"])
    assert "none: left out (not here)" in capsys.readouterr().out
    scores = {"batching on": answers([1.0, 2.0]), "batching off": answers([1.00001, 2.1])}
    scoring = serving.measure(scores, [0, 1], [1.0, 2.0], clients=[1], rounds=1)
    assert [scoring[name]["1"]["num_equal"] for name in scores] == [2, 1]
    told = serving_table.format_tables({"generation": figures, "scoring": scoring, "prompts": 3, "scored": 2})
    assert "| other |" in told and "| 2 of 3 |" in told and "| 1 of 2 |" in told and "none: left out" in told


def test_the_picture_shows_every_server(tmp_path):
    cell = {"tokens_per_second": 5.0, "requests_per_second": 2.0, "p95_s": 1.0}
    kinds = {"loop": {"1": cell}, "ours": {"1": cell, "4": cell}, "none": {"absent": "not here"}}
    serving_table.draw({"generation": kinds, "scoring": kinds}, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_no_round_is_refused(tmp_path, capsys):
    assert main(["bench", "serving", "--rounds", "0", "--output", str(tmp_path / "out")]) == 2
    assert "--rounds: got 0, expected at least 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_run(tmp_path, capsys):
    """Whatever is installed answers right: the endpoint and `transformers serve` always."""
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    words = ["--prompts", "8", "--max-tokens", "8", "--rounds", "1", "--most-clients", "4"]
    assert main(["bench", "serving", *words, "--output", str(tmp_path / "out")]) == 0
    figures = json.loads((tmp_path / "out" / "results.json").read_text())
    for kinds, number in ((figures["generation"], 8), (figures["scoring"], 32)):
        for name, row in kinds.items():
            assert "absent" in row or {cell["num_equal"] for cell in row.values()} == {number}, name
    assert {"transformers serve", "deepseek-moe serve"} <= figures["generation"].keys()
    assert (tmp_path / "out" / "serving.png").is_file()


def test_a_character_cut_in_two_is_no_other_text():
    assert serving_load.is_equal("the ca", "the ca\ufffd") and serving_load.is_equal("the ca\ufffd", "the ca")
    assert not serving_load.is_equal("the ca", "the c\ufffda") and not serving_load.is_equal("the", "the c")
    assert serving_load.is_equal(-3.0, -3.0001) and not serving_load.is_equal(-3.0, -3.001)
