"""A batch of completions: how prompts are padded, completions sampled, and what is kept about them.

`player.py` fills a `Rollout`, `update.py` learns from it. TRL tells padding from text by comparing token ids, which
hides every eos when pad and eos are one token. Here padding is `NO_TOKEN`, an id that no tokenizer has. TRL's own
functions work with it: under the mask they replace padding by token 0 before the model sees it.
"""

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from trl.experimental.ppo.ppo_trainer import INVALID_LOGPROB, batch_generation, truncate_response
from trl.experimental.utils import first_true_indices
from trl.trainer.utils import selective_log_softmax

from deepseek_training.ppo.forward import NO_TOKEN


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
    context_length = queries.shape[1]
    query_responses, logits = batch_generation(policy, queries, batch_size, NO_TOKEN, config)
    responses = query_responses[:, context_length:]
    logprobs = selective_log_softmax(logits, responses.clamp(min=0))
    if stop_token_id is not None:
        responses = truncate_response(stop_token_id, NO_TOKEN, responses)
    return torch.cat([queries, responses], 1), logprobs


def mask_beyond_end(
    responses: torch.Tensor, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, values: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the padding masks and the three tensors with padding filled in, as TRL fills it."""
    last = first_true_indices(responses == NO_TOKEN).unsqueeze(1) - 1
    positions = torch.arange(responses.shape[1], device=responses.device)
    padding_mask, padding_mask_p1 = positions > last, positions > last + 1
    return {
        "padding_mask": padding_mask,
        "padding_mask_p1": padding_mask_p1,
        "logprobs": logprobs.masked_fill(padding_mask, INVALID_LOGPROB),
        "ref_logprobs": ref_logprobs.masked_fill(padding_mask, INVALID_LOGPROB),
        "values": values.masked_fill(padding_mask_p1, 0),
    }
