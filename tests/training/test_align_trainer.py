"""CorrectedPPOTrainer against TRL's own class: equal where that is right, and right where it is wrong.

Each defect has a test on our class, and its twin on the stock class, marked as the fault it shows; should TRL mend it,
the twin fails and the override can go.
"""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from deepseek_training.ppo_checkpoint import last_checkpoint
from deepseek_training.ppo_trainer import _SEED_STEP, CorrectedPPOTrainer, RewardError

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
LIKED = 3  # the token "a": the reward is its share of the completion


def make_tokenizer(pad="<pad>"):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def make_models(seed=0, **settings):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        num_labels=1,
        **settings,
    )
    policy, value = LlamaForCausalLM(config), LlamaForSequenceClassification(config)
    # confident enough for probabilities to move when a weight does
    policy.lm_head.weight.data.mul_(8)
    return policy, value


def make_prompts(count=12, seed=0):
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS[3:], size=rng.integers(2, 6))) for _ in range(count)]
    tokenizer = make_tokenizer()
    return Dataset.from_dict({"prompt": texts, "input_ids": [tokenizer(text)["input_ids"] for text in texts]})


def share_of_liked(prompts, completions, completion_ids, **kwargs):
    return [sum(token == LIKED for token in ids) / max(1, len(ids)) for ids in completion_ids]


class StockReward(nn.Module):
    """The same kind of reward in the form that TRL takes: how many "a" stand up to the position scored."""

    base_model_prefix = "scorer"

    def __init__(self):
        super().__init__()
        self.scorer = self._Scorer()

    class _Scorer(nn.Module):
        def forward(self, input_ids, **kwargs):
            counts = (input_ids == LIKED).cumsum(1).float().unsqueeze(-1)
            return type("Output", (), {"hidden_states": [counts]})

    def score(self, hidden_states):
        return hidden_states / 10


def make_args(path, **settings):
    defaults = dict(
        output_dir=str(path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        per_device_eval_batch_size=4,
        total_episodes=12,
        num_ppo_epochs=2,
        response_length=6,
        stop_token="eos",
        learning_rate=1e-2,
        bf16=False,
        gradient_checkpointing=False,
        num_sample_generations=0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
    )
    return PPOConfig(**{**defaults, **settings})


def make_ours(path, *, reward=share_of_liked, models=None, tokenizer=None, train=None, held_out=None, **settings):
    extra = {key: settings.pop(key) for key in ("peft_config", "callbacks") if key in settings}
    policy, value = models or make_models()
    trainer = CorrectedPPOTrainer(
        args=make_args(path, **settings),
        processing_class=tokenizer or make_tokenizer(),
        model=policy,
        reward=reward,
        train_dataset=make_prompts() if train is None else train,
        eval_dataset=held_out,
        value_model=value,
        **extra,
    )
    trainer.callback_handler.callbacks = [c for c in trainer.callback_handler.callbacks if "Printer" not in str(c)]
    return trainer


def make_stock(path, *, models=None, tokenizer=None, train=None, **settings):
    policy, value = models or make_models()
    trainer = PPOTrainer(
        args=make_args(path, **settings),
        processing_class=tokenizer or make_tokenizer(),
        model=policy,
        ref_model=None,
        reward_model=StockReward(),
        train_dataset=(make_prompts() if train is None else train).select_columns(["input_ids"]),
        value_model=value,
    )
    trainer.callback_handler.callbacks = [c for c in trainer.callback_handler.callbacks if "Printer" not in str(c)]
    return trainer


def steps_of(trainer):
    """Counts the optimizer's real steps and keeps the gradient's norm at each."""
    norms = []
    inner = trainer.optimizer.optimizer

    def note(*_):
        grads = [p.grad for group in inner.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack([grad.norm() for grad in grads]).norm()))

    inner.register_step_pre_hook(note)
    return norms


def losses(trainer):
    return [row for row in trainer.state.log_history if "loss/policy_avg" in row]


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


