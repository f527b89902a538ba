"""A model from scratch, as a pretrain recipe describes it, and what every model must fit."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from deepseek_training.balance.bias_speed import check_bias_speed
from deepseek_training.launch.plan import measure_size
from deepseek_training.launch.step_time import MOST_BYTES
from deepseek_training.recipes.pretrain_and_adapt import PretrainRecipe, TrainerSettings
from deepseek_training.recipes.quantize import QuantizeSettings
from deepseek_training.recipes.shrink import ShrinkSettings
from deepseek_training.recipes.upcycle import UpcycleSettings
from deepseek_training.trainer.distributed_engine import building_as_configured
from deepseek_training.trainer.expert_parallel import split_experts
from modeling_deepseek import DeepseekConfig, DeepseekMultimodalConfig


def new_model(
    recipe: PretrainRecipe,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    folder: Path,
    *,
    is_dry: bool = False,
) -> PreTrainedModel:
    """Return a new model of the recipe's preset with the tokenizer's vocabulary, initialized from the seed.

    Args:
        recipe: The settings.
        tokenizer: Its size and special tokens go into the configuration.
        args: The trainer's arguments.
        folder: The run's, where a model that is split over processes lies for a while.
        is_dry: Whether nothing but the plan is wanted: a model over 1 GiB, which is not timed, gets its
            shapes only.
    """
    vocabulary = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = model_config(recipe, **vocabulary)
    with building_as_configured(args), _meta_device(config) if is_dry else contextlib.nullcontext():
        set_seed(recipe.seed)
        model = AutoModelForCausalLM.from_config(config)
        model.set_experts_implementation(recipe.experts_implementation)
    if recipe.expert_parallel_size > 1 and not is_dry:
        model = split_experts(model, recipe.expert_parallel_size, folder, args)
    return model


def _meta_device(config: DeepseekConfig) -> contextlib.AbstractContextManager[Any]:
    """The meta device for a model whose step would not be timed."""
    with torch.device("meta"):
        size = measure_size(AutoModelForCausalLM.from_config(config))
    return torch.device("meta") if size.num_bytes > MOST_BYTES else contextlib.nullcontext()


def model_config(recipe: PretrainRecipe, **vocabulary: int | None) -> DeepseekConfig:
    """Return the configuration of the recipe's model.

    Args:
        recipe: The settings.
        **vocabulary: Settings that the tokenizer decides; the recipe's own win.

    Raises:
        ValueError: A setting of the model is refused, or the blocks are longer than its context.
    """
    config = DeepseekConfig.from_preset(recipe.preset, **{**vocabulary, **recipe.model})
    check_context(recipe, config)
    return config


def check_model(recipe: TrainerSettings, model: PreTrainedModel) -> None:
    """Raise a one-line ValueError if a model that was loaded cannot be trained as the recipe says."""
    if isinstance(model.config, DeepseekMultimodalConfig):
        raise ValueError(
            f"model: got {type(model).__name__}, which sees or hears, expected a language model; train that one before"
        )
    check_context(recipe, model.config)
    check_bias_speed(model, recipe.bias_update_speed)


def check_context(
    recipe: TrainerSettings | ShrinkSettings | QuantizeSettings | UpcycleSettings, config: PreTrainedConfig
) -> None:
    """Raise a one-line ValueError if the blocks do not fit the model's context."""
    if recipe.sequence_length > config.max_position_embeddings:
        raise ValueError(
            f"sequence_length: got {recipe.sequence_length}, expected at most the model's context "
            f"(max_position_embeddings={config.max_position_embeddings})"
        )
