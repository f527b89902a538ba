"""What an expert tells of a token's domain, kind or place: mutual information with its error and its chance level.

The plug-in estimate is above 0 for any finite text, and documents of one domain are alike only within themselves, so
the chance level comes from shuffling whole documents (for domains) or tokens within documents (for kinds and places).

Axes: G documents, C classes, E experts, R resamples.
"""

from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 400


@dataclass(frozen=True)
class Information:
    """Mutual information of expert and class, in bits per choice.

    Attributes:
        bits: The plug-in estimate.
        stderr: By resampling documents.
        chance: Mean of the estimate where nothing is to be told.
        chance_95: Its 95th percentile.
        p_value: Share of the shuffled estimates that are as large, one added to both counts.
    """

    bits: float
    stderr: float
    chance: float
    chance_95: float
    p_value: float


def mutual_information(counts: np.ndarray) -> np.ndarray:
    """Return I = sum p(c, e) log2 p(c, e) / (p(c) p(e)) of each table.

    Args:
        counts: `[..., C, E]`, not negative.

    Returns:
        `[...]`; 0 for an empty table.
    """
    total = counts.sum((-2, -1), keepdims=True)
    joint = counts / np.maximum(total, 1)
    product = joint.sum(-1, keepdims=True) * joint.sum(-2, keepdims=True)
    ratio = np.divide(joint, product, out=np.ones_like(joint), where=joint > 0)
    return (joint * np.log2(ratio)).sum((-2, -1))


def bootstrap_error(counts: np.ndarray, strata: np.ndarray, rng: np.random.Generator) -> float:
    """Return the standard error of the information by drawing documents again, within their domains.

    Args:
        counts: `[G, C, E]`.
        strata: `[G]`, each document's domain.
        rng: Randomness.
    """
    weights = np.zeros((NUM_RESAMPLES, len(counts)))
    for stratum in np.unique(strata):
        (members,) = np.nonzero(strata == stratum)
        weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), NUM_RESAMPLES)
    tables = (weights @ counts.reshape(len(counts), -1)).reshape(NUM_RESAMPLES, *counts.shape[1:])
    return float(mutual_information(tables).std(ddof=1))


def against_chance(bits: float, stderr: float, shuffled: np.ndarray) -> Information:
    """Return the estimate beside what shuffled labels give.

    Args:
        bits: The estimate.
        stderr: Its error.
        shuffled: `[R]` estimates.
    """
    p_value = (1 + int((shuffled >= bits).sum())) / (1 + len(shuffled))
    return Information(bits, stderr, float(shuffled.mean()), float(np.quantile(shuffled, 0.95)), p_value)


def domain_tables(counts: np.ndarray, domains: np.ndarray, num_domains: int) -> np.ndarray:
    """Return `[..., C, E]` for labels `[..., G]` of documents with counts `[G, E]`.

    Args:
        counts: `[G, E]`.
        domains: `[..., G]` integers.
        num_domains: C.
    """
    is_domain = (domains[..., None, :] == np.arange(num_domains)[:, None]).astype(float)
    return is_domain @ counts


def benjamini_hochberg(p_values: np.ndarray) -> np.ndarray:
    """Return q-values: the false discovery rate at which each finding would be kept.

    Args:
        p_values: `[N]`.

    Reference: Benjamini and Hochberg, 1995.
    """
    order = np.argsort(p_values)
    ranked = p_values[order] * len(p_values) / np.arange(1, len(p_values) + 1)
    q_values = np.empty_like(ranked)
    q_values[order] = np.minimum(1, np.minimum.accumulate(ranked[::-1])[::-1])
    return q_values
