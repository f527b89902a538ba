"""A policy, value model, tokenizer and prompts small enough for tests of PPO, for our trainer and TRL's.

Used by ``ppo/test_*.py`` and, in processes of their own, by the scripts those tests launch.
"""

import types

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from deepseek_training.ppo.settings import PPOConfig
from deepseek_training.ppo.trainer import CorrectedPPOTrainer

try:
    from trl.experimental.ppo import PPOTrainer, ppo_trainer
except ImportError:  # TRL 1.13 and later: there is no stock class to compare with
    PPOTrainer = None
needs_stock = pytest.mark.skipif(PPOTrainer is None, reason="this TRL has no PPO of its own")

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
    defaults = dict(
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
    )
    config = LlamaConfig(**{**defaults, **settings})
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


if PPOTrainer is not None:
    # Stock collects garbage twice an update, which in a process full of modules takes most of a test's time.
    ppo_trainer.gc = types.SimpleNamespace(collect=lambda: None)


def make_stock(path, *, reward=None, models=None, tokenizer=None, train=None, held_out=None, **settings):
    extra = {key: settings.pop(key) for key in ("peft_config", "callbacks") if key in settings}
    policy, value = models or make_models()
    trainer = PPOTrainer(
        args=make_args(path, **settings),
        processing_class=tokenizer or make_tokenizer(),
        model=policy,
        ref_model=None,
        reward_model=reward or StockReward(),
        train_dataset=(make_prompts() if train is None else train).select_columns(["input_ids"]),
        eval_dataset=held_out if held_out is None else held_out.select_columns(["input_ids"]),
        value_model=value,
        **extra,
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


def mended(raises):
    """Parametrises a test with our trainer and, as a twin that must fail in this very way, with TRL's.

    Args:
        raises: How the stock class fails; any other error is one.
    """
    stock = pytest.param(make_stock, marks=[needs_stock, pytest.mark.xfail(strict=True, raises=raises)])
    return pytest.mark.parametrize("make", [make_ours, stock], ids=["ours", "stock"])
