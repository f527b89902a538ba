"""PPO with and without TRL's own: the same settings, class and losses."""

import dataclasses
import json

import pytest
import torch
from ppo_parts import PPOTrainer, losses, make_ours, needs_stock
from transformers import Trainer

from deepseek_training.ppo.settings import OwnPPOConfig, PPOConfig

# fp32, as TRL 1.12.0 and 1.16.0 traced them on this package's versions; those of the class before it had its own loop
TRACE = {
    "loss/policy_avg": [-0.0743328, -0.0546116, -0.0784664],
    "loss/value_avg": [0.0039386, 0.0151925, 0.0106012],
    "objective/kl": [0.0, 2.1365452, 2.029192],
    "grad_norm": [7.1812596, 5.0277724, 4.9148521],
}


def test_the_losses_are_those_of_every_trl(tmp_path):
    trainer = make_ours(tmp_path, logging_steps=1)
    trainer.train()
    for name, expected in TRACE.items():
        assert [row[name] for row in losses(trainer)] == pytest.approx(expected, rel=1e-4, abs=1e-5), name


def test_extends_trls_class_where_there_is_one_and_trainer_where_not(tmp_path):
    trainer = make_ours(tmp_path)
    assert isinstance(trainer, Trainer if PPOTrainer is None else PPOTrainer)
    assert isinstance(trainer.args, PPOConfig)
    assert type(trainer.args).__name__ == "PPOConfig"


@needs_stock
def test_our_settings_are_trls():
    ours = {field.name: field.default for field in dataclasses.fields(OwnPPOConfig)}
    theirs = {field.name: field.default for field in dataclasses.fields(PPOConfig)}
    unread = {"dataset_num_proc", "sft_model_path", "reward_model_path", "push_to_hub"}
    for name in theirs.keys() - unread:
        if not isinstance(theirs[name], type(dataclasses.MISSING)):
            assert ours[name] == theirs[name], name


def test_settings_survive_a_round_trip_and_trainers_pickle(tmp_path):
    args = OwnPPOConfig(str(tmp_path), kl_coef=0.1, bf16=False, use_cpu=True)
    torch.save(args, tmp_path / "args.bin")
    assert torch.load(tmp_path / "args.bin", weights_only=False).kl_coef == 0.1
    assert json.loads(args.to_json_string())["response_length"] == 53
