"""Stage 1: pretrain a DeepSeek-style model from scratch on plain text.

``deepseek-moe pretrain`` and the demo call `pretrain`. It trains a tokenizer if none is given, packs the text, trains
with `transformers.Trainer`, and compares the result with an interpolated bigram on the same tokens. The bigram is a
strong one: a model that has only learned which token follows which does not reach it.
"""

import time
from pathlib import Path

from deepseek_records.document_tokens import with_start
from deepseek_records.summary import Check, Summary
from deepseek_training.data.packing import PackedDataset, encode_documents
from deepseek_training.data.texts import Corpus, data_name, describe_corpora
from deepseek_training.data.tokenizer import tokenizer_for
from deepseek_training.launch.plan import announce, plan_training
from deepseek_training.recipes.pretrain_and_adapt import PretrainRecipe
from deepseek_training.trainer.bigram import BigramModel
from deepseek_training.trainer.held_out import HeldOut, bits_figures, measure_sets
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
    corpus = Corpus.load(recipe.data, recipe.data_column)
    model_config(recipe, vocab_size=recipe.vocab_size)  # a bad setting leaves no run folder behind
    args = training_arguments(recipe, Path(output))
    run = open_run(recipe, output, args, command="pretrain", overwrite=overwrite, is_dry=is_dry)
    tokenizer = tokenizer_for(recipe, corpus.train)
    documents = encode_documents(corpus.train, tokenizer)
    dataset = PackedDataset(documents, recipe.sequence_length, seed=recipe.seed)
    held_out = HeldOut.prepare(data_name(recipe.data), corpus.validation, tokenizer, recipe.eval_bytes)
    model = new_model(recipe, tokenizer, args, run.path, is_dry=is_dry)
    sizes = [(held_out.name, len(corpus.train), len(held_out.texts))]
    plan = plan_training("pretrain", recipe, args, model, data=sizes, num_blocks=len(dataset))
    announce(plan, run.path, is_first=args.process_index == 0, is_dry=is_dry)
    if is_dry:
        return None
    trainer = StageTrainer(recipe, [held_out], dataset=dataset, model=model, args=args)
    with leaving_a_checkpoint(trainer, run):
        run_training(trainer, run, lambda: write_samples(recipe, trainer, tokenizer))
        measured = measure_sets([held_out], trainer.model_wrapped, recipe)
        trainer.save_result(run, tokenizer)
        bigram = held_out.measure_bigram(BigramModel(with_start(documents, tokenizer), len(tokenizer)), recipe)
        value, what = measured[held_out.name].value, "bits per byte below the interpolated bigram's"
        about = {"metric": "bits_per_byte", "dataset": held_out.name}
        summary = Summary(
            stage="pretrain",
            results=bits_rows(measured, baseline=bigram.value, baseline_name="interpolated bigram"),
            data=describe_corpora([corpus], [held_out.texts]),
            checks=(Check.compare(what, value, "<", bigram.value, **about),) if recipe.check_bigram else (),
            samples=samples_over_time(run) + write_samples(recipe, trainer, tokenizer),
            seconds=round(time.monotonic() - started, 1),
            num_training_tokens=recipe.max_steps * step_tokens(recipe, args),
            num_parameters=model.num_parameters(),
            vocab_size=len(tokenizer),
            tokens_per_expert=tuple(map(tuple, trainer.figures.tokens_per_expert)),
        )
        if trainer.is_first:
            log_once(run, {"step": recipe.max_steps, **bits_figures(measured)})
            run.finish(summary)
    return summary
