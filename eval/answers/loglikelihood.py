"""Log-likelihoods of one-token answers, several times faster than one full forward pass a question.

Called by ``harness.py`` for multiple-choice tasks. The numbers are lm-evaluation-harness 0.4.13's: the prompt is
encoded as the tokenizer does by default, too long a prompt loses tokens from the left, and the score is the
log-softmax of the last position at each answer's token.

What is different is only the cost. Questions of one group open with the same tokens (description and shots); those are
run once and their key-value cache is shared by the whole batch without being copied. Batches hold questions of similar
length, and logits are computed only where a question ends. Batches depend on the questions alone, never on what is
already done, so an interrupted run that goes on computes the same numbers.
"""

import array
import copy
import inspect
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from deepseek_eval.model_loading import LoadedModel
from deepseek_eval.served_model import ServedModel
from deepseek_eval.tasks.task import ChoiceItem

logger = logging.getLogger(__name__)

# Below this a shared prefix saves less than its own forward pass and the wider spread of lengths in a batch cost.
MIN_SHARED_TOKENS = 32


@dataclass(frozen=True)
class EncodedItem:
    """One question as token ids.

    Args:
        item: The question.
        token_ids: The prompt, already cut to the context. Four bytes per token, where a list's take thirty: all
            questions are encoded before the first is asked, so that batches can be planned.
        choice_ids: The token of each answer.
        is_truncated: Whether the prompt lost tokens.
    """

    item: ChoiceItem
    token_ids: "array.array[int]"
    choice_ids: tuple[int, ...]
    is_truncated: bool


@dataclass(frozen=True)
class ChoiceBatch:
    """Questions that go through the model together.

    Args:
        rows: The questions, longest first.
        num_shared: How many leading tokens all questions of `prefix_key` share; 0 for none.
        prefix_key: The group whose cache is used.
    """

    rows: tuple[EncodedItem, ...]
    num_shared: int
    prefix_key: str


def encode_items(loaded: LoadedModel, items: Sequence[ChoiceItem]) -> list[EncodedItem]:
    """Encode the questions and check that they can be scored.

    Args:
        loaded: Model and tokenizer.
        items: The questions; all share one set of choices.

    Raises:
        ValueError: A choice is not one token after the prompt, or no question fits the context.
    """
    if not items:
        return []
    tokenizer, max_length = loaded.tokenizer, loaded.max_length
    choice_ids = _encode_choices(loaded, items[0])
    encoded = []
    shortest = None
    for item in items:
        for prompt in (item.prompt, *item.shorter_prompts):
            token_ids = tokenizer.encode(prompt, verbose=False)
            if len(token_ids) <= max_length:
                break
        shortest = len(token_ids) if shortest is None else min(shortest, len(token_ids))
        kept = array.array("i", token_ids[-max_length:])
        encoded.append(EncodedItem(item, kept, choice_ids, len(token_ids) > max_length))
    if shortest > max_length:
        raise ValueError(
            f"context: {max_length} tokens hold not even the shortest question ({shortest} tokens); use fewer shots "
            "or a model with a longer context"
        )
    return encoded


def _encode_choices(loaded: LoadedModel, item: ChoiceItem) -> tuple[int, ...]:
    """The token each choice adds to the prompt, by lm-eval's rule: encode both, drop the prompt's tokens."""
    num_prompt = len(loaded.tokenizer.encode(item.prompt, verbose=False))
    ids = []
    for choice in item.choices:
        added = loaded.tokenizer.encode(item.prompt + choice, verbose=False)[num_prompt:]
        if len(added) != 1:
            raise ValueError(
                f"tokenizer: {choice!r} becomes {len(added)} tokens after a question, expected exactly 1; this "
                "model's multiple-choice scores would not be comparable"
            )
        ids.append(added[0])
    if len(set(ids)) != len(ids):
        raise ValueError(f"tokenizer: the choices {item.choices} share a token, so they cannot be told apart")
    return tuple(ids)


def plan_batches(encoded: Sequence[EncodedItem], batch_size: int, can_share: bool = True) -> list[ChoiceBatch]:
    """Group questions into batches: by shared prefix where that pays, else by length over all groups.

    Args:
        encoded: The questions.
        batch_size: At most this many a batch.
        can_share: Whether the model's cache can be shared.
    """
    groups: dict[str, list[EncodedItem]] = {}
    for row in encoded:
        groups.setdefault(row.item.group, []).append(row)
    batches, pooled = [], []
    for key, rows in groups.items():
        whole = [row for row in rows if not row.is_truncated]
        num_shared = _common_prefix([row.token_ids for row in whole]) if can_share and len(whole) > 1 else 0
        if num_shared < MIN_SHARED_TOKENS:
            pooled += rows
            continue
        pooled += [row for row in rows if row.is_truncated]
        batches += _cut(whole, batch_size, num_shared, key)
    return _cut(pooled, batch_size, 0, "") + batches


def _cut(rows: list[EncodedItem], batch_size: int, num_shared: int, key: str) -> list[ChoiceBatch]:
    # Longest first: too large a batch fails at once and not after an hour. The sort is stable, hence deterministic.
    ordered = sorted(rows, key=lambda row: -len(row.token_ids))
    return [
        ChoiceBatch(tuple(ordered[start : start + batch_size]), num_shared, key)
        for start in range(0, len(ordered), batch_size)
    ]


def _common_prefix(sequences: list["array.array[int]"]) -> int:
    """Tokens that all sequences begin with, leaving at least one of each to run."""
    first, last = min(sequences), max(sequences)
    limit = min(len(sequence) for sequence in sequences) - 1
    for index in range(limit):
        if first[index] != last[index]:
            return index
    return limit


