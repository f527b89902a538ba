"""Stage 1: pretrain a DeepSeek-style model from scratch on plain text.

``deepseek-moe pretrain`` and the demo call `pretrain`. It trains a tokenizer if none is given, packs the text, trains
with `transformers.Trainer`, and compares the result with an interpolated bigram on the same tokens. The bigram is a
strong one: a model that has only learned which token follows which does not reach it.
"""

import time
from pathlib import Path

from deepseek_records.summary import Check, Summary
from deepseek_training.data.corpus import check_corpora, describe_corpora, load_corpora
from deepseek_training.data.packing import encode_documents
from deepseek_training.data.recipe_blocks import check_end_token, check_text_training, mix, pack, with_steps
from deepseek_training.data.tokenizer import tokenizer_for
from deepseek_training.launch.plan import announce, plan_training
from deepseek_training.recipes.pretrain_and_adapt import PretrainRecipe
from deepseek_training.trainer.bigram import BigramModel
from deepseek_training.trainer.bits_per_byte import BitsPerByte
from deepseek_training.trainer.held_out import bits_figures, measure_sets, prepare_all, scored_texts, sizes_of
from deepseek_training.trainer.interruption import leaving_a_checkpoint
from deepseek_training.trainer.new_model import model_config, new_model
from deepseek_training.trainer.outcome import bits_rows, step_tokens, write_samples
from deepseek_training.trainer.run_callbacks import log_once
from deepseek_training.trainer.run_start import open_run, training_arguments
from deepseek_training.trainer.sample_log import samples_over_time
from deepseek_training.trainer.stage_trainer import StageTrainer, run_training

__all__ = ["PretrainRecipe", "pretrain"]


def pretrain(
    recipe: PretrainRecipe, output: str | Path, *, overwrite: bool = False, is_dry: bool = False
) -> Summary | None:
    """Train a model from scratch and return the summary.

    Args:
        recipe: The settings.
        output: The run folder; an unfinished run with equal settings goes on from its last complete checkpoint.
        overwrite: Delete whatever run the folder holds.
        is_dry: Print what would happen, what it needs and how long it takes, write nothing, and return None.

    Raises:
        FileExistsError: The folder holds another run.
        FileNotFoundError: A data set or tokenizer is missing.
        ValueError: A setting or a data set cannot be used.
    """
    started = time.monotonic()
    corpora = load_corpora(recipe.data, "data", column=recipe.data_column, encoding=recipe.encoding)
    check_corpora(corpora)
    model_config(recipe, vocab_size=recipe.vocab_size)  # a bad setting leaves no run folder behind
    args = training_arguments(recipe, Path(output))
    run = open_run(recipe, output, args, command="pretrain", overwrite=overwrite, is_dry=is_dry)
    tokenizer = tokenizer_for(recipe, [corpus.train for corpus in corpora])
    check_end_token(tokenizer)
    documents = [encode_documents(corpus.train, tokenizer) for corpus in corpora]
    parts = [pack(recipe, one, tokenizer) for one in documents]
    recipe = with_steps(recipe, sum(map(len, parts)), args)
    dataset = parts[0] if isinstance(recipe.data, str) else mix(recipe, corpora, parts, args)
    held_out = prepare_all(corpora, tokenizer, recipe.eval_bytes)
    model = new_model(recipe, tokenizer, args, run.path, is_dry=is_dry)
    check_text_training(recipe, model, tokenizer)
    plan = plan_training("pretrain", recipe, args, model, data=sizes_of(corpora, held_out), blocks=parts)
    announce(plan, run.path, is_first=args.process_index == 0, is_dry=is_dry)
    if is_dry:
        return None
    trainer = StageTrainer(recipe, held_out, dataset=dataset, model=model, args=args)
    with leaving_a_checkpoint(trainer, run):
        run_training(trainer, run, lambda: write_samples(recipe, trainer, tokenizer))
        measured = measure_sets(held_out, trainer.model_wrapped, recipe)
        trainer.save_result(run, tokenizer)
        bigram = BigramModel.of(documents, tokenizer)
        baselines = {one.name: one.measure_bigram(bigram, recipe).value for one in held_out}
        summary = Summary(
            stage="pretrain",
            results=bits_rows(measured, baselines=baselines, baseline_name="interpolated bigram"),
            data=describe_corpora(corpora, scored_texts(corpora, held_out)),
            checks=_checks(measured, baselines) if recipe.check_bigram else (),
            samples=samples_over_time(run) + write_samples(recipe, trainer, tokenizer),
            seconds=round(time.monotonic() - started, 1),
            num_training_tokens=recipe.max_steps * step_tokens(recipe, args),
            num_parameters=model.num_parameters(),
            vocab_size=len(tokenizer),
            tokens_per_expert=tuple(map(tuple, trainer.figures.tokens_per_expert)),
        )
        if trainer.is_first:
            log_once(run, {"step": recipe.max_steps, **bits_figures(measured)})
            summary = run.finish(summary)
    return summary


def _checks(measured: dict[str, BitsPerByte], baselines: dict[str, float]) -> tuple[Check, ...]:
    """The model's bits per byte are below the bigram's on each held-out set."""
    what = "bits per byte below the interpolated bigram's"
    return tuple(
        Check.compare(
            what if len(measured) == 1 else f"{what} on {name}",
            value.value,
            "<",
            baselines[name],
            metric="bits_per_byte",
            dataset=name,
        )
        for name, value in measured.items()
    )
