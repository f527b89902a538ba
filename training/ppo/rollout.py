"""A batch of completions: how prompts are padded, completions sampled, and what is kept about them.

`player.py` fills a `Rollout`, `update.py` learns from it. TRL tells padding from text by comparing token ids, which
hides every eos when pad and eos are one token. Here padding is `NO_TOKEN`, an id that no tokenizer has;
under the mask it becomes token 0 before a model sees it.
"""

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from trl.trainer.utils import selective_log_softmax

from deepseek_training.ppo.forward import NO_TOKEN

INVALID_LOGPROB = 1.0  # stands where there is no token, as in TRL


@dataclasses.dataclass
class Rollout:
    """One batch of completions and what was noted about them. B prompts, P prompt tokens, T completion tokens.

    Attributes:
        query_responses: [B, P + T] token ids, prompts padded left, both with `NO_TOKEN`.
        context_length: P.
        logprobs: [B, T] of the policy that sampled, `INVALID_LOGPROB` at padding.
        ref_logprobs: [B, T] of the reference.
        values: [B, T] of the value model, 0 beyond the end.
        scores: [B] rewards.
        has_eos: [B] whether the completion ended by itself.
        padding_mask: [B, T] True after the last token.
        padding_mask_p1: [B, T] True after the position behind the last token, whose value still counts.
        completions: The completions as text.
    """

    query_responses: torch.Tensor
    context_length: int
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor
    has_eos: torch.Tensor
    padding_mask: torch.Tensor
    padding_mask_p1: torch.Tensor
    completions: list[str]

    @property
    def responses(self) -> torch.Tensor:
        """[B, T] completion ids."""
        return self.query_responses[:, self.context_length :]

    @property
    def lengths(self) -> torch.Tensor:
        """[B] tokens of each completion, its eos included."""
        return (~self.padding_mask).sum(1)


class PromptCollator:
    """Pads ``input_ids`` on the left with `NO_TOKEN` and keeps every other column as a list.

    Left, because generation continues the last column; TRL's default collator follows the tokenizer's padding side,
    and drops on text columns, which rewards need.
    """

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch."""
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), NO_TOKEN, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, width - len(row["input_ids"]) :] = torch.tensor(row["input_ids"])
        columns = {key: [row[key] for row in rows] for key in rows[0] if key not in ("input_ids", "attention_mask")}
        return {"input_ids": ids, **columns}


def sample(
    policy: nn.Module, queries: torch.Tensor, config: GenerationConfig, batch_size: int, stop_token_id: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sampled completions behind their prompts, [B, P + T], and the logprobs of their tokens, [B, T].

    Args:
        policy: The unwrapped policy.
        queries: [B, P] prompts padded with `NO_TOKEN`.
        config: How to sample.
        batch_size: Prompts generated at a time.
        stop_token_id: Where a completion ends; what follows becomes `NO_TOKEN`.
    """
    responses, logprobs = [], []
    for part in queries.split(batch_size):
        mask = part != NO_TOKEN
        output = policy.generate(
            input_ids=part.masked_fill(~mask, 0),
            attention_mask=mask,
            generation_config=config,
            return_dict_in_generate=True,
            output_scores=True,
            synced_gpus=False,  # under ZeRO-3 transformers waits in each token, but another process may play less
        )
        ids = output.sequences[:, part.shape[1] :]
        logprobs.append(selective_log_softmax(torch.stack(output.scores, 1), ids))
        if stop_token_id is not None:
            ids = ids.masked_fill(_behind_first(ids == stop_token_id), NO_TOKEN)
        responses.append(ids)
    return torch.cat([queries, _stack(responses, NO_TOKEN)], 1), _stack(logprobs, INVALID_LOGPROB)


def _behind_first(is_stop: torch.Tensor) -> torch.Tensor:
    """[B, T] whether a position lies behind the first True of its row."""
    return is_stop.cumsum(1) - is_stop.long() > 0


def _stack(parts: list[torch.Tensor], fill: float) -> torch.Tensor:
    """[B, T] of parts with fewer columns each, filled up on the right."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in parts])


def mask_beyond_end(
    responses: torch.Tensor, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, values: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the padding masks and the three tensors with padding filled in, as TRL fills it."""
    last = (responses != NO_TOKEN).sum(1, keepdim=True) - 1
    positions = torch.arange(responses.shape[1], device=responses.device)
    padding_mask, padding_mask_p1 = positions > last, positions > last + 1
    return {
        "padding_mask": padding_mask,
        "padding_mask_p1": padding_mask_p1,
        "logprobs": logprobs.masked_fill(padding_mask, INVALID_LOGPROB),
        "ref_logprobs": ref_logprobs.masked_fill(padding_mask, INVALID_LOGPROB),
        "values": values.masked_fill(padding_mask_p1, 0),
    }
