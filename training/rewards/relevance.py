"""Relevance: does the completion speak about what the prompt asks, in words of its own?

    relevance  = similarity * max(novelty, given) * prose, of the completion without the prompt if that is quoted whole
    similarity = max(1 / (1 + exp(-(cosine - emptiness - commonness - middle) / width)), min(1, coverage / 0.6))
    cosine     = embed(prompt) . embed(completion)
    emptiness  = max(0, mean of the completion's 3 largest cosines with the `EMPTY_ANSWERS` of its language - 0.3)
    commonness = the completion's mean cosine with other prompts of its language (every eighth of the embedded training
                 dialogues)
    coverage   = share of the prompt's content words, weighted by rarity, that the completion names (also by initials)
    novelty    = min(1, share of the completion's distinct content words, by rarity, that the prompt lacks in any
                 form / 0.7)
    given      = 0.5 where the completion leaves out a sentence of the prompt and may treat another, else 0
    prose      = max(min(1, share of function words / 0.25), list) * min(1, share of distinct content words / 0.6)
                 (of Chinese function words 0.15 are enough)
    list       = 0.5 * min(1, separators (commas, dashes, bars, numbers "1.", line breaks) a word / (1 / 6))

Similarity alone is hacked at once: repeating the prompt maximizes it. `novelty` takes an echo to 0, gives fillers
between its words little, and lets an answer name its subject freely; a prompt quoted whole is taken out first, else
praise beside an echo would bring the new words; `given` lets a text that was to be corrected or sorted earn half;
`prose` takes keywords strung together and a word said over and over to 0, and lets a list that is written as one earn
half; `emptiness` and `commonness` take down what would go with any question. The embedder is the small one that ships
(`deepseek_training.rewards.text_embedder`) or any sentence-embedding model (`SentenceEncoder`).

Chinese words are pairs of characters; its novelty is counted by characters, so that the prompt's in another order are
no news.

Failure modes: a bag of words knows no truth and no grammar, so a false statement on the topic earns as much as a true
one; an honest answer of a word or two ("Paris", "About one in ten") earns 0 or little; one sentence of several that
the prompt has, said again, earns half, and a prompt with rare words put in between may earn all; the guards and the
embedded embedder are made for English and Chinese in simplified characters: in other languages of Latin script `prose`
takes honest answers to 0, and text in other scripts is not judged.
"""

import functools
import math
import re
from typing import Any, Protocol

import numpy as np
from transformers.utils import logging

from deepseek_training.data.texts import read_rows
from deepseek_training.rewards.copied_text import treats_given_text, without_quoted_prompt
from deepseek_training.rewards.empty_answers import EMPTY_ANSWERS, EMPTY_ANSWERS_ZH
from deepseek_training.rewards.function_words import FUNCTION_WORDS
from deepseek_training.rewards.scripts import find_foreign_script, han_share, is_han
from deepseek_training.rewards.text_embedder import TextEmbedder
from deepseek_training.rewards.words import content_words, has_form_of, split_words, stem, text_of

logger = logging.get_logger(__name__)

# Between the cosines of unrelated and of good answers (quartiles on held-out dialogues, data/text_embedder.json). A
# logistic and not a ramp: where a ramp is 0 a policy that is off the topic could not learn in which direction it lies.
MIDDLE_COSINE, COSINE_WIDTH = 0.25, 0.08
LEAST_EMPTINESS, NUM_EMPTY = 0.3, 3
FULL_COVERAGE, FULL_NOVELTY, FULL_DISTINCT_SHARE = 0.6, 0.7, 0.6
FULL_FUNCTION_SHARE, FULL_FUNCTION_SHARE_ZH = 0.25, 0.15
FULL_SEPARATORS, LIST_SHARE, GIVEN_SHARE = 1 / 6, 0.5, 0.5
OTHER_PROMPTS_STEP = 8
_SEPARATOR = re.compile(r"[,;|\n\u2022\uff0c\u3001\uff1b]|(?:^|\s)(?:[-+*]|\d{1,2}[.)])(?=\s)")
_CAPITALS = re.compile(r"\b[A-Z]{2,6}\b")
_CASED_WORD = re.compile(r"[^\W\d_][\w'-]*")


class Embedder(Protocol):
    """What `Relevance` needs of an embedder."""

    def embed(self, texts: list[str]) -> np.ndarray:
        """Return [len(texts), dimensions] unit rows."""


