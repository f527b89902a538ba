"""Supervised fine-tuning on conversations, the optional stage between `adapt` and `align`, by TRL's `SFTTrainer`.

``deepseek-moe sft`` calls `sft`. A conversation is put by the tokenizer's chat template, which is saved with it, and
only the answer's tokens count in the loss. Measured on held-out conversations before and after: bits per byte of the
answer, given the question. Surprising: ``align`` speaks to the model by the same template with ``prompt_template:
null``; any other template asks it in a way that it was not taught.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer

from deepseek_records.loading import load_model, load_tokenizer
from deepseek_records.run_folder import METRICS_FILE, RunFolder
from deepseek_records.summary import Check, Sample, Summary
from deepseek_training.data.texts import describe_data, load_texts, read_rows
from deepseek_training.recipes.sft import SftRecipe
from deepseek_training.stages.pretrain import check_context, data_name, result_row
from deepseek_training.trainer.bits_per_byte import BitsPerByte
from deepseek_training.trainer.run_callbacks import log_closing_line
from deepseek_training.trainer.stage_trainer import StageTraining, open_run, run_training

__all__ = ["SftRecipe", "sft"]
NUM_SAMPLES = 4


class SftStageTrainer(StageTraining, SFTTrainer):
    """TRL's trainer with the stage's way back from a checkpoint and its measure of held-out conversations."""

    recipe: SftRecipe
    held_out: Sequence[dict[str, str]]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the held-out conversations, log and return ``eval_<name>_bits_per_byte``."""
        measured = measure_answers(self.model, self.processing_class, self.held_out, self.recipe)
        metrics = {f"eval_{data_name(self.recipe.data)}_bits_per_byte": measured.value}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def sft(recipe: SftRecipe, output: str | Path, *, overwrite: bool = False) -> Summary:
    """Teach a model to answer and return the summary.

    Args:
        recipe: The settings.
        output: The run folder; an unfinished run with equal settings goes on from its last complete checkpoint.
        overwrite: Delete whatever run the folder holds.

    Raises:
        FileExistsError: The folder holds another run.
        FileNotFoundError: The model, the template or the data are missing.
        ValueError: A setting, the tokenizer or the data cannot be used.
    """
    started = time.monotonic()
    train, held_out = (load_conversations(recipe, split) for split in ("train", "validation"))
    held_out = held_out[: recipe.num_eval_conversations]
    tokenizer = load_tokenizer(recipe.model)
    tokenizer.chat_template = read_template(recipe, tokenizer)
    model = load_model(recipe.model)
    check_context(recipe, model.config)
    run, args = open_run(recipe, output, command="sft", overwrite=overwrite)
    model.set_experts_implementation(recipe.experts_implementation)
    set_seed(recipe.seed)
    before = measure_answers(model.to(args.device), tokenizer, held_out, recipe)
    name = data_name(recipe.data)
    if args.process_index == 0 and not (run.path / METRICS_FILE).exists():
        run.log({"step": 0, f"eval_{name}_bits_per_byte": before.value})
    trainer = train_on(recipe, run, args, model, tokenizer, train, held_out)
    after = measure_answers(trainer.model, tokenizer, held_out, recipe)
    trainer.save_result(run, tokenizer)
    samples = write_answers(trainer.model, tokenizer, held_out, recipe)
    summary = summarize(recipe, {"train": train, "validation": held_out}, (before, after), samples)
    summary = dataclasses.replace(
        summary,
        tokens_per_expert=tuple(map(tuple, trainer.figures.tokens_per_expert)),
        seconds=round(time.monotonic() - started, 1),
    )
    if trainer.is_first:
        log_closing_line(run, {"step": recipe.max_steps, f"eval_{name}_bits_per_byte": after.value})
        run.finish(summary)
    return summary


def load_conversations(recipe: SftRecipe, split: str) -> list[dict[str, str]]:
    """Return the rows of one split with ``prompt`` and ``answer``.

    Raises:
        ValueError: A column is missing, or no row is left.
    """
    texts = set(load_texts(recipe.data, split, column=recipe.prompt_column))
    rows = []
    for row in read_rows(recipe.data, split, column=recipe.prompt_column):
        if row["text"] not in texts or (recipe.sources and row.get("source") not in recipe.sources):
            continue
        if not isinstance(row.get(recipe.answer_column), str):
            raise ValueError(f"answer_column={recipe.answer_column!r}: {recipe.data} has a row without such a text")
        rows.append({"prompt": row["text"], "answer": row[recipe.answer_column]})
    if not rows:
        raise ValueError(f"sources={recipe.sources}: {recipe.data} has no {split} row from them")
    return rows


def read_template(recipe: SftRecipe, tokenizer: Any) -> str:
    """Return the recipe's chat template, or the tokenizer's.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Neither the recipe nor the tokenizer has one.
    """
    if recipe.chat_template is not None:
        if not Path(recipe.chat_template).is_file():
            raise FileNotFoundError(f"chat_template: no file {recipe.chat_template}")
        tokenizer.chat_template = Path(recipe.chat_template).read_text(encoding="utf-8")
    if tokenizer.chat_template is None:
        raise ValueError("chat_template=null: the tokenizer has none; name a file with one")
    return tokenizer.chat_template


