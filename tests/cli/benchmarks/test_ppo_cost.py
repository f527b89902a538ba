"""The comparison of PPO's cost: both classes do the same work, and the report says what it was."""

import json

from deepseek_cli.benchmarks import ppo_cost
from deepseek_cli.main import main
from deepseek_training.data.texts import load_texts
from deepseek_training.data.tokenizer import train_tokenizer


def test_both_classes_take_as_many_steps_on_as_many_tokens(tmp_path):
    tokenizer = train_tokenizer(load_texts("dialogues", "validation"), 400)
    trainers = ppo_cost.build_trainers((4, 5, 3, 9), tokenizer, str(tmp_path))
    steps = {name: ppo_cost._count_steps(trainer) for name, trainer in trainers.items()}
    for trainer in trainers.values():
        trainer.train()
    assert len(steps["ours"]) == len(steps["stock"]) == 2
    entropies = {name: trainer.state.log_history[-1]["policy/entropy_avg"] for name, trainer in trainers.items()}
    assert abs(entropies["ours"] - entropies["stock"]) < 0.1  # both near the uniform one: no column of zeros in either
    assert trainers["ours"].state.log_history[-1]["length_tokens"] == 5


def test_the_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ppo_cost, "SHAPES", {"tiny": (4, 5, 3, 9)})
    assert main(["bench", "ppo", "--rounds", "2", "--output", str(tmp_path / "cost")]) == 0
    row = json.loads((tmp_path / "cost" / "results.json").read_text())["tiny"]
    assert len(row["ratios"]) == 2 and min(row["ratios"]) > 0
    printed = capsys.readouterr().out
    assert "an update of 2 optimizer steps" in printed
    assert (tmp_path / "cost" / "table.txt").read_text() in printed
