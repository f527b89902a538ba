"""Which tokens a decoder reads in a pass, also where a model around it makes the embeddings, and their hashes.

`RouterReplay` finds by them what it noted.
"""

from typing import Any

import torch

from modeling_deepseek.token_layout import TokenLayout


def tokens_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Return the token ids [B, S] that a model is given; None where it is given embeddings.

    Args:
        args: Of its call.
        kwargs: Likewise.
    """
    tokens = kwargs.get("input_ids", args[0] if args else None)
    is_ids = isinstance(tokens, torch.Tensor) and tokens.ndim == 2 and not tokens.is_floating_point()
    return tokens if is_ids else None


def tokens_behind(embeddings: object, given: dict[str, Any] | None) -> torch.Tensor | None:
    """Return the token ids [B, S] of embeddings; None where images or sound are among them.

    Args:
        embeddings: [B, S, D].
        given: What the model was given that made them, with ``input_ids``.
    """
    if given is None or not isinstance(embeddings, torch.Tensor) or embeddings.shape[:2] != given["input_ids"].shape:
        return None
    others = [value for name, value in given.items() if "mask" not in name and "position" not in name]
    is_mixed = any(
        bool(one) if isinstance(one, dict) else isinstance(one, torch.Tensor) and one.is_floating_point()
        for one in others  # a dict: what a tower returned
    )
    return None if is_mixed else given["input_ids"]


def prefix_hashes(token_ids: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Return [T] int64 hashes of each token's sequence up to itself, whatever stands around it.

    Args:
        token_ids: [B, S].
        layout: Sequences and padding.
    """
    flat, is_token = token_ids.flatten().long(), layout.is_token
    counts = is_token.long().cumsum(0)
    # The sequence's first token: its id differs from that of the last token before.
    ids = layout.sequence_ids
    last_ids = torch.where(is_token, ids, -1).cummax(0).values  # rise along the batch
    begins = is_token & (ids != torch.cat([ids.new_full((1,), -1), last_ids[:-1]]))
    offsets = counts - torch.where(begins, counts, 0).cummax(0).values
    mixed = _mix(flat + 1, offsets) * is_token
    sums = mixed.cumsum(0)
    starts = torch.where(begins, torch.arange(len(flat), device=flat.device), 0).cummax(0).values
    return sums - (sums - mixed)[starts]


def _mix(tokens: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """A pseudo-random int64 for each token and offset, by splitmix64's finish; products wrap around."""
    value = tokens * -0x61C8864680B583EB + offsets * -0x3B314601E57A13AD
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        value = (value ^ ((value >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return value ^ ((value >> 31) & ((1 << 33) - 1))
