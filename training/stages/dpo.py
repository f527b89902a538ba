"""Direct preference optimization by TRL's `DPOTrainer`: pairs of answers of which one is better.

``deepseek-moe dpo`` calls `dpo`. Measured on held-out pairs after training: the share whose better answer has gained
more probability over the reference than the worse one, and TRL's loss.
"""

import time
from pathlib import Path
from typing import Any

from deepseek_records.loading import check_vocabulary, load_tokenizer
from deepseek_records.statistics import share_error
from deepseek_records.summary import Check, Result, Summary
from deepseek_training.data.conversations import read_template
from deepseek_training.data.pairs import describe_pairs, load_pairs
from deepseek_training.data.texts import data_name
from deepseek_training.launch.plan import announce, load_or_outline, plan_training
from deepseek_training.recipes.dpo import DpoRecipe
from deepseek_training.trainer.distributed_engine import refuse_fsdp
from deepseek_training.trainer.interruption import leaving_a_checkpoint
from deepseek_training.trainer.lora import with_lora
from deepseek_training.trainer.new_model import check_model
from deepseek_training.trainer.preference_trainers import dpo_trainer
from deepseek_training.trainer.run_start import open_run, training_arguments
from deepseek_training.trainer.stage_trainer import run_training

__all__ = ["DpoRecipe", "dpo"]


def dpo(recipe: DpoRecipe, output: str | Path, *, overwrite: bool = False, is_dry: bool = False) -> Summary | None:
    """Teach a model to prefer better answers and return the summary.

    Args:
        recipe: The settings.
        output: The run folder; an unfinished run with equal settings goes on from its last complete checkpoint.
        overwrite: Delete whatever run the folder holds.
        is_dry: Print what would happen, what it needs and how long it takes, write nothing, and return None.

    Raises:
        FileExistsError: The folder holds another run.
        FileNotFoundError: The model, the template or the data are missing.
        ValueError: A setting, the tokenizer, the data or the engine cannot be used.
    """
    started = time.monotonic()
    refuse_fsdp("dpo")
    train, validation = (load_pairs(recipe, split) for split in ("train", "validation"))
    validation = validation[: recipe.num_eval_pairs]
    tokenizer = load_tokenizer(recipe.model)
    tokenizer.chat_template = read_template(recipe, tokenizer)
    model = load_or_outline(recipe.model, is_dry=is_dry)
    check_vocabulary(model, tokenizer)
    reference = None if recipe.lora_rank or is_dry else load_or_outline(recipe.model, is_dry=is_dry)
    check_model(recipe, model)
    args = training_arguments(recipe, Path(output))
    run = open_run(recipe, output, args, command="dpo", overwrite=overwrite, is_dry=is_dry)
    model.set_experts_implementation(recipe.experts_implementation)
    model = with_lora(model, recipe)
    sizes = [(data_name(recipe.data), len(train), len(validation))]
    plan = plan_training("dpo", recipe, args, model, data=sizes, num_blocks=len(train))
    announce(plan, run.path, is_first=args.process_index == 0, is_dry=is_dry)
    if is_dry:
        return None
    models = {"model": model, "reference": reference, "tokenizer": tokenizer}
    trainer = dpo_trainer(recipe, args, train=train, held_out=validation, **models)
    with leaving_a_checkpoint(trainer, run):
        run_training(trainer, run)
        results = _measure(trainer.evaluate(), data_name(recipe.data), len(validation))
        trainer.save_result(run, tokenizer)
        summary = Summary(
            stage="dpo",
            base_model=recipe.model,
            results=results,
            data=(
                describe_pairs(recipe, "train", train, "training"),
                describe_pairs(recipe, "validation", validation, "evaluation"),
            ),
            checks=_checks(recipe, results[0].value),
            seconds=round(time.monotonic() - started, 1),
        )
        if trainer.is_first:
            summary = run.finish(summary)
    return summary


def _measure(metrics: dict[str, float], dataset: str, n: int) -> tuple[Result, ...]:
    accuracy = metrics["eval_rewards/accuracies"]
    about: dict[str, Any] = {"dataset": dataset, "split": "validation", "n": n, "when": "after"}
    return (
        Result(
            metric="preference_accuracy",
            value=accuracy,
            stderr=share_error(accuracy, n),
            higher_is_better=True,
            **about,
        ),
        Result(metric="preference_margin", value=metrics["eval_rewards/margins"], **about),
        Result(metric="dpo_loss", value=metrics["eval_loss"], higher_is_better=False, **about),
    )


def _checks(recipe: DpoRecipe, accuracy: float) -> tuple[Check, ...]:
    if recipe.min_accuracy is None:
        return ()
    what = "share of held-out pairs whose better answer gains more"
    return (Check.compare(what, accuracy, ">", recipe.min_accuracy, metric="preference_accuracy"),)
