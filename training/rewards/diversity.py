"""Diversity: a completion that does not repeat itself, and does not repeat the others.

    diversity = length * distinct * (1 - self_bleu)
    distinct  = mean over n = 1..3 of |set of n-grams| / |n-grams|; at n = 1 in windows of 50 words, times 1.25 and at
                most 1, as plain prose repeats one word in five
    self_bleu = mean over n = 2..4 of the share of the completion's n-grams that occur in any other completion of
                the batch (leave one out) or of the bank of the last `bank_size` completions
    length    = min(1, words / `min_words`)

A product, so that neither buys the other: one word said forty times differs from everything else in the batch, and a
copy of a neighbor is fine prose. PPO has one completion per prompt, so the batch and the bank stand in for the group
that GRPO would have. Failure modes: random words are maximally diverse (relevance and the KL term must hold them), and
a stock phrase that every honest answer shares ("see your doctor") is punished.
"""

from collections import Counter, deque
from typing import Any

from deepseek_training.rewards.words import ngrams, split_words, text_of


class Diversity:
    """Distinct n-grams within a completion, and leave-one-out self-BLEU against the batch and a rolling bank.

    Args:
        bank_size: Completions of earlier calls to compare with; 0 looks at the batch only.
        min_words: A completion with fewer words gets a proportional share.
    """

    name = "diversity"

    def __init__(self, bank_size: int = 256, min_words: int = 8) -> None:
        if bank_size < 0 or min_words < 1:
            raise ValueError(
                f"bank_size, min_words: got {bank_size}, {min_words}, expected bank_size >= 0, min_words >= 1"
            )
        self.__name__ = self.name  # GRPO and RLOO log a reward under its __name__
        self.min_words = min_words
        self.bank: deque[list[str]] = deque(maxlen=bank_size)

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: Any = None, **kwargs: Any
    ) -> list[float]:
        """Return one score in [0, 1] a completion; an empty completion gets 0.

        Args:
            prompts: Not used; here for the shared signature.
            completions: Strings or chat messages.
            completion_ids: Not used.
            kwargs: Not used, except ``is_evaluation=True``, which neither reads nor fills the bank.
        """
        texts = [split_words(text_of(completion)) for completion in completions]
        # A bank that training has filled would mark down the same policy: evaluations compare within the batch.
        is_evaluation = kwargs.get("is_evaluation", False)
        self_bleu = leave_one_out_overlap(texts, [] if is_evaluation else list(self.bank))
        if not is_evaluation:
            self.bank.extend(texts)
        return [
            min(1.0, len(words) / self.min_words) * distinctness(words) * (1 - overlap)
            for words, overlap in zip(texts, self_bleu, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the bank, for a checkpoint."""
        return {"bank": [" ".join(words) for words in self.bank]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the bank from a checkpoint."""
        self.bank.clear()
        self.bank.extend(text.split() for text in state["bank"])


def distinctness(words: list[str]) -> float:
    """Return the share of distinct n-grams, n = 1..3, mean over n; 0 for no words.

    Distinct words fall with length even in good prose (Heaps' law), so the share at n = 1 is measured in windows of
    50 words.
    """
    if not words:
        return 0.0
    windows = [words[i : i + 50] for i in range(0, max(1, len(words) - 25), 50)]
    shares = [min(1.0, 1.25 * sum(len(set(window)) / len(window) for window in windows) / len(windows))]
    for n in (2, 3):
        grams = ngrams(words, n)
        shares.append(len(set(grams)) / len(grams) if grams else shares[0])
    return sum(shares) / len(shares)


def leave_one_out_overlap(texts: list[list[str]], bank: list[list[str]]) -> list[float]:
    """Return, for each text, the share of its 2- to 4-grams found in another text of the list or in the bank."""
    totals = [0.0] * len(texts)
    for n in (2, 3, 4):
        of_text = [set(ngrams(words, n)) for words in texts]
        count = Counter(gram for grams in of_text for gram in grams)
        count.update({gram for words in bank for gram in ngrams(words, n)})
        for i, words in enumerate(texts):
            grams = ngrams(words, n)
            if grams:
                totals[i] += sum(count[gram] > 1 for gram in grams) / len(grams)
    return [total / 3 for total in totals]