def test_traces_the_losses_of_the_stock_class(tmp_path):
    # one micro-batch a mini-batch, no clipping, fp32, one process, pad is not eos: nothing here is broken in TRL
    settings = dict(num_mini_batches=2, max_grad_norm=0.0, logging_steps=1, missing_eos_penalty=0.1, vf_coef=0.3)

    def models():
        policy, value = make_models()
        # the policy never says "<pad>", which stock takes for the end
        policy.lm_head.bias = nn.Parameter(torch.tensor([-30.0] + [0.0] * (len(WORDS) - 1)))
        return policy, value

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


@pytest.mark.parametrize("make", [make_ours, pytest.param(make_stock, marks=pytest.mark.xfail(strict=True))])
def test_clips_the_gradient(make, tmp_path):
    trainer = make(tmp_path, max_grad_norm=0.01)
    norms = steps_of(trainer)
    trainer.train()
    assert max(norms) <= 0.01 * 1.001


@pytest.mark.parametrize("make", [make_ours, pytest.param(make_stock, marks=pytest.mark.xfail(strict=True))])
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


@pytest.mark.parametrize("make", [make_ours, pytest.param(make_stock, marks=pytest.mark.xfail(strict=True))])
def test_gradient_checkpointing_is_applied(make, tmp_path):
    trainer = make(tmp_path, gradient_checkpointing=True)
    assert trainer.policy_model.is_gradient_checkpointing


def test_gradient_checkpointing_changes_no_number(tmp_path):
    runs = [make_ours(tmp_path / str(flag), gradient_checkpointing=flag, logging_steps=1) for flag in (False, True)]
    for trainer in runs:
        trainer.train()
    plain, recomputed = (losses(trainer) for trainer in runs)
    assert [row["loss/policy_avg"] for row in plain] == pytest.approx([row["loss/policy_avg"] for row in recomputed])


# (mini-batches, accumulation): a step a mini-batch and epoch, 2 epochs, 3 updates of 8 prompts
@pytest.mark.parametrize(("num_mini_batches", "accumulation"), [(1, 2), (2, 2), (2, 4), (4, 2)])
def test_steps_once_a_mini_batch(num_mini_batches, accumulation, tmp_path):
    trainer = make_ours(
        tmp_path,
        num_mini_batches=num_mini_batches,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=8 // accumulation,
        total_episodes=24,
        logging_steps=1,
    )
    norms = steps_of(trainer)
    trainer.train()
    assert len(norms) == 3 * 2 * num_mini_batches
    # the first step of an update leaves the ratio at 1; the mean over steps is near it, not a fraction of it
    assert all(row["val/ratio"] == pytest.approx(1.0, abs=0.3) for row in losses(trainer))


@pytest.mark.xfail(strict=True, reason="TRL steps once per accumulation and divides stats by it")
def test_steps_once_a_mini_batch_stock(tmp_path):
    trainer = make_stock(
        tmp_path,
        num_mini_batches=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        total_episodes=24,
        logging_steps=1,
    )
    norms = steps_of(trainer)
    trainer.train()
    assert all(row["val/ratio"] == pytest.approx(1.0, abs=0.3) for row in losses(trainer))
    assert len(norms) == 3 * 2 * 2


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


def test_resumes_exactly(tmp_path):
    settings = dict(total_episodes=16, save_strategy="steps", save_steps=2, logging_steps=1)
    whole = make_ours(tmp_path / "whole", **settings)
    whole.train()
    cut = make_ours(tmp_path / "whole2", **settings)
    cut.args.num_total_batches = 2
    cut.train()
    resumed = make_ours(tmp_path / "whole2", models=make_models(seed=9), **settings)
    resumed.ref_model.load_state_dict(cut.ref_model.state_dict())
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path / "whole2"))
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    timed = ("eps", "time/", "tokens_per_second")
    for mine, theirs in zip(losses(resumed), losses(whole), strict=True):
        for name, value in theirs.items():
            if not any(part in name for part in timed):
                assert mine[name] == value, name


def test_stock_cannot_resume(tmp_path):
    with pytest.raises(TypeError, match="resume_from_checkpoint"):
        make_stock(tmp_path).train(resume_from_checkpoint=str(tmp_path))


