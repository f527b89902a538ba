"""The embedded sentence embedder of the relevance reward: a vector for each word, one sum.

    embed(text) = normalize(sum over words w of log(1 + count(w)) * vector[w])
    vector[w]   = the mean of its four-letter pieces' vectors, for a word that is not in the vocabulary

A bag of words, so word order is lost, but words are compared by what they mean: "prevalence" is near "how many
people". `train_text_embedder` distils it from a real sentence encoder (all-MiniLM-L6-v2) and trains
it to tell an answer from other answers; its measured accuracy stands in ``data/text_embedder.json``. Chinese
characters and pairs of them come from a second file, ``data/text_embedder_zh.npz``, by `train_text_embedder_zh`, in
the same space. Pieces are hashed by CRC-32, as Python's own hash differs by process.
"""

import functools
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from deepseek_training.rewards.scripts import is_han
from deepseek_training.rewards.stored_arrays import read_arrays
from deepseek_training.rewards.words import content_words, split_words

NUM_PIECES = 2048
DATA_FOLDER = Path(__file__).parents[1] / "data"
EMBEDDED_PATHS = (DATA_FOLDER / "text_embedder.npz", DATA_FOLDER / "text_embedder_zh.npz")


class TextEmbedder:
    """Texts to unit vectors; the cosine of two is their dot product.

    Args:
        words: The vocabulary: stems of English, characters of Chinese and pairs of them.
        vectors: [len(words) + NUM_PIECES, dimensions], float32; the pieces come last. A part without pieces can be
            saved.
        rarity: [len(words)], float32: log of documents over documents that hold the word, 0 or more.
    """

    def __init__(self, words: Sequence[str], vectors: np.ndarray, rarity: np.ndarray) -> None:
        if len(vectors) - len(words) not in (0, NUM_PIECES) or len(rarity) != len(words):
            raise ValueError(
                f"text embedder: got {len(vectors)} vectors and {len(rarity)} rarities, expected "
                f"{len(words) + NUM_PIECES} and {len(words)} for {len(words)} words"
            )
        self.words = list(words)
        self.rows = {word: i for i, word in enumerate(self.words)}
        self.vectors = vectors
        self.rarity = rarity

    @classmethod
    @functools.cache
    def load(cls, *paths: Path) -> "TextEmbedder":
        """Return the embedder stored in files of `save`; without a path, the one that ships.

        Raises:
            FileNotFoundError: There is no such file.
        """
        parts = [_read(Path(path)) for path in paths or EMBEDDED_PATHS]
        words = [word for part in parts for word in part[0]]
        rarity = np.concatenate([rarity for _, _, rarity in parts])
        own = [vectors[: len(words)] for words, vectors, _ in parts]
        pieces = [vectors[len(words) :] for words, vectors, _ in parts]  # of the first only
        return cls(words, np.concatenate([*own, *pieces]), rarity)

    def save(self, path: Path) -> None:
        """Write the vectors in 8 bits, scaled a dimension at a time."""
        # The longest vectors are few: clipping them leaves the others finer steps.
        scales = (np.quantile(np.abs(self.vectors), 0.9995, axis=0) / 127).astype(np.float32)
        np.savez_compressed(
            path,
            words=np.frombuffer("\n".join(self.words).encode(), dtype=np.uint8),
            vectors=np.clip(np.round(self.vectors / scales), -127, 127).astype(np.int8),
            scales=scales,
            rarity=np.round(self.rarity * 16).astype(np.uint8),
        )

    def keep_words(self, start: int) -> "TextEmbedder":
        """Return the words from a row on, without the pieces: what a second file adds to the first."""
        words = self.words[start:]
        return TextEmbedder(words, self.vectors[start : len(self.words)], self.rarity[start:])

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return [len(texts), dimensions] unit rows; a text without content words gives a row of zeros."""
        if not texts:
            return np.zeros((0, self.vectors.shape[1]), np.float32)
        return np.stack([self._embed_one(text) for text in texts])

    def weigh(self, words: Sequence[str]) -> np.ndarray:
        """Return the rarity of each word, float32; one outside the vocabulary is as rare as any of its script."""
        rarest = self._rarest
        return np.array(
            [self.rarity[self.rows[w]] if w in self.rows else rarest[is_han(w)] for w in words], np.float32
        )

    @functools.cached_property
    def _rarest(self) -> tuple[float, float]:
        """The greatest rarity of other words and of Han words, 0 where there is none."""
        marks = np.array([is_han(word) for word in self.words], bool)
        return float(self.rarity[~marks].max(initial=0.0)), float(self.rarity[marks].max(initial=0.0))

    def find_rows(
        self, text: str, is_known: Callable[[str], bool] = lambda word: True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of a text's content words, int64, and the weight of each, float32.

        Args:
            text: The text.
            is_known: Whether a word of the vocabulary may be read as a whole; training says no now and then.
        """
        rows: list[int] = []
        weights: list[float] = []
        for word, count in Counter(content_words(split_words(text))).items():
            is_whole = word in self.rows and is_known(word)
            found = [self.rows[word]] if is_whole else self.piece_rows(word)
            rows += found
            weights += [float(np.log1p(count)) / len(found)] * len(found)
        return np.array(rows, dtype=np.int64), np.array(weights, dtype=np.float32)

    def piece_rows(self, word: str) -> list[int]:
        """Return the rows of a word's pieces: the characters of a Han word, else four letters, borders marked."""
        characters = [self.rows[c] for c in word if c in self.rows] if is_han(word) else []
        return characters or [len(self.words) + piece for piece in _hash_pieces(word)]

    def _embed_one(self, text: str) -> np.ndarray:
        rows, weights = self.find_rows(text)
        total = weights @ self.vectors[rows] if len(rows) else np.zeros(self.vectors.shape[1], np.float32)
        norm = np.linalg.norm(total)
        return total / norm if norm > 0 else total


def _read(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Words, vectors and rarities of a file."""
    stored = read_arrays(path, "text embedder")
    words = stored["words"].tobytes().decode().split("\n")
    return words, stored["vectors"].astype(np.float32) * stored["scales"], stored["rarity"] / np.float32(16)


@functools.lru_cache(maxsize=65_536)
def _hash_pieces(word: str) -> list[int]:
    marked = f"<{word}>"
    pieces = [marked[i : i + 4] for i in range(max(1, len(marked) - 3))]
    return [zlib.crc32(piece.encode()) % NUM_PIECES for piece in pieces]
