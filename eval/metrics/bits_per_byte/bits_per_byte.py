"""Bits per byte of texts, with a standard error over documents.

Loaded offline by ``evaluate.load(<this folder>)``.

    bits per byte = sum over documents of -log2 P(document) / sum of their UTF-8 bytes

This is lm-evaluation-harness' ``bits_per_byte``: the sum of log-likelihoods over the sum of bytes, not a mean over
documents. Lower is better.
"""

import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from deepseek_records.statistics import ratio_with_error

_CITATION = """\
@article{gao2020pile, title={The Pile: An 800GB Dataset of Diverse Text for Language Modeling}, author={Gao et al.},
year={2020}, note={arXiv 2101.00027}}
"""
_DESCRIPTION = "Bits that a language model needs per UTF-8 byte of text, with a standard error over documents."
_INPUTS = """
Args:
    predictions: log-likelihood of each document, in nats.
    references: UTF-8 bytes of each.
Returns:
    bits_per_byte, bits_per_byte_stderr (None for a single document), n.
"""


class BitsPerByte(evaluate.Metric):
    """Bits per byte with a standard error over documents."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
            reference_urls=["https://arxiv.org/abs/2101.00027"],
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[int]) -> dict[str, Any]:
        bits = [-value / math.log(2) for value in predictions]
        value, stderr = ratio_with_error(bits, [float(count) for count in references])
        return {"bits_per_byte": value, "bits_per_byte_stderr": stderr, "n": len(bits)}