@pytest.mark.parametrize("make", [make_ours, pytest.param(make_stock, marks=pytest.mark.xfail(strict=True))])
def test_checkpoint_holds_the_critic(make, tmp_path):
    trainer = make(tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    saved = LlamaForSequenceClassification.from_pretrained(tmp_path / "checkpoint-3" / "value_model")
    for mine, theirs in zip(saved.parameters(), trainer.value_model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_checkpoint_cut_short_is_passed_over(tmp_path):
    trainer = make_ours(tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    (tmp_path / "checkpoint-3" / "ppo_state.json").unlink()
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    with pytest.raises(FileNotFoundError, match="no whole PPO checkpoint"):
        trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-3")


def force_eos(policy):
    """Make every completion empty: eos is the first token, always."""
    policy.lm_head.weight.data.zero_()
    policy.lm_head.bias = nn.Parameter(torch.full((len(WORDS),), -30.0))
    policy.lm_head.bias.data[1] = 30.0


@pytest.mark.parametrize("make", [make_ours, pytest.param(make_stock, marks=pytest.mark.xfail(strict=True))])
def test_pad_may_be_eos_and_completions_empty(make, tmp_path):
    policy, value = make_models()
    force_eos(policy)
    trainer = make(tmp_path, models=(policy, value), tokenizer=make_tokenizer(pad="<eos>"), logging_steps=1)
    trainer.train()
    assert all(math.isfinite(row["loss/value_avg"]) for row in losses(trainer))


def test_pad_as_eos_changes_no_number(tmp_path):
    # prompts hold an eos, as the turns of a conversation do; it must be seen whatever the pad token is
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


def test_fewer_prompts_than_a_batch_are_refused(tmp_path):
    with pytest.raises(ValueError, match="3 rows are fewer than the batch of 4"):
        make_ours(tmp_path, train=make_prompts(3))


def test_stock_would_wait_for_ever_on_few_prompts(tmp_path):
    assert len(make_stock(tmp_path, train=make_prompts(3)).dataloader) == 0


@pytest.mark.parametrize("make", [make_ours, pytest.param(make_stock, marks=pytest.mark.xfail(strict=True))])
def test_functional_dropout_is_off(make, tmp_path):
    # Llama's attention drops by a functional call, which TRL's disabling of nn.Dropout does not reach
    trainer = make(
        tmp_path, models=make_models(attention_dropout=0.5), num_ppo_epochs=1, logging_steps=1, learning_rate=0.0
    )
    trainer.train()
    assert all(row["val/ratio"] == pytest.approx(1.0, abs=1e-5) for row in losses(trainer))


def test_rollouts_run_in_evaluation_mode_and_updates_in_training_mode(tmp_path):
    trainer = make_ours(tmp_path, num_ppo_epochs=1)
    modes = {True: set(), False: set()}
    trainer.policy_model.model.register_forward_hook(
        lambda module, *_: modes[torch.is_grad_enabled()].add(module.training)
    )
    trainer.train()
    assert modes == {True: {True}, False: {False}}


def test_evaluates_every_held_out_prompt(tmp_path):
    held_out = make_prompts(11, seed=7)  # 11 is no multiple of the batch of 4
    trainer = make_ours(tmp_path, held_out=held_out, eval_strategy="steps", eval_steps=1)
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
    trainer.train()
    assert sum("eval_reward" in row for row in trainer.state.log_history) == 2 + 3


def test_evaluating_does_not_change_training(tmp_path):
    plain = make_ours(tmp_path / "a", logging_steps=1)
    plain.train()
    watched = make_ours(
        tmp_path / "b", logging_steps=1, held_out=make_prompts(5, seed=7), eval_strategy="steps", eval_steps=1
    )
    watched.train()
    assert [row["loss/policy_avg"] for row in losses(plain)] == [row["loss/policy_avg"] for row in losses(watched)]


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


# ---- LoRA -----------------------------------------------------------------------------------------------------------


def test_lora_policy_keeps_one_copy_and_resumes(tmp_path):
    from peft import LoraConfig

    def make(folder, seed=0):
        # peft draws the adapter from the global generator
        return make_ours(
            folder,
            models=make_models(),
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1),
            total_episodes=16,
            save_strategy="steps",
            save_steps=2,
            logging_steps=1,
        )

    whole = make(tmp_path / "a")
    base = {name: p.clone() for name, p in whole.policy_model.named_parameters() if "lora" not in name}
    assert whole.ref_model is None
    whole.train()
    for name, parameter in whole.policy_model.named_parameters():
        if "lora" not in name:
            assert torch.equal(parameter, base[name])
    assert any(p.abs().sum() > 0 for name, p in whole.policy_model.named_parameters() if "lora_B" in name)
    assert losses(whole)[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)  # the reference is the adapter turned off
    assert losses(whole)[-1]["objective/kl"] != 0.0

    cut = make(tmp_path / "b")
    cut.args.num_total_batches = 2
    cut.train()
    resumed = make(tmp_path / "b")
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path / "b"))
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


