"""The multimodal stage: a language model learns to see and hear, and keeps what it can read and write.

``deepseek-moe multimodal`` calls `multimodal`. It joins a model with a vision encoder, an audio encoder or both,
trains in two stages (first without the language model) and replays text. Measured on held-out data: bits per byte of
answers, also with images and sounds exchanged, and of text before and after. ``deepseek-moe evaluate`` scores the
answers.

Reference: Lu et al., 2024, "DeepSeek-VL", arXiv 2403.05525: adaptor first, then joint training with text.
"""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from deepseek_records.loading import check_vocabulary, load_model, load_tokenizer
from deepseek_records.media.item import MediaItem
from deepseek_records.media.licenses import LICENSES
from deepseek_records.media.reading import check_media, load_items
from deepseek_records.summary import Check, DataUse, Result, Sample, Summary
from deepseek_training.data.corpus import Corpus, check_corpora, describe_corpora, load_corpora
from deepseek_training.data.packing import PackedDataset, encode_documents
from deepseek_training.data.recipe_blocks import source_weights
from deepseek_training.data.texts import data_name
from deepseek_training.launch.plan import announce, plan_training
from deepseek_training.recipes.multimodal import NONE, MultimodalRecipe
from deepseek_training.see_and_hear.encoders import load_audio, load_vision
from deepseek_training.see_and_hear.held_out import HeldOutQuestions
from deepseek_training.see_and_hear.join import Joined, join
from deepseek_training.see_and_hear.lessons import Lessons, encode_items
from deepseek_training.see_and_hear.trainer import MultimodalTrainer
from deepseek_training.trainer.bits_per_byte import BitsPerByte
from deepseek_training.trainer.held_out import (
    HeldOut,
    HeldOutSet,
    bits_figures,
    measure_sets,
    prepare_all,
    scored_texts,
    sizes_of,
)
from deepseek_training.trainer.interruption import leaving_a_checkpoint
from deepseek_training.trainer.new_model import check_model
from deepseek_training.trainer.outcome import bits_rows
from deepseek_training.trainer.run_callbacks import log_once
from deepseek_training.trainer.run_start import open_run, training_arguments
from deepseek_training.trainer.sample_log import samples_over_time
from deepseek_training.trainer.stage_trainer import run_training
from modeling_deepseek.modeling_multimodal import DeepseekMultimodalForConditionalGeneration
from modeling_deepseek.processing_multimodal import MultimodalProcessor

__all__ = ["MultimodalRecipe", "multimodal"]


