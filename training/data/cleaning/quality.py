"""What a text looks like in figures, and which of them lie too far out.

Fixed limits destroy domain text: Gopher's drop half of clean medical abstracts and all Chinese. So the limits are
fitted, for each source and language, either to trusted text (the quantile that loses a stated share) or to the source
itself (some interquartile ranges beyond the quartile). Two figures come from small language models of the same text:
``character_bits`` finds what no one writes in that language, ``order_gain`` words in no order. A document is judged by
a model that has not seen it.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from deepseek_training.data.cleaning.ngram_model import NgramModel, characters_of
from deepseek_training.data.cleaning.words import hash_ngrams, hash_words, words_of

# Below this many documents quartiles say little; the models of fewer are not judged by.
MIN_DOCUMENTS = 50
# Shorter texts vary too much to be judged by a language model.
_MIN_CHARACTERS, _MIN_WORDS = 120, 40
_CHARACTER_ORDER, _WORD_ORDER = 5, 2
_FOUND_SHARE = 0.95


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the limit of a figure is fitted.

    Args:
        is_high_bad: Whether large values are bad.
        always: The limit that always holds.
        never_within: Values within this one are never dropped.
        least_range: The least interquartile range that is reckoned with.
    """

    is_high_bad: bool
    always: float
    never_within: float
    least_range: float


_RULES = {
    "letters": Rule(False, 0.15, 0.40, 0.02),
    "repeated_lines": Rule(True, 0.70, 0.45, 0.02),
    "repeated_words": Rule(True, 0.70, 0.45, 0.02),
    "character_bits": Rule(True, np.inf, 0.0, 0.05),
    # Fitted to the sample's own words in random order instead, of which nearly all shall lie beyond it.
    "order_gain": Rule(False, -np.inf, np.inf, 0.0),
}


@dataclasses.dataclass
class QualityModel:
    """Limits and language models of one source and language.

    Args:
        limits: By figure, the value beyond which a document is dropped.
        characters: Two models, each of one half of the documents; none where there were too few.
        words: Likewise.
        num_documents: What it was fitted to.
    """

    limits: dict[str, float]
    characters: tuple[NgramModel, ...] = ()
    words: tuple[NgramModel, ...] = ()
    num_documents: int = 0

    def measure(self, text: str, half: int) -> dict[str, float]:
        """Return a text's figures; those that cannot be measured are absent.

        Args:
            text: The text.
            half: Which half of the documents it belongs to; the other half's models judge it.
        """
        hashes = hash_words(words_of(text))
        figures = measure_shape(text, hashes)
        symbols = characters_of(text)
        is_long = len(hashes) >= _MIN_WORDS
        if self.characters and (is_long or len(symbols) >= _MIN_CHARACTERS):
            figures["character_bits"] = self.characters[1 - half].bits(symbols)[-1]
        if self.words and is_long:
            unigram, bigram = self.words[1 - half].bits(hashes)
            figures["order_gain"] = unigram - bigram
        return figures

    def judge(self, figures: dict[str, float]) -> str:
        """Return why a text is dropped, empty for a text that stays.

        Args:
            figures: From `measure`.
        """
        for name, value in figures.items():
            is_high = _RULES[name].is_high_bad
            limit = self.limits[name]
            if (value > limit) if is_high else (value < limit):
                return f"{name}: {value:.2f} is {'above' if is_high else 'below'} {limit:.2f}"
        return ""


def measure_shape(text: str, hashes: np.ndarray) -> dict[str, float]:
    """Return the figures that need no model.

    ``letters`` is the share of letters among all but white space, ``repeated_lines`` the share of characters in
    lines that stood before, ``repeated_words`` the share of word 5-grams that stood before.

    Args:
        text: The text.
        hashes: Of its words.
    """
    visible = len("".join(text.split()))
    letters = sum(map(str.isalpha, text))
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    first = {line: i for i, line in reversed(list(enumerate(lines)))}
    repeated = sum(len(line) for i, line in enumerate(lines) if first[line] != i)
    ngrams = hash_ngrams(hashes, 5)
    return {
        "letters": letters / visible if visible else 0.0,
        "repeated_lines": repeated / max(1, sum(map(len, lines))),
        "repeated_words": 1 - len(np.unique(ngrams)) / len(ngrams) if len(ngrams) else 0.0,
    }


def fit_quality(texts: Sequence[str], halves: Sequence[int], *, fence: float, max_loss: float | None) -> QualityModel:
    """Return the models and limits of a sample of one source and language.

    Args:
        texts: The sample.
        halves: Of each text 0 or 1.
        fence: Interquartile ranges beyond the quartile, for text that may be dirty.
        max_loss: For trusted text the share that may be lost over all figures; None for text that may be dirty.
    """
    loosest = {name: rule.always for name, rule in _RULES.items()}
    if len(texts) < MIN_DOCUMENTS:
        return QualityModel(loosest, num_documents=len(texts))
    model = QualityModel(loosest, *_fit_models(texts, halves), num_documents=len(texts))
    measured = [model.measure(text, half) for text, half in zip(texts, halves, strict=True)]
    model.limits["order_gain"] = _shuffled_gain(model, texts, halves)
    for name in _RULES:
        if name == "order_gain":
            continue
        values = [figures[name] for figures in measured if name in figures]
        if len(values) >= MIN_DOCUMENTS:
            model.limits[name] = _limit(name, np.array(values), fence, max_loss)
    return model


def _fit_models(texts: Sequence[str], halves: Sequence[int]) -> tuple[tuple[NgramModel, ...], tuple[NgramModel, ...]]:
    def of_half(half: int) -> Iterable[str]:
        return (text for text, own in zip(texts, halves, strict=True) if own == half)

    characters = [NgramModel(_CHARACTER_ORDER, map(characters_of, of_half(half))) for half in (0, 1)]
    words = [NgramModel(_WORD_ORDER, (hash_words(words_of(text)) for text in of_half(half))) for half in (0, 1)]
    return tuple(characters), tuple(words)


def _shuffled_gain(model: QualityModel, texts: Sequence[str], halves: Sequence[int]) -> float:
    """The gain that all but a few of the texts stay below once their words are in random order."""
    rng, gains = np.random.default_rng(0), []
    for text, half in zip(texts, halves, strict=True):
        hashes = hash_words(words_of(text))
        if len(hashes) >= _MIN_WORDS:
            unigram, bigram = model.words[1 - half].bits(rng.permutation(hashes))
            gains.append(unigram - bigram)
    return float(np.quantile(gains, _FOUND_SHARE)) if len(gains) >= MIN_DOCUMENTS else -np.inf


def _limit(name: str, values: np.ndarray, fence: float, max_loss: float | None) -> float:
    rule = _RULES[name]
    if max_loss is not None:
        share = max_loss / len(_RULES)
        limit = float(np.quantile(values, 1 - share if rule.is_high_bad else share))
    else:
        low, high = np.quantile(values, [0.25, 0.75])
        reach = fence * max(high - low, rule.least_range)
        limit = float(high + reach if rule.is_high_bad else low - reach)
    if rule.is_high_bad:
        return min(max(limit, rule.never_within), rule.always)
    return max(min(limit, rule.never_within), rule.always)
