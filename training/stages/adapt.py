"""Stage 2: continue the pretraining of a model on a domain, replaying general text so that it is not forgotten.

``deepseek-moe adapt`` and the demo call `adapt`. It reports bits per byte on held-out domain and general text, before
and after. Any causal language model works, ours or not.
"""

import time
from pathlib import Path

from transformers import set_seed

from deepseek_records.loading import load_model, load_tokenizer
from deepseek_records.run_folder import METRICS_FILE
from deepseek_records.summary import Check, DataUse, Result, Summary, When
from deepseek_training.data.packing import MixedDataset, PackedDataset, encode_documents
from deepseek_training.data.texts import describe_data, load_texts
from deepseek_training.recipes.pretrain_and_adapt import AdaptRecipe
from deepseek_training.stages.pretrain import (
    check_context,
    data_name,
    result_row,
    step_tokens,
    write_samples,
)
from deepseek_training.trainer.bits_per_byte import BitsPerByte
from deepseek_training.trainer.expert_parallel import split_experts
from deepseek_training.trainer.run_callbacks import log_closing_line
from deepseek_training.trainer.stage_trainer import HeldOut, open_run, train_stage

__all__ = ["AdaptRecipe", "adapt"]


def adapt(recipe: AdaptRecipe, output: str | Path, *, overwrite: bool = False) -> Summary:
    """Continue a model on a domain and return the summary.

    Args:
        recipe: The settings.
        output: The run folder; an unfinished run with equal settings goes on from its last complete checkpoint.
        overwrite: Delete whatever run the folder holds.

    Raises:
        FileExistsError: The folder holds another run.
        FileNotFoundError: The model or a data set is missing.
        ValueError: A setting, the model or a data set cannot be used.
    """
    started = time.monotonic()
    corpora = _load_corpora(recipe)
    tokenizer = load_tokenizer(recipe.model)
    model = load_model(recipe.model)
    check_context(recipe, model.config)
    run, args = open_run(recipe, output, command="adapt", overwrite=overwrite)
    model.set_experts_implementation(recipe.experts_implementation)
    if recipe.expert_parallel_size > 1:
        model = split_experts(model, recipe.expert_parallel_size, run.path, args)
    packed = [
        PackedDataset(encode_documents(train, tokenizer), recipe.sequence_length, seed=recipe.seed)
        for train, _ in corpora.values()
    ]
    dataset = MixedDataset(*packed, recipe.replay_share, seed=recipe.seed)
    held_out = [
        HeldOut.prepare(data_name(name), texts, tokenizer, recipe.eval_bytes) for name, (_, texts) in corpora.items()
    ]
    set_seed(recipe.seed)
    if recipe.expert_parallel_size == 1:  # a split model is where it belongs
        model = model.to(args.device)
    before = [one.measure(model, recipe) for one in held_out]
    if args.process_index == 0 and not (run.path / METRICS_FILE).exists():
        run.log({"step": 0, **_figures(held_out, before)})
    trainer = train_stage(recipe, run, args, model, dataset, held_out)
    after = [one.measure(trainer.model_wrapped, recipe) for one in held_out]
    trainer.save_result(run, tokenizer)
    summary = Summary(
        stage="adapt",
        base_model=recipe.model,
        results=_results(held_out, before, "before") + _results(held_out, after, "after"),
        data=_describe(recipe, corpora, held_out),
        checks=_checks(recipe, held_out, before, after),
        samples=write_samples(recipe, trainer, tokenizer),
        seconds=round(time.monotonic() - started, 1),
        num_training_tokens=recipe.max_steps * step_tokens(recipe, args),
        replay_share=recipe.replay_share,
        tokens_per_expert=tuple(map(tuple, trainer.figures.tokens_per_expert)),
    )
    if trainer.is_first:
        log_closing_line(run, {"step": recipe.max_steps, **_figures(held_out, after)})
        run.finish(summary)
    return summary


def _load_corpora(recipe: AdaptRecipe) -> dict[str, tuple[list[str], list[str]]]:
    """Training and held-out texts of the domain, then of the general text."""
    named = ((recipe.data, recipe.data_column), (recipe.general_data, recipe.general_column))
    return {
        name: (load_texts(name, "train", column=column), load_texts(name, "validation", column=column))
        for name, column in named
    }


def _figures(held_out: list[HeldOut], measured: list[BitsPerByte]) -> dict[str, float]:
    return {f"eval_{one.name}_bits_per_byte": value.value for one, value in zip(held_out, measured, strict=True)}


def _results(held_out: list[HeldOut], measured: list[BitsPerByte], when: When) -> tuple[Result, ...]:
    return tuple(result_row(one.name, value, when=when) for one, value in zip(held_out, measured, strict=True))


def _describe(
    recipe: AdaptRecipe, corpora: dict[str, tuple[list[str], list[str]]], held_out: list[HeldOut]
) -> tuple[DataUse, ...]:
    rows = [describe_data(name, "train", train, "training") for name, (train, _) in corpora.items()]
    for name, one in zip(corpora, held_out, strict=True):
        rows.append(describe_data(name, "validation", one.texts, "evaluation"))
    return tuple(rows)


def _checks(
    recipe: AdaptRecipe, held_out: list[HeldOut], before: list[BitsPerByte], after: list[BitsPerByte]
) -> tuple[Check, ...]:
    """The domain's bits per byte fall enough, and the general ones rise little enough; values are relative changes."""
    domain, general = (new.value / old.value - 1 for old, new in zip(before, after, strict=True))
    bounds = (
        (domain, -recipe.min_domain_gain, f"falls by at least {recipe.min_domain_gain:.0%}"),
        (general, recipe.max_general_loss, f"rises by at most {recipe.max_general_loss:.0%}"),
    )
    return tuple(
        Check.compare(
            f"bits per byte on {one.name} {what}", change, "<=", bound, metric="bits_per_byte", dataset=one.name
        )
        for one, (change, bound, what) in zip(held_out, bounds, strict=True)
    )
