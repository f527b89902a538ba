"""GRPO and DPO through TRL: what they learn, the run folder, LoRA, resume, dry runs and bad input."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from deepseek_cli.main import main
from deepseek_records.loading import load_tokenizer
from deepseek_records.run_folder import RunFolder
from deepseek_training.data.pairs import encode_pair, load_pairs
from deepseek_training.recipes.dpo import DpoRecipe
from deepseek_training.trainer.checkpoints import last_complete_checkpoint


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Forty pairs whose better answer is polite."""
    path = tmp_path_factory.mktemp("pairs") / "preferences.jsonl"
    rows = []
    for i in range(40):
        row = {"prompt": f"What is {i} and {i}?", "chosen": f"It is {2 * i}, sir.", "rejected": f"{2 * i}!"}
        rows.append({**row, "split": "train" if i < 30 else "validation"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dpo_command(policy, pairs, output, *more):
    small = ["--max-steps", "8", "--learning-rate", "0.01", "--save-steps", "4", "--report-to", "[]"]
    return ["dpo", "dpo-debug", "--model", str(policy), "--data", str(pairs), "--output", str(output), *small, *more]


def assert_bias_moved(policy_path, run):
    before, after = (load_file(path / "model.safetensors") for path in (policy_path, run.model_path))
    names = [name for name in before if name.endswith("e_score_correction_bias")]
    assert names and all(not torch.equal(before[name], after[name]) for name in names)


@pytest.mark.parametrize("lora", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_dpo_learns_the_preference(policy_path, pairs, tmp_path, capsys, lora):
    more = ["--lora-rank", str(lora), "--min-accuracy", "0.5", "--bias-update-speed", "0.01"]
    command = dpo_command(policy_path, pairs, tmp_path / "run", *more)
    assert main(command) == 0
    assert "held-out preference accuracy" in capsys.readouterr().out
    run = RunFolder(tmp_path / "run")
    accuracy, margin, loss = run.summary.results
    assert accuracy.value > 0.9 and margin.value > 0 and loss.value < 0.69 and accuracy.n == 10
    assert run.summary.checks[0].passed
    rows = [row for row in run.metrics if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3), "the reference is the model at its start"
    assert any("load_imbalance" in row for row in rows)
    assert_bias_moved(policy_path, run)
    assert (run.path / "adapter" / "adapter_config.json").is_file() == bool(lora)
    assert main(["card", str(run.path)]) == 0
    assert "aligned by DPO" in (run.path / "README.md").read_text()
    assert (run.model_path / "config.json").is_file() and load_tokenizer(run.model_path).chat_template


@pytest.mark.slow
def test_dpo_goes_on_after_a_signal(policy_path, pairs, tmp_path, monkeypatch, capsys):
    import os

    step, calls = torch.optim.AdamW.step, [0]

    def stopped(self, *args, **kwargs):
        calls[0] += 1
        if calls[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    command = dpo_command(policy_path, pairs, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stopped)
        assert main(command) == 143
    assert last_complete_checkpoint(tmp_path / "run" / "checkpoints").name == "checkpoint-3"
    assert main(command) == 0
    assert main(dpo_command(policy_path, pairs, tmp_path / "whole")) == 0
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_pairs_in_every_shape_are_encoded_alike(policy_path, tmp_path):
    asked, good, bad = "Why?", "Because.", "No."
    shapes = [
        {"prompt": asked, "chosen": good, "rejected": bad},
        {
            "prompt": [{"role": "user", "content": asked}],
            "chosen": [{"role": "assistant", "content": good}],
            "rejected": [{"role": "assistant", "content": bad}],
        },
        {
            name: [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            for name, said in (("chosen", good), ("rejected", bad))
        },
    ]
    tokenizer = load_tokenizer(str(policy_path))
    found = []
    for number, row in enumerate(shapes):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps({**row, "split": split}) + "\n" for split in ("train", "validation")))
        recipe = DpoRecipe(model="m", data=str(path), max_steps=1, learning_rate=0.1)
        found.append(encode_pair(load_pairs(recipe, "train")[0], tokenizer, 64))
    assert found[0] == found[1] == found[2]
    assert tokenizer.decode(found[0]["prompt_ids"]) == "<|begin|>User: Why?\n\nAssistant:"
    assert tokenizer.decode(found[0]["chosen_ids"]) == " Because.<|end|>"
    assert tokenizer.decode(found[0]["rejected_ids"]) == " No.<|end|>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "got NoneType in column 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": 1}, "got int in column 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "equal answers"),
        ({"question": "a"}, "no column 'chosen'"),
    ],
)
def test_bad_pairs_are_one_line(policy_path, tmp_path, capsys, row, message):
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps({**row, "split": split}) + "\n" for split in ("train", "validation")))
    assert main(dpo_command(policy_path, path, tmp_path / "run")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def grpo_command(policy, output, *more):
    return ["grpo", "grpo-debug", "--model", str(policy), "--output", str(output), "--report-to", "[]", *more]


@pytest.mark.parametrize(
    "more", [["--repetition-penalty", "5"], pytest.param(["--lora-rank", "2"], marks=pytest.mark.slow)]
)
def test_grpo(policy_path, tmp_path, capsys, more):
    settings = ["--learning-rate", "0.01", "--router-replay", "true", "--bias-update-speed", "0.01"]
    command = grpo_command(policy_path, tmp_path / "run", *settings, *more)
    assert main(command) == 0
    assert "held-out reward" in capsys.readouterr().out
    run = RunFolder(tmp_path / "run")
    names = {(row.metric, row.when) for row in run.summary.results}
    assert {("reward", "before"), ("reward", "after"), ("reward_safety", "after"), ("length_tokens", "after")} <= names
    rows = [row for row in run.metrics if "reward" in row]
    assert [row["step"] for row in rows] == [1, 2] and all("kl" in row for row in rows)
    assert all(0.5 < row["router_replay_share"] < 1 for row in rows)
    assert abs(rows[0]["kl"]) < 1e-4, "the reference is the model at its start"
    before, after = (load_file(path / "model.safetensors") for path in (policy_path, run.model_path))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert_bias_moved(policy_path, run)
    assert (run.path / "adapter").is_dir() == ("--lora-rank" in more)
    assert main(["card", str(run.path)]) == 0
    card = (run.path / "README.md").read_text()
    assert "aligned by GRPO" in card and "The reward of its alignment (relevance 0.7" in card


@pytest.mark.parametrize("command", ["grpo", "dpo"])
def test_a_dry_run_writes_nothing(policy_path, pairs, tmp_path, capsys, command):
    words = grpo_command(policy_path, tmp_path / "run") if command == "grpo" else None
    assert main([*(words or dpo_command(policy_path, pairs, tmp_path / "run")), "--dry-run"]) == 0
    assert "dry run: nothing was written" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_what_grpo_cannot_use(policy_path, tmp_path, capsys):
    for more, message in (
        (["--num-generations", "1"], "num_generations: got 1"),
        (["--num-generations", "3"], "expected a multiple of 3"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
    ):
        assert main(grpo_command(policy_path, tmp_path / "run", *more)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
