"""What the first ratio of an update is off by, before any weight has moved, is measured and logged."""

import pytest
import torch
from ppo_parts import losses, make_models, make_ours

NAME = "val/first_ratio_deviation"


def test_the_first_ratio_is_one_in_fp32_and_only_the_first_counts(tmp_path):
    trainer = make_ours(tmp_path, logging_steps=1, learning_rate=0.05)
    trainer.train()
    rows = losses(trainer)
    assert rows and all(0 <= row[NAME] < 1e-4 for row in rows)
    assert any(abs(row["val/ratio"] - 1) > 1e-4 for row in rows)  # the weights did move afterwards


@pytest.mark.parametrize("kind", ["autocast", "weights"])
def test_in_16_bits_the_log_probs_are_those_of_the_updates_passes(tmp_path, kind):
    models = make_models() if kind == "autocast" else tuple(model.bfloat16() for model in make_models())
    settings = dict(bf16=kind == "autocast", temperature=0.8, response_length=16, learning_rate=0.0, logging_steps=1)
    trainer = make_ours(tmp_path, models=models, **settings)
    trainer.train()
    deviations = [row[NAME] for row in losses(trainer)]
    assert deviations and max(deviations) < 1e-3  # by generation's log-probs: 0.002 to 0.008


def test_other_log_probs_than_the_updates_show(tmp_path):
    policy, value = make_models(attention_dropout=0.0)
    trainer = make_ours(tmp_path, models=(policy, value), logging_steps=1, learning_rate=0.0)
    play = trainer.player.play

    def play_at_other_weights(*args, **kwargs):
        rollout = play(*args, **kwargs)
        rollout.logprobs[:, 0] -= 0.1  # as where generation rounds or routes otherwise
        return rollout

    trainer.player.play = play_at_other_weights
    trainer.train()
    assert all(row[NAME] == pytest.approx(torch.tensor(0.1).exp().item() - 1, rel=0.01) for row in losses(trainer))
