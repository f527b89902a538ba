"""Bands of entities by how often training text names them, and sampling that raises the share of the rare ones."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from deepseek_training.knowledge.vocabulary import Vocabulary

# By the number of documents that name the entity: up to this many.
BANDS = {"unseen": 0, "1-2": 2, "3-10": 10, "11-50": 50, "over 50": 10**9}


def count_documents(texts: Iterable[str], vocabulary: Vocabulary) -> tuple[Counter[str], list[set[str]]]:
    """Return how many documents name each entity, and the entities of each document.

    Args:
        texts: The documents.
        vocabulary: The entities.
    """
    named = [{mention.term for mention in vocabulary.find(text)} for text in texts]
    return Counter(term for terms in named for term in terms), named


def band_of(count: int) -> str:
    """Return the band of an entity.

    Args:
        count: Training documents that name it.
    """
    return next(name for name, most in BANDS.items() if count <= most)


def rarest_band(terms: Iterable[str], counts: Mapping[str, int]) -> str | None:
    """Return the band of a document's rarest entity, None where it names none.

    Args:
        terms: Its entities.
        counts: By entity, from `count_documents` of the training text.
    """
    found = [counts.get(term, 0) for term in terms]
    return band_of(min(found)) if found else None


def balanced_weights(named: Sequence[set[str]], counts: Mapping[str, int], strength: float = 0.5) -> np.ndarray:
    """Return each document's chance to be drawn, relative to one whose entities are all the most frequent.

    `w_d = max over its entities e of (c_max / c_e)^strength`, and 1 for a document that names none.

    Args:
        named: Entities of each document.
        counts: Documents that name each entity.
        strength: 0 leaves all equal; 1 gives each entity about the same share.
    """
    most = max(counts.values(), default=1)
    return np.array([max(((most / counts[term]) ** strength for term in terms), default=1.0) for terms in named])


def draw_balanced(
    texts: Sequence[str], weights: np.ndarray, num_bytes: int, *, seed: int = 0, most_repeats: int = 4
) -> list[str]:
    """Return documents drawn by weight until they have as many bytes; none more often than `most_repeats` times.

    Args:
        texts: The documents.
        weights: From `balanced_weights`.
        num_bytes: UTF-8 bytes to reach.
        seed: Of the draws.
        most_repeats: Bound on the copies of a document.
    """
    rng = np.random.default_rng(seed)
    found: list[str] = []
    copies: Counter[int] = Counter()
    size = 0
    while (size < num_bytes and len(copies) * most_repeats > sum(copies.values())) or not found:
        for index in rng.choice(len(texts), size=len(texts), p=weights / weights.sum()):
            if size >= num_bytes:
                break
            if copies[int(index)] < most_repeats:
                copies[int(index)] += 1
                found.append(texts[int(index)])
                size += len(found[-1].encode())
    return found
