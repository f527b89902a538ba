"""What PPO needs before its first step: settings and prompts that can work, batch sizes, no dropout.

`CorrectedPPOTrainer` and its foundation call it.
"""

import math

from accelerate import PartialState
from accelerate.utils import DeepSpeedPlugin
from datasets import Dataset
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from deepseek_training.ppo.settings import PPOConfig
from deepseek_training.recipes.bounds import require_at_least

_AT_LEAST = {
    0: ("kl_coef", "cliprange", "cliprange_value", "vf_coef", "max_grad_norm", "learning_rate", "missing_eos_penalty"),
    1: (
        "response_length",
        "num_mini_batches",
        "num_ppo_epochs",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "local_rollout_forward_batch_size",
        "gradient_accumulation_steps",
        "total_episodes",
    ),
}


def check_settings(args: PPOConfig, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Refuse settings and tokenizers that could not train.

    Args:
        args: TRL's settings.
        tokenizer: Of the policy.
        config: Of the policy.

    Raises:
        ValueError: Names the setting, its value and what is allowed.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer: it has no pad token; set tokenizer.pad_token (it may be the eos token)")
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: it has no eos token, so no completion could end; set tokenizer.eos_token")
    if len(tokenizer) > config.get_text_config().vocab_size:
        raise ValueError(
            f"tokenizer: its {len(tokenizer)} tokens are more than the model's {config.get_text_config().vocab_size}"
        )
    require_at_least(args, _AT_LEAST)
    for name in ("gamma", "lam"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"{name}: got {getattr(args, name)}, expected 0 to 1")
    if not args.temperature > 0:
        raise ValueError(f"temperature: got {args.temperature}, expected above 0")
    if args.kl_estimator not in ("k1", "k3"):
        raise ValueError(f"kl_estimator: got {args.kl_estimator!r}, expected 'k1' or 'k3'")
    if args.stop_token not in ("eos", None):
        raise ValueError(f"stop_token: got {args.stop_token!r}, expected 'eos' or None")
    if args.stop_token and args.stop_token_id:
        raise ValueError(f"stop_token_id: got {args.stop_token_id} beside stop_token='eos', expected one of the two")
    _check_batches(args)
    is_reentrant = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if is_reentrant and PartialState().num_processes > 1:
        raise ValueError("gradient_checkpointing_kwargs: use_reentrant=True works in one process only; use False")


def _check_batches(args: PPOConfig) -> None:
    local_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if local_batch % args.num_mini_batches:
        raise ValueError(
            f"num_mini_batches: got {args.num_mini_batches}, expected a divisor of {local_batch} prompts per process"
        )
    per_mini_batch = args.gradient_accumulation_steps / args.num_mini_batches
    if per_mini_batch > 1 and not per_mini_batch.is_integer():
        raise ValueError(
            f"num_mini_batches: got {args.num_mini_batches}, expected a divisor of gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps}, or a number at least as large"
        )
    mini_batch = local_batch // args.num_mini_batches
    if args.whiten_rewards and mini_batch < 8:
        raise ValueError(f"whiten_rewards: got True with a mini-batch of {mini_batch}, expected one of 8 or more")


def check_prompts(args: PPOConfig, config: PretrainedConfig, train: Dataset, held_out: Dataset | None) -> None:
    """Refuse prompts that could not be completed.

    Args:
        args: TRL's settings.
        config: Of the policy.
        train: The prompts.
        held_out: Those of the evaluation; None: there is none.

    Raises:
        ValueError: No prompts, an empty one, fewer than a batch, or one that leaves no room for a completion.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    vocab_size = config.get_text_config().vocab_size
    for name, dataset in (("train_dataset", train), ("eval_dataset", held_out)):
        if dataset is None and name == "eval_dataset":
            continue
        if not isinstance(dataset, Dataset):
            raise ValueError(f"{name}: {type(dataset).__name__} is not supported, expected a datasets.Dataset")
        if not len(dataset):
            raise ValueError(f"{name}: it is empty, expected at least one prompt")
        if "input_ids" not in dataset.column_names:
            raise ValueError(f"{name}: it has no column 'input_ids', only {', '.join(dataset.column_names)}")
        for row, ids in enumerate(dataset["input_ids"]):
            if not len(ids):
                raise ValueError(f"{name}: prompt {row} has no tokens")
            if min(ids) < 0 or max(ids) >= vocab_size:
                raise ValueError(f"{name}: prompt {row} has token {max(ids)}, the model knows 0 to {vocab_size - 1}")
            if context is not None and len(ids) + args.response_length > context:
                raise ValueError(
                    f"{name}: prompt {row} has {len(ids)} tokens, with response_length={args.response_length} more "
                    f"than the model's context of {context}"
                )
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * PartialState().num_processes
    if len(train) < batch:
        raise ValueError(
            f"train_dataset: {len(train)} rows are fewer than the batch of {batch}; "
            "lower per_device_train_batch_size or gradient_accumulation_steps"
        )


def check_value_model(value_model: nn.Module, config: PretrainedConfig) -> None:
    """Refuse a value model that cannot follow the policy.

    Args:
        value_model: What was passed as one.
        config: The policy's.

    Raises:
        ValueError: It has no head for one number, or does not know all of the policy's tokens.
    """
    if not hasattr(value_model, "score") or not hasattr(value_model, value_model.base_model_prefix):
        raise ValueError(
            f"value_model: {type(value_model).__name__} has no `score` head; pass a sequence classifier with one label"
        )
    if value_model.config.num_labels != 1:
        raise ValueError(f"value_model: it has {value_model.config.num_labels} labels, expected 1 (num_labels=1)")
    known, wanted = (each.get_text_config().vocab_size for each in (value_model.config, config))
    if known < wanted:
        raise ValueError(f"value_model: it knows {known} tokens, the policy {wanted}")


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate to 0, also those that a module keeps as a number; TRL reaches only ``nn.Dropout``.

    PPO compares probabilities of the same tokens before and after a step, so they must not be random.

    Args:
        model: Changed in place; its configuration, which is saved, is left as it is.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def set_batch_sizes(args: PPOConfig, num_processes: int, num_prompts: int) -> None:
    """Fill in the sizes that follow from others.

    Args:
        args: The settings, already checked.
        num_processes: How many train.
        num_prompts: Rows of the data.
    """
    if args.total_episodes is None:
        args.total_episodes = int(args.num_train_epochs * num_prompts)
    args.world_size = num_processes
    args.local_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    args.micro_batch_size = args.per_device_train_batch_size * num_processes
    args.batch_size = args.local_batch_size * num_processes
    args.mini_batch_size = args.batch_size // args.num_mini_batches
    args.local_mini_batch_size = args.local_batch_size // args.num_mini_batches
    args.num_total_batches = math.ceil(args.total_episodes / args.batch_size)


def deepspeed_plugin(args: PPOConfig, num_steps: int) -> DeepSpeedPlugin | None:
    """Return DeepSpeed's settings with PPO's own in them; None without DeepSpeed.

    Args:
        args: The trainer's arguments.
        num_steps: Passes of an optimizer step.

    Raises:
        ValueError: Weights are split, and shall not be gathered to write completions.
    """
    plugin = args.deepspeed_plugin
    if plugin is None:
        return None
    if plugin.zero_stage == 3 and not args.ds3_gather_for_generation:
        raise ValueError("ds3_gather_for_generation: got False under ZeRO-3, expected True")
    plugin.deepspeed_config["gradient_accumulation_steps"] = num_steps
    plugin.deepspeed_config["gradient_clipping"] = args.max_grad_norm or 0.0
    return plugin
