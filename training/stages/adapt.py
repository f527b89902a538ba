"""Stage 2: continue the pretraining of a model on a domain, replaying general text so that it is not forgotten.

``deepseek-moe adapt`` and the demo call `adapt`. It reports bits per byte on held-out domain and general text, before
and after. Any causal language model works, ours or not.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase, set_seed

from deepseek_records.loading import check_vocabulary, load_tokenizer
from deepseek_records.summary import Check, Summary
from deepseek_training.data.packing import MixedDataset, PackedDataset, encode_documents
from deepseek_training.data.texts import Corpus, describe_corpora, distinct_names
from deepseek_training.launch.plan import announce, plan_training
from deepseek_training.mtp.load_to_train import load_to_train
from deepseek_training.recipes.pretrain_and_adapt import AdaptRecipe
from deepseek_training.trainer.bits_per_byte import BitsPerByte
from deepseek_training.trainer.expert_parallel import split_experts
from deepseek_training.trainer.held_out import HeldOut, bits_figures, measure_sets
from deepseek_training.trainer.interruption import leaving_a_checkpoint
from deepseek_training.trainer.lora import with_lora
from deepseek_training.trainer.new_model import check_model
from deepseek_training.trainer.outcome import bits_rows, step_tokens, write_samples
from deepseek_training.trainer.run_callbacks import log_once
from deepseek_training.trainer.run_start import open_run, training_arguments
from deepseek_training.trainer.sample_log import samples_over_time
from deepseek_training.trainer.stage_trainer import StageTrainer, run_training

__all__ = ["AdaptRecipe", "adapt"]


def adapt(recipe: AdaptRecipe, output: str | Path, *, overwrite: bool = False, is_dry: bool = False) -> Summary | None:
    """Continue a model on a domain and return the summary.

    Args:
        recipe: The settings.
        output: The run folder; an unfinished run with equal settings goes on from its last complete checkpoint.
        overwrite: Delete whatever run the folder holds.
        is_dry: Print what would happen, what it needs and how long it takes, write nothing, and return None.

    Raises:
        FileExistsError: The folder holds another run.
        FileNotFoundError: The model or a data set is missing.
        ValueError: A setting, the model or a data set cannot be used.
    """
    started = time.monotonic()
    corpora = (Corpus.load(recipe.data, recipe.data_column), Corpus.load(recipe.general_data, recipe.general_column))
    tokenizer, model = load_tokenizer(recipe.model), load_to_train(recipe, is_dry=is_dry)
    check_vocabulary(model, tokenizer)
    check_model(recipe, model)
    args = training_arguments(recipe, Path(output))
    run = open_run(recipe, output, args, command="adapt", overwrite=overwrite, is_dry=is_dry)
    model.set_experts_implementation(recipe.experts_implementation)
    model = with_lora(model, recipe)
    dataset, held_out = _encode(recipe, corpora, tokenizer)
    sizes = [(one.name, len(corpus.train), len(one.texts)) for one, corpus in zip(held_out, corpora, strict=True)]
    plan = plan_training("adapt", recipe, args, model, data=sizes, num_blocks=len(dataset))
    announce(plan, run.path, is_first=args.process_index == 0, is_dry=is_dry)
    if is_dry:
        return None
    if recipe.expert_parallel_size > 1:
        model = split_experts(model, recipe.expert_parallel_size, run.path, args)
    set_seed(recipe.seed)
    if recipe.expert_parallel_size == 1:  # a split model is where it belongs
        model = model.to(args.device)
    before = measure_sets(held_out, model, recipe)
    if args.process_index == 0:
        log_once(run, {"step": 0, **bits_figures(before)})
    trainer = StageTrainer(recipe, held_out, dataset=dataset, model=model, args=args)
    with leaving_a_checkpoint(trainer, run):
        run_training(trainer, run, lambda: write_samples(recipe, trainer, tokenizer))
        after = measure_sets(held_out, trainer.model_wrapped, recipe)
        trainer.save_result(run, tokenizer)
        summary = Summary(
            stage="adapt",
            base_model=recipe.model,
            results=bits_rows(before, when="before") + bits_rows(after, when="after"),
            data=describe_corpora(corpora, [one.texts for one in held_out]),
            checks=_checks(recipe, before, after),
            samples=samples_over_time(run) + write_samples(recipe, trainer, tokenizer),
            seconds=round(time.monotonic() - started, 1),
            num_training_tokens=recipe.max_steps * step_tokens(recipe, args),
            replay_share=recipe.replay_share,
            tokens_per_expert=tuple(map(tuple, trainer.figures.tokens_per_expert)),
        )
        if trainer.is_first:
            log_once(run, {"step": recipe.max_steps, **bits_figures(after)})
            run.finish(summary)
    return summary


def _encode(
    recipe: AdaptRecipe, corpora: Sequence[Corpus], tokenizer: PreTrainedTokenizerBase
) -> tuple[MixedDataset, list[HeldOut]]:
    """The blocks to train on, and the held-out set of each corpus."""
    packed = [
        PackedDataset(encode_documents(corpus.train, tokenizer), recipe.sequence_length, seed=recipe.seed)
        for corpus in corpora
    ]
    names = distinct_names(*(corpus.source for corpus in corpora))
    held_out = [
        HeldOut.prepare(name, corpus.validation, tokenizer, recipe.eval_bytes)
        for name, corpus in zip(names, corpora, strict=True)
    ]
    return MixedDataset(*packed, recipe.replay_share, seed=recipe.seed), held_out


def _checks(recipe: AdaptRecipe, before: dict[str, BitsPerByte], after: dict[str, BitsPerByte]) -> tuple[Check, ...]:
    """The domain's bits per byte fall enough, and the general ones rise little enough; values are relative changes."""
    bounds = (
        (-recipe.min_domain_gain, f"falls by at least {recipe.min_domain_gain:.0%}"),
        (recipe.max_general_loss, f"rises by at most {recipe.max_general_loss:.0%}"),
    )
    return tuple(
        Check.compare(
            f"bits per byte on {name} {what}",
            after[name].value / before[name].value - 1,
            "<=",
            bound,
            metric="bits_per_byte",
            dataset=name,
        )
        for name, (bound, what) in zip(before, bounds, strict=True)
    )
