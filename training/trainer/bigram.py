"""An interpolated bigram model: the baseline that a pretrained model must beat.

`pretrain` trains it on the training tokens and scores the held-out text with it, exactly as it scores the model. It is
interpolated modified Kneser-Ney, the strongest of the usual bigram estimates, so that beating it means something: the
model then uses more than the last token.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from deepseek_records.document_tokens import with_start
from deepseek_training.data.packing import document_lengths

MOST_TOKENS = 32_000_000
_PAIRS_AT_ONCE = 4_000_000


class BigramModel:
    """Holds the smoothed bigram of a token stream.

    With c the counts and N1+(. w) the number of different tokens seen before w:

        P(w | v) = max(c(v w) - D(c(v w)), 0) / c(v) + g(v) P(w)
        P(w)     = max(N1+(. w) - D', 0) / sum_u N1+(. u) + g' / V

    where D takes one of three values for counts 1, 2 and 3 or more, and g makes the sums 1.

    Args:
        documents: Token arrays; no pair is counted across documents.
        vocab_size: Number of tokens V.

    Reference:
        Chen and Goodman 1998, "An Empirical Study of Smoothing Techniques for Language Modeling", section 3.
    """

    def __init__(self, documents: Iterable[np.ndarray], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.pairs, counts = self._count(documents)
        first: np.ndarray
        second: np.ndarray
        first, second = self.pairs // vocab_size, self.pairs % vocab_size
        discounts = _discounts(counts)[np.minimum(counts, 3) - 1]
        self.contexts = np.bincount(first, weights=counts, minlength=vocab_size)
        freed = np.bincount(first, weights=discounts, minlength=vocab_size)
        # a context never seen leaves everything to the unigram
        self.backoff = np.where(self.contexts > 0, freed / np.maximum(self.contexts, 1), 1.0)
        self.kept = (counts - discounts) / self.contexts[first]
        self.unigram = self._continuation(second)

    @classmethod
    def of(cls, corpora: Sequence[Sequence[np.ndarray]], tokenizer: Any) -> "BigramModel":
        """Return the bigram of what a model trains on; of more than `MOST_TOKENS`, of evenly spaced documents.

        Args:
            corpora: Token arrays of each source's documents, from `encode_documents`.
            tokenizer: Theirs.
        """
        every = max(1, -(-sum(int(document_lengths(one).sum()) for one in corpora) // MOST_TOKENS))
        documents = (one[place] for one in corpora for place in range(0, len(one), every))
        return cls(with_start(documents, tokenizer), len(tokenizer))

    def _count(self, documents: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """All pairs, ascending, and how often each occurs; no more than some at once are in memory."""
        pairs: np.ndarray = np.zeros(0, dtype=np.int64)
        counts: np.ndarray = np.zeros(0, dtype=np.int64)
        waiting: list[np.ndarray] = []
        size = 0
        for document in itertools.chain(documents, [None]):
            if document is not None:
                waiting.append(self._pairs(document))
                size += len(waiting[-1])
            if size and (document is None or size >= _PAIRS_AT_ONCE):
                new, seen = np.unique(np.concatenate(waiting), return_counts=True)
                pairs, places = np.unique(np.concatenate([pairs, new]), return_inverse=True)
                counts = np.bincount(places, weights=np.concatenate([counts, seen])).astype(np.int64)
                waiting, size = [], 0
        return pairs, counts

    def _pairs(self, document: np.ndarray) -> np.ndarray:
        document = document.astype(np.int64)
        return document[:-1] * self.vocab_size + document[1:]

    def _continuation(self, second: np.ndarray) -> np.ndarray:
        """P(w) from the number of contexts each token was seen in; the freed mass is spread evenly."""
        continuations = np.bincount(second, minlength=self.vocab_size)
        seen = continuations > 0
        discounts = np.zeros(self.vocab_size)
        discounts[seen] = _discounts(continuations[seen])[np.minimum(continuations[seen], 3) - 1]
        total = continuations.sum()
        return (continuations - discounts) / total + discounts.sum() / total / self.vocab_size

    def nats(self, document: np.ndarray) -> np.ndarray:
        """Return -log P of every token but the first, given the one before it; float64 `[len - 1]`.

        Args:
            document: Token ids.
        """
        pairs = self._pairs(document)
        place = np.minimum(np.searchsorted(self.pairs, pairs), len(self.pairs) - 1)
        kept = np.where(self.pairs[place] == pairs, self.kept[place], 0.0)
        return -np.log(kept + self.backoff[document[:-1]] * self.unigram[document[1:]])


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Discounts for counts 1, 2 and 3 or more, estimated from how many items were seen once to four times."""
    n1, n2, n3, n4 = (max(int((counts == times).sum()), 1) for times in (1, 2, 3, 4))
    share = n1 / (n1 + 2 * n2)
    raw = np.array([1 - 2 * share * n2 / n1, 2 - 3 * share * n3 / n2, 3 - 4 * share * n4 / n3])
    # Tiny streams give estimates outside (0, count), which would make a probability negative or zero.
    return np.clip(raw, 0.1, [0.9, 1.9, 2.9])