def multimodal(
    recipe: MultimodalRecipe, output: str | Path, *, overwrite: bool = False, is_dry: bool = False
) -> Summary | None:
    """Teach a model to see and hear, and return the summary.

    Args:
        recipe: The settings.
        output: The run folder; an unfinished run with equal settings goes on from its last complete checkpoint.
        overwrite: Delete whatever run the folder holds.
        is_dry: Print what would happen, what it needs and how long it takes, write nothing, and return None.

    Raises:
        FileExistsError: The folder holds another run.
        FileNotFoundError: The model, an encoder or a data set is missing.
        ValueError: A setting, the model, an encoder or a data set cannot be used.
    """
    started = time.monotonic()
    made = _prepare(recipe, output, is_dry=is_dry)
    model, args, asked, texts = made.model, made.args, made.asked, made.texts
    run = open_run(recipe, output, args, command="multimodal", overwrite=overwrite, is_dry=is_dry)
    plan = plan_training("multimodal", recipe, args, model, data=made.sizes, num_blocks=len(made.lessons.examples))
    announce(plan, run.path, is_first=args.process_index == 0, is_dry=is_dry)
    if is_dry:
        return None
    if args.process_index == 0:
        log_once(run, {"step": 0, **bits_figures(made.before)})
    held_out: list[HeldOutSet] = [*asked, *texts]
    lessons, processor = made.lessons, made.processor
    trainer = MultimodalTrainer(recipe, held_out, lessons=lessons, processor=processor, model=model, args=args)
    with leaving_a_checkpoint(trainer, run):
        run_training(trainer, run, lambda: _samples(asked, trainer, recipe))
        after, answers = (measure_sets(sets, trainer.model_wrapped, recipe) for sets in (texts, asked))
        exchanged = {one.name: one.shuffled().measure(trainer.model_wrapped, recipe) for one in asked}
        trainer.save_result(run, processor)
        summary = Summary(
            stage="multimodal",
            base_model=recipe.model,
            results=_results(made.before, after, answers, exchanged),
            data=made.describe(recipe),
            checks=_checks(recipe, made.before, after, answers, exchanged),
            samples=samples_over_time(run) + _samples(asked, trainer, recipe),
            seconds=round(time.monotonic() - started, 1),
            replay_share=recipe.replay_share,
            tokens_per_expert=tuple(map(tuple, trainer.figures.tokens_per_expert)),
        )
        if trainer.is_first:
            log_once(run, {"step": recipe.max_steps, **bits_figures({**after, **answers})})
            summary = run.finish(summary)
    return summary


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """What a training needs: the joined model, what it learns from, and what it is measured on."""

    model: DeepseekMultimodalForConditionalGeneration
    processor: MultimodalProcessor
    args: TrainingArguments
    lessons: Lessons
    train: dict[str, list[MediaItem]]
    asked: list[HeldOutQuestions]
    corpora: list[Corpus]
    texts: list[HeldOut]
    before: dict[str, BitsPerByte]

    @property
    def sizes(self) -> list[tuple[str, int, int]]:
        """Name, rows to train on and held-out rows of each source."""
        questions = [(one.name, len(self.train[one.name]), len(one.items)) for one in self.asked]
        return questions + sizes_of(self.corpora, self.texts)

    def describe(self, recipe: MultimodalRecipe) -> tuple[DataUse, ...]:
        """The summary's lines on all data."""
        of_text = describe_corpora(self.corpora, scored_texts(self.corpora, self.texts))
        return _describe(recipe.data, self.train, self.asked) + of_text


def _prepare(recipe: MultimodalRecipe, output: str | Path, *, is_dry: bool) -> _Prepared:
    """Load everything, look at every image and sound, measure the text before, and join the parts."""
    train, validation = _load_questions(recipe)
    corpora = load_corpora(recipe.general_data, "general_data", column=recipe.general_column, encoding="utf-8")
    check_corpora(corpora)
    tokenizer, causal = load_tokenizer(recipe.model), load_model(recipe.model)
    check_vocabulary(causal, tokenizer)
    check_model(recipe, causal)
    args = training_arguments(recipe, Path(output))
    texts = prepare_all(corpora, tokenizer, recipe.eval_bytes)
    before = {} if is_dry else measure_sets(texts, causal.to(args.device), recipe)
    joined = _join(recipe, causal, tokenizer)
    model, processor = joined.model, joined.processor
    _check_media([*train.values(), *validation.values()], processor)
    lessons = _lessons(recipe, args, processor, list(train.values()), corpora)
    model.set_experts_implementation(recipe.experts_implementation)
    if not recipe.train_encoders:
        model.model.freeze_encoders()
    asked = [HeldOutQuestions(name, items[: recipe.num_eval_items], processor) for name, items in validation.items()]
    return _Prepared(model, processor, args, lessons, train, asked, corpora, texts, before)


def _samples(
    asked: Sequence[HeldOutQuestions], trainer: MultimodalTrainer, recipe: MultimodalRecipe
) -> tuple[Sample, ...]:
    return tuple(one for part in asked for one in part.sample(trainer.model, recipe))


def _load_questions(recipe: MultimodalRecipe) -> tuple[dict[str, list[MediaItem]], dict[str, list[MediaItem]]]:
    """Training and held-out questions by the source's name."""
    names = [data_name(source) for source in recipe.data]
    if len(set(names)) < len(names):
        raise ValueError(f"data: got {', '.join(recipe.data)}, expected sources of different names")
    train, validation = (
        {name: load_items(source, split) for name, source in zip(names, recipe.data, strict=True)}
        for split in ("train", "validation")
    )
    return train, validation


