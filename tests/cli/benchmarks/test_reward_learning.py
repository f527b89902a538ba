"""The comparison of PPO, GRPO and RLOO under the reward: real short trainings, the gauges, the errors and the bar."""

import json
import statistics

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_cli.benchmarks.reward_learning import GAUGES, START, _gain, format_table
from deepseek_cli.benchmarks.reward_runs import METHODS, Gauges, measure_policy, train_policy
from deepseek_cli.main import main
from deepseek_training.recipes.align import AlignRecipe
from deepseek_training.recipes.loading import load_recipe

SMALL = {"num_updates": 1, "num_eval_prompts": 8, "response_length": 6, "prompt_sources": ["medquad"]}


def make_recipe(policy_path, **settings):
    return load_recipe("align-debug", AlignRecipe, {"model": str(policy_path), **SMALL, **settings})


@pytest.mark.parametrize("engine", ["grpo", "rloo"])
def test_group_trainers_take_the_same_reward(engine, policy_path, tmp_path):
    recipe = make_recipe(policy_path, num_updates=2, learning_rate=1e-3, kl_coef=0.1)
    policy, curve = train_policy(METHODS[engine], recipe, tmp_path)
    assert len(curve) == 2  # one call of the reward an update, as with PPO
    assert all(0 <= row[name] <= 1 for row in curve for name in ("reward", "relevance", "safety", "diversity"))
    start = AutoModelForCausalLM.from_pretrained(policy_path).state_dict()
    moved = [name for name, value in policy.state_dict().items() if not torch.equal(value, start[name])]
    assert any("proj" in name for name in moved)


def test_gauges_tell_a_hack_from_an_answer():
    prompt = "What are the symptoms of Giant Axonal Neuropathy?"
    honest = "Children with GAN walk with an unsteady gait, their hair is tightly curled, and the nerves waste away."
    columns = Gauges().read([prompt] * 3, [honest, prompt, "axonal symptoms giant neuropathy " * 5])
    assert columns["naive_reward"][1] > columns["naive_reward"][0]  # the echo wins without guards
    assert columns["reward"][0] > max(columns["reward"][1:]) + 0.2  # and loses with them
    assert columns["copied_words"][1:] == [1.0, 1.0] and columns["copied_words"][0] < 0.2
    assert columns["guard"][0] > 0.9 and max(columns["guard"][1:]) < 0.1
    assert columns["distinct_words"][2] == pytest.approx(4 / 20)
    assert Gauges().read(["Why?"], [""])["reward"][0] == pytest.approx(
        Gauges().read(["Why?"], [""])["safety"][0] ** 2 * 0.2  # weighed, and gated
    )


def test_the_start_is_no_nats_from_itself_and_another_policy_is(policy_path):
    recipe = make_recipe(policy_path, response_length=12)
    same = measure_policy(AutoModelForCausalLM.from_pretrained(policy_path), recipe, num_samples=1)
    assert same["kl"] == pytest.approx([0.0] * 8, abs=1e-3)
    other = AutoModelForCausalLM.from_pretrained(policy_path)
    with torch.no_grad():
        other.lm_head.weight.mul_(40.0)
    far = measure_policy(other, recipe, num_samples=2)
    assert statistics.fmean(far["kl"]) > 1.0
    assert all(1 <= length <= 12 for length in far["length_tokens"])


def test_the_errors_are_over_seeds_and_paired_over_prompts():
    start = [0.1, 0.3, 0.5, 0.7]
    cell = _gain([[0.2, 0.4, 0.6, 0.8], [0.3, 0.5, 0.7, 0.9]], start)  # the prompts differ, their gains do not
    assert cell["gain"] == pytest.approx(0.15) and cell["mean"] == pytest.approx(0.55)
    assert cell["stderr_over_prompts"] == pytest.approx(0.0, abs=1e-12)
    assert cell["stderr_over_seeds"] == pytest.approx(0.05)
    assert cell["stderr"] == cell["stderr_over_seeds"]


@pytest.mark.parametrize(
    ("gain", "error", "kl", "is_passed"),
    [(0.03, 0.01, 5, True), (0.029, 0.01, 5, False), (0.03, 0.01, 16, False), (-0.03, 0.01, 5, False)],
)
def test_the_bar_wants_three_errors_and_a_small_divergence(gain, error, kl, is_passed):
    cell = {"mean": 0.5, "gain": gain, "stderr_over_seeds": error, "stderr_over_prompts": error / 2, "stderr": error}
    results = {START: {name: {"mean": 0.4} for name in GAUGES}, "ppo": dict.fromkeys(GAUGES, cell)}
    results["ppo"]["kl"] = {**cell, "mean": kl}
    table, passed = format_table(results, min_gain=3, max_kl=15)
    assert passed is is_passed
    assert ("met" if is_passed else "missed") in table


@pytest.mark.slow
def test_the_command_runs_each_method_once_and_takes_finished_runs_as_they_are(policy_path, tmp_path, capsys):
    words = [
        "bench",
        "rewards",
        "align-debug",
        "--model",
        str(policy_path),
        "--output",
        str(tmp_path),
        "--num-samples",
        "1",
    ]
    words += ["--seeds", "0", "1", "--batch-size", "8"]
    for name, value in SMALL.items():
        words += [f"--{name.replace('_', '-')}", json.dumps(value)]
    assert main(words) in (0, 3)
    assert capsys.readouterr().out.split("rloo-1")[0].count("-1\n") == 3
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {START, *METHODS}
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "PPO: held-out reward" in (tmp_path / "table.txt").read_text()
    stamp = (tmp_path / "grpo-1" / "summary.json").stat().st_mtime_ns
    main(words)
    assert "ppo-0" not in capsys.readouterr().out
    assert (tmp_path / "grpo-1" / "summary.json").stat().st_mtime_ns == stamp
    assert json.loads((tmp_path / "results.json").read_text()) == results
