import json

import pytest

from deepseek_cli.benchmarks.expert_count import format_table, parse_count, summarize
from deepseek_cli.main import main


def test_a_count_is_a_number_or_a_range():
    fixed = {"min_experts_per_tok": 8, "num_experts_per_tok": 8, "target_experts_per_tok": 8.0}
    assert parse_count("8") == fixed
    assert parse_count("8-12") == {**fixed, "num_experts_per_tok": 12, "target_experts_per_tok": 10.0}
    for wrong in ("", "8-", "-8", "8..12", "eight", "12-8", "0", "0-8"):
        with pytest.raises(ValueError, match="expected a number such as 8 or a range such as 8-12"):
            parse_count(wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--timing-rounds", "0"], "timing_rounds: got 0, expected at least 1"),
        (["--seeds", "0"], "seeds: got 0, expected at least 1"),
        (["--counts", "8", "eight"], "counts: got 'eight', expected a number such as 8"),
        (["--counts", "8", "12-8"], "counts: got '12-8', expected a number such as 8 or a range such as 8-12"),
        (["--counts", "8", "12", "8"], "counts: got '8' 2 times, expected each once"),
        (["--counts", "8", "65"], "num_experts_per_tok: got 65, expected at most n_routed_experts=64"),
        (["--recipe", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_options_are_checked_before_anything_is_trained(tmp_path, capsys, options, message):
    assert main(["bench", "experts", *options, "--output", str(tmp_path / "runs")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (tmp_path / "runs").exists()


def test_differences_are_paired_by_seed():
    """Seeds differ by 1, variants by 0.1 in each of them: the error of the mean is large, of the difference none."""
    measured = {
        "8": [{"bits_per_byte": bits, "mean_experts": 8.0, "active_parameters": 1000} for bits in (2.0, 3.0, 4.0)],
        "8-12": [{"bits_per_byte": bits, "mean_experts": 9.5, "active_parameters": 1200} for bits in (1.9, 2.9, 3.9)],
    }
    table = summarize(measured)
    mean, error = table["8"]["bits_per_byte"]
    assert mean == pytest.approx(3.0) and error == pytest.approx(1 / 3**0.5)  # deviation 1, three seeds
    change, error = table["8-12"]["difference"]
    assert change == pytest.approx(-0.1) and error == pytest.approx(0, abs=1e-9)
    alone = summarize({count: rows[:1] for count, rows in measured.items()})
    assert alone["8"]["bits_per_byte"] == (2.0, None), "one seed has no error"
    for row in table.values():
        row["relative_step_time"] = 1.0
    assert "| against 8, paired | its 3 seeds | active" in format_table(table)
    assert (
        "| 8-12 | 9.50 ± 0.00 | 2.9000 ± 0.5774 | -0.1000 ± 0.0000 | -0.1000, -0.1000, -0.1000 | 1 k | 1.00 |"
        in format_table(table)
    )


@pytest.mark.slow
def test_the_table_of_a_debug_size_model(tiny_data, tmp_path, capsys):
    """The real command: two seeds of three variants, four steps each; a second call takes them as they are."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"data: {tiny_data}\npreset: debug\nvocab_size: 300\nsequence_length: 32\nbatch_size: 4\nmax_steps: 4\n"
        "learning_rate: 3.0e-3\nlogging_steps: 1\neval_bytes: 2000\nreport_to: []\n"
        "model: {router_bias_update_speed: 0.01}\n"
    )
    command = ["--recipe", str(recipe), "--counts", "1", "3", "1-3", "--seeds", "2", "--timing-rounds", "1"]
    main(["bench", "experts", *command, "--output", str(tmp_path / "runs")])
    lines = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert lines[-6].startswith("| experts per token") and lines[-2].startswith("| 1-3 |")
    for count, mean in (("1", 1), ("3", 3)):
        assert [row["mean_experts"] for row in found["runs"][count]] == [mean, mean]
        assert [row[f"share_of_tokens_with_{count}_experts"] for row in found["runs"][count]] == [1, 1]
    for row in found["runs"]["1-3"]:
        shares = [row[f"share_of_tokens_with_{count}_experts"] for count in (1, 2, 3)]
        assert sum(shares) == pytest.approx(1)
        assert row["mean_experts"] == pytest.approx(shares[0] + 2 * shares[1] + 3 * shares[2])
        assert 1.5 < row["mean_experts_in_training"] < 3
    assert found["runs"]["1"][0]["bits_per_byte"] != found["runs"]["1"][1]["bits_per_byte"], "seeds differ"
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("model.safetensors")}
    main(["bench", "experts", *command, "--output", str(tmp_path / "runs")])
    assert {path: path.stat().st_mtime_ns for path in written} == written, "finished runs are not trained again"
    assert json.loads((tmp_path / "runs" / "results.json").read_text())["runs"] == found["runs"]
