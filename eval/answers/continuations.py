"""Log-likelihoods of answers of any length, and of whole sentences, as lm-evaluation-harness 0.4.13 takes them.

Called by ``runners/text.py``. An answer's tokens are those that it adds to the encoded prompt; a sentence without
prompt is read after the tokenizer's BOS (else EOS) token. Too long a pair loses tokens from the left. A batch holds
whole questions of similar length, logits are kept only where an answer is predicted, and batches depend on the
questions alone, so an interrupted run that goes on computes the same numbers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from deepseek_eval.answers.loglikelihood import keep_logits
from deepseek_eval.model_loading import LoadedModel
from deepseek_eval.served_model import ServedModel
from deepseek_eval.tasks.task import ChoiceItem
from deepseek_records.user_text import encode


@dataclass(frozen=True)
class EncodedContinuations:
    """One question with each of its answers as token ids.

    Args:
        item: The question.
        token_ids: For each answer, prompt and answer, cut to the context plus the last token, which is only predicted.
        num_scored: For each answer, how many of the last tokens are its own.
        is_truncated: Whether a prompt lost tokens.
    """

    item: ChoiceItem
    token_ids: tuple[list[int], ...]
    num_scored: tuple[int, ...]
    is_truncated: bool


def encode_continuations(loaded: LoadedModel, items: Sequence[ChoiceItem]) -> list[EncodedContinuations]:
    """Encode questions and answers and check that they can be scored.

    Args:
        loaded: Model and tokenizer.
        items: The questions.

    Raises:
        ValueError: An answer adds no token, or alone exceeds the context.
    """
    return [_encode(loaded, item) for item in items]


def _encode(loaded: LoadedModel, item: ChoiceItem) -> EncodedContinuations:
    # +1: the last token is predicted, never read.
    room = loaded.max_length + 1
    rows, counts, is_truncated = [], [], False
    for choice in item.choices:
        prompt_ids, choice_ids = _encode_pair(loaded, item.prompt, choice)
        if not choice_ids:
            raise ValueError(f"tokenizer: the answer {choice!r} of {item.id} adds no token to its prompt")
        if len(choice_ids) >= room:
            raise ValueError(
                f"context: {loaded.max_length} tokens do not hold the answer {choice[:40]!r} of {item.id} "
                f"({len(choice_ids)} tokens)"
            )
        ids = prompt_ids + choice_ids
        is_truncated |= len(ids) > room
        rows.append(ids[-room:])
        counts.append(len(choice_ids))
    return EncodedContinuations(item, tuple(rows), tuple(counts), is_truncated)


def _encode_pair(loaded: LoadedModel, prompt: str, choice: str) -> tuple[list[int], list[int]]:
    """Prompt and answer by lm-eval's rules: spaces at the prompt's end go to the answer; no prompt means BOS."""
    tokenizer = loaded.tokenizer
    if not prompt:
        ids = tokenizer.encode(choice, add_special_tokens=False, verbose=False)
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ValueError("tokenizer: neither a BOS nor an EOS token, so a sentence has nothing to begin with")
        return (ids[:1], ids[1:]) if ids[:1] == [start] else ([start], ids)
    stripped = prompt.rstrip()
    # A chat template may have written the begin token itself.
    add = not prompt.startswith(_begin_token(tokenizer))
    whole = encode(prompt + choice, tokenizer, add_special_tokens=add)
    prompt_ids = encode(stripped, tokenizer, add_special_tokens=add)
    return prompt_ids, whole[len(prompt_ids) :]


def _begin_token(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.bos_token or tokenizer.eos_token or "\0")


def plan_continuations(
    encoded: Sequence[EncodedContinuations], batch_size: int
) -> list[tuple[EncodedContinuations, ...]]:
    """Group questions into batches of similar length, longest first.

    Args:
        encoded: The questions.
        batch_size: At most this many sequences a batch; one question's answers stay together even where they are more.
    """
    # Longest first: too large a batch fails at once and not after an hour. The sort is stable, hence deterministic.
    ordered = sorted(encoded, key=lambda row: -max(map(len, row.token_ids)))
    batches: list[list[EncodedContinuations]] = []
    num_rows = 0
    for row in ordered:
        if not batches or num_rows + len(row.token_ids) > batch_size:
            batches.append([])
            num_rows = 0
        batches[-1].append(row)
        num_rows += len(row.token_ids)
    return [tuple(batch) for batch in batches]


def score_continuations(
    loaded: LoadedModel, batches: Iterable[tuple[EncodedContinuations, ...]]
) -> Iterator[tuple[EncodedContinuations, list[float]]]:
    """Yield each question with the log-likelihood of each answer, batch by batch.

    Args:
        loaded: Model and tokenizer.
        batches: From `plan_continuations`.

    Raises:
        ValueError: The model returns NaN or infinity.
    """
    for batch in batches:
        sums = iter(_sum_logprobs(loaded, batch))
        for row in batch:
            scores = [next(sums) for _ in row.token_ids]
            if not all(-float("inf") < score < float("inf") for score in scores):
                raise ValueError(
                    f"model: the logits of question {row.item.id} are NaN or infinite; its scores mean nothing"
                )
            yield row, scores


@torch.inference_mode()
def _sum_logprobs(loaded: LoadedModel, batch: tuple[EncodedContinuations, ...]) -> list[float]:
    """Summed log-probability of each answer of the batch, in order.

    Rows are padded on the right, where causal attention cannot see the padding, so no mask is needed.
    """
    rows = [ids for row in batch for ids in row.token_ids]
    counts = [count for row in batch for count in row.num_scored]
    if isinstance(loaded.model, ServedModel):
        return loaded.model.sum_last(rows, counts)
    width = max(map(len, rows)) - 1
    pad_id = loaded.tokenizer.pad_token_id or 0
    device = loaded.model.device
    input_ids = torch.tensor([ids[:-1] + [pad_id] * (width - len(ids) + 1) for ids in rows], device=device)
    # The logits at position i predict token i + 1, so an answer's are those from one before it to one before its end.
    spans = [range(len(ids) - 1 - count, len(ids) - 1) for ids, count in zip(rows, counts, strict=True)]
    wanted = sorted(set().union(*spans))
    keep = keep_logits(loaded, torch.tensor(wanted, device=device))
    logits = loaded.model(input_ids=input_ids, use_cache=False, **keep).logits
    column = {position: index for index, position in enumerate(wanted)} if keep else None
    sums = []
    for index, (ids, span) in enumerate(zip(rows, spans, strict=True)):
        places = [column[position] for position in span] if column else list(span)
        # In fp32: bf16 holds a log-probability to about 0.03, which adds up over the words of a sentence.
        logprobs = torch.log_softmax(logits[index, places].float(), dim=-1)
        targets = torch.tensor(ids[-len(span) :], device=device)
        sums.append(logprobs.gather(1, targets[:, None]).sum().item())
    return sums
