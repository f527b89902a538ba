"""CorrectedPPOTrainer against TRL's own class: equal where that is right, and right where it is wrong.

Each defect has a test on our class, and its twin on the stock class, which must fail in the way the fault shows;
should TRL mend it, the twin passes, is reported, and the override can go. The other defects: ``test_resume.py``,
``test_processes.py``, ``test_lora.py``, ``test_moe.py``.
"""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from ppo_parts import (
    WORDS,
    StockReward,
    losses,
    make_models,
    make_ours,
    make_prompts,
    make_stock,
    make_tokenizer,
    mended,
    needs_stock,
    share_of_liked,
    steps_of,
)
from torch import nn
from transformers import TrainerCallback

from deepseek_records.activation_checkpointing import uses_checkpointing
from deepseek_training.ppo.trainer import _SEED_STEP

# ---- where stock is right, ours is the same -------------------------------------------------------------------------


class Reseed(TrainerCallback):
    """Gives stock the random numbers that ours draws at each update."""

    def __init__(self, seed):
        self.seed = seed

    def on_step_end(self, args, state, control, **kwargs):
        self.set(state.global_step + 1)

    def set(self, update):
        torch.manual_seed(self.seed + _SEED_STEP * update)
        np.random.seed((self.seed + _SEED_STEP * update) % 2**32)


def silence(policy, *tokens):
    """Make a policy never say some tokens."""
    policy.lm_head.bias = nn.Parameter(torch.zeros(len(WORDS)))
    policy.lm_head.bias.data[list(tokens)] = -30.0
    return policy


@needs_stock
def test_traces_the_losses_of_the_stock_class(tmp_path):
    # one micro-batch a mini-batch, no clipping, fp32, one process, pad is not eos: nothing here is broken in TRL
    settings = dict(num_mini_batches=2, max_grad_norm=0.0, logging_steps=1, missing_eos_penalty=0.1, vf_coef=0.3)

    def models():
        policy, value = make_models()
        return silence(policy, 0), value  # stock takes "<pad>" for the end

    ours = make_ours(tmp_path / "ours", reward=StockReward(), models=models(), **settings)
    ours.train()

    stock = make_stock(tmp_path / "stock", models=models(), **settings)
    batches = [ours._batch(update)["input_ids"] for update in (1, 2, 3)]
    stock.dataloader = [{"input_ids": ids.masked_fill(ids < 0, 0)} for ids in batches]
    reseed = Reseed(stock.local_seed)
    stock.add_callback(reseed)
    reseed.set(1)
    stock.train()

    assert len(losses(ours)) == len(losses(stock)) == 3
    for mine, theirs in zip(losses(ours), losses(stock), strict=True):
        for name in theirs:
            if name not in ("eps", "epoch"):
                assert mine[name] == pytest.approx(theirs[name], abs=2e-5), name
    for mine, theirs in zip(ours.policy_model.parameters(), stock.policy_model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


# ---- the defects ----------------------------------------------------------------------------------------------------


@mended(AssertionError)
def test_clips_the_gradient(make, tmp_path):
    trainer = make(tmp_path, max_grad_norm=0.01)
    norms = steps_of(trainer)
    trainer.train()
    assert max(norms) <= 0.01 * 1.001


@mended(AssertionError)
def test_bf16_reaches_the_accelerator(make, tmp_path):
    trainer = make(tmp_path, bf16=True)
    assert trainer.accelerator.mixed_precision == "bf16"


def test_rollouts_and_updates_share_the_precision(tmp_path):
    trainer = make_ours(tmp_path, bf16=True, num_ppo_epochs=1)
    seen = []
    hook = lambda module, inputs, output: seen.append(output.dtype)  # noqa: E731
    trainer.policy_model.model.layers[0].mlp.down_proj.register_forward_hook(hook)
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in trainer.policy_model.parameters())


@mended(AssertionError)
def test_gradient_checkpointing_is_applied(make, tmp_path):
    trainer = make(tmp_path, gradient_checkpointing=True)
    assert uses_checkpointing(trainer.policy_model)


def test_gradient_checkpointing_changes_no_number(tmp_path):
    runs = [make_ours(tmp_path / str(flag), gradient_checkpointing=flag, logging_steps=1) for flag in (False, True)]
    for trainer in runs:
        trainer.train()
    plain, recomputed = (losses(trainer) for trainer in runs)
    assert [row["loss/policy_avg"] for row in plain] == pytest.approx([row["loss/policy_avg"] for row in recomputed])


def count_steps(make, path, num_mini_batches, accumulation, num_prompts=32):
    """Optimizer steps in 2 epochs each of 3 updates of 8 prompts."""
    trainer = make(
        path,
        train=make_prompts(num_prompts),
        num_mini_batches=num_mini_batches,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=8 // accumulation,
        total_episodes=24,
    )
    norms = steps_of(trainer)
    trainer.train()
    return len(norms)


