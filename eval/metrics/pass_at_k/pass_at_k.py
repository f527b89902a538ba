"""pass@k of programs against their tests, run in the sandbox. A drop-in for ``code_eval``, with a standard error.

Loaded offline by ``evaluate.load(<this folder>)``; inputs are those of ``code_eval``, so its users' predictions fit.

Formula, for n samples per problem of which c pass: pass@k = 1 - C(n - c, k) / C(n, k), averaged over problems.
"""

import logging
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate

from deepseek_eval.metrics.description import TEXT, describe_metric
from deepseek_eval.sandbox.client import run_tests
from deepseek_records.statistics import mean_with_error

logger = logging.getLogger(__name__)

_CITATION = """\
@article{chen2021codex, title={Evaluating Large Language Models Trained on Code}, author={Chen et al.}, year={2021},
note={arXiv 2107.03374}}
"""
_DESCRIPTION = (
    "Unbiased probability that at least one of k samples passes its tests, with standard error over problems."
)
_INPUTS = """
Args:
    predictions: for each problem a list of candidate programs.
    references: for each problem the code that tests it; it must raise when the candidate is wrong.
    k: values of k; those above the smallest number of samples are left out, and a warning says so.
    timeout_s: seconds each program may run.
    num_workers: programs run at once; by default one a processor.
    allow_weak_sandbox: run even when the machine offers less than the sandbox's stated minimum.
    on_result: called after each program, for progress bars.
Returns:
    pass@k and pass@k_stderr for each k, n (problems), and samples: passed, reason and isolation of each
    candidate (``separate``: its tests ran in a process of their own, ``shared``: behind it in one program).
"""


class PassAtK(evaluate.Metric):
    """Unbiased pass@k."""

    def _info(self) -> evaluate.MetricInfo:
        return describe_metric(
            _DESCRIPTION,
            _CITATION,
            _INPUTS,
            ["https://arxiv.org/abs/2107.03374"],
            predictions=datasets.Sequence(TEXT),
            references=TEXT,
        )

    def _compute(
        self,
        predictions: Sequence[Any],
        references: Sequence[Any],
        k: int | Sequence[int] = (1, 10, 100),
        timeout_s: float = 3.0,
        num_workers: int | None = None,
        allow_weak_sandbox: bool = False,
        on_result: Callable[[], object] | None = None,
    ) -> dict[str, Any]:
        ks = [k] if isinstance(k, numbers.Number) else list(k)
        _check(ks, predictions)
        if not 0 < timeout_s < math.inf:
            raise ValueError(f"timeout_s: got {timeout_s}, expected a finite number of seconds above 0")
        pairs, owners = [], []
        for index, (candidates, tests) in enumerate(zip(predictions, references, strict=True)):
            pairs += [(candidate, tests) for candidate in candidates]
            owners += [index] * len(candidates)
        samples: list[list[dict[str, Any]]] = [[] for _ in references]
        results = run_tests(pairs, timeout_s=timeout_s, num_workers=num_workers, allow_weak_sandbox=allow_weak_sandbox)
        for owner, result in zip(owners, results, strict=True):
            samples[owner].append({"passed": result.passed, "reason": result.reason, "isolation": result.isolation})
            if on_result is not None:
                on_result()
        counts = [(len(rows), sum(row["passed"] for row in rows)) for rows in samples]
        return {**_estimate(counts, ks), "n": len(counts), "samples": samples}


def _check(ks: list[int], predictions: list[list[str]]) -> None:
    """Before any program runs: refuse what has no answer, and name the k that will be left out."""
    for k in ks:
        if not isinstance(k, numbers.Integral) or isinstance(k, bool) or k < 1:
            raise ValueError(f"k: got {k!r}, expected a whole number of at least 1")
    if not predictions:
        raise ValueError("predictions: no problem, expected at least one")
    sizes = [len(candidates) for candidates in predictions]
    fewest = min(sizes)
    if fewest == 0:
        raise ValueError(f"predictions: problem {sizes.index(0)} has no sample, expected at least one")
    beyond = [f"pass@{k}" for k in sorted(set(ks)) if k > fewest]
    if beyond:
        logger.warning("%s left out: a problem has only %d sample%s", ", ".join(beyond), fewest, "s"[: fewest > 1])


def _estimate(counts: list[tuple[int, int]], ks: list[int]) -> dict[str, Any]:
    smallest = min(total for total, _ in counts)
    scores = {}
    for k in ks:
        if k > smallest:
            continue
        per_problem = [1 - math.comb(total - passed, k) / math.comb(total, k) for total, passed in counts]
        scores[f"pass@{k}"], scores[f"pass@{k}_stderr"] = mean_with_error(per_problem)
    return scores
