"""The training of an update: new text with earlier blocks between, by the method that its recipe names."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from deepseek_training.continual.elastic_weights import ElasticWeights
from deepseek_training.continual.reservoir import Reservoir, StoredBlocks
from deepseek_training.data.mixture import Mixture
from deepseek_training.data.recipe_blocks import num_blocks, with_steps
from deepseek_training.recipes.update import UpdateRecipe
from deepseek_training.trainer.chosen_experts import Esft, prepare_esft
from deepseek_training.trainer.lora import merged, with_lora
from deepseek_training.trainer.stage_trainer import StageTrainer


def mix_replay(
    recipe: UpdateRecipe, new: Any, reservoir: Reservoir, args: TrainingArguments
) -> tuple[UpdateRecipe, Mixture]:
    """Return the recipe with its steps, and the stream of blocks; earlier sources have equal shares of the replay.

    Args:
        recipe: The settings.
        new: The new text's blocks.
        reservoir: Earlier blocks.
        args: The trainer's arguments.
    """
    recipe = with_steps(recipe, len(new) / (1 - recipe.replay_share), args)
    earlier: Sequence[Any] = reservoir.parts if recipe.replay_share else []
    weights = [1 - recipe.replay_share, *(recipe.replay_share / len(earlier) for _ in earlier)]
    return recipe, Mixture([new, *earlier], weights, num_blocks(recipe, args), seed=recipe.seed)


def prepare_method(recipe: UpdateRecipe, model: PreTrainedModel, new: Any) -> tuple[Any, Esft]:
    """Return the model as it trains, and the choice of experts if there is one.

    Args:
        recipe: The settings.
        model: The old model.
        new: The new text's blocks.
    """
    model.set_experts_implementation(recipe.experts_implementation)
    return with_lora(model, recipe), prepare_esft(recipe, model, [new])


def build_trainer(
    recipe: UpdateRecipe, model: Any, dataset: Mixture, args: TrainingArguments, *, esft: Esft, reservoir: Reservoir
) -> StageTrainer:
    """Return the trainer.

    Args:
        recipe: The settings, with steps.
        model: From `prepare_method`.
        dataset: From `mix_replay`.
        args: The trainer's arguments.
        esft: From `prepare_method`.
        reservoir: What the elastic penalty is about.
    """
    trainer = StageTrainer(recipe, [], dataset=dataset, model=model, args=args, chosen=esft.rows)
    if recipe.ewc_weight:
        earlier = StoredBlocks(np.concatenate(list(reservoir.blocks.values())))
        elastic = ElasticWeights(model, earlier, weight=recipe.ewc_weight, num_blocks=recipe.ewc_blocks)
        trainer.add_callback(elastic)
    return trainer


def save_trained(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the trained weights, an adapter merged; the folder appears whole, by a rename.

    Args:
        model: From `prepare_method`, trained.
        tokenizer: Saved beside it.
        folder: Absent.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    merged(model).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
