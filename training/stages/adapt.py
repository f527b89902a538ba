"""Stage 2: continue the pretraining of a model on a domain, replaying general text so that it is not forgotten.

``deepseek-moe adapt`` and the demo call `adapt`. It reports bits per byte on held-out domain and general text, before
and after. Any causal language model works, ours or not.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from deepseek_records.loading import check_vocabulary, load_tokenizer
from deepseek_records.summary import Check, Summary
from deepseek_training.data.corpus import Corpus, check_corpora, describe_corpora, load_corpora
from deepseek_training.data.mixture import Mixture
from deepseek_training.data.packing import MixedDataset, PackedDataset, encode_documents
from deepseek_training.data.recipe_blocks import (
    check_text_training,
    num_blocks,
    pack,
    source_weights,
    with_steps,
)
from deepseek_training.data.separate import SeparateDataset
from deepseek_training.launch.plan import announce, plan_training
from deepseek_training.mtp.load_to_train import load_to_train
from deepseek_training.recipes.pretrain_and_adapt import AdaptRecipe
from deepseek_training.trainer.adaptation_watch import AdaptationWatch, num_held_out
from deepseek_training.trainer.bits_per_byte import BitsPerByte
from deepseek_training.trainer.chosen_experts import prepare_esft
from deepseek_training.trainer.expert_parallel import place_model
from deepseek_training.trainer.held_out import bits_figures, measure_sets, prepare_all, scored_texts, sizes_of
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
    domain, general = _load(recipe)
    corpora = [*domain, *general]
    tokenizer, model = load_tokenizer(recipe.model), load_to_train(recipe, is_dry=is_dry)
    check_text_training(recipe, model, tokenizer)
    check_vocabulary(model, tokenizer)
    check_model(recipe, model)
    args = training_arguments(recipe, Path(output))
    run = open_run(recipe, output, args, command="adapt", overwrite=overwrite, is_dry=is_dry)
    model.set_experts_implementation(recipe.experts_implementation)
    model = with_lora(model, recipe)
    recipe, dataset, parts = _blocks(recipe, domain, general, tokenizer, args)
    held_out = prepare_all(corpora, tokenizer, recipe.eval_bytes)
    esft, sizes = prepare_esft(recipe, model, parts[: len(domain)]), sizes_of(corpora, held_out)
    plan = plan_training("adapt", recipe, args, model, data=sizes, blocks=parts, num_trained=esft.num_trained)
    announce(plan, run.path, is_first=args.process_index == 0, is_dry=is_dry)
    if is_dry:
        return None
    model = place_model(model, recipe.expert_parallel_size, run.path, args)
    set_seed(recipe.seed)
    before = measure_sets(held_out, model, recipe)
    if args.process_index == 0:
        log_once(run, {"step": 0, **bits_figures(before)})
    trainer = StageTrainer(recipe, held_out, dataset=dataset, model=model, args=args, chosen=esft.rows)
    with leaving_a_checkpoint(trainer, run):
        watch = AdaptationWatch.begin(recipe, trainer, tokenizer, domain, held_out=held_out, before=before)
        run_training(trainer, run, lambda: write_samples(recipe, trainer, tokenizer))
        after = measure_sets(held_out, trainer.model_wrapped, recipe)
        trainer.save_result(run, tokenizer)
        summary = Summary(
            stage="adapt",
            base_model=recipe.model,
            results=bits_rows(before, when="before") + bits_rows(after, when="after"),
            data=describe_corpora(corpora, scored_texts(corpora, held_out)),
            checks=_checks(recipe, num_held_out(domain), before, after),
            samples=samples_over_time(run) + write_samples(recipe, trainer, tokenizer),
            seconds=round(time.monotonic() - started, 1),
            num_training_tokens=watch.num_steps * step_tokens(recipe, args),
            replay_share=recipe.replay_share,
            tokens_per_expert=tuple(map(tuple, trainer.figures.tokens_per_expert)),
            details={**esft.details, **watch.details(run)},
        )
        if trainer.is_first:
            log_once(run, {"step": watch.num_steps, **bits_figures(after)})
            summary = run.finish(summary)
    return summary


def _load(recipe: AdaptRecipe) -> tuple[list[Corpus], list[Corpus]]:
    """The sources of the domain and those of general text."""
    domain = load_corpora(recipe.data, "data", column=recipe.data_column, encoding=recipe.encoding)
    column = recipe.general_column
    general = load_corpora(recipe.general_data, "general_data", column=column, encoding=recipe.encoding)
    check_corpora([*domain, *general])
    return domain, general


def _blocks(
    recipe: AdaptRecipe,
    domain: Sequence[Corpus],
    general: Sequence[Corpus],
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
) -> tuple[AdaptRecipe, MixedDataset | Mixture, list[PackedDataset | SeparateDataset]]:
    """The recipe with its steps, what to train on, and the blocks of each source.

    Of two plain sources each block of the domain comes once per pass; lists make a stream by weight.
    """
    parts = [pack(recipe, encode_documents(corpus.train, tokenizer), tokenizer) for corpus in (*domain, *general)]
    own, replayed = parts[: len(domain)], parts[len(domain) :]
    recipe = with_steps(recipe, sum(map(len, own)) / (1 - recipe.replay_share), args)
    if isinstance(recipe.data, str) and isinstance(recipe.general_data, str):
        return recipe, MixedDataset(own[0], replayed[0], recipe.replay_share, seed=recipe.seed), parts
    weights = [one * (1 - recipe.replay_share) for one in source_weights(domain, own)]
    weights += [one * recipe.replay_share for one in source_weights(general, replayed)]
    return recipe, Mixture(parts, weights, num_blocks(recipe, args), seed=recipe.seed), parts


def _checks(
    recipe: AdaptRecipe, num_domain: int, before: dict[str, BitsPerByte], after: dict[str, BitsPerByte]
) -> tuple[Check, ...]:
    """The domain's bits per byte fall enough, and the general ones rise little enough; values are relative changes."""
    bounds = {
        True: (-recipe.min_domain_gain, f"falls by at least {recipe.min_domain_gain:.0%}"),
        False: (recipe.max_general_loss, f"rises by at most {recipe.max_general_loss:.0%}"),
    }
    return tuple(
        Check.compare(
            f"bits per byte on {name} {bounds[number < num_domain][1]}",
            after[name].value / before[name].value - 1,
            "<=",
            bounds[number < num_domain][0],
            metric="bits_per_byte",
            dataset=name,
        )
        for number, name in enumerate(before)
    )
