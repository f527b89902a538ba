"""Relevance: does the completion speak about what the prompt asks, in words of its own?

    relevance  = similarity * novelty * prose
    similarity = (cosine(embed(prompt), embed(completion)) - low) / (high - low), cut to [0, 1]
    novelty    = min(1, share of the completion's distinct content words that the prompt lacks / 0.5)
    prose      = min(1, share of function words / 0.25) * min(1, share of distinct content words / 0.6)

The cosine alone is hacked at once: repeating the prompt maximises it. `novelty` takes an echo to 0 and lets an answer
name its subject freely; `prose` takes a list of keywords and a word said over and over to 0. The embedder is the
small one that ships (`deepseek_training.text_embedder`) or any sentence-embedding model (`SentenceEncoder`).

Failure modes: a bag of words knows no truth and no grammar, so a false statement on the topic earns as much as a true
one; short honest answers that share no topic word ("About one in ten") earn little; the function words are English, so
for text in other scripts `prose` only counts repetition.
"""

from typing import Any, Protocol

import numpy as np

from deepseek_training.rewards.words import FUNCTION_WORDS, content_words, split_words, text_of

# The cosines of unrelated and of good answers, from data/text_embedder.json (quartiles on held-out dialogues).
LOW_COSINE, HIGH_COSINE = 0.05, 0.60
FULL_NOVELTY, FULL_FUNCTION_SHARE, FULL_DISTINCT_SHARE = 0.5, 0.25, 0.6


class Embedder(Protocol):
    """What `Relevance` needs of an embedder."""

    def embed(self, texts: list[str]) -> np.ndarray:
        """Return [len(texts), dimensions] unit rows."""


class Relevance:
    """Cosine of prompt and completion under guards against echo, keyword lists and repetition.

    Args:
        embedder: Anything with ``embed(texts)``; None takes the one that ships.
        low: The cosine that earns 0.
        high: The cosine that earns 1, above `low`.
        has_guards: False leaves the bare cosine, to show what PPO makes of it.
    """

    def __init__(
        self,
        embedder: Embedder | None = None,
        low: float = LOW_COSINE,
        high: float = HIGH_COSINE,
        has_guards: bool = True,
    ):
        from deepseek_training.text_embedder import TextEmbedder

        if not -1 <= low < high <= 1:
            raise ValueError(f"low={low}, high={high}: allowed is -1 <= low < high <= 1")
        self.__name__ = "relevance"  # GRPO and RLOO log a reward under its __name__
        self.embedder = TextEmbedder.load() if embedder is None else embedder
        self.low, self.high, self.has_guards = low, high, has_guards

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: Any = None, **kwargs: Any
    ) -> list[float]:
        """Return one score in [0, 1] a completion; an empty one gets 0.

        Args:
            prompts: Strings or chat messages, one a completion.
            completions: Strings or chat messages.
            completion_ids: Not used.
            kwargs: Not used.
        """
        asked, answered = [text_of(item) for item in prompts], [text_of(item) for item in completions]
        distinct = list(dict.fromkeys(asked))  # GRPO repeats a prompt for each of its completions
        rows = dict(zip(distinct, self.embedder.embed(distinct), strict=True))
        cosines = [float(rows[p] @ c) for p, c in zip(asked, self.embedder.embed(answered), strict=True)]
        return [
            min(1.0, max(0.0, (cosine - self.low) / (self.high - self.low)))
            * (guard(split_words(p), split_words(c)) if self.has_guards else 1.0)
            for cosine, p, c in zip(cosines, asked, answered, strict=True)
        ]


def guard(asked: list[str], answered: list[str]) -> float:
    """Return novelty times prose, in [0, 1].

    Args:
        asked: The prompt's words.
        answered: The completion's words.
    """
    content = content_words(answered)
    if not content:
        return 0.0
    kinds = set(content)
    novelty = len(kinds - set(content_words(asked))) / len(kinds)
    prose = min(1.0, len(kinds) / len(content) / FULL_DISTINCT_SHARE)
    if sum(word.isascii() for word in answered) > len(answered) / 2:
        share = sum(word in FUNCTION_WORDS for word in answered) / len(answered)
        prose *= min(1.0, share / FULL_FUNCTION_SHARE)
    return min(1.0, novelty / FULL_NOVELTY) * prose
