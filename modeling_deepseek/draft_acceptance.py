"""How many drafted tokens speculative decoding accepts, for any transformers model.

``deepseek-moe generate --use-mtp`` prints it. transformers drafts and verifies but tells nobody how it went; this
listens to its candidate generator. Drafts that run past the end of the text or of `max_new_tokens` count
as drafted and not accepted, for they too were computed in vain.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel


@dataclasses.dataclass
class DraftCounts:
    """What one or several calls of `generate` drafted.

    Attributes:
        num_drafted: Tokens proposed.
        num_accepted: Those of them that the model itself would have written.
        num_passes: Forward passes of the model; each also writes one token of its own.
    """

    num_drafted: int = 0
    num_accepted: int = 0
    num_passes: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted, in [0, 1]; 0 where nothing was drafted."""
        return self.num_accepted / max(self.num_drafted, 1)

    @property
    def tokens_per_pass(self) -> float:
        """Tokens written a forward pass of the model; 1 without drafts."""
        return 1 + self.num_accepted / max(self.num_passes, 1)

    def __str__(self) -> str:
        """Return one line for a person."""
        return (
            f"{self.num_accepted} of {self.num_drafted} drafted tokens accepted ({self.acceptance_rate:.0%}), "
            f"{self.tokens_per_pass:.2f} tokens per pass"
        )


@contextlib.contextmanager
def count_drafts(model: PreTrainedModel) -> Iterator[DraftCounts]:
    """Count what `model.generate` drafts while the context is open.

    Args:
        model: Any model that generates, with `use_mtp=True`, `assistant_model=` or another way to draft.

    Example:
        >>> with count_drafts(model) as drafts:  # doctest: +SKIP
        ...     model.generate(input_ids, max_new_tokens=50, use_mtp=True)
        >>> drafts.acceptance_rate  # doctest: +SKIP
    """
    counts = DraftCounts()
    make_generator = model._get_candidate_generator

    def make_counted(*args: Any, **kwargs: Any) -> Any:
        return _listen(make_generator(*args, **kwargs), counts)

    model._get_candidate_generator = make_counted
    try:
        yield counts
    finally:
        del model._get_candidate_generator


def _listen(generator: Any, counts: DraftCounts) -> Any:
    get_candidates, update = generator.get_candidates, generator.update_candidate_strategy

    def counted_candidates(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        candidates = get_candidates(input_ids, *args, **kwargs)
        counts.num_drafted += candidates[0].shape[1] - input_ids.shape[1]
        return candidates

    def counted_update(input_ids: Any, scores: Any, num_matches: int) -> Any:
        counts.num_accepted += int(num_matches)
        counts.num_passes += 1
        return update(input_ids, scores, num_matches)

    generator.get_candidates, generator.update_candidate_strategy = counted_candidates, counted_update
    return generator