# ---- rewards in the trainer -----------------------------------------------------------------------------------------


def test_the_reward_sees_prompts_columns_and_completions_alone(tmp_path):
    rows = make_prompts()
    rows = rows.add_column("topic", [f"topic {i}" for i in range(len(rows))])
    calls = []

    def reward(prompts, completions, completion_ids, topic, **kwargs):
        calls.append((prompts, completions, completion_ids, topic))
        kwargs["log_metric"]("seen", 3.0)
        return [0.5] * len(prompts)

    trainer = make_ours(tmp_path, reward=reward, train=rows, logging_steps=1)
    trainer.train()
    lookup = dict(zip(rows["prompt"], rows["topic"], strict=True))
    for prompts, completions, ids, topics in calls:
        assert len(prompts) == 4  # once a batch
        assert [lookup[prompt] for prompt in prompts] == topics
        decoded = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
        assert completions == decoded
        assert all(len(row) <= 6 for row in ids)
    assert losses(trainer)[0]["seen"] == 3.0


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda n: [0.5] * (n - 1), "3 scores for 4 completions"),
        (lambda n: [float("nan")] * n, "wanted a finite number"),
        (lambda n: [None] * n, "no part could score"),
    ],
)
def test_a_failing_reward_leaves_a_checkpoint_and_its_name(scores, message, tmp_path):
    calls = []

    def reward(prompts, completions, completion_ids, **kwargs):
        calls.append(1)
        return scores(len(prompts)) if len(calls) == 3 else share_of_liked(prompts, completions, completion_ids)

    trainer = make_ours(tmp_path, reward=reward, logging_steps=1)
    with pytest.raises(RewardError, match=f"step 3: .*{message}"):
        trainer.train()
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    whole = make_ours(tmp_path / "whole")
    whole.train()
    resumed = make_ours(tmp_path, logging_steps=1)
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


class Counting:
    """A reward with a state."""

    __name__ = "counting"

    def __init__(self):
        self.calls = 0

    def __call__(self, prompts, completions, completion_ids, **kwargs):
        self.calls += not kwargs["is_evaluation"]
        return share_of_liked(prompts, completions, completion_ids)

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def test_the_rewards_state_is_resumed(tmp_path):
    trainer = make_ours(tmp_path, reward=Counting(), save_strategy="steps", save_steps=3)
    trainer.train()
    assert json.loads((tmp_path / "checkpoint-3" / "ppo_state.json").read_text())["reward"] == {"calls": 3}
    reward = Counting()
    resumed = make_ours(tmp_path, reward=reward)
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-3")
    assert reward.calls == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"tokenizer": make_tokenizer(pad=None)}, "no pad token"),
        (lambda: {"train": make_prompts().select([])}, "train_dataset: it is empty"),
        (lambda: {"held_out": make_prompts().select([])}, "eval_dataset: it is empty"),
        (lambda: {"num_mini_batches": 2, "gradient_accumulation_steps": 3}, "num_mini_batches=2"),
    ],
)
def test_bad_input_is_one_line_before_training(change, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        make_ours(tmp_path, **change())
    assert "\n" not in str(caught.value)