def score_batches(loaded: LoadedModel, batches: Iterable[ChoiceBatch]) -> Iterator[tuple[EncodedItem, list[float]]]:
    """Yield each question with the log-likelihood of each choice, batch by batch.

    Args:
        loaded: Model and tokenizer.
        batches: From `plan_batches`; batches of one prefix must follow one another for its cache to be reused.

    Raises:
        ValueError: The model returns NaN or infinity.
    """
    prefix_key, prefix_cache = None, None  # no group's name: an empty one is a name as well
    for batch in batches:
        if batch.num_shared and batch.prefix_key != prefix_key:
            prefix_key = batch.prefix_key
            prefix_cache = None  # Freed before the next one is made: one prefix in memory, however many groups.
            prefix_cache = _run_prefix(loaded, batch.rows[0].token_ids[: batch.num_shared])
        for row, scores in zip(batch.rows, _score_batch(loaded, batch, prefix_cache), strict=True):
            if not all(-float("inf") < score < float("inf") for score in scores):
                raise ValueError(
                    f"model: the logits of question {row.item.id} are NaN or infinite; its scores mean nothing"
                )
            yield row, scores


def _score_batch(loaded: LoadedModel, batch: ChoiceBatch, prefix: DynamicCache | None) -> list[list[float]]:
    """The log-likelihood of each choice of each question."""
    if isinstance(loaded.model, ServedModel):
        asked = [[*row.token_ids, choice] for row in batch.rows for choice in row.choice_ids]
        scores = iter(loaded.model.sum_last(asked, [1] * len(asked)))
        return [[next(scores) for _ in row.choice_ids] for row in batch.rows]
    logprobs_BV = _last_logprobs(loaded, batch, prefix if batch.num_shared else None)
    pairs = zip(batch.rows, logprobs_BV, strict=True)
    return [logprobs_V[list(row.choice_ids)].tolist() for row, logprobs_V in pairs]


def supports_shared_prefix(loaded: LoadedModel) -> bool:
    """Tell whether the model fills a plain cache that can be expanded over a batch; warn when it does not.

    Sliding-window, recurrent and custom caches are left alone: their state depends on more than keys and values.

    Args:
        loaded: Model and tokenizer.
    """
    if isinstance(loaded.model, ServedModel):
        return False
    cache = _run_prefix(loaded, [loaded.tokenizer.eos_token_id or 0, 0])
    is_plain = isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
    if not is_plain:
        logger.warning(
            "%s: no plain key-value cache, so the shots are run for every question", type(loaded.model).__name__
        )
    return is_plain


@torch.inference_mode()
def _run_prefix(loaded: LoadedModel, token_ids: Sequence[int]) -> DynamicCache | None:
    input_ids = torch.tensor([list(token_ids)], device=loaded.model.device)
    output = loaded.model(input_ids=input_ids, use_cache=True, **keep_logits(loaded, torch.tensor([0])))
    return output[_cache_name(loaded)]


def _cache_name(loaded: LoadedModel) -> str:
    """What the model's forward calls its cache: transformers 5.24 renamed ``past_key_values``."""
    return "cache" if "cache" in inspect.signature(loaded.model.forward).parameters else "past_key_values"


def _expand(cache: DynamicCache, batch_size: int) -> DynamicCache:
    """A view of a one-row cache as a batch: layers are shallow copies, tensors are expanded without memory.

    A layer grows by concatenation, which makes new tensors, so the shared one is never written to.
    """
    expanded = copy.copy(cache)
    expanded.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in expanded.layers:
        layer.keys = layer.keys.expand(batch_size, *layer.keys.shape[1:])
        layer.values = layer.values.expand(batch_size, *layer.values.shape[1:])
    return expanded


@torch.inference_mode()
def _last_logprobs(loaded: LoadedModel, batch: ChoiceBatch, prefix: DynamicCache | None) -> torch.Tensor:
    """Log-probabilities [B, V] after each row's last token.

    Rows are padded on the right, where causal attention cannot see the padding, so no mask is needed.
    """
    rows = [list(row.token_ids[batch.num_shared :]) for row in batch.rows]
    lengths = [len(row) for row in rows]
    width = max(lengths)
    pad_id = loaded.tokenizer.pad_token_id or 0
    device = loaded.model.device
    input_ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
    ends = sorted({length - 1 for length in lengths})
    cache = None if prefix is None else _expand(prefix, len(rows))
    keep = keep_logits(loaded, torch.tensor(ends, device=device))
    given = {_cache_name(loaded): cache, "use_cache": cache is not None}
    logits = loaded.model(input_ids=input_ids, **given, **keep).logits
    # With `logits_to_keep` the second axis lists `ends`; without it, all positions.
    columns = [ends.index(length - 1) for length in lengths] if keep else [length - 1 for length in lengths]
    last_BV = logits[torch.arange(len(rows), device=device), torch.tensor(columns, device=device)]
    # In the logits' own type, as lm-eval does.
    return torch.log_softmax(last_BV, dim=-1).float().cpu()


def keep_logits(loaded: LoadedModel, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the argument that spares the other positions' logits, empty where the model's forward has none.

    Args:
        loaded: Model and tokenizer.
        positions: The positions wanted, or their number counted from the end.
    """
    if "logits_to_keep" in inspect.signature(loaded.model.forward).parameters:
        return {"logits_to_keep": positions}
    return {}
