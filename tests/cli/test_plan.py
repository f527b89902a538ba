"""``deepseek-moe plan``: what it prints, and what it refuses."""

import json

import pytest

from deepseek_cli.main import main


def test_a_plan_of_the_large_preset(capsys, tmp_path):
    target = tmp_path / "plan.json"
    assert main(["plan", "154b", "--gpus", "1024", "--simulate", "--json", str(target)]) == 0
    printed = capsys.readouterr().out
    plan = json.loads(target.read_text())
    assert plan["parameters"] == 154_099_136_512 and plan["fits"]
    layout = plan["layout"]
    assert layout["data"] * layout["tensor"] * layout["pipeline"] <= 1024
    for label in ("model", "layout", "engine", "memory", "expert exchange", "checkpoint", "run", "error"):
        assert f"\n{label} " in "\n" + printed
    assert "simulated" in printed and "Megatron-Bridge" in printed


def test_the_engine_of_transformers_has_no_pipeline(capsys):
    assert main(["plan", "7.7b", "--gpus", "64", "--engine", "transformers", "--batch", "1024"]) == 0
    printed = capsys.readouterr().out
    assert "transformers' Trainer with" in printed and "x TP 1 x PP 1" in printed


def test_a_recipes_model_and_a_fixed_layout(capsys):
    assert main(["plan", "pretrain-1b", "--gpus", "4", "--data", "4", "--zero", "3", "--batch", "64"]) == 0
    assert "DP 4 x TP 1 x PP 1, EP" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "plan: got no MODEL or no --gpus, expected both (or --check)"),
        (["154b"], "plan: got no MODEL or no --gpus"),
        (["154b", "--gpus", "0"], "--gpus: got 0, expected a number above 0"),
        (["154b", "--gpus", "8"], "--gpus: got 8 x h100, expected more or larger ones"),
        (["154b", "--gpus", "8", "--gpu", "tpu"], "--gpu: got 'tpu', expected one of"),
        (["155b", "--gpus", "8"], "model: got '155b', expected a preset"),
        (["7.7b", "--gpus", "8", "--data", "16"], "--data: got a layout of 16 GPUs, expected at most --gpus 8"),
        (["7.7b", "--gpus", "8", "--engine", "transformers", "--pipeline", "2"], "--pipeline: got 2, expected 1"),
        (["7.7b", "--gpus", "8", "--experts-per-token", "99"], "--experts-per-token: got 99"),
        (["7.7b", "--gpus", "8", "--tokens", "nan"], "--tokens: got nan, expected a number above 0"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
