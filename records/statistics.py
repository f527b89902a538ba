"""Error bars shared by the metrics: of shares, of means, of a ratio of sums, clustered where items are near-copies.

Called by the metrics and by the stages. A single item has no spread, so its error is None. Items made from one
template depend on one another, so with clusters the errors count these and not the items.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence


def mean_with_error(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> tuple[float, float | None]:
    """Return the mean and its standard error.

    Args:
        values: One number an item, at least one.
        clusters: What each item was made from; None where all are independent.
    """
    return ratio_with_error(values, [1.0] * len(values), clusters)


def pooled_mean_with_error(groups: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """Return the mean over all items and its standard error from the spread within groups.

        Var = sum_g sum_i (x_gi - mean_g)^2 / (N - G) / N

    over G groups of N items together: lm-evaluation-harness's ``pooled_sample_stderr``.

    Args:
        groups: The numbers of each group, at least one per group.
    """
    n = sum(len(group) for group in groups)
    mean = sum(sum(group) for group in groups) / n
    if n == len(groups):
        return mean, None
    means = [sum(group) / len(group) for group in groups]
    squares = sum(sum((value - center) ** 2 for value in group) for group, center in zip(groups, means, strict=True))
    return mean, math.sqrt(squares / (n - len(groups)) / n)


def share_error(share: float, n: int) -> float | None:
    """Return the standard error of a share of n independent items, as `mean_with_error` has it of zeros and ones.

    Args:
        share: In [0, 1].
        n: Items, at least 1.
    """
    return math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None


def ratio_with_error(
    numerators: Sequence[float], denominators: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> tuple[float, float | None]:
    """Return sum(numerators) / sum(denominators) and its standard error by the delta method.

        r = sum(a) / sum(b);  Var(r) = G / (G - 1) * sum_g (sum_{i in g} (a_i - r b_i))^2 / sum(b)^2

    over G clusters, or over the items where none are given. With b = 1 this is the usual error of a mean.

    Args:
        numerators: a, one an item.
        denominators: b, one an item, at least one of them not zero.
        clusters: What each item was made from.

    Reference: Cochran, 1977, "Sampling Techniques", section 9A.2 (ratio estimates of clusters).
    """
    total = sum(denominators)
    ratio = sum(numerators) / total
    residuals: dict[Hashable, float] = defaultdict(float)
    for index, (a, b) in enumerate(zip(numerators, denominators, strict=True)):
        if b or a:  # An item outside the ratio does not count.
            residuals[clusters[index] if clusters is not None else index] += a - ratio * b
    if len(residuals) < 2:
        return ratio, None
    groups = len(residuals)
    variance = groups / (groups - 1) * sum(value**2 for value in residuals.values()) / total**2
    return ratio, math.sqrt(variance)


def difference_with_error(
    first: tuple[float, float | None], second: tuple[float, float | None]
) -> tuple[float, float | None]:
    """Return first minus second of two independent estimates, with its standard error.

    Args:
        first: Estimate and error.
        second: The same of the other one.
    """
    if first[1] is None or second[1] is None:
        return first[0] - second[0], None
    return first[0] - second[0], math.hypot(first[1], second[1])


def chi_square_p(statistic: float, freedom: int) -> float:
    """Return the probability of a chi-square statistic at least this large.

    Args:
        statistic: The statistic, not negative.
        freedom: Degrees of freedom, at least 1.
    """
    half = statistic / 2
    if freedom % 2 == 0:
        return math.exp(-half) * sum(half**k / math.factorial(k) for k in range(freedom // 2))
    terms = sum(half ** (k + 0.5) / math.gamma(k + 1.5) for k in range((freedom - 1) // 2))
    return math.erfc(math.sqrt(half)) + math.exp(-half) * terms


def wilson_interval(share: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """Return the interval of a share that n trials leave open.

    (p + z^2/2n +/- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)

    Args:
        share: Successes over trials, in [0, 1].
        n: Trials, at least 1.
        z: Quantile of the normal distribution; 1.96 gives 95 %.

    Reference: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def share_interval(share: float, n: int, stderr: float | None = None) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share, as wide as its standard error says where items are not independent.

    A share of 0 or 1 has a standard error of 0; its interval is that of n trials and not a point.

    Args:
        share: In [0, 1].
        n: Items.
        stderr: The share's standard error, where there is one: clustered items count as fewer trials.
    """
    spread = share * (1 - share)
    trials = min(float(n), spread / stderr**2) if stderr and spread else float(n)
    return wilson_interval(share, max(trials, 1.0))
