"""PPO on Mixture-of-Experts policies: balancing takes part in the update, and rollouts are not counted as load."""

import itertools

import pytest
import torch
from moe_routers import find_routers
from ppo_parts import losses, make_ours, mended, steps_of
from transformers import AutoModelForSequenceClassification, MixtralConfig, MixtralForCausalLM

from deepseek_training.balance.callback import ExpertBalanceCallback
from deepseek_training.balance.replay_callback import RouterReplayCallback
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM


def make_mixtral(coefficient, has_aux_loss=True):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=29,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=1,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        num_labels=1,
        output_router_logits=has_aux_loss,
        router_aux_loss_coef=coefficient,
    )
    return MixtralForCausalLM(config), AutoModelForSequenceClassification.from_config(config)


@mended(RuntimeError)
def test_a_policy_with_an_auxiliary_loss_can_generate(make, tmp_path):
    make(tmp_path, models=make_mixtral(1.0), total_episodes=4).train()


def generate_without_router_logits(trainer):
    """Take transformers' own crash out of the way, so that what the update does can be seen."""
    generate, config = trainer.policy_model.generate, trainer.policy_model.config

    def wrapped(**kwargs):
        config.output_router_logits = False
        try:
            return generate(**kwargs)
        finally:
            config.output_router_logits = True

    trainer.policy_model.generate = wrapped


@mended(AssertionError)
def test_the_auxiliary_loss_reaches_the_routers(make, tmp_path):
    gates = []
    for coefficient in (0.0, 1.0):
        trainer = make(tmp_path / str(coefficient), models=make_mixtral(coefficient), total_episodes=4, seed=1)
        generate_without_router_logits(trainer)
        trainer.train()
        gates.append(trainer.policy_model.model.layers[0].mlp.gate.weight.detach())
    assert (gates[0] - gates[1]).abs().max() > 1e-3


def test_the_auxiliary_loss_is_logged_weighted_and_accumulation_does_not_multiply_it(tmp_path):
    rows = []
    for accumulation in (1, 4):
        trainer = make_ours(
            tmp_path / str(accumulation),
            models=make_mixtral(0.5),
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=8 // accumulation,
            local_rollout_forward_batch_size=8,
            total_episodes=8,
            logging_steps=1,
        )
        trainer.train()
        rows.append(losses(trainer)[0])
    # transformers' loss is 1 where four experts are used alike, at most 4; it is no sum over sequences
    assert 0.5 * 0.9 < rows[0]["aux_loss"] < 0.5 * 4
    assert rows[1]["aux_loss"] == pytest.approx(rows[0]["aux_loss"], rel=0.2)


def test_the_experts_of_a_rollout_are_replayed(tmp_path):
    plain, replayed = (make_ours(tmp_path / str(n), models=make_ours_moe(), logging_steps=1) for n in range(2))
    callback = RouterReplayCallback.attach(replayed)
    for trainer in (plain, replayed):
        trainer.train()
    assert all(0.5 < row["router_replay_share"] < 1 for row in losses(replayed))
    assert callback.replay is None
    assert "router_replay_share" not in losses(plain)[0]
    # in fp32 nothing but the later epochs' routers could choose otherwise
    assert losses(replayed)[0]["objective/kl"] == pytest.approx(losses(plain)[0]["objective/kl"], abs=1e-5)


def make_ours_moe(**settings):
    torch.manual_seed(0)
    config = DeepseekConfig.from_preset("debug", vocab_size=29, pad_token_id=0, eos_token_id=1, **settings)
    policy = DeepseekForCausalLM(config)
    config = DeepseekConfig.from_preset("debug", vocab_size=29, pad_token_id=0, num_labels=1, **settings)
    return policy, AutoModelForSequenceClassification.from_config(config)


def test_a_policy_with_mtp_layers_trains(tmp_path):
    models = make_ours_moe(num_nextn_predict_layers=1, mtp_loss_coef=0.1)
    trainer = make_ours(tmp_path, models=models, total_episodes=4, logging_steps=1)
    trainer.train()
    assert losses(trainer)[0]["grad_norm"] > 0
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in trainer.value_model.model.layers[-1].parameters())


def test_a_policy_with_mtp_layers_resumes(tmp_path):
    settings = {"total_episodes": 8, "logging_steps": 1, "save_strategy": "steps", "save_steps": 1}
    mtp = {"num_nextn_predict_layers": 1, "mtp_loss_coef": 0.1}
    whole = make_ours(tmp_path, models=make_ours_moe(**mtp), **settings)
    whole.train()
    resumed = make_ours(tmp_path, models=make_ours_moe(**mtp), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name in ("policy_model", "value_model"):
        one, other = (getattr(trainer, name).state_dict() for trainer in (whole, resumed))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_our_balance_losses_do_not_grow_with_accumulation(tmp_path):
    rows = []
    for accumulation in (1, 4):
        trainer = make_ours(
            tmp_path / str(accumulation),
            models=make_ours_moe(seq_aux_loss_coef=1.0),
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=8 // accumulation,
            local_rollout_forward_batch_size=8,
            total_episodes=8,
            num_ppo_epochs=1,
            logging_steps=1,
            max_grad_norm=1e-6,
        )
        trainer.train()
        rows.append(losses(trainer)[0])
    assert rows[1]["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-4)


class CountingGate(torch.nn.Module):
    """A router's load counter as many models have it: guarded by ``training`` alone."""

    def __init__(self, gate):
        super().__init__()
        self.gate, self.count = gate, 0

    def forward(self, hidden_states):
        if self.training:
            self.count += hidden_states.shape[:-1].numel()
        return self.gate(hidden_states)


@mended(AssertionError)
def test_rollouts_are_not_counted_as_load(make, tmp_path):
    trainer = make(tmp_path, models=make_mixtral(0.0, has_aux_loss=False), num_ppo_epochs=1, total_episodes=12)
    mlp = trainer.policy_model.model.layers[0].mlp
    mlp.gate = CountingGate(mlp.gate)
    seen = []
    trainer.policy_model.model.register_forward_hook(
        lambda module, args, kwargs, output: (
            seen.append(output.last_hidden_state.shape[:2].numel()) if torch.is_grad_enabled() else None
        ),
        with_kwargs=True,
    )
    trainer.train()
    assert mlp.gate.count == sum(seen) > 0


@mended(AssertionError)
def test_the_balancing_bias_moves_at_each_optimizer_step(make, tmp_path):
    trainer = make(
        tmp_path, models=make_ours_moe(), callbacks=[ExpertBalanceCallback(0.01)], num_mini_batches=2, total_episodes=8
    )
    norms = steps_of(trainer)
    router = find_routers(trainer.policy_model)[0]
    moved = []
    finish = router.finish_step
    router.finish_step = lambda *args: (finish(*args), moved.append(router.e_score_correction_bias.clone()))
    trainer.train()
    assert len(moved) == len(norms) == 2 * 2 * 2
    assert all(not torch.equal(left, right) for left, right in itertools.pairwise(moved))
