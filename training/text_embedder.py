"""The embedded sentence embedder of the relevance reward: hashed words, learned vectors, one sum.

    embed(text) = normalise(sum over words w of log(1 + count(w)) * (vector[w] + mean over pieces p of vector[p]))

A bag of words, so word order is lost, but words are compared by what they go with: "prevalence" is near "how many
people". Trained by `deepseek_training.train_text_embedder` to tell an answer from other answers of the same source;
its measured accuracy stands in ``data/text_embedder.json``. Hashing is CRC-32, as Python's own differs by process.
"""

import functools
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deepseek_training.words import content_words, split_words

NUM_BUCKETS, NUM_DIMENSIONS = 12_288, 48
EMBEDDED_PATH = Path(__file__).parent / "data" / "text_embedder.npz"


class TextEmbedder:
    """Texts to unit vectors; the cosine of two is their dot product.

    Args:
        vectors: [NUM_BUCKETS, NUM_DIMENSIONS], float32.
        rarity: [NUM_BUCKETS], float32: log of documents over documents that hold the word, 0 or more.
    """

    def __init__(self, vectors: np.ndarray, rarity: np.ndarray):
        if vectors.shape != (NUM_BUCKETS, NUM_DIMENSIONS):
            raise ValueError(f"text embedder: vectors of shape {vectors.shape}; wanted {NUM_BUCKETS, NUM_DIMENSIONS}")
        self.vectors = vectors
        self.rarity = rarity

    @classmethod
    @functools.cache
    def load(cls, path: Path = EMBEDDED_PATH) -> "TextEmbedder":
        """Return the embedder stored in a file of `save`.

        Raises:
            FileNotFoundError: There is no such file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"text embedder: no file {path}")
        with np.load(path) as file:
            return cls(file["vectors"].astype(np.float32) * file["scales"], file["rarity"].astype(np.float32) / 16)

    def save(self, path: Path) -> None:
        """Write the vectors in 8 bits, scaled a dimension at a time."""
        scales = (np.abs(self.vectors).max(0) / 127).astype(np.float32)
        vectors = np.round(self.vectors / scales).astype(np.int8)
        np.savez_compressed(path, vectors=vectors, scales=scales, rarity=np.round(self.rarity * 16).astype(np.uint8))

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return [len(texts), NUM_DIMENSIONS] unit rows; a text without content words gives a row of zeros."""
        return np.stack([self._embed_one(text) for text in texts]) if texts else np.zeros((0, NUM_DIMENSIONS))

    def weigh(self, words: Sequence[str]) -> np.ndarray:
        """Return the rarity of each word, float32; a word never seen is as rare as can be."""
        return self.rarity[[word_bucket(word) for word in words]] if words else np.zeros(0, np.float32)

    def _embed_one(self, text: str) -> np.ndarray:
        buckets, weights = hash_text(text)
        total = weights @ self.vectors[buckets] if len(buckets) else np.zeros(NUM_DIMENSIONS, np.float32)
        norm = np.linalg.norm(total)
        return total / norm if norm > 0 else total


def hash_text(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the buckets of a text's content words and their pieces, int64, and the weight of each, float32."""
    buckets: list[int] = []
    weights: list[float] = []
    for word, count in Counter(content_words(split_words(text))).items():
        ids = _hash_word(word)
        weight = float(np.log1p(count))
        buckets += ids
        weights += [weight] + [weight / max(1, len(ids) - 1)] * (len(ids) - 1)
    return np.array(buckets, dtype=np.int64), np.array(weights, dtype=np.float32)


def word_bucket(word: str) -> int:
    """Return the bucket of a whole word."""
    return zlib.crc32(f"w {word}".encode()) % NUM_BUCKETS


@functools.lru_cache(maxsize=65_536)
def _hash_word(word: str) -> list[int]:
    """The word's bucket, then those of its four-letter pieces, borders marked."""
    marked = f"<{word}>"
    pieces = [marked[i : i + 4] for i in range(len(marked) - 3)] if len(word) > 3 else []
    return [word_bucket(word), *(zlib.crc32(piece.encode()) % NUM_BUCKETS for piece in pieces)]
