"""What PPO needs before its first step: settings that can work, modules without dropout, an obedient accelerator.

Called by `deepseek_training.ppo_trainer`. Surprising: TRL's constructor builds its own `Accelerator` from a name in
its module, so ours is put in that name's place while the constructor runs.
"""

import contextlib
from collections.abc import Iterator

import trl.experimental.ppo.ppo_trainer as trl_ppo
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl.experimental.ppo import PPOConfig


def check_settings(
    args: PPOConfig, tokenizer: PreTrainedTokenizerBase, train: Dataset, held_out: Dataset | None
) -> None:
    """Refuse what could not train.

    Args:
        args: TRL's settings.
        tokenizer: Of the policy.
        train: The prompts.
        held_out: The prompts of the evaluation.

    Raises:
        ValueError: A setting, tokenizer or data set with which training could not begin or never end.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer: it has no pad token; set tokenizer.pad_token (it may be the eos token)")
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: it has no eos token, so no completion could end; set tokenizer.eos_token")
    for name, dataset in (("train_dataset", train), ("eval_dataset", held_out)):
        if dataset is None and name == "eval_dataset":
            continue
        if not len(dataset):
            raise ValueError(f"{name}: it is empty; wanted at least one prompt")
        if any(not len(ids) for ids in dataset["input_ids"]):
            raise ValueError(f"{name}: a prompt has no tokens")
    per_mini_batch = args.gradient_accumulation_steps / args.num_mini_batches
    if per_mini_batch > 1 and not per_mini_batch.is_integer():
        raise ValueError(
            f"num_mini_batches={args.num_mini_batches}: gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps} must be a multiple of it, or at most as large"
        )


def disable_functional_dropout(model: nn.Module) -> None:
    """Set every dropout rate a module keeps as a number to 0; TRL reaches only ``nn.Dropout``.

    PPO compares probabilities of the same tokens before and after a step, so they must not be random.

    Args:
        model: Changed in place; its configuration, which is saved, is left as it is.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


@contextlib.contextmanager
def stock_accelerator_replaced(args: PPOConfig) -> Iterator[None]:
    """While stock's constructor runs, give it an `Accelerator` that obeys the settings.

    Stock builds one without mixed precision, that counts `gradient_accumulation_steps` micro-batches to a step, steps
    early at the data loader's end, and lets DDP wait for experts that saw no token.

    Args:
        args: TRL's settings.
    """

    def build(gradient_accumulation_steps: int) -> Accelerator:
        steps = max(1, gradient_accumulation_steps // args.num_mini_batches)
        return Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=steps, sync_with_dataloader=False),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )

    stock, trl_ppo.Accelerator = trl_ppo.Accelerator, build
    try:
        yield
    finally:
        trl_ppo.Accelerator = stock
