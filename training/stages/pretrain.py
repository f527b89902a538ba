"""Stage 1: pretrain a DeepSeek-style model from scratch on plain text.

``deepseek-moe pretrain`` and the demo call `pretrain`. It trains a tokenizer if none is given, packs the text, trains
with `transformers.Trainer`, and holds the result against an interpolated bigram on the same tokens. Surprising: the
bigram is a strong one, so a model that has only learned which token follows which fails the check.
"""

import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from deepseek_records.loading import load_tokenizer
from deepseek_records.summary import Check, Result, Sample, Summary
from deepseek_training.data.packing import PackedDataset, encode_documents
from deepseek_training.data.texts import describe_data, load_texts
from deepseek_training.data.tokenizer import train_tokenizer
from deepseek_training.recipes.pretrain_and_adapt import PretrainRecipe, TrainerSettings
from deepseek_training.trainer.bigram import BigramModel
from deepseek_training.trainer.bits_per_byte import BitsPerByte, measure_bigram
from deepseek_training.trainer.engine import building_as_configured
from deepseek_training.trainer.expert_parallel import split_experts
from deepseek_training.trainer.run_callbacks import log_closing_line
from deepseek_training.trainer.stage_trainer import HeldOut, StageTrainer, open_run, train_stage
from modeling_deepseek import DeepseekConfig

__all__ = ["PretrainRecipe", "pretrain"]


def pretrain(recipe: PretrainRecipe, output: str | Path, *, overwrite: bool = False) -> Summary:
    """Train a model from scratch and return the summary.

    Args:
        recipe: The settings.
        output: The run folder; an unfinished run with equal settings goes on from its last complete checkpoint.
        overwrite: Delete whatever run the folder holds.

    Raises:
        FileExistsError: The folder holds another run.
        FileNotFoundError: A data set or tokenizer is missing.
        ValueError: A setting or a data set cannot be used.
    """
    started = time.monotonic()
    texts = load_texts(recipe.data, "train", column=recipe.data_column)
    held_out_texts = load_texts(recipe.data, "validation", column=recipe.data_column)
    model_config(recipe, {"vocab_size": recipe.vocab_size})  # a bad setting leaves no run folder behind
    run, args = open_run(recipe, output, command="pretrain", overwrite=overwrite)
    tokenizer = prepare_tokenizer(recipe, texts)
    with building_as_configured(args):
        model = build_model(recipe, tokenizer)
    if recipe.expert_parallel_size > 1:
        model = split_experts(model, recipe.expert_parallel_size, run.path, args)
    documents = encode_documents(texts, tokenizer)
    dataset = PackedDataset(documents, recipe.sequence_length, seed=recipe.seed)
    held_out = HeldOut.prepare(data_name(recipe.data), held_out_texts, tokenizer, recipe.eval_bytes)
    trainer = train_stage(recipe, run, args, model, dataset, [held_out])
    measured = held_out.measure(trainer.model_wrapped, recipe)
    trainer.save_result(run, tokenizer)
    bigram = measure_bigram(
        BigramModel(documents, len(tokenizer)),
        held_out.documents,
        held_out.num_bytes,
        sequence_length=recipe.sequence_length,
    )
    summary = Summary(
        stage="pretrain",
        results=(result_row(held_out.name, measured, baseline=bigram.value, baseline_name="interpolated bigram"),),
        data=(
            describe_data(recipe.data, "train", texts, "training"),
            describe_data(recipe.data, "validation", held_out.texts, "evaluation"),
        ),
        checks=(bigram_check(held_out.name, measured, bigram),) if recipe.check_bigram else (),
        samples=write_samples(recipe, trainer, tokenizer),
        seconds=round(time.monotonic() - started, 1),
        num_training_tokens=recipe.max_steps * step_tokens(recipe, args),
        num_parameters=model.num_parameters(),
        vocab_size=len(tokenizer),
        tokens_per_expert=tuple(map(tuple, trainer.figures.tokens_per_expert)),
    )
    if trainer.is_first:
        log_closing_line(run, {"step": recipe.max_steps, f"eval_{held_out.name}_bits_per_byte": measured.value})
        run.finish(summary)
    return summary


