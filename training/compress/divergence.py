"""A model before and after on the same held-out text: bits per byte, their paired difference, and the divergence.

What `quantize` reports. The model is changed in place, so that what it said before is kept: each window's loss, and
the distributions over a part of the tokens.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deepseek_training.data.packing import PackedDataset
from deepseek_training.recipes.quantize import QuantizeSettings
from deepseek_training.trainer.bits_per_byte import BitsPerByte, measure_windows
from deepseek_training.trainer.held_out import HeldOut

_MOST_TOKENS = 8192
_MOST_NUMBERS = 2**26  # of the distributions that are kept: 256 MiB in fp32


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far a model has moved.

    Attributes:
        before: Bits per byte.
        after: Likewise.
        difference: After less before, with the standard error of the pairs of windows.
        divergence: Mean KL(before || after) of a token's distribution, in nats.
        num_tokens: Over which that is the mean.
    """

    before: BitsPerByte
    after: BitsPerByte
    difference: BitsPerByte
    divergence: float
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a model said before it was changed.

    Attributes:
        held_out: The text.
        settings: Length and number of the blocks.
        nats: Each window's.
        num_tokens: Likewise.
        blocks: `[blocks, S]` on which distributions are compared.
        log_probs: `[blocks, S, vocabulary]`.
    """

    held_out: HeldOut
    settings: QuantizeSettings
    nats: list[float]
    num_tokens: list[int]
    blocks: Tensor
    log_probs: Tensor

    @classmethod
    def of(cls, model: PreTrainedModel, held_out: HeldOut, settings: QuantizeSettings) -> "Reference":
        """Ask a model.

        Args:
            model: Before it is changed.
            held_out: The text.
            settings: Of the command.
        """
        length = settings.sequence_length
        blocks = PackedDataset(held_out.documents, length).blocks
        most = min(_MOST_TOKENS, _MOST_NUMBERS // model.config.get_text_config().vocab_size)
        blocks = blocks[: max(1, most // length)]
        nats, num_tokens = _measure(model, held_out, settings)
        return cls(held_out, settings, nats, num_tokens, blocks, torch.cat(list(_log_probs(model, blocks))))

    @property
    def before(self) -> BitsPerByte:
        """Bits per byte of the model before it was changed."""
        return BitsPerByte.from_windows(self.nats, self.num_tokens, self.held_out.num_bytes)

    def compare(self, model: PreTrainedModel) -> Comparison:
        """Return how far the model is now from what it was.

        Args:
            model: After it was changed.
        """
        nats, _ = _measure(model, self.held_out, self.settings)
        changes = [new - old for new, old in zip(nats, self.nats, strict=True)]
        after, difference = (
            BitsPerByte.from_windows(one, self.num_tokens, self.held_out.num_bytes) for one in (nats, changes)
        )
        total = 0.0
        for old, new in zip(self.log_probs, _log_probs(model, self.blocks), strict=True):
            total += float((old.exp() * (old - new[0])).sum())
        count = self.blocks.numel()
        return Comparison(self.before, after, difference, divergence=total / count, num_tokens=count)


def _measure(model: PreTrainedModel, held_out: HeldOut, settings: QuantizeSettings) -> tuple[list[float], list[int]]:
    sizes = {"sequence_length": settings.sequence_length, "batch_size": settings.batch_size}
    return measure_windows(model, held_out.documents, **sizes)


@torch.no_grad()
def _log_probs(model: PreTrainedModel, blocks: Tensor) -> Iterator[Tensor]:
    """`[1, S, vocabulary]` of each block."""
    for block in blocks:
        yield model(input_ids=block[None].long().to(model.device), use_cache=False).logits.float().log_softmax(-1)