def _join(recipe: MultimodalRecipe, causal: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Joined:
    set_seed(recipe.seed)
    return join(
        causal,
        tokenizer,
        vision=None if recipe.vision_encoder == NONE else load_vision(recipe.vision_encoder, recipe.vision),
        audio=None
        if recipe.audio_encoder == NONE
        else load_audio(recipe.audio_encoder, recipe.audio, recipe.audio_seconds),
        audio_seconds=recipe.audio_seconds,
        vision_layer=recipe.vision_layer,
        vision_strategy=recipe.vision_strategy,
        audio_layer=recipe.audio_layer,
    )


def _check_media(sets: Iterable[Sequence[MediaItem]], processor: MultimodalProcessor) -> None:
    hears, sees = processor.audio_seq_length is not None, processor.image_seq_length is not None
    rate = processor.feature_extractor.sampling_rate if hears else None
    for items in sets:
        check_media(items, rate, processor.audio_seconds, has_eyes=sees)


def _lessons(
    recipe: MultimodalRecipe,
    args: TrainingArguments,
    processor: MultimodalProcessor,
    sources: Sequence[Sequence[MediaItem]],
    corpora: Sequence[Corpus],
) -> Lessons:
    encoded = [encode_documents(corpus.train, processor.tokenizer) for corpus in corpora]
    texts = [PackedDataset(documents, recipe.sequence_length, seed=recipe.seed) for documents in encoded]
    return Lessons(
        [encode_items(items, processor, recipe.sequence_length) for items in sources],
        texts,
        source_weights(corpora, texts),
        num_steps=recipe.max_steps,
        num_first=recipe.frozen_steps,
        rows_per_step=recipe.batch_size * recipe.gradient_accumulation_steps * args.world_size,
        replay_share=recipe.replay_share,
        seed=recipe.seed,
    )


def _results(
    before: dict[str, BitsPerByte],
    after: dict[str, BitsPerByte],
    answers: dict[str, BitsPerByte],
    exchanged: dict[str, BitsPerByte],
) -> tuple[Result, ...]:
    baselines = {f"{name} (answers)": value.value for name, value in exchanged.items()}
    named = {f"{name} (answers)": value for name, value in answers.items()}
    return (
        *bits_rows(before, when="before"),
        *bits_rows(after, when="after"),
        *bits_rows(named, when="after", baselines=baselines, baseline_name="images and sounds exchanged"),
    )


def _checks(
    recipe: MultimodalRecipe,
    before: dict[str, BitsPerByte],
    after: dict[str, BitsPerByte],
    answers: dict[str, BitsPerByte],
    exchanged: dict[str, BitsPerByte],
) -> tuple[Check, ...]:
    """Text is kept, and answers depend on what is seen or heard; values are relative changes."""
    kept = (
        Check.compare(
            f"bits per byte on {name} rises by at most {recipe.max_text_loss:.0%}",
            value.value / before[name].value - 1,
            "<=",
            recipe.max_text_loss,
            metric="bits_per_byte",
            dataset=name,
        )
        for name, value in after.items()
    )
    seen = (
        Check.compare(
            f"answers of {name} take fewer bits than with others' images and sounds",
            value.value / exchanged[name].value - 1,
            "<",
            0.0,
            metric="bits_per_byte",
            dataset=name,
        )
        for name, value in answers.items()
    )
    return (*kept, *seen)


def _describe(
    sources: Sequence[str], train: dict[str, list[MediaItem]], asked: list[HeldOutQuestions]
) -> tuple[DataUse, ...]:
    """The summary's lines on the questions."""
    rows = []
    for source, held_out in zip(sources, asked, strict=True):
        license, origin = LICENSES.get(source, ("not stated", "own data"))
        for split, items in (("train", train[held_out.name]), ("validation", held_out.items)):
            used_for: Literal["training", "evaluation"] = "training" if split == "train" else "evaluation"
            num_bytes = sum(len((item.prompt + item.answer).encode()) for item in items)
            rows.append(
                DataUse(
                    name=held_out.name,
                    split=split,
                    used_for=used_for,
                    license=license,
                    source=origin,
                    num_rows=len(items),
                    num_bytes=num_bytes,
                    languages=("en",) if source in LICENSES else (),
                )
            )
    return tuple(rows)
