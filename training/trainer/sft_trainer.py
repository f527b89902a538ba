"""TRL's `SFTTrainer` as the sft stage uses it, on conversations that are encoded here already.

TRL finds the answer by the length of the prompt, and makes tokens of text that spells a special token.
"""

from collections.abc import Sequence
from typing import Any

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl import SFTConfig, SFTTrainer

from deepseek_training.data.conversations import encode_conversation
from deepseek_training.recipes.sft import SftRecipe
from deepseek_training.trainer.distributed_engine import prepare_engine
from deepseek_training.trainer.held_out import HeldOutSet
from deepseek_training.trainer.stage_trainer import StageTraining


class SftStageTrainer(StageTraining, SFTTrainer):
    """TRL's trainer with the stage's way back from a checkpoint and its measure of held-out conversations."""


def sft_trainer(
    recipe: SftRecipe,
    args: TrainingArguments,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, str]],
    held_out: Sequence[HeldOutSet],
) -> SftStageTrainer:
    """Return the trainer of a recipe.

    Args:
        recipe: The settings.
        args: The trainer's arguments.
        model: Trained in place.
        tokenizer: With its chat template.
        rows: Conversations to train on.
        held_out: Sets scored every `eval_steps`.
    """
    datasets.disable_progress_bars()  # four bars of a second each before ours
    encoded = [one for row in rows for one in encode_conversation(row, tokenizer, recipe.sequence_length)]
    conversations = datasets.Dataset.from_list([{"input_ids": one.input_ids, "labels": one.labels} for one in encoded])
    kept: dict[str, Any] = {key: value for key, value in args.to_dict().items() if not key.endswith("_token")}
    kept["accelerator_config"] = prepare_engine(recipe.collective_timeout_s)  # the dict has lost it
    return SftStageTrainer(
        recipe,
        held_out,
        model=model,
        args=SFTConfig(
            **kept,
            max_length=recipe.sequence_length,
            completion_only_loss=True,
            router_aux_loss_coef=0.0,  # our layers balance by themselves; TRL's pooled loss would come on top
        ),
        train_dataset=conversations,
        # Trainer wants one; `evaluate` reads `held_out`
        eval_dataset=conversations.select([0]) if recipe.eval_steps else None,
        processing_class=tokenizer,
    )
