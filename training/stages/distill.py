"""Teach a smaller model by a larger one: cross-entropy on the text, and a divergence from what the teacher says of it.

``deepseek-moe distill`` calls `distill`. The student is cut out of the teacher, begun anew, or a model that is there;
the teacher runs beside it, or speaks from a cache on disk. Reported are bits per byte of the student before and after,
beside the teacher's, on held-out text.
"""

import time
from pathlib import Path

from deepseek_records.loading import check_vocabulary, load_tokenizer
from deepseek_records.summary import Summary
from deepseek_training.compress.outcome import distill_outcome
from deepseek_training.compress.student import make_student, plan_student
from deepseek_training.compress.teaching import (
    check_pair,
    hold_pair,
    open_teacher,
    place_pair,
    plan_distillation,
    read_blocks,
)
from deepseek_training.data.corpus import Corpus, describe_corpora
from deepseek_training.data.texts import data_name
from deepseek_training.launch.plan import announce, load_or_outline
from deepseek_training.recipes.distill import DistillRecipe
from deepseek_training.trainer.distill_trainer import DistillTrainer
from deepseek_training.trainer.distributed_engine import building_as_configured
from deepseek_training.trainer.held_out import HeldOut, bits_figures
from deepseek_training.trainer.interruption import leaving_a_checkpoint
from deepseek_training.trainer.outcome import step_tokens, write_samples
from deepseek_training.trainer.run_callbacks import log_once
from deepseek_training.trainer.run_start import open_run, training_arguments
from deepseek_training.trainer.sample_log import samples_over_time
from deepseek_training.trainer.stage_trainer import run_training

__all__ = ["DistillRecipe", "distill"]


def distill(
    recipe: DistillRecipe, output: str | Path, *, overwrite: bool = False, is_dry: bool = False
) -> Summary | None:
    """Teach a student and return the summary.

    Args:
        recipe: The settings.
        output: The run folder; an unfinished run with equal settings goes on from its last complete checkpoint.
        overwrite: Delete whatever run the folder holds.
        is_dry: Print what would happen, what it needs and how long it takes, write nothing, and return None.

    Raises:
        FileExistsError: The folder holds another run.
        FileNotFoundError: A model or a data set is missing.
        ValueError: A setting, a model, the cache or a data set cannot be used.
    """
    started = time.monotonic()
    planned = plan_student(recipe)
    corpus = Corpus.load(recipe.data, recipe.data_column)
    tokenizer, teacher = load_tokenizer(recipe.teacher), load_or_outline(recipe.teacher, is_dry=is_dry)
    check_vocabulary(teacher, tokenizer)
    args = training_arguments(recipe, Path(output))
    dataset = read_blocks(recipe, corpus, tokenizer, args)
    with building_as_configured(args):
        student = make_student(recipe, planned, teacher, dataset.blocks, is_dry=is_dry)
    pair = {"teacher": teacher, "student": student, "tokenizer": tokenizer}
    check_pair(recipe, dataset, **pair)
    run = open_run(recipe, output, args, command="distill", overwrite=overwrite, is_dry=is_dry)
    held_out = HeldOut.prepare(data_name(recipe.data), corpus.validation, tokenizer, recipe.eval_bytes)
    sizes = [(held_out.name, len(corpus.train), len(held_out.texts))]
    plan = plan_distillation(recipe, args, student, teacher, data=sizes, num_blocks=len(dataset))
    announce(plan, run.path, is_first=args.process_index == 0, is_dry=is_dry)
    if is_dry:
        return None
    hold_pair(run, args, **pair)
    student = place_pair(recipe, run, args, teacher=teacher, student=student)
    before, taught = (held_out.measure(model, recipe) for model in (student, teacher))
    if args.process_index == 0:
        log_once(run, {"step": 0, **bits_figures({held_out.name: before})})
    teacher = open_teacher(recipe, args, dataset, teacher, tokenizer)
    trainer = DistillTrainer(recipe, [held_out], dataset=dataset, teacher=teacher, model=student, args=args)
    with leaving_a_checkpoint(trainer, run):
        run_training(trainer, run, lambda: write_samples(recipe, trainer, tokenizer))
        after = held_out.measure(trainer.model_wrapped, recipe)
        trainer.save_result(run, tokenizer)
        summary = Summary(
            stage="distill",
            base_model=recipe.teacher if planned.source is None else recipe.start,
            data=describe_corpora([corpus], [held_out.texts]),
            samples=samples_over_time(run) + write_samples(recipe, trainer, tokenizer),
            seconds=round(time.monotonic() - started, 1),
            num_training_tokens=recipe.max_steps * step_tokens(recipe, args),
            num_parameters=student.num_parameters(),
            tokens_per_expert=tuple(map(tuple, trainer.figures.tokens_per_expert)),
            **distill_outcome(recipe, held_out.name, before=before, after=after, teacher=taught),
        )
        if trainer.is_first:
            log_once(run, {"step": recipe.max_steps, **bits_figures({held_out.name: after})})
            summary = run.finish(summary)
    return summary
