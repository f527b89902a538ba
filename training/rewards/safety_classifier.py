"""The embedded safety classifiers, of English and Chinese: logistic regression over hashed n-grams.

    p_unsafe = sigmoid(bias + sum over distinct features f of weight[hash(f)] / sqrt(number of distinct features))

Small enough to ship (262,144 8-bit weights, most of them 0) and to score thousands of texts per second on one core;
what they can and cannot tell is measured in ``data/safety_classifier.json`` and ``data/safety_classifier_zh.json``.
Trained by `train_safety_classifier` and `train_safety_classifier_zh`. A text is as unsafe as its worst
sentence, for a harmless context would dilute an abusive one; and hashing is CRC-32, because Python's own hash differs
between processes.
"""

import functools
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deepseek_training.rewards.scripts import find_foreign_script, is_han
from deepseek_training.rewards.stored_arrays import read_arrays
from deepseek_training.rewards.words import ngrams, split_sentences, split_words

NUM_BUCKETS = 1 << 18
MAX_WORDS = 30  # a longer sentence is cut into stretches of this many words
DATA_FOLDER = Path(__file__).parents[1] / "data"
EMBEDDED_PATH, EMBEDDED_PATH_ZH = DATA_FOLDER / "safety_classifier.npz", DATA_FOLDER / "safety_classifier_zh.npz"


class SafetyClassifier:
    """Probability that a text is unsafe: hateful, abusive, or help towards harm.

    Args:
        weights: [NUM_BUCKETS], float32.
        bias: The intercept.
    """

    def __init__(self, weights: np.ndarray, bias: float) -> None:
        if weights.shape != (NUM_BUCKETS,):
            raise ValueError(f"safety classifier: weights of shape {weights.shape}, expected ({NUM_BUCKETS},)")
        self.weights = weights
        self.bias = bias

    @classmethod
    @functools.cache
    def load(cls, path: Path = EMBEDDED_PATH) -> "SafetyClassifier":
        """Return the classifier stored in a file of `save`.

        Raises:
            FileNotFoundError: There is no such file.
        """
        stored = read_arrays(path, "safety classifier")
        return cls(stored["weights"].astype(np.float32) * stored["scale"], float(stored["bias"]))

    def save(self, path: Path) -> None:
        """Write the classifier with 8-bit weights."""
        scale = np.float32(np.abs(self.weights).max() / 127)
        weights = np.round(self.weights / scale).astype(np.int8)
        np.savez_compressed(path, weights=weights, scale=scale, bias=np.float32(self.bias))

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        """Return the probability that each text is unsafe, float64 [len(texts)]."""
        return np.array([max(self.predict_words(part) for part in split_stretches(text)) for text in texts])

    def predict_words(self, words: Sequence[str]) -> float:
        """Return the probability that a stretch of words is unsafe."""
        features = hash_features(words)
        logit = self.bias + (self.weights[features].sum() / np.sqrt(len(features)) if len(features) else 0.0)
        return float(1 / (1 + np.exp(-logit)))


class EmbeddedSafety:
    """The two classifiers that ship, for English and Chinese; a text in both is judged by both."""

    def __init__(self) -> None:
        self.english = SafetyClassifier.load(EMBEDDED_PATH)
        self.chinese = SafetyClassifier.load(EMBEDDED_PATH_ZH)

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        """Return the probability that each text is unsafe, float64 [len(texts)].

        NaN for a text in another script in which nothing unsafe was heard.
        """
        return np.array([self._predict_one(text) for text in texts], np.float64)

    def _predict_one(self, text: str) -> float:
        unsafe = max(self.predict_stretch(part) for part in split_stretches(text))
        return math.nan if unsafe <= 0.5 and find_foreign_script(text) is not None else unsafe

    def predict_stretch(self, words: list[str]) -> float:
        """Return the probability that one stretch of words is unsafe.

        Args:
            words: Of `split_stretches`.
        """
        chinese = [word for word in words if is_han(word)]
        others = [word for word in words if not is_han(word)]
        judged = [self.chinese.predict_words(chinese)] if chinese else []
        if others or not words:
            judged.append(self.english.predict_words(others))
        return max(judged)


def hash_features(words: Sequence[str]) -> np.ndarray:
    """Return the distinct buckets of a text's features, int64.

    Features are words, word pairs, and the 3- to 5-letter pieces of each word with its borders marked, which still see
    a word that is misspelt or joined to another; of Han words, which are pairs of characters, the characters.

    Args:
        words: From `split_words`.
    """
    features = {f"w {word}" for word in words}
    features.update(f"b {first} {second}" for first, second in ngrams(words, 2))
    for word in set(words):
        if is_han(word):
            features.update(f"h {character}" for character in word)
            continue
        marked = f"<{word}>"
        features.update(
            f"c {marked[i : i + n]}" for n in (3, 4, 5) for i in range(len(marked) - n + 1) if len(marked) > n
        )
    return np.unique(np.array([zlib.crc32(text.encode()) % NUM_BUCKETS for text in features], dtype=np.int64))


def split_stretches(text: str) -> list[list[str]]:
    """Return the words of each sentence, long ones cut, at least one list."""
    stretches = []
    for sentence in split_sentences(text):
        words = split_words(sentence)
        stretches += [words[i : i + MAX_WORDS] for i in range(0, len(words), MAX_WORDS)]
    return stretches or [[]]
