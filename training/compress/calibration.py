"""Text that tells what matters in a model: the first blocks of the training data, in an order of their own."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from deepseek_training.data.packing import PackedDataset

# Of a mean expert. Fewer would rank experts by the accident of a few tokens.
_LEAST_TOKENS_PER_EXPERT = 16


def shuffled_blocks(documents: Sequence[np.ndarray], sequence_length: int) -> torch.Tensor:
    """Return documents as blocks `[blocks, S]`, in an order that depends on nothing but their number.

    The first of them are then a sample of all documents: in the order of the stream they could be a single book.

    Args:
        documents: Token arrays from `encode_documents`.
        sequence_length: S.
    """
    blocks = PackedDataset(documents, sequence_length).blocks
    return blocks[torch.from_numpy(np.random.default_rng(0).permutation(len(blocks)))]


def calibration_blocks(blocks: torch.Tensor, num_tokens: int, config: Any) -> torch.Tensor:
    """Return the first blocks that hold so many tokens together.

    Args:
        blocks: `[blocks, S]`.
        num_tokens: How many are wanted.
        config: The model's configuration, which tells how many experts there are to rank.

    Raises:
        ValueError: There are fewer, or too few for the model's experts.
    """
    text_config = config.get_text_config()
    experts = getattr(text_config, "num_experts", None) or getattr(text_config, "num_local_experts", None) or 0
    chosen = getattr(text_config, "num_experts_per_tok", None) or 1
    least = -(-_LEAST_TOKENS_PER_EXPERT * experts // chosen)
    if num_tokens < least:
        raise ValueError(
            f"calibration_tokens: got {num_tokens}, expected at least {least}, {_LEAST_TOKENS_PER_EXPERT} for each of "
            f"the {experts} experts"
        )
    if blocks.numel() < num_tokens:
        raise ValueError(f"calibration_tokens: got data of {blocks.numel()} tokens, expected at least {num_tokens}")
    return blocks[: -(-num_tokens // blocks.shape[1])]