class Relevance:
    """Cosine of prompt and completion under guards against echo, keyword lists and repetition.

    Args:
        embedder: Anything with ``embed(texts)`` or, for a cross-encoder, ``match(prompts, completions)``, whose
            probability stands in the cosine's place; None takes the one that ships.
        middle: The cosine that earns one half, in [-1, 1].
        width: How far the cosine must rise to go from 0.5 to 0.73, above 0.
        has_guards: False leaves the bare cosine, to show what PPO makes of it.
    """

    def __init__(
        self,
        embedder: Embedder | None = None,
        middle: float = MIDDLE_COSINE,
        width: float = COSINE_WIDTH,
        has_guards: bool = True,
    ) -> None:
        if not -1 <= middle <= 1 or not width > 0:
            raise ValueError(f"middle, width: got {middle}, {width}, expected -1 <= middle <= 1 and width > 0")
        self.__name__ = "relevance"  # GRPO and RLOO log a reward under its __name__
        self.lexicon = TextEmbedder.load()
        self.embedder = self.lexicon if embedder is None else embedder
        self.middle, self.width, self.has_guards = middle, width, has_guards

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: Any = None, **kwargs: Any
    ) -> list[float | None]:
        """Return one score in [0, 1] per completion; an empty one gets 0.

        With the embedded embedder, None for a prompt in a script that it was not made for (not Latin, not Han), and 0
        for a completion in such a script under another prompt; a warning names the script once.

        Args:
            prompts: Strings or chat messages, one a completion.
            completions: Strings or chat messages.
            completion_ids: Not used.
            kwargs: Not used.

        Raises:
            ValueError: There are more or fewer prompts than completions.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"relevance: {len(prompts)} prompts for {len(completions)} completions")
        asked, answered = [text_of(item) for item in prompts], [text_of(item) for item in completions]
        said = answered
        if self.has_guards:
            said = [without_quoted_prompt(*pair) for pair in zip(asked, answered, strict=True)]
        near = self._match(asked, said)
        scores: list[float | None] = [self._score(*row) for row in zip(asked, answered, said, near, strict=True)]
        if self.embedder is self.lexicon:
            scores = [self._judge_script(*row) for row in zip(asked, answered, scores, strict=True)]
        return scores

    def _judge_script(self, asked: str, answered: str, score: float | None) -> float | None:
        """The score; None where the prompt, 0 where only the completion is in a script without a model."""
        foreign = [find_foreign_script(text) for text in (asked, answered)]
        for script in foreign:
            if script is not None:
                logger.warning_once(
                    f"relevance: got text in {script} script, expected English or Chinese; it is not judged (pass "
                    "Relevance an embedder that knows it)"
                )
        if foreign[0] is not None:
            return None
        return 0.0 if foreign[1] is not None else score

    def _match(self, asked: list[str], said: list[str]) -> list[float]:
        """How near each completion is to its prompt, in [0, 1]."""
        if hasattr(self.embedder, "match"):
            return [float(p) for p in self.embedder.match(asked, said)]
        distinct = list(dict.fromkeys(asked))  # GRPO repeats a prompt for each of its completions
        rows = dict(zip(distinct, self.embedder.embed(distinct), strict=True))
        answers = self.embedder.embed(said)
        cosines = np.array([float(rows[p] @ c) for p, c in zip(asked, answers, strict=True)])
        if self.has_guards and len(said):
            cosines = cosines - self._generality(said, answers)
        # Beyond 700 the exponential overflows, and the score is 0 to the last bit.
        return [1 / (1 + math.exp(min(700.0, (self.middle - cosine) / self.width))) for cosine in cosines]

    def _generality(self, said: list[str], answers: np.ndarray) -> np.ndarray:
        """Emptiness plus commonness of each answer, compared with texts of its language."""
        is_chinese = np.array([han_share(text) > 0.5 for text in said])
        each = []
        for empty_rows, mean_prompt in self._references:
            nearest = np.sort(answers @ empty_rows.T, axis=1)[:, -NUM_EMPTY:].mean(axis=1)
            each.append(np.maximum(0.0, nearest - LEAST_EMPTINESS) + answers @ mean_prompt)
        return np.where(is_chinese, each[1], each[0])

    @functools.cached_property
    def _references(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The vectors of the empty answers and the mean vector of other prompts, English and Chinese."""
        references = []
        for name, empty in (("dialogues", EMPTY_ANSWERS), ("dialogues_zh", EMPTY_ANSWERS_ZH)):
            prompts = [row["prompt"] for row in read_rows(name) if row["split"] == "train"][::OTHER_PROMPTS_STEP]
            references.append((self.embedder.embed(list(empty)), self.embedder.embed(prompts).mean(axis=0)))
        return references

    def _score(self, asked: str, answered: str, said: str, near: float) -> float:
        similarity = min(1.0, max(near, coverage(asked, said, self.lexicon) / FULL_COVERAGE))
        if not self.has_guards:
            return similarity
        # what is left beside a quoted prompt may leave out whatever it likes
        is_given = said == answered and treats_given_text(asked, answered)
        return similarity * guard(asked, said, self.lexicon, GIVEN_SHARE if is_given else 0.0)


