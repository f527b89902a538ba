"""Supervised fine-tuning on conversations, the optional stage between `adapt` and `align`, by TRL's `SFTTrainer`.

``deepseek-moe sft`` and the demo call `sft`. A conversation is put by the tokenizer's chat template, which is saved
with it, and only the answer's tokens count in the loss. Measured on held-out conversations before and after: bits per
byte of the answer, given the question. ``align`` asks the model by the same template with ``prompt_template: null``.
"""

import time
from pathlib import Path

from transformers import set_seed

from deepseek_records.loading import check_vocabulary, load_tokenizer
from deepseek_records.summary import Check, Summary
from deepseek_training.data.conversations import describe_conversations, load_conversations, read_template
from deepseek_training.data.texts import data_name
from deepseek_training.launch.plan import announce, plan_training
from deepseek_training.mtp.load_to_train import load_to_train
from deepseek_training.recipes.sft import SftRecipe
from deepseek_training.trainer.answers import HeldOutAnswers
from deepseek_training.trainer.expert_parallel import place_model
from deepseek_training.trainer.held_out import bits_figures
from deepseek_training.trainer.interruption import leaving_a_checkpoint
from deepseek_training.trainer.lora import with_lora
from deepseek_training.trainer.new_model import check_model
from deepseek_training.trainer.outcome import bits_rows
from deepseek_training.trainer.run_callbacks import log_once
from deepseek_training.trainer.run_start import open_run, training_arguments
from deepseek_training.trainer.sample_log import samples_over_time
from deepseek_training.trainer.sft_trainer import sft_trainer
from deepseek_training.trainer.stage_trainer import run_training

__all__ = ["SftRecipe", "sft"]


def sft(recipe: SftRecipe, output: str | Path, *, overwrite: bool = False, is_dry: bool = False) -> Summary | None:
    """Teach a model to answer and return the summary.

    Args:
        recipe: The settings.
        output: The run folder; an unfinished run with equal settings goes on from its last complete checkpoint.
        overwrite: Delete whatever run the folder holds.
        is_dry: Print what would happen, what it needs and how long it takes, write nothing, and return None.

    Raises:
        FileExistsError: The folder holds another run.
        FileNotFoundError: The model, the template or the data are missing.
        ValueError: A setting, the tokenizer or the data cannot be used.
    """
    started = time.monotonic()
    train, validation = (load_conversations(recipe, split) for split in ("train", "validation"))
    validation = validation[: recipe.num_eval_conversations]
    tokenizer = load_tokenizer(recipe.model)
    tokenizer.chat_template = read_template(recipe, tokenizer)
    model = load_to_train(recipe, is_dry=is_dry)
    check_vocabulary(model, tokenizer)
    check_model(recipe, model)
    args = training_arguments(recipe, Path(output))
    run = open_run(recipe, output, args, command="sft", overwrite=overwrite, is_dry=is_dry)
    model.set_experts_implementation(recipe.experts_implementation)
    model = with_lora(model, recipe)
    held_out = HeldOutAnswers(data_name(recipe.data), validation, tokenizer)
    sizes = [(held_out.name, len(train), len(validation))]
    plan = plan_training("sft", recipe, args, model, data=sizes, num_blocks=len(train))
    announce(plan, run.path, is_first=args.process_index == 0, is_dry=is_dry)
    if is_dry:
        return None
    set_seed(recipe.seed)
    before = held_out.measure(model := place_model(model, recipe.expert_parallel_size, run.path, args), recipe)
    if args.process_index == 0:
        log_once(run, {"step": 0, **bits_figures({held_out.name: before})})
    trainer = sft_trainer(recipe, args, model=model, tokenizer=tokenizer, rows=train, held_out=[held_out])
    with leaving_a_checkpoint(trainer, run):
        run_training(trainer, run, lambda: held_out.sample(trainer.model, recipe))
        after = held_out.measure(trainer.model_wrapped, recipe)
        trainer.save_result(run, tokenizer)
        change, what = after.value / before.value - 1, f"bits per byte of held-out answers on {held_out.name} fall"
        summary = Summary(
            stage="sft",
            base_model=recipe.model,
            results=bits_rows({f"{held_out.name} (answers)": before}, when="before")
            + bits_rows({f"{held_out.name} (answers)": after}, when="after"),
            data=(
                describe_conversations(recipe, "train", train, "training"),
                describe_conversations(recipe, "validation", validation, "evaluation"),
            ),
            checks=(Check.compare(what, change, "<", 0.0, metric="bits_per_byte", dataset=held_out.name),),
            samples=samples_over_time(run) + held_out.sample(trainer.model, recipe),
            tokens_per_expert=tuple(map(tuple, trainer.figures.tokens_per_expert)),
            seconds=round(time.monotonic() - started, 1),
        )
        if trainer.is_first:
            log_once(run, {"step": recipe.max_steps, **bits_figures({held_out.name: after})})
            summary = run.finish(summary)
    return summary
