"""The indexer's loss: how far its distribution over the candidates is from the attention's.

`IndexerObserver` calls both functions, for one layer at a time.

Axes: B sequences, S queries, T keys, N heads, G heads per head of the keys, K candidates, P keys per candidate.
"""

import torch

# Entries of `[B, N, s, T]` at a time, where s of the S queries are taken together: 256 MiB in fp32.
ENTRIES_AT_ONCE = 2**26


def indexer_kl(
    index_scores: torch.Tensor, attention: torch.Tensor, is_valid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each query's divergence of the indexer from the attention, and which queries have one.

    Over the candidates s of query t that are valid, all that it may see in the dense stage, the chosen in the sparse::

        p_ts = attention_ts / sum_s attention_ts,   KL_t = sum_s p_ts (log p_ts - log softmax_s(index_scores_ts))

    Args:
        index_scores: `[B, S, K]`, with gradient.
        attention: `[B, S, K]`, the attention's weights summed over heads; no gradient flows into it.
        is_valid: `[B, S, K]` bool.

    Returns:
        `[B, S]` of the scores' dtype, and `[B, S]` bool; the divergence is 0 where there is none.

    Reference:
        DeepSeek-AI 2025, "DeepSeek-V3.2", arXiv 2512.02556, equations 3 and 4. There the queries are summed.
    """
    attention = attention.detach().to(index_scores.dtype).masked_fill(~is_valid, 0.0)
    mass = attention.sum(-1, keepdim=True)
    has_any = is_valid.any(-1) & (mass.squeeze(-1) > 0)
    target = attention / mass.clamp(min=torch.finfo(mass.dtype).tiny)
    # A row without candidates would be a softmax over nothing, whose gradient is NaN even where it is masked later.
    scores = index_scores.masked_fill(~is_valid & has_any.unsqueeze(-1), -torch.inf)
    scores = scores.masked_fill(~has_any.unsqueeze(-1), 0.0)
    log_index = scores.log_softmax(-1).masked_fill(~is_valid, 0.0)
    divergence = torch.xlogy(target, target) - target * log_index
    return divergence.sum(-1).masked_fill(~has_any, 0.0), has_any


@torch.no_grad()
def attention_on_candidates(
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    candidates: torch.Tensor,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention's weights of the candidates, summed over heads and over each candidate's keys.

    The weights are computed again from queries and keys, some queries at a time, so that `[B, N, S, T]` never exists.

    Args:
        query: `[B, N, S, H]`.
        key: `[B, N / G, T, H]`.
        attention_mask: `[B or 1, 1, S, T]`, bool (True is seen) or added to the logits.
        scaling: Factor of the logits.
        candidates: `[B, S, K, P]` int64, places of keys; negative ones count nothing.
        sinks: `[N]`, a logit of each head that takes a share without being a key.

    Returns:
        `[B, S, K]`, fp32 or wider.
    """
    batch, num_heads, num_queries, _ = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    narrow = min((query.dtype, key.dtype), key=lambda dtype: dtype.itemsize)  # as autocast would have it
    query, key = query.to(narrow), key.to(narrow)
    rows = max(1, ENTRIES_AT_ONCE // max(batch * num_heads * num_keys, 1))
    parts = []
    for begin in range(0, num_queries, rows):
        some = query[:, :, begin : begin + rows]
        # The heads that share a key stand as rows of one product, which needs no copies of the key.
        logits = some.reshape(batch, num_kv_heads, -1, some.shape[-1]) @ key.transpose(-1, -2) * scaling
        logits = _at_least_fp32(logits).view(batch, num_heads, -1, num_keys)
        mask = attention_mask[:, :, begin : begin + rows]
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        total = logits.logsumexp(-1, keepdim=True)
        if sinks is not None:
            total = torch.logaddexp(total, sinks.to(total.dtype).view(1, -1, 1, 1))
        weights = (logits - total).exp().nan_to_num(0.0).sum(1)  # NaN: a query that sees no key at all
        places = candidates[:, begin : begin + rows]
        found = weights.gather(-1, places.clamp(min=0).flatten(2)).view(places.shape)
        parts.append(found.masked_fill(places < 0, 0.0).sum(-1))
    return torch.cat(parts, 1)


def _at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
