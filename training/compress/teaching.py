"""What stands between the `distill` stage and its trainer: blocks, plan, and a teacher that runs or is cached.

The blocks and their order are the same for every seed, and a run trains on the first of them, as many as its steps
need: so one cache serves several seeds, students and lengths.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from deepseek_records.hashes import hash_model, hash_tokenizer
from deepseek_records.loading import load_tokenizer
from deepseek_records.run_folder import RunFolder
from deepseek_training.compress.calibration import shuffled_blocks
from deepseek_training.compress.teacher_cache import CacheIdentity, block_keys, check_cache, fill_cache
from deepseek_training.data.corpus import Corpus
from deepseek_training.data.packing import encode_documents
from deepseek_training.launch.plan import Plan, describe_size, measure_size, plan_training
from deepseek_training.recipes.distill import DistillRecipe
from deepseek_training.trainer.distill_trainer import TaughtBlocks
from deepseek_training.trainer.expert_parallel import place_model
from deepseek_training.trainer.new_model import check_model


def read_blocks(
    recipe: DistillRecipe, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, args: TrainingArguments
) -> TaughtBlocks:
    """Return the blocks that a run trains on, the same whatever its seed.

    Args:
        recipe: The settings.
        corpus: The text.
        tokenizer: The teacher's.
        args: The trainer's arguments, which know the processes.
    """
    blocks = shuffled_blocks(encode_documents(corpus.train, tokenizer), recipe.sequence_length)
    needed = recipe.max_steps * recipe.batch_size * recipe.gradient_accumulation_steps * args.world_size
    return TaughtBlocks(blocks[:needed])


def check_pair(
    recipe: DistillRecipe,
    dataset: TaughtBlocks,
    *,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Refuse what cannot be trained, a pair of different tokens and another pair's cache, before anything is written.

    Args:
        recipe: The settings.
        dataset: The blocks.
        teacher: The model.
        student: The model.
        tokenizer: The teacher's.

    Raises:
        ValueError: In one line, why.
        FileExistsError: The cache's folder holds something else.
    """
    check_model(recipe, student)
    sizes = [model.config.get_text_config().vocab_size for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"student: got a vocabulary of {sizes[0]}, expected the teacher's {sizes[1]}")
    if recipe.start not in ("shrink", "fresh"):
        other = load_tokenizer(recipe.start)
        if other.get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"student: got {recipe.start} with another tokenizer, expected the teacher's")
    if recipe.cache is None:
        return
    if recipe.cache_top_k > sizes[1]:
        raise ValueError(f"cache_top_k: got {recipe.cache_top_k}, expected at most the vocabulary of {sizes[1]}")
    if not any(parameter.is_meta for parameter in teacher.parameters()):
        check_cache(recipe.cache, _identity(recipe, teacher, tokenizer), block_keys(dataset.blocks))


def plan_distillation(
    recipe: DistillRecipe,
    args: TrainingArguments,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    *,
    data: Sequence[tuple[str, int, int]],
    num_blocks: int,
) -> Plan:
    """Return the plan of the stage: that of the student's training, and what the teacher adds.

    Args:
        recipe: The settings.
        args: The trainer's arguments.
        student: The model that is trained, also on the meta device.
        teacher: The model that is asked, likewise.
        data: As for `plan_training`.
        num_blocks: Blocks to train on.
    """
    plan = plan_training("distill", recipe, args, student, data=data, num_blocks=num_blocks)
    size = measure_size(teacher)
    start = {"shrink": "cut out of the teacher", "fresh": "new weights"}.get(recipe.start, recipe.start)
    rows = [("student", start), ("teacher", f"{describe_size(size)}, {size.num_bytes / 2**30:.2g} GiB more")]
    loss = f"{recipe.divergence} x {recipe.distill_weight} + cross-entropy x {1 - recipe.distill_weight:g}"
    rows.append(("loss", loss if recipe.distill_weight else "cross-entropy"))
    if recipe.cache is not None:
        positions = num_blocks * (recipe.sequence_length - 1)
        identity = _identity(recipe, teacher, None)
        full = 2 * identity.vocab_size
        rows.append(
            (
                "cache",
                f"{recipe.cache}, {positions * identity.bytes_per_token / 2**20:.3g} MiB, "
                f"{identity.bytes_per_token} bytes a position of {full} in full (fp16)",
            )
        )
    return dataclasses.replace(plan, rows=(plan.rows[0], *rows, *plan.rows[1:]))


def hold_pair(
    run: RunFolder,
    args: TrainingArguments,
    *,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Hold the run to the content of the teacher, its tokenizer and the student's start.

    Args:
        run: The run folder.
        args: The trainer's arguments, which know the processes.
        teacher: The model.
        student: The model before its training.
        tokenizer: The teacher's.

    Raises:
        FileExistsError: The run was begun with another.
    """
    held = {"teacher": hash_model(teacher), "tokenizer": hash_tokenizer(tokenizer), "start": hash_model(student)}
    with args.main_process_first(local=False):
        run.hold_to(**held)


def place_pair(
    recipe: DistillRecipe,
    run: RunFolder,
    args: TrainingArguments,
    *,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
) -> PreTrainedModel:
    """Bring both models where they run, and return the student, split over processes where the recipe says so.

    Args:
        recipe: The settings.
        run: The run folder.
        args: The trainer's arguments, which know the processes.
        teacher: The model; whole in every process.
        student: The model.
    """
    for model in (teacher, student):
        model.to(args.device).set_experts_implementation(recipe.experts_implementation)
    return place_model(student, recipe.expert_parallel_size, run.path, args)


def open_teacher(
    recipe: DistillRecipe,
    args: TrainingArguments,
    dataset: TaughtBlocks,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel | None:
    """Return the teacher where it is asked at every step; else None, after its cache was filled and put to the blocks.

    Args:
        recipe: The settings.
        args: The trainer's arguments, which know processes and device.
        dataset: Gets the cache.
        teacher: The model.
        tokenizer: The teacher's.
    """
    if recipe.distill_weight == 0:
        return None
    if recipe.cache is None:
        return teacher.eval().requires_grad_(False)
    identity = _identity(recipe, teacher, tokenizer)
    with args.main_process_first(local=False):
        dataset.cache = fill_cache(
            Path(recipe.cache),
            identity,
            dataset.blocks,
            teacher.eval(),
            batch_size=recipe.batch_size,
            device=args.device,
        )
    return None


def _identity(
    recipe: DistillRecipe, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> CacheIdentity:
    config: Any = teacher.config.get_text_config()
    return CacheIdentity(
        teacher="" if tokenizer is None else hash_model(teacher),
        tokenizer="" if tokenizer is None else hash_tokenizer(tokenizer),
        top_k=recipe.cache_top_k,
        temperature=recipe.temperature,
        bf16=recipe.bf16,
        vocab_size=config.vocab_size,
        sequence_length=recipe.sequence_length,
    )