def prepare_tokenizer(recipe: PretrainRecipe, texts: list[str]) -> PreTrainedTokenizerBase:
    """Return the tokenizer the recipe names, or one trained on its data.

    Training it takes seconds and gives the same result each time, so a resumed run trains it anew.

    Args:
        recipe: The settings.
        texts: The training texts, which a new tokenizer learns from unless `tokenizer_data` names others.
    """
    if recipe.tokenizer is not None:
        return load_tokenizer(recipe.tokenizer)
    corpora = [load_texts(name, "train") for name in recipe.tokenizer_data] or [texts]
    return train_tokenizer(
        (text for corpus in corpora for text in corpus), recipe.vocab_size, model_max_length=recipe.sequence_length
    )


def build_model(recipe: PretrainRecipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return a new model of the recipe's preset with the tokenizer's vocabulary, initialised from the seed.

    Args:
        recipe: The settings.
        tokenizer: Its size and special tokens go into the configuration.
    """
    vocabulary = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = model_config(recipe, vocabulary)
    set_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(config)
    model.set_experts_implementation(recipe.experts_implementation)
    return model


def model_config(recipe: PretrainRecipe, vocabulary: dict[str, Any]) -> DeepseekConfig:
    """Return the configuration of the recipe's model.

    Args:
        recipe: The settings.
        vocabulary: Settings that the tokenizer decides; the recipe's own win.

    Raises:
        ValueError: A setting of the model is refused, or the blocks are longer than its context.
    """
    config = DeepseekConfig.from_preset(recipe.preset, **{**vocabulary, **recipe.model})
    check_context(recipe, config)
    return config


def check_context(recipe: TrainerSettings, config: Any) -> None:
    """Raise a one-line ValueError if the blocks do not fit the model's context."""
    if recipe.sequence_length > config.max_position_embeddings:
        raise ValueError(
            f"sequence_length={recipe.sequence_length} must be at most the model's context "
            f"(max_position_embeddings={config.max_position_embeddings})"
        )


def data_name(name_or_path: str) -> str:
    """Return a data set's name as figures carry it: an embedded name, or the last part of a path or Hub id."""
    return Path(name_or_path).name.split(".")[0]


def step_tokens(recipe: TrainerSettings, args: TrainingArguments) -> int:
    """Return the tokens of one optimizer step over all processes."""
    return recipe.sequence_length * recipe.batch_size * recipe.gradient_accumulation_steps * args.world_size


def result_row(name: str, measured: BitsPerByte, **extra: Any) -> Result:
    """Return the summary's line on a measured held-out set.

    Args:
        name: The set.
        measured: Its bits per byte.
        **extra: Further fields, for example ``when`` or ``baseline``.
    """
    return Result(
        metric="bits_per_byte",
        dataset=name,
        split="validation",
        value=measured.value,
        stderr=measured.stderr,
        n=measured.num_windows,
        num_tokens=measured.num_tokens,
        num_bytes=measured.num_bytes,
        **extra,
    )


def bigram_check(name: str, measured: BitsPerByte, bigram: BitsPerByte) -> Check:
    """Return the check that the model beats the bigram."""
    what = "bits per byte below the interpolated bigram's"
    return Check.compare(what, measured.value, "<", bigram.value, metric="bits_per_byte", dataset=name)


def write_samples(
    recipe: TrainerSettings, trainer: StageTrainer, tokenizer: PreTrainedTokenizerBase
) -> tuple[Sample, ...]:
    """Return what the model makes of the recipe's prompts, sampled at temperature 0.8 from the recipe's seed.

    A model sharded over processes writes none: load it from the run folder for that.
    """
    if trainer.is_sharded:
        return ()
    model = trainer.model
    set_seed(recipe.seed)
    model.eval()
    samples = []
    for prompt in recipe.sample_prompts:
        inputs = tokenizer(tokenizer.bos_token + prompt, return_tensors="pt").to(model.device)
        with torch.no_grad():
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=recipe.sample_tokens,
                do_sample=True,
                temperature=0.8,
            )
        completion = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        samples.append(Sample(prompt=prompt, completion=completion))
    return tuple(samples)
