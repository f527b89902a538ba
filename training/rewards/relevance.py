"""Relevance: how much of the prompt's topic a completion takes up, without repeating the prompt.

    relevance = (1 - echo) * min(1, cosine / `full_cosine`)
    cosine    = cosine of the IDF-weighted bags of word stems of prompt and completion
    echo      = share of the completion's word triples that are copied from the prompt

The offline default needs no model. Failure modes: it sees words, not meaning, so a synonym earns nothing and a wrong
statement on the topic earns everything.
"""

import functools
import math
from collections import Counter
from typing import Any

from deepseek_training.rewards.words import content_words, ngrams, split_words, text_of


class Relevance:
    """Lexical relevance with an echo guard.

    Args:
        full_cosine: The cosine that earns full marks, above 0 and at most 1.
    """

    name = "relevance"

    def __init__(self, full_cosine: float = 0.6):
        if not 0 < full_cosine <= 1:
            raise ValueError(f"full_cosine={full_cosine}: allowed is above 0 and at most 1")
        self.__name__ = self.name  # GRPO and RLOO log a reward under its __name__
        self.full_cosine = full_cosine
        self.idf, self.rarest = _load_idf()

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: Any = None, **kwargs: Any
    ) -> list[float]:
        """Return one score in [0, 1] a completion.

        Args:
            prompts: Strings or chat messages, one a completion.
            completions: Strings or chat messages.
            completion_ids: Not used.
            kwargs: Not used.
        """
        return [self._score(text_of(p), text_of(c)) for p, c in zip(prompts, completions, strict=True)]

    def _score(self, prompt: str, completion: str) -> float:
        asked, answered = split_words(prompt), split_words(completion)
        cosine = self._cosine(content_words(asked), content_words(answered))
        return (1 - echo_share(asked, answered)) * min(1.0, cosine / self.full_cosine)

    def _cosine(self, first: list[str], second: list[str]) -> float:
        a, b = self._bag(first), self._bag(second)
        norm = math.sqrt(sum(x * x for x in a.values()) * sum(x * x for x in b.values()))
        return sum(weight * b.get(word, 0.0) for word, weight in a.items()) / norm if norm else 0.0

    def _bag(self, words: list[str]) -> dict[str, float]:
        """Logarithmic counts: saying a word ten times is not ten times as relevant."""
        return {word: (1 + math.log(n)) * self.idf.get(word, self.rarest) for word, n in Counter(words).items()}


def echo_share(asked: list[str], answered: list[str]) -> float:
    """Return the share of the answer's word triples that stand in the prompt."""
    triples = ngrams(answered, min(3, max(1, len(answered))))
    known = set(ngrams(asked, min(3, max(1, len(answered)))))
    return sum(triple in known for triple in triples) / len(triples) if triples else 0.0


@functools.cache
def _load_idf() -> tuple[dict[str, float], float]:
    """Inverse document frequencies over the embedded training dialogues."""
    from deepseek_training.text_data import read_rows

    rows = [row for row in read_rows("dialogues") if row["split"] == "train"]
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(set(content_words(split_words(row["prompt"] + " " + row["answer"]))))
    idf = {word: math.log((1 + len(rows)) / (1 + n)) for word, n in counts.items()}
    return idf, math.log(1 + len(rows))