@pytest.mark.parametrize(("num_mini_batches", "accumulation"), [(2, 4), (4, 2)])
def test_steps_once_a_mini_batch(num_mini_batches, accumulation, tmp_path):
    assert count_steps(make_ours, tmp_path, num_mini_batches, accumulation) == 3 * 2 * num_mini_batches


@mended(AssertionError)
def test_steps_once_a_mini_batch_where_accumulation_is_no_less(make, tmp_path):
    assert count_steps(make, tmp_path, 2, 2) == 3 * 2 * 2


@mended(AssertionError)
def test_does_not_step_early_at_the_end_of_the_data(make, tmp_path):
    assert count_steps(make, tmp_path, 1, 2, num_prompts=8) == 3 * 2 * 1


@mended(AssertionError)
def test_logged_means_do_not_shrink_with_the_mini_batches(make, tmp_path):
    # the first step of an update leaves the ratio at 1; the mean over steps is near it, not a fraction of it
    trainer = make(tmp_path, num_mini_batches=2, gradient_accumulation_steps=2, total_episodes=24, logging_steps=1)
    trainer.train()
    assert all(row["val/ratio"] == pytest.approx(1.0, abs=0.3) for row in losses(trainer))


class CountOptimizerSteps(TrainerCallback):
    """What `ExpertBalanceCallback` hears."""

    count = 0

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.count += 1


@mended(AssertionError)
def test_callbacks_hear_of_each_optimizer_step(make, tmp_path):
    counter = CountOptimizerSteps()
    trainer = make(tmp_path, callbacks=[counter], num_mini_batches=2)
    norms = steps_of(trainer)
    trainer.train()
    assert counter.count == len(norms) == 3 * 2 * 2


def test_accumulation_changes_no_number(tmp_path):
    # completions end at different lengths, so micro-batches hold different numbers of tokens
    runs = []
    for accumulation in (1, 4):
        trainer = make_ours(
            tmp_path / str(accumulation),
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=8 // accumulation,
            total_episodes=16,
            logging_steps=1,
            local_rollout_forward_batch_size=8,
        )
        trainer.train()
        runs.append(trainer)
    for one, many in zip(losses(runs[0]), losses(runs[1]), strict=True):
        for name in ("loss/policy_avg", "loss/value_avg", "val/ratio", "policy/entropy_avg", "grad_norm"):
            assert one[name] == pytest.approx(many[name], abs=2e-5), name


def force_eos(policy):
    """Make every completion empty: eos is the first token, always."""
    policy.lm_head.weight.data.zero_()
    policy.lm_head.bias = nn.Parameter(torch.full((len(WORDS),), -30.0))
    policy.lm_head.bias.data[1] = 30.0


@mended(ValueError)
def test_pad_may_be_eos_and_completions_empty(make, tmp_path):
    policy, value = make_models()
    force_eos(policy)
    trainer = make(tmp_path, models=(policy, value), tokenizer=make_tokenizer(pad="<eos>"), logging_steps=1)
    trainer.train()
    assert all(math.isfinite(row["loss/value_avg"]) for row in losses(trainer))


@mended(AssertionError)
def test_eos_inside_a_prompt_is_seen_where_pad_is_eos(make, tmp_path):
    # as the turns of a conversation have it; the policy says neither, so that nothing else differs
    rows = Dataset.from_list([{"prompt": "x", "input_ids": [5, 6, 1, 7 + i % 3]} for i in range(12)])
    runs = []
    for pad in ("<pad>", "<eos>"):
        policy, value = make_models()
        models = (silence(policy, 0, 1), value)
        trainer = make(tmp_path / pad, models=models, tokenizer=make_tokenizer(pad=pad), train=rows, logging_steps=1)
        torch.manual_seed(0)
        trainer.train()
        runs.append(losses(trainer)[0])
    for name in ("objective/entropy", "loss/policy_avg", "loss/value_avg", "policy/entropy_avg"):
        assert runs[0][name] == runs[1][name], name


def test_pad_as_eos_changes_no_number(tmp_path):
    rows = [{"prompt": "x", "input_ids": [5, 6, 1, 7 + i % 3]} for i in range(12)]
    runs = []
    for pad in ("<pad>", "<eos>"):
        trainer = make_ours(
            tmp_path / pad, tokenizer=make_tokenizer(pad=pad), train=Dataset.from_list(rows), logging_steps=1
        )
        trainer.train()
        runs.append(losses(trainer))
    for one, other in zip(*runs, strict=True):
        assert one["loss/policy_avg"] == other["loss/policy_avg"]
        assert one["objective/entropy"] == other["objective/entropy"]


