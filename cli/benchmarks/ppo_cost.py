"""What the mended PPO costs: an update of `CorrectedPPOTrainer` against one of TRL's own class, on the same work.

``deepseek-moe bench ppo`` trains both in turn within one run: the same model, prompts, settings and
reward model, completions of one fixed length and as many optimizer steps, counted. The stock class takes
fewer steps under most settings with several mini-batches (one of its defects), so the settings are ones where it does
not.
"""

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
import warnings
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase, PrinterCallback
from transformers.utils import logging

from deepseek_cli.benchmarks.result_files import BenchmarkRun
from deepseek_records.activation_checkpointing import checkpointing_setting
from deepseek_training.data.texts import load_texts
from deepseek_training.data.tokenizer import train_tokenizer
from deepseek_training.ppo.settings import PPOConfig
from deepseek_training.ppo.trainer import CorrectedPPOTrainer
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

SHAPES = {  # prompts per update, tokens of a completion, tokens of the shortest and of the longest prompt
    "short prompts": (16, 40, 8, 40),
    "long prompts": (8, 24, 32, 160),
}


class TokenCountReward(nn.Module):
    """A reward model as TRL takes it that costs next to nothing: how often one token stands in the text."""

    base_model_prefix = "scorer"

    def __init__(self) -> None:
        super().__init__()
        self.scorer = _Scorer()

    def score(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return [B, S, 1] rewards.

        Args:
            hidden_states: [B, S, 1] counts up to each position.
        """
        return hidden_states / 10


class _Scorer(nn.Module):
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        counts = (input_ids == 7).cumsum(1).float().unsqueeze(-1)
        return argparse.Namespace(hidden_states=[counts])


def build_trainers(
    shape: tuple[int, int, int, int], tokenizer: PreTrainedTokenizerBase, folder: str
) -> dict[str, Any]:
    """Return both trainers, with equal weights and settings.

    Args:
        shape: One of `SHAPES`.
        tokenizer: Gives vocabulary and special tokens.
        folder: For what TRL writes.
    """
    batch_size, response_length, shortest, longest = shape
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (4 * batch_size,), generator=generator)
    rows = [torch.randint(8, len(tokenizer), (int(n),), generator=generator).tolist() for n in lengths]
    trainers = {}
    for name, trainer_class in (("stock", _stock_class()), ("ours", CorrectedPPOTrainer)):
        args = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=batch_size // 2,  # one pass a mini-batch, which stock counts right
            gradient_accumulation_steps=2,
            num_mini_batches=1,
            local_rollout_forward_batch_size=batch_size,
            total_episodes=batch_size,
            num_ppo_epochs=2,
            response_length=response_length,
            learning_rate=1e-5,
            max_grad_norm=1.0,
            bf16=False,
            **checkpointing_setting(False),
            num_sample_generations=0,
            save_strategy="no",
            disable_tqdm=True,
            report_to=[],
        )
        torch.manual_seed(0)
        config = DeepseekConfig.from_preset("nano", vocab_size=len(tokenizer), pad_token_id=0)
        policy = DeepseekForCausalLM(config)
        config = DeepseekConfig.from_preset("nano", vocab_size=len(tokenizer), pad_token_id=0, num_labels=1)
        value_model = AutoModelForSequenceClassification.from_config(config)
        for model in (policy, value_model):
            model.set_experts_implementation("fused_moe")
        parts = {"args": args, "processing_class": tokenizer, "model": policy, "value_model": value_model}
        parts["train_dataset"] = Dataset.from_dict({"input_ids": rows})
        reward = {"reward" if name == "ours" else "reward_model": TokenCountReward()}
        trainers[name] = trainer_class(**parts, **reward, ref_model=None)
        trainers[name].remove_callback(PrinterCallback)
    return trainers


def _stock_class() -> Any:
    try:
        from trl.experimental.ppo import PPOTrainer
    except ImportError as error:
        raise ValueError(f"trl: got {trl.__version__}, expected 1.12, the last with a PPO to compare with") from error
    return PPOTrainer


def compare(shape: tuple[int, int, int, int], tokenizer: PreTrainedTokenizerBase, num_rounds: int) -> dict[str, Any]:
    """Return seconds an update of each class, and the ratio of stock's to ours round by round.

    Args:
        shape: One of `SHAPES`.
        tokenizer: For the model's vocabulary.
        num_rounds: Timed updates of each; the order changes from round to round.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainers = build_trainers(shape, tokenizer, folder)
        steps = {name: _count_steps(trainer) for name, trainer in trainers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for turn in range(1 + num_rounds):
            for name in sorted(trainers, reverse=bool(turn % 2)):
                began = time.perf_counter()
                with contextlib.redirect_stdout(io.StringIO()):  # stock prints a line
                    trainers[name].train()
                if turn:
                    seconds[name].append(time.perf_counter() - began)
    if len(steps["ours"]) != len(steps["stock"]):
        raise RuntimeError(
            f"optimizer steps: ours {len(steps['ours'])}, stock {len(steps['stock'])}; expected as many"
        )
    ratios = [stock / ours for stock, ours in zip(seconds["stock"], seconds["ours"], strict=True)]
    shares = {name: value for name, value in trainers["ours"].state.log_history[-1].items() if "time/" in name}
    return {"seconds": seconds, "ratios": ratios, "steps": len(steps["ours"]), "shares": shares}


def _count_steps(trainer: Any) -> list[int]:
    """A list that grows by one at each of the optimizer's steps."""
    steps: list[int] = []
    trainer.optimizer.optimizer.register_step_pre_hook(lambda *_: steps.append(1))
    return steps


def run(args: argparse.Namespace) -> int:
    """Print three lines per shape and write all figures as JSON.

    Args:
        args: The options of ``deepseek-moe bench ppo``.

    Raises:
        ValueError: There are fewer than two rounds, of which no quartiles could be taken, or TRL has no PPO.
    """
    if args.rounds < 2:
        raise ValueError(f"rounds: got {args.rounds}, expected at least 2")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()  # each generation would repeat one on TRL's behalf
    settings = {"rounds": args.rounds, "num_threads": torch.get_num_threads()}
    _stock_class()
    bench = BenchmarkRun("ppo", args.output, settings, overwrite=args.overwrite)
    lines = [f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"]
    print(lines[0])
    tokenizer = train_tokenizer(load_texts("dialogues", "validation"), 1024)
    figures = {}
    for name, shape in SHAPES.items():
        figures[name] = compare(shape, tokenizer, args.rounds)
        lines.append(_describe(name, figures[name]))
        print(lines[-1], flush=True)
    bench.finish(figures, "\n".join(lines))
    return 0


def _describe(name: str, row: dict[str, Any]) -> str:
    stock, ours = (1000 * statistics.median(row["seconds"][key]) for key in ("stock", "ours"))
    low, middle, high = statistics.quantiles(row["ratios"], n=4)
    num_rounds = len(row["ratios"])
    num_steps = row["steps"] // (num_rounds + 1)
    shares = ", ".join(f"{key[5:-6]} {100 * value:.0f} %" for key, value in row["shares"].items())
    return (
        f"{name}: an update of {num_steps} optimizer steps takes stock {stock:.0f} ms, ours {ours:.0f} ms\n"
        f"  stock / ours {middle:.2f} (quartiles {low:.2f} to {high:.2f} over {num_rounds} rounds)\n"
        f"  ours: {shares}"
    )
