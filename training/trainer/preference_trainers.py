"""TRL's `GRPOTrainer` and `DPOTrainer` as the grpo and dpo stages use them: TRL trains, ours are resume and encoding.

Prompts and answers are encoded here, so that text which spells a special token stays text, and the answer is found by
comparing (`data/conversations.py`).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from deepseek_records.activation_checkpointing import checkpointing_setting
from deepseek_training.balance.callback import ExpertBalanceCallback
from deepseek_training.balance.replay_callback import RouterReplayCallback
from deepseek_training.data.pairs import Pair, encode_pair
from deepseek_training.data.prompts import encode_prompt
from deepseek_training.recipes.dpo import DpoRecipe
from deepseek_training.recipes.grpo import GrpoRecipe
from deepseek_training.trainer.distributed_engine import prepare_engine
from deepseek_training.trainer.resumed_training import ResumedTraining
from deepseek_training.trainer.run_start import choose_trackers
from deepseek_training.trainer.whole_weights import load_whole


class GrpoStageTrainer(ResumedTraining, GRPOTrainer):
    """TRL's trainer on prompts that are put by the recipe's template.

    Args:
        recipe: The settings.
        model: Trained in place; the reference is a copy of it, with LoRA the model without its adapter.
        **kwargs: As for `GRPOTrainer`.
    """

    def __init__(self, recipe: GrpoRecipe, *, model: PreTrainedModel, **kwargs: Any) -> None:
        self.recipe = recipe
        start = {name: value.clone() for name, value in model.state_dict().items()}
        super().__init__(model=model, **kwargs)
        if self.ref_model is not None:  # TRL has read it from a path, which an adapter's model does not have
            load_whole(self.accelerator.unwrap_model(self.ref_model), start)
        ExpertBalanceCallback.attach(self, recipe.bias_update_speed)
        if recipe.router_replay:
            RouterReplayCallback.attach(self)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        ids = [encode_prompt(prompt, self.processing_class, self.recipe.prompt_template) for prompt in prompts]
        return ids, None, {}


class DpoStageTrainer(ResumedTraining, DPOTrainer):
    """TRL's trainer on pairs that are encoded already.

    Args:
        recipe: The settings.
        **kwargs: As for `DPOTrainer`.
    """

    def __init__(self, recipe: DpoRecipe, **kwargs: Any) -> None:
        self.recipe = recipe
        super().__init__(**kwargs)

    def _prepare_dataset(self, dataset: datasets.Dataset, *args: Any, **kwargs: Any) -> datasets.Dataset:
        return dataset


def grpo_config(recipe: GrpoRecipe, output: Path) -> GRPOConfig:
    """Return TRL's settings for a recipe.

    Args:
        recipe: The settings.
        output: The run folder; checkpoints go into it.
    """
    return GRPOConfig(
        accelerator_config=prepare_engine(),
        output_dir=str(output / "checkpoints"),
        max_steps=recipe.num_updates * recipe.num_iterations,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_iterations=recipe.num_iterations,
        num_generations=recipe.num_generations,
        max_completion_length=recipe.response_length,
        temperature=recipe.temperature,
        learning_rate=recipe.learning_rate,
        beta=recipe.kl_coef,
        epsilon=recipe.cliprange,
        router_aux_loss_coef=0.0,  # our layers balance by themselves; TRL's pooled loss would come on top
        max_grad_norm=recipe.max_grad_norm,
        bf16=False,
        **checkpointing_setting(False),
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        logging_steps=1,
        save_strategy="steps" if recipe.save_steps else "no",
        save_steps=recipe.save_steps or 1,
        seed=recipe.seed,
        disable_tqdm=True,
        project="deepseek-moe",
        run_name=f"{output.parent.name}-{output.name}",
        report_to=choose_trackers(recipe) or "none",
    )


def dpo_trainer(
    recipe: DpoRecipe,
    args: TrainingArguments,
    *,
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Pair],
    held_out: Sequence[Pair],
) -> DpoStageTrainer:
    """Return the trainer of a recipe.

    Args:
        recipe: The settings.
        args: The trainer's arguments.
        model: Trained in place.
        reference: The same model once more; None with LoRA, where it is the model without its adapter.
        tokenizer: With its chat template.
        train: Pairs to train on.
        held_out: Pairs that are scored.
    """
    known = {field.name for field in dataclasses.fields(DPOConfig)}
    kept = {key: value for key, value in args.to_dict().items() if key in known and not key.endswith("_token")}
    kept["accelerator_config"] = prepare_engine(recipe.collective_timeout_s)  # the dict has lost it
    encoded = [
        datasets.Dataset.from_list([encode_pair(pair, tokenizer, recipe.sequence_length) for pair in pairs])
        for pairs in (train, held_out)
    ]
    trainer = DpoStageTrainer(
        recipe,
        model=model,
        ref_model=reference,
        args=DPOConfig(
            **{**kept, "per_device_eval_batch_size": recipe.batch_size},
            beta=recipe.beta,
            max_length=recipe.sequence_length,
            router_aux_loss_coef=0.0,  # our layers balance by themselves; TRL's pooled loss would come on top
        ),
        train_dataset=encoded[0],
        eval_dataset=encoded[1],
        processing_class=tokenizer,
    )
    ExpertBalanceCallback.attach(trainer, recipe.bias_update_speed)
    return trainer