@mended(pytest.fail.Exception)
def test_fewer_prompts_than_a_batch_are_refused(make, tmp_path):
    # stock builds, and its training then asks an empty loader for a batch for ever
    with pytest.raises(ValueError, match="3 rows are fewer than the batch of 4"):
        assert len(make(tmp_path, train=make_prompts(3)).dataloader) == 0


@mended(AssertionError)
def test_functional_dropout_is_off(make, tmp_path):
    # Llama's attention drops by a functional call, which TRL's disabling of nn.Dropout does not reach
    trainer = make(
        tmp_path, models=make_models(attention_dropout=0.5), num_ppo_epochs=1, logging_steps=1, learning_rate=0.0
    )
    trainer.train()
    assert all(row["val/ratio"] == pytest.approx(1.0, abs=1e-5) for row in losses(trainer))


@mended(AssertionError)
def test_rollouts_run_in_evaluation_mode_and_updates_in_training_mode(make, tmp_path):
    trainer = make(tmp_path, num_ppo_epochs=1)
    modes = {True: set(), False: set()}
    trainer.policy_model.model.register_forward_hook(
        lambda module, *_: modes[torch.is_grad_enabled()].add(module.training)
    )
    trainer.train()
    assert modes == {True: {True}, False: {False}}


@mended(AssertionError)
def test_evaluates_every_held_out_prompt(make, tmp_path):
    held_out = make_prompts(11, seed=7)  # 11 is no multiple of the batch of 4
    trainer = make(tmp_path, held_out=held_out, eval_strategy="steps", eval_steps=1)
    if make is make_stock:  # it has no evaluation to call; its loader is what samples are generated from
        assert sum(len(batch["input_ids"]) for batch in trainer.get_eval_dataloader()) == 11
    seen = []
    trainer.reward_model.reward = lambda prompts, completions, completion_ids, **kw: (
        (seen.extend(prompts) if kw["is_evaluation"] else None) or share_of_liked(prompts, completions, completion_ids)
    )
    metrics = trainer.evaluate()
    assert seen == held_out["prompt"]
    assert len(trainer.last_evaluation["reward"]) == 11
    assert metrics["eval_kl"] == pytest.approx(0.0, abs=1e-5)  # the policy is still the reference
    assert metrics["eval_reward_stderr"] == pytest.approx(
        np.std(trainer.last_evaluation["reward"], ddof=1) / math.sqrt(11)
    )
    assert trainer.evaluate() == metrics  # the same random numbers at every call


@mended(AssertionError)
def test_evaluates_while_training(make, tmp_path):
    trainer = make(tmp_path, held_out=make_prompts(4, seed=7), eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert sum(any(name.startswith("eval_") for name in row) for row in trainer.state.log_history) == 3


def test_evaluating_does_not_change_training(tmp_path):
    plain = make_ours(tmp_path / "a", logging_steps=1)
    plain.train()
    watched = make_ours(
        tmp_path / "b", logging_steps=1, held_out=make_prompts(5, seed=7), eval_strategy="steps", eval_steps=1
    )
    watched.train()
    assert [row["loss/policy_avg"] for row in losses(plain)] == [row["loss/policy_avg"] for row in losses(watched)]


def test_samples_are_shown_as_often_as_asked(tmp_path, capsys):
    settings = dict(logging_steps=1, held_out=make_prompts(6), total_episodes=16)
    plain, shown = (make_ours(tmp_path / str(n), num_sample_generations=n, **settings) for n in (0, 2))
    plain.train()
    assert "model response" not in capsys.readouterr().out
    shown.train()
    assert capsys.readouterr().out.count("model response") == 2
    assert [row["loss/policy_avg"] for row in losses(plain)] == [row["loss/policy_avg"] for row in losses(shown)]


def test_logs_speed_and_shares_of_time(tmp_path):
    trainer = make_ours(tmp_path, logging_steps=1, eval_strategy="steps", eval_steps=1, held_out=make_prompts(4))
    trainer.train()
    for row in losses(trainer):
        shares = [row[f"time/{name}_share"] for name in ("generation", "reward", "logps", "update")]
        assert sum(shares) == pytest.approx(1.0) and min(shares) > 0
        assert row["rollout_tokens_per_second"] > 0 and row["update_tokens_per_second"] > 0


def test_learns(tmp_path):
    trainer = make_ours(
        tmp_path,
        train=make_prompts(64),
        held_out=make_prompts(64, seed=3),
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        total_episodes=32 * 25,
        num_mini_batches=2,
        kl_coef=0.01,
        learning_rate=1e-2,
    )
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_reward"] > before + 5 * after["eval_reward_stderr"]
    assert after["eval_kl"] > 0
