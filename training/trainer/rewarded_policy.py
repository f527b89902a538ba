"""Held-out prompts completed and scored, before and after a training that a reward drives."""

import json
from collections.abc import Callable
from typing import Any

import datasets
import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from deepseek_records.run_folder import RunFolder, write_json
from deepseek_training.recipes.rewarded import RewardedSettings

BEFORE_FILE = "before.json"


def measure_before(run: RunFolder, measure: Callable[[], dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Return the start model's measurement; a resumed run reads what it has measured. The first process writes it.

    Args:
        run: The run folder, where a file keeps it.
        measure: Measures.
    """
    path = run.path / BEFORE_FILE
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    measured = measure()
    if PartialState().is_main_process:
        write_json(path, measured)
    return measured


@torch.no_grad()
def complete_and_score(
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: datasets.Dataset,
    reward: Callable[..., list[float | None]],
    recipe: RewardedSettings,
) -> dict[str, list[Any]]:
    """Return a column each of reward, its parts, length and completion, one row per prompt.

    The randomness is the same at every call, so that two measurements differ by the policy alone.

    Args:
        policy: The model.
        tokenizer: Of the policy.
        prompts: Rows with ``prompt`` and ``input_ids``.
        reward: A callable, told ``is_evaluation=True``.
        recipe: How to sample, and how often.
    """
    was_training = policy.training
    policy.eval()
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        passes = [_complete(policy, tokenizer, prompts, reward, recipe) for _ in range(recipe.num_eval_samples)]
    policy.train(was_training)
    columns = {
        name: [sum(values) / len(values) for values in zip(*(one[name] for one in passes), strict=True)]
        for name in passes[0]
        if name != "completion" and all(value is not None for one in passes for value in one[name])
    }
    return {**columns, "completion": passes[0]["completion"]}


def _complete(
    policy: Any, tokenizer: PreTrainedTokenizerBase, prompts: datasets.Dataset, reward: Any, recipe: RewardedSettings
) -> dict[str, list[Any]]:
    texts: list[str] = []
    lengths: list[float] = []
    answers: list[list[int]] = []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for start in range(0, len(prompts), recipe.batch_size):
        rows = prompts[start : start + recipe.batch_size]["input_ids"]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=policy.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=policy.device)
        written = policy.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=recipe.response_length,
            do_sample=True,
            temperature=recipe.temperature,
            top_k=0,
            top_p=1.0,
            pad_token_id=pad,
            synced_gpus=False,  # all weights are here
        )[:, width:]
        for row in written.tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            lengths.append(float(end))
            answers.append(row[:end])
            texts.append(tokenizer.decode(row[:end], skip_special_tokens=True))
    parts: dict[str, list[Any]] = {}
    scores = reward(
        prompts=list(prompts["prompt"]),
        completions=texts,
        completion_ids=answers,
        is_evaluation=True,
        log_extra=parts.__setitem__,
    )
    return {"reward": list(scores), **parts, "length_tokens": lengths, "completion": texts}
