"""The start-up block of `align`: policy, value model, reward, prompts, updates, memory and time."""

import copy
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from deepseek_training.launch.plan import (
    Plan,
    describe_memory,
    describe_size,
    describe_time,
    free_bytes,
    measure_size,
    switches,
    training_bytes,
)
from deepseek_training.launch.step_time import is_timeable, random_batch, time_passes
from deepseek_training.ppo.settings import PPOConfig
from deepseek_training.recipes.align import AlignRecipe
from deepseek_training.recipes.grpo import GrpoRecipe

_MOST_ROWS = 32  # that are generated for the timing


def plan_alignment(
    recipe: AlignRecipe,
    args: PPOConfig,
    policy: PreTrainedModel,
    value_model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    held_out: Dataset,
    reward: Any,
) -> Plan:
    """Return the plan.

    Args:
        recipe: The settings.
        args: TRL's.
        policy: What will be aligned, also on the meta device.
        value_model: None where it shares the policy's weights.
        tokenizer: The policy's.
        train: Prompts to train on.
        held_out: Prompts to measure on.
        reward: For the timing of its scores.
    """
    size = measure_size(policy)
    lengths = [len(ids) for ids in train["input_ids"]]
    width = max(lengths) + recipe.response_length
    memory = training_bytes(size, policy, width * args.per_device_train_batch_size)
    if recipe.lora_rank:  # the frozen weights serve as policy, value model and reference
        memory -= 12 * size.trained
    else:
        memory += size.num_bytes + (0 if value_model is None else 16 * measure_size(value_model).total)
    prompts = recipe.batch_size * args.world_size
    fits = memory < free_bytes() and args.world_size == 1 and is_timeable(policy)
    seconds = _time_run(recipe, args, policy, tokenizer, train, len(held_out), reward) if fits else None
    weights = ", ".join(f"{weight:g} {name}" for weight, name in zip(reward.weights, reward.names, strict=True))
    return Plan(
        "align",
        (
            ("policy", describe_size(size)),
            ("value model", "shares the policy's weights" if value_model is None else describe_value(value_model)),
            ("reward", weights),
            ("data", f"{recipe.prompts}: {len(train):,} prompts to train on, {len(held_out):,} held out"),
            (
                "tokens",
                f"{min(lengths)} to {max(lengths)} per prompt, at most {recipe.response_length} per completion",
            ),
            (
                "steps",
                f"{recipe.num_updates} updates of {prompts} prompts, {recipe.num_mini_batches} mini-batches, "
                f"{recipe.num_ppo_epochs} passes over each; {recipe.num_updates * prompts / len(train):.2g} passes "
                "over the prompts",
            ),
            ("memory", describe_memory(memory)),
            ("time", describe_time(seconds, "updates and both measurements")),
            *switches(policy, recipe, args),
        ),
    )


def plan_group_updates(
    recipe: GrpoRecipe, args: TrainingArguments, model: PreTrainedModel, num_train: int, num_held_out: int
) -> Plan:
    """Return the plan of `grpo`, without an estimate of the time.

    Args:
        recipe: The settings.
        args: TRL's.
        model: What will be aligned, also on the meta device.
        num_train: Prompts to train on.
        num_held_out: Prompts to measure on.
    """
    size = measure_size(model)
    width = recipe.max_prompt_tokens + recipe.response_length
    memory = training_bytes(size, model, width * recipe.batch_size) + (0 if recipe.lora_rank else size.num_bytes)
    each = recipe.batch_size * args.world_size
    return Plan(
        "grpo",
        (
            ("policy", describe_size(size)),
            ("data", f"{recipe.prompts}: {num_train:,} prompts to train on, {num_held_out:,} held out"),
            (
                "steps",
                f"{recipe.num_updates} updates of {each} completions, {recipe.num_generations} of each prompt, "
                f"{recipe.num_iterations} steps on each",
            ),
            ("memory", describe_memory(memory)),
            ("time", describe_time(None, "updates")),
            *switches(model, recipe, args),
        ),
    )


def describe_value(value_model: PreTrainedModel) -> str:
    """Return the size of a value model of its own."""
    return describe_size(measure_size(value_model))


def _time_run(
    recipe: AlignRecipe,
    args: PPOConfig,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    num_held_out: int,
    reward: Any,
) -> float | None:
    """Seconds of all updates and both measurements, from one small batch of each part."""
    rows = train.select(range(min(_MOST_ROWS, recipe.batch_size, len(train))))
    width = max(len(ids) for ids in rows["input_ids"])
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows["input_ids"]], device=args.device)
    length = {"max_new_tokens": recipe.response_length, "min_new_tokens": recipe.response_length}
    state = copy.deepcopy(reward.state_dict()) if hasattr(reward, "state_dict") else None
    with torch.random.fork_rng(), torch.no_grad():
        twin = copy.deepcopy(policy).to(args.device).eval()
        started = time.perf_counter()
        written = twin.generate(input_ids=ids, attention_mask=ids != pad, do_sample=True, pad_token_id=pad, **length)
        answers = written[:, width:].tolist()
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        reward(prompts=list(rows["prompt"]), completions=texts, completion_ids=answers, is_evaluation=True)
        if state is not None:  # a first call may move what it standardizes by
            reward.load_state_dict(state)
        played = (time.perf_counter() - started) / len(rows)
    batch = random_batch(policy, len(rows), width + recipe.response_length)
    passed = time_passes(policy, batch, num_passes=1, device=args.device)
    if passed is None:
        return None
    # Policy and value model go forward and backward; reference and value model forward once, a third of that.
    learned = passed / len(rows) * (2 * recipe.num_ppo_epochs + 2 / 3)
    updates = recipe.num_updates * recipe.batch_size * (played + learned)
    return updates + 2 * num_held_out * recipe.num_eval_samples * (played + passed / len(rows) / 3)
