"""What a metric says of itself to ``evaluate``: the part that all metrics here share."""

from typing import Any

import datasets
import evaluate

INTEGER = datasets.Value("int64")
TEXT = datasets.Value("string")


def describe_metric(
    description: str,
    citation: str,
    inputs: str,
    urls: list[str],
    *,
    predictions: Any = INTEGER,
    references: Any = INTEGER,
) -> evaluate.MetricInfo:
    """Return what a metric's ``_info`` returns.

    Args:
        description: What it measures.
        citation: BibTeX of where it is from.
        inputs: What it takes and returns.
        urls: Pages on it.
        predictions: The type of one prediction; the index of a chosen answer by default.
        references: Likewise of one reference.
    """
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description=inputs,
        features=datasets.Features({"predictions": predictions, "references": references}),
        reference_urls=urls,
    )
