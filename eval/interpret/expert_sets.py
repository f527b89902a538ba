"""What is lost without all experts that prefer a domain, masked together: a set, held against sets as busy as it.

One masked expert is replaced by its like, so preference and need fall apart. Here the experts that prefer a domain
most are masked at once. On half of the documents they are chosen, on the other half they are measured; beside
them stand random sets with as many experts in each layer and about their share of the routing, none of them in the
set. Errors count documents. Axes: G documents, E experts.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from deepseek_eval.interpret.ablation import change_by_domain, score_passages
from deepseek_eval.interpret.passages import Passage
from deepseek_eval.interpret.routed_tokens import RoutedTokens, layer_number
from deepseek_eval.interpret.steered_router import masked_expert
from deepseek_records.statistics import ratio_with_error
from modeling_deepseek.families import MoeLayer

SIZE, NUM_CONTROLS = 5, 8
_NUM_DRAWS = 400
# Place of a layer, and an expert's number.
ExpertSet = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class SetEffect:
    """What masking the experts that prefer a domain does.

    Attributes:
        domain: The domain.
        experts: Layer and expert of each, such as ``1:6``.
        load: Share of all routing that they take, domains weighed alike, on the half that chose them.
        control_load: The same of the random sets, mean.
        domain_load: Share of the domain's routing that the set takes.
        control_domain_load: The same of the random sets, mean: where the ratio of losses is that of these two, what
            the set does is what any as busy with the domain would do.
        num_controls: Random sets.
        change: By domain, loss without the set minus loss with it, nats per token.
        stderr: By domain, paired over documents; None of a single document.
        control_change: By domain, the same for the random sets, mean over them.
        control_stderr: By domain.
        ratio: The domain's own change over the random sets'; None where these change it by nothing, or for the better.
        ratio_stderr: Paired over documents.
    """

    domain: str
    experts: tuple[str, ...]
    load: float
    control_load: float
    domain_load: float
    control_domain_load: float
    num_controls: int
    change: tuple[float, ...]
    stderr: tuple[float | None, ...]
    control_change: tuple[float, ...]
    control_stderr: tuple[float | None, ...]
    ratio: float | None
    ratio_stderr: float | None


def measure_sets(
    model: PreTrainedModel,
    layers: Sequence[MoeLayer],
    passages: Sequence[Passage],
    routed: RoutedTokens,
    *,
    size: int | None = None,
    num_controls: int = NUM_CONTROLS,
    batch_size: int = 16,
    seed: int = 0,
) -> list[SetEffect]:
    """Return what masking each domain's preferred experts does; nothing where a domain has a single document.

    Args:
        model: In evaluation mode.
        layers: Its layers of routed experts.
        passages: What was read.
        routed: What the routers chose there.
        size: Experts of a set; 0: no sets; None: `SIZE`, at most a quarter of all and what can be spared.
        num_controls: Random sets beside each.
        batch_size: Passages at once.
        seed: Of the halves and the random sets.

    Raises:
        ValueError: The layers cannot do without so many experts.
    """
    rng = np.random.default_rng(seed)
    domains = list(dict.fromkeys(passage.domain for passage in passages))
    is_chooser, limits = split_documents(passages, rng), spare_experts(routed)
    if size is None:
        size = min(SIZE, sum(limits), sum(routed.num_experts) // 4)
    if is_chooser is None or len(domains) < 2 or not size:
        return []
    rates = _rates(routed, passages, is_chooser, domains)
    measured = [passage for passage, chooses in zip(passages, is_chooser, strict=True) if not chooses]
    if size > sum(limits):
        raise ValueError(f"--set-size: got {size}, expected at most {sum(limits)}, which the layers can do without")
    before = score_passages(model, measured, batch_size)
    bar = tqdm(total=len(domains) * (1 + num_controls), desc="masked sets", unit="set")

    def change(experts: ExpertSet) -> np.ndarray:
        with masked_experts(layers, experts):
            found: np.ndarray = score_passages(model, measured, batch_size) - before
        bar.update()
        return found

    effects = []
    for number, domain in enumerate(domains):
        chosen = preferred(rates, number, size, limits)
        controls = equally_busy(rates, chosen, num_controls, rng)
        changed = change(chosen)
        others = np.mean([change(one) for one in controls], axis=0) if controls else None
        names = tuple(f"{layer_number(layers[place])}:{expert}" for place, expert in chosen)
        effects.append(_effect(domain, names, measured, changed, others, rates, chosen, controls))
    bar.close()
    return effects


def spare_experts(routed: RoutedTokens) -> list[int]:
    """Return by layer how many experts it can do without: all but as many as a token takes at most.

    Args:
        routed: What the routers chose.
    """
    return [width - experts.shape[1] for width, experts in zip(routed.num_experts, routed.experts, strict=True)]


@contextmanager
def masked_experts(layers: Sequence[MoeLayer], experts: ExpertSet) -> Iterator[None]:
    """Run with several experts taken out of their routers' choice.

    Args:
        layers: Layers of routed experts.
        experts: Place in `layers` and number of each.
    """
    with ExitStack() as stack:
        for place, expert in experts:
            stack.enter_context(masked_expert(layers[place], expert))
        yield


def split_documents(passages: Sequence[Passage], rng: np.random.Generator) -> np.ndarray | None:
    """Return which passages are of the documents that choose, `[P]` bool; None where a domain has one document.

    Args:
        passages: P passages.
        rng: Draws the half.
    """
    chosen: list[int] = []
    for domain in dict.fromkeys(passage.domain for passage in passages):
        documents = sorted({passage.document for passage in passages if passage.domain == domain})
        if len(documents) < 2:
            return None
        chosen += rng.permutation(documents)[: len(documents) // 2].tolist()
    return np.array([passage.document in chosen for passage in passages])


def _rates(
    routed: RoutedTokens, passages: Sequence[Passage], is_chooser: np.ndarray, domains: Sequence[str]
) -> list[np.ndarray]:
    """By layer `[C, E]`: choices per token of each domain that fall on each expert."""
    domain_of = np.array([domains.index(passage.domain) for passage in passages])[routed.passages]
    is_read = is_chooser[routed.passages]
    found = []
    for experts, width in zip(routed.experts, routed.num_experts, strict=True):
        table = np.zeros((len(domains), width))
        token, slot = np.nonzero((experts >= 0) & is_read[:, None])
        np.add.at(table, (domain_of[token], experts[token, slot]), 1)
        found.append(table / np.bincount(domain_of[is_read], minlength=len(domains))[:, None])
    return found


def preferred(rates: Sequence[np.ndarray], domain: int, size: int, limits: Sequence[int]) -> ExpertSet:
    """Return the experts with the largest rate * log(rate / mean rate): busy with the domain, and beyond their share.

    Lift alone would name experts that hardly take a token.

    Args:
        rates: By layer `[C, E]`.
        domain: Its number.
        size: How many.
        limits: The most of each layer.
    """
    worth = {
        (place, expert): float(rate * np.log(max(rate, 1e-12) / max(mean, 1e-12)))
        for place, table in enumerate(rates)
        for expert, (rate, mean) in enumerate(zip(table[domain], table.mean(0), strict=True))
    }
    chosen: list[tuple[int, int]] = []
    for place, expert in sorted(worth, key=lambda one: -worth[one]):
        if len(chosen) < size and sum(other == place for other, _ in chosen) < limits[place]:
            chosen.append((place, expert))
    return tuple(sorted(chosen))


def _load(rates: Sequence[np.ndarray], experts: ExpertSet) -> float:
    return _share([table.mean(0) for table in rates], experts)


def _share(rates: Sequence[np.ndarray], experts: ExpertSet) -> float:
    """Of `[E]` by layer, the share that falls on some experts."""
    return sum(float(rates[place][expert]) for place, expert in experts) / sum(float(row.sum()) for row in rates)


def equally_busy(
    rates: Sequence[np.ndarray], chosen: ExpertSet, number: int, rng: np.random.Generator
) -> list[ExpertSet]:
    """Return random sets without a chosen expert, as many in each layer, whose load is nearest to the chosen set's.

    Args:
        rates: By layer `[C, E]`.
        chosen: The set.
        number: How many sets.
        rng: Draws them.
    """
    goal, drawn = _load(rates, chosen), set()
    for _ in range(_NUM_DRAWS):
        one: list[tuple[int, int]] = []
        for place, table in enumerate(rates):
            rest = [expert for expert in range(table.shape[1]) if (place, expert) not in chosen]
            wanted = min(sum(other == place for other, _ in chosen), len(rest))
            one += [(place, int(expert)) for expert in rng.choice(rest, wanted, replace=False)]
        drawn.add(tuple(sorted(one)))
    return sorted(drawn, key=lambda one: (abs(_load(rates, one) - goal), one))[:number]


def _effect(
    domain: str,
    names: tuple[str, ...],
    passages: Sequence[Passage],
    changed: np.ndarray,
    others: np.ndarray | None,
    rates: Sequence[np.ndarray],
    chosen: ExpertSet,
    controls: Sequence[ExpertSet],
) -> SetEffect:
    own = change_by_domain(passages, changed)
    control = change_by_domain(passages, np.zeros_like(changed) if others is None else others)
    ratio: tuple[float | None, float | None] = (None, None)
    number = list(dict.fromkeys(passage.domain for passage in passages)).index(domain)
    of_domain = [table[number] for table in rates]
    is_own = np.array([passage.domain == domain for passage in passages])
    if others is not None and others[is_own].sum() > 0:
        documents = [passage.document for passage in passages if passage.domain == domain]
        ratio = ratio_with_error(changed[is_own].tolist(), others[is_own].tolist(), documents)
    return SetEffect(
        domain=domain,
        experts=names,
        load=_load(rates, chosen),
        control_load=float(np.mean([_load(rates, one) for one in controls])) if controls else 0.0,
        domain_load=_share(of_domain, chosen),
        control_domain_load=float(np.mean([_share(of_domain, one) for one in controls])) if controls else 0.0,
        num_controls=len(controls),
        change=tuple(value for value, _ in own),
        stderr=tuple(error for _, error in own),
        control_change=tuple(value for value, _ in control),
        control_stderr=tuple(error for _, error in control),
        ratio=ratio[0],
        ratio_stderr=ratio[1],
    )
