"""Numbers as a reader wants them: values with their errors, counts, times and sizes.

One place, so that the card, the report and the closing table never round the same figure differently.
"""

import math
from typing import Any

from deepseek_records.stages import is_number
from deepseek_records.summary import Result

# Of the training stages; a benchmark's figures bring their own words.
_METRIC_WORDS = {"acc": "accuracy", "kl": "KL"}


def format_value(value: Any, stderr: Any = None) -> str:
    """Return a value, with its standard error where there is one.

    The error gets two significant digits and the value as many decimals; without one, the value gets four significant
    digits.

    Args:
        value: A number, a bool, a text or None (shown as a dash).
        stderr: Its standard error, or None.
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    if not is_number(value):
        return str(value)
    if isinstance(value, float) and abs(value) < 5e-7:
        value = 0.0  # rounding noise, such as a KL between a model and itself
    if is_number(stderr) and stderr > 5e-7 and math.isfinite(stderr):
        decimals = min(6, max(0, 1 - math.floor(math.log10(stderr))))
        return f"{value:.{decimals}f} \u00b1 {stderr:.{decimals}f}"
    if isinstance(value, int) or value == 0:
        return f"{value:,.0f}"
    if not math.isfinite(value) or not 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}"
    return f"{value:.{min(4, max(0, 3 - math.floor(math.log10(abs(value)))))}f}"


def format_count(count: float) -> str:
    """Return a count with a unit: ``154.1 B``, ``3.02 M``, ``812``.

    Args:
        count: Zero or more.
    """
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            scaled = count / size
            return f"{scaled:.{1 if scaled >= 100 else 2}f} {unit}"
    return f"{count:,.0f}"


def format_seconds(seconds: Any) -> str:
    """Return a duration: ``42 s``, ``3 min 05 s``, ``2 h 10 min``.

    Args:
        seconds: A number, or None where it was not recorded.
    """
    if not is_number(seconds):
        return "not recorded"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_bytes(size: Any) -> str:
    """Return a size in kB, MB or GB (powers of ten).

    Args:
        size: Bytes, or None where not recorded.
    """
    if not is_number(size):
        return "-"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"


def label_metric(metric: str) -> str:
    """Return a metric's name in words.

    Args:
        metric: The name in ``results``, such as ``bits_per_byte``.
    """
    return _METRIC_WORDS.get(metric, metric.replace("_", " "))


def label_figure(row: Result) -> str:
    """Return what a figure is, in words.

    Args:
        row: A measured figure.
    """
    return row.metric_label or label_metric(row.metric)


def label_dataset(row: Result) -> str:
    """Return what a figure was measured on: the task's label, else the data set, with its split.

    Args:
        row: A measured figure.
    """
    return ", ".join(part for part in (row.label or row.dataset, row.split) if part)
