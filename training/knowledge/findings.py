"""Faults of the data that a graph shows: passages that are there twice, statements that contradict each other."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from deepseek_training.data.overlap import shingles
from deepseek_training.knowledge.extract import Statement, topic_id
from deepseek_training.knowledge.passages import Passage

_SAME = 0.8  # Jaccard similarity of word 5-grams
_FEW_WORDS = 20


@dataclasses.dataclass(frozen=True)
class Duplicate:
    """Two passages of nearly the same words.

    Args:
        first: Document of the one.
        second: Document of the other.
        topics: Their topics.
        section: Of the second.
        similarity: Jaccard index of their word 5-grams.
    """

    first: str
    second: str
    topics: tuple[str, str]
    section: str
    similarity: float


@dataclasses.dataclass(frozen=True)
class Contradiction:
    """A statement that one passage makes and another denies.

    Args:
        stated: The one.
        denied: The other.
    """

    stated: Statement
    denied: Statement


def find_duplicates(passages: Iterable[Passage]) -> list[Duplicate]:
    """Return pairs of passages that say the same under a topic, or under two.

    Args:
        passages: All of the data.
    """
    kept = [one for one in passages if one.topic and len(one.text.split()) >= _FEW_WORDS]
    parts = [shingles(one.text) for one in kept]
    grams = np.concatenate(parts) if parts else np.zeros(0, np.uint64)
    owners: np.ndarray = np.repeat(np.arange(len(parts)), list(map(len, parts)))
    order = np.argsort(grams, kind="stable")
    grams, owners = grams[order], owners[order]
    bounds: np.ndarray = np.flatnonzero(np.diff(grams)) + 1
    shared: dict[tuple[int, int], int] = {}
    for group in np.split(owners, bounds):
        if 2 <= len(group) <= 20:  # boilerplate is in more
            for place, one in enumerate(group):
                for other in group[place + 1 :]:
                    key = (min(one, other), max(one, other))
                    shared[key] = shared.get(key, 0) + 1
    found = []
    for (one, other), count in sorted(shared.items()):
        similarity = count / (len(parts[one]) + len(parts[other]) - count)
        if similarity >= _SAME:
            first, second = kept[one], kept[other]
            topics = (first.topic, second.topic)
            found.append(Duplicate(first.document, second.document, topics, second.section, round(similarity, 3)))
    return found


def find_contradictions(statements: Sequence[Statement]) -> list[Contradiction]:
    """Return what is stated plainly in one place and denied in another, of one topic, relation and term.

    Args:
        statements: All of the data.
    """
    denied = {_key(one): one for one in statements if one.is_negated}
    found: dict[tuple[str, str, str], Contradiction] = {}
    for one in statements:
        other = denied.get(_key(one))
        if other is not None and not one.is_negated and one.confidence > 0.8:
            found.setdefault(_key(one), Contradiction(one, other))
    return [found[key] for key in sorted(found)]


def _key(one: Statement) -> tuple[str, str, str]:
    return one.subject, one.relation, one.object


def topics_of(passages: Iterable[Passage]) -> dict[str, set[str]]:
    """Return by document the ids of its topics.

    Args:
        passages: The passages.
    """
    found: dict[str, set[str]] = {}
    for passage in passages:
        if passage.topic:
            found.setdefault(passage.document, set()).add(topic_id(passage.topic))
    return found