def coverage(asked: str, answered: str, lexicon: TextEmbedder) -> float:
    """Return the share of the prompt's content words that the answer names, weighted by rarity, in [0, 1].

    Words that the answer gives by their initials count as named: "GAN" for "Giant Axonal Neuropathy".

    Args:
        asked: The prompt.
        answered: The completion.
        lexicon: Knows how rare words are.
    """
    wanted = sorted(set(content_words(split_words(asked))))
    if not wanted:
        return 0.0
    named = set(content_words(split_words(answered))) | _named_by_initials(asked, set(_CAPITALS.findall(answered)))
    weights = lexicon.weigh(wanted)
    total = float(weights.sum())
    return float(sum(weights[i] for i, word in enumerate(wanted) if word in named)) / total if total > 0 else 0.0


def _named_by_initials(asked: str, capitals: set[str]) -> set[str]:
    """The stems of the runs of content words whose initials stand among the capitals."""
    words = [word for word in _CASED_WORD.findall(asked) if word.lower() not in FUNCTION_WORDS]
    initials = "".join(word[0].upper() for word in words)
    found: set[str] = set()
    for text in capitals:
        start = initials.find(text)
        if start >= 0:
            found.update(content_words(split_words(" ".join(words[start : start + len(text)]))))
    return found


def guard(asked: str, answered: str, lexicon: TextEmbedder, least_novelty: float = 0.0) -> float:
    """Return novelty times prose, in [0, 1].

    Args:
        asked: The prompt.
        answered: The completion.
        lexicon: Knows how rare words are; "really" and "perhaps" between the prompt's words are little news.
        least_novelty: What novelty counts at least.
    """
    words = split_words(answered)
    content = content_words(words)
    if not content:
        return 0.0
    kinds = set(content)
    prose = min(1.0, len(kinds) / len(content) / FULL_DISTINCT_SHARE)
    is_latin = sum(word.isascii() for word in words) > len(words) / 2
    if is_latin or han_share(answered) > 0.5:
        function_share = sum(word in FUNCTION_WORDS for word in words) / len(words)
        separators = len(_SEPARATOR.findall(answered)) / len(words)
        is_list = LIST_SHARE * min(1.0, separators / FULL_SEPARATORS)
        full_share = FULL_FUNCTION_SHARE if is_latin else FULL_FUNCTION_SHARE_ZH
        prose *= max(min(1.0, function_share / full_share), is_list)
    return max(_novelty(set(split_words(asked)), words, lexicon), least_novelty) * prose


def _novelty(prompt: set[str], words: list[str], lexicon: TextEmbedder) -> float:
    """What share of the words, by rarity, the prompt does not have in any form."""
    known = {stem(word) for word in words if has_form_of(word, prompt)}.union(content_words(prompt))
    known.update(character for word in prompt if is_han(word) for character in word)
    units = sorted(_units(content_words(words)))
    weights = lexicon.weigh(units)
    fresh = sum(float(weight) for unit, weight in zip(units, weights, strict=True) if unit not in known)
    return min(1.0, fresh / max(float(weights.sum()), 1e-9) / FULL_NOVELTY)


def _units(content: list[str]) -> set[str]:
    """The distinct words, Han ones by their characters: the prompt's characters in another order are not new."""
    return {unit for word in content for unit in (word if is_han(word) else [word])}
