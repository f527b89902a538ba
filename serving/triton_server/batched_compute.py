"""What the batched models compute: log-likelihoods, embeddings and the scores of a head, of many texts at once.

Texts are put side by side with padding on the right, where causal attention cannot see it, so that each row's numbers
are those that it has alone. Called by `batched_models.py`, which Triton loads.
"""

from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel

Ids = list[int]


def in_batches(rows: list[Ids], max_tokens: int) -> Iterator[list[int]]:
    """Yield places of rows that go through the model together, of similar length.

    Args:
        rows: Token ids.
        max_tokens: Most tokens of one pass, padding among them; a longer row goes alone.
    """
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    batch: list[int] = []
    for place in order:
        if batch and len(rows[place]) * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel, rows: list[tuple[Ids, Ids]], max_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of each row's second part after its first, and how many tokens were scored.

        log p(text | context) = sum over tokens t of text of log p(t | everything before t)

    A first token with nothing before it is not scored.

    Args:
        model: A causal language model.
        rows: Ids of context and text.
        max_tokens: Of one pass.

    Returns:
        Two tensors `[B]`, float32 and int32.
    """
    scores, counts = torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.int32)
    joined = [context + text for context, text in rows]
    for batch in in_batches(joined, max_tokens):
        ids, mask = _pad([joined[place] for place in batch], model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        first = torch.tensor([max(1, len(rows[place][0])) for place in batch], device=ids.device)
        column = torch.arange(1, ids.shape[1], device=ids.device)
        is_scored = (column >= first[:, None]) & (mask[:, 1:] > 0)
        scores[batch] = (logps.double() * is_scored).sum(-1).float().cpu()
        counts[batch] = is_scored.sum(-1).int().cpu()
    return scores, counts


@torch.inference_mode()
def embeddings(model: PreTrainedModel, rows: list[Ids], max_tokens: int) -> torch.Tensor:
    """Return the mean of the last hidden states over a text's tokens, scaled to length 1.

    Args:
        model: A causal language model or a decoder.
        rows: Token ids.
        max_tokens: Of one pass.

    Returns:
        `[B, D]` float32.
    """
    decoder = model.base_model

    def compute(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=-1)

    return _rowwise(compute, rows, max_tokens, model.device)


@torch.inference_mode()
def head_scores(model: PreTrainedModel, rows: list[Ids], max_tokens: int) -> torch.Tensor:
    """Return what a sequence classifier's head gives for each text.

    Args:
        model: Decoders are read at the last token of each text, whatever their `pad_token_id`.
        rows: Token ids.
        max_tokens: Of one pass.

    Returns:
        `[B, labels]` float32.
    """

    def compute(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if not hasattr(model, "score"):  # an encoder, which has a begin token to read from
            return model(input_ids=ids, attention_mask=mask).logits.float()
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = mask.sum(1) - 1
        return model.score(hidden[torch.arange(len(ids), device=ids.device), last]).float()

    return _rowwise(compute, rows, max_tokens, model.device)


def _rowwise(
    compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    rows: list[Ids],
    max_tokens: int,
    device: torch.device,
) -> torch.Tensor:
    found: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    for batch in in_batches(rows, max_tokens):
        values = compute(*_pad([rows[place] for place in batch], device)).cpu()
        for place, value in zip(batch, values, strict=True):
            found[place] = value
    return torch.stack(found)


def _pad(rows: list[Ids], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, `[B, S]`."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    return ids, mask
