"""The blocks that `pretrain` and `adapt` train on, and how many steps that is, as their recipes say."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from deepseek_training.data.corpus import Corpus
from deepseek_training.data.mixture import Mixture
from deepseek_training.data.packing import PackedDataset
from deepseek_training.data.separate import SeparateDataset
from deepseek_training.recipes.pretrain_and_adapt import TextSettings

RecipeT = TypeVar("RecipeT", bound=TextSettings)


def pack(
    recipe: TextSettings, documents: Sequence[np.ndarray], tokenizer: PreTrainedTokenizerBase
) -> PackedDataset | SeparateDataset:
    """Return a source's blocks, packed as the recipe says.

    Args:
        recipe: The settings.
        documents: Of the source, from `encode_documents`.
        tokenizer: Theirs.
    """
    if recipe.packing == "joined":
        return PackedDataset(documents, recipe.sequence_length, seed=recipe.seed)
    pad = next((one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None), 0)
    return SeparateDataset(documents, recipe.sequence_length, pad_token_id=pad, seed=recipe.seed)


def with_steps(recipe: RecipeT, epoch: float, args: TrainingArguments) -> RecipeT:
    """Return the recipe with the steps that its epochs make, and tell the trainer's arguments.

    Args:
        recipe: The settings.
        epoch: Its blocks.
        args: The trainer's arguments, which know the processes.

    Raises:
        ValueError: The steps are too few for another setting.
    """
    if recipe.epochs is None:
        return recipe
    per_step = recipe.batch_size * recipe.gradient_accumulation_steps * args.world_size
    steps = max(1, math.ceil(recipe.epochs * epoch / per_step))
    args.max_steps = steps
    args.save_steps = recipe.save_steps or steps
    return dataclasses.replace(recipe, max_steps=steps, epochs=None)


def mix(
    recipe: TextSettings,
    corpora: Sequence[Corpus],
    parts: Sequence[PackedDataset | SeparateDataset],
    args: TrainingArguments,
) -> Mixture:
    """Return the stream of blocks of a list of sources, as long as the training is.

    Args:
        recipe: The settings, with steps.
        corpora: The sources.
        parts: Their blocks.
        args: The trainer's arguments, which know the processes.
    """
    return Mixture(parts, source_weights(corpora, parts), num_blocks(recipe, args), seed=recipe.seed)


def num_blocks(recipe: TextSettings, args: TrainingArguments) -> int:
    """Return the blocks that a training of these steps takes.

    Args:
        recipe: The settings, with steps.
        args: The trainer's arguments, which know the processes.
    """
    return recipe.max_steps * recipe.batch_size * recipe.gradient_accumulation_steps * args.world_size


def source_weights(corpora: Sequence[Corpus], parts: Sequence[Any]) -> list[float]:
    """Return the weight of each source: its own, else the number of its blocks; they sum to 1.

    Args:
        corpora: The sources.
        parts: Their blocks.
    """
    given = [corpus.settings.weight for corpus in corpora]
    weights = [len(part) if weight is None else weight for weight, part in zip(given, parts, strict=True)]
    return [weight / sum(weights) for weight in weights]


def check_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without end token.

    Args:
        tokenizer: What documents are encoded with.

    Raises:
        ValueError: It has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenizer: got one without end token, expected one; nothing would tell the model where a text ends"
        )


def check_text_training(recipe: TextSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse what cannot be trained on text as the recipe says.

    transformers gives flash attention no mask for packed rows of a batch, only for a single one.

    Args:
        recipe: The settings.
        model: What is trained.
        tokenizer: What documents are encoded with.

    Raises:
        ValueError: There is no end token, or the attention would cross documents.
    """
    check_end_token(tokenizer)
    attention = str(getattr(model.config, "_attn_implementation", ""))
    if recipe.packing == "separate" and "flash" in attention and recipe.batch_size > 1:
        raise ValueError(
            f"packing: got 'separate' with {attention} and batch_size={recipe.batch_size}, expected batch_size 1 "
            "(with gradient_accumulation_steps), or sdpa"
        )
