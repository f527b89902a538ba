"""Which token belongs to which sequence, and which is padding: what routers need to count and to average.

`DeepseekModel.forward` makes one a training pass and hands it down to every router. Sequences packed
into one row are told apart by `position_ids` that start anew, so a packed batch and a padded one give equal losses.
"""

from typing import NamedTuple

import torch


class TokenLayout(NamedTuple):
    """Sequences of a batch.

    Attributes:
        sequence_ids: `[T]` int64, from 0; -1 for padding.
        num_sequences: An upper bound of the ids; ids without tokens may occur.
    """

    sequence_ids: torch.Tensor
    num_sequences: int

    @property
    def is_token(self) -> torch.Tensor:
        """`[T]` bool, False for padding."""
        return self.sequence_ids >= 0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean over each sequence's tokens, `[num_sequences, ...]`; zero for a sequence without tokens.

        A product with a matrix rather than index_add_, which is not deterministic on a GPU.

        Args:
            values: `[T, E]`.
        """
        ids = torch.arange(self.num_sequences, device=values.device).unsqueeze(1)
        members = (self.sequence_ids.unsqueeze(0) == ids).to(values.dtype)
        return (members @ values) / members.sum(1, keepdim=True).clamp(min=1)

    def mean_over_sequences(self, losses: torch.Tensor) -> torch.Tensor:
        """Return the mean of `[num_sequences]` losses over the sequences that have tokens.

        Args:
            losses: One a sequence, zero for a sequence without tokens.
        """
        ids = torch.arange(self.num_sequences, device=losses.device).unsqueeze(1)
        return losses.sum() / (self.sequence_ids.unsqueeze(0) == ids).any(1).sum().clamp(min=1)


def make_layout(
    shape: torch.Size, device: torch.device, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> TokenLayout:
    """Return the layout of a batch.

    Args:
        shape: `(B, S)`.
        device: Where the tokens are.
        attention_mask: Anything a model takes; only a 2-D one, `[B, S]` or with a cached part before, tells padding.
        position_ids: `[B, S]` or None. Within a row a new sequence begins where they do not go up by one.
    """
    batch, length = shape
    rows = torch.arange(batch, device=device).unsqueeze(1).expand(batch, length)
    num_sequences = batch
    is_real = torch.ones(shape, dtype=torch.bool, device=device)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        is_real = attention_mask[:, -length:] != 0
    if position_ids is not None and position_ids.shape == shape:
        begins = is_real & (is_real.cumsum(1) == 1)
        begins[:, 1:] |= position_ids[:, 1:] != position_ids[:, :-1] + 1
        begins &= is_real  # Positions of padding rise or not, as its maker likes.
        rows = begins.flatten().cumsum(0).view(shape) - 1
        num_sequences = max(int(rows[-1, -1]) + 1, 1)
    rows = rows.masked_fill(~is_real, -1)
    return TokenLayout(rows.reshape(-1), num_sequences)


def one_sequence(tokens: torch.Tensor) -> TokenLayout:
    """Return the layout that takes all tokens for one sequence.

    Args:
        tokens: `[T, ...]`.
    """
    return TokenLayout(torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device), 1)
