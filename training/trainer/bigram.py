"""An interpolated bigram model: the baseline that a pretrained model must beat.

`pretrain` trains it on the training tokens and scores the held-out text with it, exactly as it scores the model. It is
interpolated modified Kneser-Ney, the strongest of the usual bigram estimates, so that beating it means something: the
model then uses more than the last token.
"""

from collections.abc import Sequence

import numpy as np


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

    def __init__(self, documents: Sequence[np.ndarray], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        pairs = np.concatenate([self._pairs(document) for document in documents])
        self.pairs, counts = np.unique(pairs, return_counts=True)
        first, second = self.pairs // vocab_size, self.pairs % vocab_size
        discounts = _discounts(counts)[np.minimum(counts, 3) - 1]
        self.contexts = np.bincount(first, weights=counts, minlength=vocab_size)
        freed = np.bincount(first, weights=discounts, minlength=vocab_size)
        # a context never seen leaves everything to the unigram
        self.backoff = np.where(self.contexts > 0, freed / np.maximum(self.contexts, 1), 1.0)
        self.kept = (counts - discounts) / self.contexts[first]
        self.unigram = self._continuation(second)

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