def train_on(
    recipe: SftRecipe,
    run: RunFolder,
    args: TrainingArguments,
    model: Any,
    tokenizer: Any,
    train: list[dict[str, str]],
    held_out: list[dict[str, str]],
) -> SftStageTrainer:
    """Train the model in place, from the run's last complete checkpoint if it has one, and return the trainer."""
    import datasets

    datasets.disable_progress_bars()  # four bars of a second each before ours
    messages = [to_messages(row) for row in train]
    trainer = SftStageTrainer(
        model=model,
        args=SFTConfig(
            **{key: value for key, value in args.to_dict().items() if not key.endswith("_token")},
            max_length=recipe.sequence_length,
            completion_only_loss=True,
            router_aux_loss_coef=0.0,  # our layers balance by themselves; TRL's pooled loss would come on top
        ),
        train_dataset=datasets.Dataset.from_list(messages),
        eval_dataset=datasets.Dataset.from_list(messages[:1])
        if recipe.eval_steps
        else None,  # `evaluate` reads its own
        processing_class=tokenizer,
    )
    trainer.recipe, trainer.held_out = recipe, held_out
    run_training(trainer, run)
    return trainer


def to_messages(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """Return a conversation as TRL reads it: the loss is taken on the completion only."""
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["answer"]}],
    }


@torch.no_grad()
def measure_answers(model: Any, tokenizer: Any, rows: Sequence[dict[str, str]], recipe: SftRecipe) -> BitsPerByte:
    """Return the bits per byte of the held-out answers given their questions, the end token included.

    Args:
        model: The model.
        tokenizer: With its chat template.
        rows: Conversations; what does not fit `sequence_length` is cut off.
        recipe: Names batch size and length.
    """
    was_training = model.training
    model.eval()
    nats, counts, num_bytes = [], [], 0
    for start in range(0, len(rows), recipe.batch_size):
        part = rows[start : start + recipe.batch_size]
        encoded = [_encode(row, tokenizer, recipe.sequence_length) for row in part]
        batch = tokenizer.pad({"input_ids": [ids for ids, _ in encoded]}, padding_side="right", return_tensors="pt")
        batch = {name: value.to(model.device) for name, value in batch.items()}
        logps = model(**batch).logits[:, :-1].float().log_softmax(-1)
        of_tokens = logps.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        for row, (ids, first) in zip(range(len(part)), encoded, strict=True):
            nats.append(-float(of_tokens[row, first - 1 : len(ids) - 1].sum()))
            counts.append(len(ids) - first)
            num_bytes += len(tokenizer.decode(ids[first:], skip_special_tokens=True).encode())
    model.train(was_training)
    return BitsPerByte.from_windows(nats, counts, num_bytes)


def _encode(row: dict[str, str], tokenizer: Any, length: int) -> tuple[list[int], int]:
    """A conversation's tokens and where its answer begins."""
    both = to_messages(row)
    asked = tokenizer.apply_chat_template(both["prompt"], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(both["prompt"] + both["completion"], return_dict=False)[:length]
    if len(asked) >= len(whole):
        raise ValueError(
            f"sequence_length={length}: the question of {len(asked)} tokens ({row['prompt'][:40]!r}...) leaves no "
            "room for an answer"
        )
    return whole, len(asked)


@torch.no_grad()
def write_answers(model: Any, tokenizer: Any, rows: Sequence[dict[str, str]], recipe: SftRecipe) -> tuple[Sample, ...]:
    """Return sampled answers to a few held-out questions."""
    set_seed(recipe.seed)
    model.eval()
    samples = []
    for row in rows[:: max(1, len(rows) // NUM_SAMPLES)][:NUM_SAMPLES]:
        messages = to_messages(row)["prompt"]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=recipe.sample_tokens, do_sample=True, temperature=0.8)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        samples.append(Sample(prompt=row["prompt"], completion=answer))
    return tuple(samples)


def summarize(
    recipe: SftRecipe,
    rows: dict[str, list[dict[str, str]]],
    measured: tuple[BitsPerByte, BitsPerByte],
    samples: tuple[Sample, ...],
) -> Summary:
    """Return the summary but for times and loads: bits per byte before and after, data, check and samples."""
    name = data_name(recipe.data)
    change = measured[1].value / measured[0].value - 1
    what = f"bits per byte of held-out answers on {name} fall"
    return Summary(
        stage="sft",
        base_model=recipe.model,
        results=tuple(
            result_row(f"{name} (answers)", value, when=when)
            for when, value in zip(("before", "after"), measured, strict=True)
        ),
        data=tuple(
            describe_data(recipe.data, split, [f"{row['prompt']}{row['answer']}" for row in rows[split]], used_for)
            for split, used_for in (("train", "training"), ("validation", "evaluation"))
        ),
        checks=(Check.compare(what, change, "<", 0.0, metric="bits_per_byte", dataset=name),),
        samples=samples,
    )
