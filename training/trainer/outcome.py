"""What the stages write into their summaries: results, checks, samples, and the names and counts in them."""

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from deepseek_records.document_tokens import start_of_text
from deepseek_records.summary import Result, Sample, When
from deepseek_records.user_text import encode, protect
from deepseek_training.recipes.pretrain_and_adapt import TrainerSettings
from deepseek_training.trainer.bits_per_byte import BitsPerByte
from deepseek_training.trainer.stage_trainer import StageTrainer


def step_tokens(recipe: TrainerSettings, args: TrainingArguments) -> int:
    """Return the tokens of one optimizer step over all processes."""
    return recipe.sequence_length * recipe.batch_size * recipe.gradient_accumulation_steps * args.world_size


def bits_rows(
    measured: dict[str, BitsPerByte],
    *,
    when: When | None = None,
    baselines: dict[str, float] | None = None,
    baseline_name: str | None = None,
) -> tuple[Result, ...]:
    """Return the summary's lines on the bits per byte of held-out sets.

    Args:
        measured: By the set's name.
        when: Before or after the stage's training; None for neither.
        baselines: The same figures of something simpler.
        baseline_name: What that is.
    """
    return tuple(
        Result(
            metric="bits_per_byte",
            dataset=name,
            split="validation",
            value=value.value,
            stderr=value.stderr,
            n=value.num_windows,
            num_tokens=value.num_tokens,
            num_bytes=value.num_bytes,
            when=when,
            higher_is_better=False,
            baseline=(baselines or {}).get(name),
            baseline_name=baseline_name,
        )
        for name, value in measured.items()
    )


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
        ids = [*start_of_text(tokenizer), *encode(protect(prompt, tokenizer), tokenizer)]
        input_ids = torch.tensor([ids], device=model.device)
        with torch.no_grad():
            output = model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=recipe.sample_tokens,
                do_sample=True,
                temperature=0.8,
            )
        completion = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        samples.append(Sample(prompt=prompt, completion=completion))
    return tuple(samples)
