"""The expert atlas: per layer and expert, which domains, kinds of tokens, places and tokens it takes, and how surely.

Every figure of a domain weighs domains alike and has its error over documents. Axes: T tokens, K slots, G documents,
C classes (domains, kinds or places), E experts, R shufflings.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from deepseek_eval.interpret.information import (
    Information,
    against_chance,
    benjamini_hochberg,
    bootstrap_error,
    domain_tables,
    mutual_information,
)
from deepseek_eval.interpret.passages import Passage
from deepseek_eval.interpret.routed_tokens import RoutedTokens

KINDS = ("word start", "word part", "number", "punctuation", "space", "Han", "other")
_NUM_SHUFFLES = 1000
_NUM_TOKEN_SHUFFLES = 40
_NUM_SPLITS = 50
_NUM_TOKENS = 8
_LEAST_COUNT = 4


@dataclass(frozen=True)
class TakenToken:
    """A token that an expert takes more often than others do.

    Attributes:
        text: As it is written.
        count: Times the expert took it.
        lift: Its share among the expert's tokens over its share among all.
    """

    text: str
    count: int
    lift: float


@dataclass(frozen=True)
class ExpertEntry:
    """One expert of one layer.

    Attributes:
        expert: Its number.
        load: Share of the tokens that it takes, domains weighed alike.
        rates: By domain, the share of its tokens that the expert takes.
        rate_errors: By domain, over documents; None of a single document.
        lifts: By domain, rate over load.
        domain: Of the largest lift.
        q_value: How surely it prefers domains at all: false discovery rate over all experts of the model.
        kind_lifts: By kind of token, the same.
        place_lifts: By place, the same.
        tokens: What it takes most beyond the others.
    """

    expert: int
    load: float
    rates: tuple[float, ...]
    rate_errors: tuple[float | None, ...]
    lifts: tuple[float, ...]
    domain: str
    q_value: float
    kind_lifts: tuple[float, ...]
    place_lifts: tuple[float, ...]
    tokens: tuple[TakenToken, ...]


@dataclass(frozen=True)
class LayerEntry:
    """One layer.

    Attributes:
        layer: Its number in the model.
        domain: Information of expert and domain; None with one domain.
        kind: Of expert and kind of token.
        place: Of expert and place in the passage.
        stability: Correlation of the logarithms of the lifts over halves of the documents: mean, and standard
            deviation over splits; None where a domain has one document.
        experts: Of all experts.
    """

    layer: str
    domain: Information | None
    kind: Information
    place: Information
    stability: tuple[float, float] | None
    experts: tuple[ExpertEntry, ...]


@dataclass(frozen=True)
class Atlas:
    """What every expert takes.

    Attributes:
        domains: Names.
        kinds: Names.
        places: Names: tokens from the beginning of the passage.
        num_tokens: By domain.
        num_documents: By domain.
        layers: Of all layers of routed experts.
    """

    domains: tuple[str, ...]
    kinds: tuple[str, ...]
    places: tuple[str, ...]
    num_tokens: tuple[int, ...]
    num_documents: tuple[int, ...]
    layers: tuple[LayerEntry, ...]


def kind_of(text: str) -> str:
    """Return which of `KINDS` a token is.

    Args:
        text: As the tokenizer decodes it alone.
    """
    word = text.strip()
    if not word:
        return "space"
    first = unicodedata.category(word[0])
    if "\u4e00" <= word[0] <= "\u9fff":
        return "Han"
    if first[0] == "N":
        return "number"
    if first[0] in "PS" and word[0] != "\ufffd":
        return "punctuation"
    if first[0] != "L":
        return "other"
    return "word start" if text[0].isspace() else "word part"


def show_token(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return a token as text; of a part of a character its piece in the vocabulary.

    Args:
        tokenizer: The model's.
        token: Its id.
    """
    text = tokenizer.decode([token])
    return str(tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text or not text else text


class _Tokens:
    """The tokens with their classes, shared by all layers."""

    def __init__(self, routed: RoutedTokens, passages: Sequence[Passage], tokenizer: PreTrainedTokenizerBase) -> None:
        self.routed = routed
        self.domains = tuple(dict.fromkeys(passage.domain for passage in passages))
        documents, self.document = np.unique([passage.document for passage in passages], return_inverse=True)
        self.document = self.document[routed.passages]  # [T]
        self.num_documents = len(documents)
        self.domain_of: np.ndarray = np.zeros(self.num_documents, dtype=np.int64)  # [G]
        names = np.array([self.domains.index(passage.domain) for passage in passages])[routed.passages]
        self.domain_of[self.document] = names
        self.tokens_of = np.bincount(self.document, minlength=self.num_documents).astype(float)  # [G]
        ids, self.id_index = np.unique(routed.token_ids, return_inverse=True)
        kinds = [KINDS.index(kind_of(tokenizer.decode([int(one)]))) for one in ids]
        self.texts = [show_token(tokenizer, int(one)) for one in ids]
        self.kind = np.array(kinds)[self.id_index]
        self.place = np.floor(np.log2(routed.positions + 1)).astype(np.int64)
        edges = [2**power - 1 for power in range(self.place.max() + 2)]
        self.places = tuple(str(low) if high == low + 1 else f"{low}-{high - 1}" for low, high in pairwise(edges))
        self.weights = np.zeros(len(self.domains))
        np.add.at(self.weights, self.domain_of, self.tokens_of)

    def count(self, layer: int, classes: np.ndarray, num_classes: int) -> np.ndarray:
        """Return `[C, E]` choices for the class `[T]` of each token."""
        experts: np.ndarray = self.routed.experts[layer].astype(np.int64)
        width = self.routed.num_experts[layer]
        cells = classes[:, None] * width + experts
        return (
            np.bincount(cells[experts >= 0], minlength=num_classes * width).reshape(num_classes, width).astype(float)
        )

    def count_by_document(self, layer: int, classes: np.ndarray, num_classes: int) -> np.ndarray:
        """Return `[G, C, E]`."""
        cells = self.document * num_classes + classes
        return self.count(layer, cells, self.num_documents * num_classes).reshape(self.num_documents, num_classes, -1)


def make_atlas(
    routed: RoutedTokens,
    passages: Sequence[Passage],
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[str],
    seed: int = 0,
) -> Atlas:
    """Return the atlas of what `read_routing` saw.

    Args:
        routed: The tokens with their experts.
        passages: What was read.
        tokenizer: The model's.
        layers: A name for each layer.
        seed: Of shufflings and resamples.
    """
    tokens = _Tokens(routed, passages, tokenizer)
    rng = np.random.default_rng(seed)
    by_document = [tokens.count(number, tokens.document, tokens.num_documents) for number in range(len(layers))]
    p_values = [_preference_p(tokens, counts, rng) for counts in by_document]
    q_values = np.split(benjamini_hochberg(np.concatenate(p_values)), np.cumsum([len(part) for part in p_values])[:-1])
    entries = tuple(
        LayerEntry(
            layer=name,
            domain=_domain_information(tokens, by_document[number], rng) if len(tokens.domains) > 1 else None,
            kind=_token_information(tokens, number, tokens.kind, len(KINDS), rng),
            place=_token_information(tokens, number, tokens.place, len(tokens.places), rng),
            stability=_stability(tokens, by_document[number], rng) if len(tokens.domains) > 1 else None,
            experts=_expert_entries(tokens, number, by_document[number], q_values[number]),
        )
        for number, name in enumerate(layers)
    )
    return Atlas(
        domains=tokens.domains,
        kinds=KINDS,
        places=tokens.places,
        num_tokens=tuple(int(one) for one in tokens.weights),
        num_documents=tuple(int((tokens.domain_of == one).sum()) for one in range(len(tokens.domains))),
        layers=entries,
    )


def _rates(counts: np.ndarray, tokens_of: np.ndarray, domains: np.ndarray, num_domains: int) -> np.ndarray:
    """[..., C, E]: share of a domain's tokens that an expert takes, of document counts [G, E] and labels [..., G]."""
    totals = domain_tables(tokens_of[:, None], domains, num_domains)
    return domain_tables(counts, domains, num_domains) / np.maximum(totals, 1)


def _preference(rates: np.ndarray) -> np.ndarray:
    """[..., E]: divergence in bits of where an expert's tokens come from, from equal shares of the domains."""
    shares = rates / np.maximum(rates.sum(-2, keepdims=True), 1e-12)
    logs = np.log2(np.maximum(shares * rates.shape[-2], 1e-12))
    return (shares * logs).sum(-2)


def _shuffles(tokens: _Tokens, rng: np.random.Generator, number: int = _NUM_SHUFFLES) -> np.ndarray:
    return rng.permuted(np.tile(tokens.domain_of, (number, 1)), axis=1)


def _preference_p(tokens: _Tokens, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    num_domains = len(tokens.domains)
    found = _preference(_rates(counts, tokens.tokens_of, tokens.domain_of, num_domains))
    shuffled = _preference(_rates(counts, tokens.tokens_of, _shuffles(tokens, rng), num_domains))
    return (1 + (shuffled >= found - 1e-12).sum(0)) / (1 + len(shuffled))


def _domain_information(tokens: _Tokens, counts: np.ndarray, rng: np.random.Generator) -> Information:
    """Of document counts [G, E]; chance by giving whole documents another's domain."""
    num_domains = len(tokens.domains)
    # Domains weigh alike: each document's counts are divided by its domain's tokens.
    share = tokens.weights[tokens.domain_of]
    scaled = counts / share[:, None]
    bits = float(mutual_information(domain_tables(scaled, tokens.domain_of, num_domains)))
    shuffled = mutual_information(_rates(counts, tokens.tokens_of, _shuffles(tokens, rng), num_domains))
    tables = np.zeros((len(counts), num_domains, counts.shape[1]))
    tables[np.arange(len(counts)), tokens.domain_of] = scaled
    return against_chance(bits, bootstrap_error(tables, tokens.domain_of, rng), shuffled)


def _token_information(
    tokens: _Tokens, layer: int, classes: np.ndarray, num_classes: int, rng: np.random.Generator
) -> Information:
    """Of kinds or places; chance by shuffling tokens' classes within each document."""
    counts = tokens.count_by_document(layer, classes, num_classes)
    starts = np.nonzero(np.diff(tokens.document, prepend=-1))[0]
    is_whole = len(starts) == tokens.num_documents and bool((np.diff(tokens.document) >= 0).all())
    order = np.arange(len(classes)) if is_whole else np.argsort(tokens.document, kind="stable")
    shuffled = []
    for _ in range(_NUM_TOKEN_SHUFFLES):
        moved = np.empty_like(classes)
        within = np.lexsort((rng.random(len(classes)), tokens.document))
        moved[order] = classes[within]
        shuffled.append(mutual_information(tokens.count(layer, moved, num_classes)))
    error = bootstrap_error(counts, tokens.domain_of, rng)
    return against_chance(float(mutual_information(counts.sum(0))), error, np.array(shuffled))


def _stability(tokens: _Tokens, counts: np.ndarray, rng: np.random.Generator) -> tuple[float, float] | None:
    """Correlation over random halves of each domain's documents."""
    members = [np.nonzero(tokens.domain_of == one)[0] for one in range(len(tokens.domains))]
    if min(map(len, members)) < 2:
        return None
    found = []
    for _ in range(_NUM_SPLITS):
        is_first: np.ndarray = np.zeros(len(counts), dtype=bool)
        for part in members:
            is_first[rng.permutation(part)[: len(part) // 2]] = True
        halves = [_log_lifts(tokens, counts, is_half) for is_half in (is_first, ~is_first)]
        if all(half.std() > 0 for half in halves):
            found.append(float(np.corrcoef(halves[0], halves[1])[0, 1]))
    return (float(np.mean(found)), float(np.std(found))) if found else None


def _log_lifts(tokens: _Tokens, counts: np.ndarray, is_part: np.ndarray) -> np.ndarray:
    rates = _rates(counts[is_part] + 0.5, tokens.tokens_of[is_part], tokens.domain_of[is_part], len(tokens.domains))
    return np.log2(rates / rates.mean(0)).flatten()


def _expert_entries(tokens: _Tokens, layer: int, counts: np.ndarray, q_values: np.ndarray) -> tuple[ExpertEntry, ...]:
    num_domains = len(tokens.domains)
    rates = _rates(counts, tokens.tokens_of, tokens.domain_of, num_domains)
    errors = [_rate_errors(counts, tokens.tokens_of, tokens.domain_of == one) for one in range(num_domains)]
    load = rates.mean(0)
    lifts = rates / np.maximum(load, 1e-12)
    kinds = _lifts(tokens, layer, tokens.kind, len(KINDS))
    places = _lifts(tokens, layer, tokens.place, len(tokens.places))
    taken = _taken_tokens(tokens, layer)
    return tuple(
        ExpertEntry(
            expert=number,
            load=float(load[number]),
            rates=tuple(map(float, rates[:, number])),
            rate_errors=tuple(None if one is None else float(one[number]) for one in errors),
            lifts=tuple(map(float, lifts[:, number])),
            domain=tokens.domains[int(lifts[:, number].argmax())],
            q_value=float(q_values[number]),
            kind_lifts=tuple(map(float, kinds[:, number])),
            place_lifts=tuple(map(float, places[:, number])),
            tokens=taken[number],
        )
        for number in range(counts.shape[1])
    )


def _rate_errors(counts: np.ndarray, tokens_of: np.ndarray, is_domain: np.ndarray) -> np.ndarray | None:
    """[E], by the delta method over documents, as `deepseek_records.statistics.ratio_with_error` of one expert."""
    number, total = int(is_domain.sum()), tokens_of[is_domain].sum()
    if number < 2:
        return None
    residuals = counts[is_domain] - tokens_of[is_domain, None] * counts[is_domain].sum(0) / total
    return np.sqrt(number / (number - 1) * (residuals**2).sum(0)) / total


def _lifts(tokens: _Tokens, layer: int, classes: np.ndarray, num_classes: int) -> np.ndarray:
    """[C, E]: how often a class's tokens take an expert, over how often all do."""
    counts = tokens.count(layer, classes, num_classes)
    sizes = np.bincount(classes, minlength=num_classes)
    overall = counts.sum(0) / len(classes)
    return counts / np.maximum(sizes, 1)[:, None] / np.maximum(overall, 1e-12)


def _taken_tokens(tokens: _Tokens, layer: int) -> list[tuple[TakenToken, ...]]:
    """Of each expert the tokens with the largest count * log(lift): many, and beyond what its load explains."""
    counts = tokens.count(layer, tokens.id_index, len(tokens.texts))
    sizes = np.bincount(tokens.id_index, minlength=len(tokens.texts))
    lifts = counts / np.maximum(np.outer(sizes, counts.sum(0) / sizes.sum()), 1e-12)
    worth = np.where((counts >= _LEAST_COUNT) & (lifts > 1), counts * np.log(np.maximum(lifts, 1e-12)), 0)
    best = np.argsort(-worth, axis=0)[:_NUM_TOKENS]
    return [
        tuple(
            TakenToken(tokens.texts[one], int(counts[one, expert]), float(lifts[one, expert]))
            for one in best[:, expert]
            if worth[one, expert] > 0
        )
        for expert in range(counts.shape[1])
    ]
