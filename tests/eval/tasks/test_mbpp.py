"""MBPP: prompts equal lm-evaluation-harness', reference solutions pass, wrong ones fail."""

import hashlib

import pytest

from deepseek_eval.metrics.loading import load_metric
from deepseek_eval.tasks import mbpp

# Printed by reference/hash_lm_eval_prompts.py under lm_eval 0.4.13.
PROMPT_HASHES = {
    0: "4f259f964218fd2df021d1fa9bd1d81a6993c2e7d2780aa60fbdb7c690508a2f",
    3: "b09746904aefaa696bf54d6663046bc5f84f3e32d0d239213c3e5ba298aa697c",
}
# Its reference solution searches for ten seconds and more.
SLOW_PROBLEM = "MBPP/123"


def score(items, completions, timeout_s: float) -> float:
    predictions = [[item.program(text)] for item, text in zip(items, completions, strict=True)]
    references = [item.tests for item in items]
    return load_metric("pass_at_k").compute(predictions=predictions, references=references, k=1, timeout_s=timeout_s)


@pytest.mark.parametrize("num_fewshot", [0, 3])
def test_prompts_equal_lm_eval(num_fewshot):
    prompts = [item.prompt for item in mbpp.build_items(num_fewshot, None, None)]
    assert len(prompts) == 500
    assert hashlib.sha256("\0".join(prompts).encode()).hexdigest() == PROMPT_HASHES[num_fewshot]


def test_reference_solutions_pass_and_wrong_ones_fail():
    items = [item for item in mbpp.build_items(3, 60, None) if item.id != SLOW_PROBLEM]
    assert score(items, [item.target for item in items], 20.0)["pass@1"] == 1.0
    # The right functions under another name.
    assert score(items, [item.target.replace("def ", "def not_") for item in items], 20.0)["pass@1"] == 0.0


@pytest.mark.slow
def test_all_reference_solutions_pass():
    items = list(mbpp.build_items(3, None, None))
    result = score(items, [item.target for item in items], 60.0)
    assert result["pass@1"] == 1.0, [row for row in result["samples"] if not row[0]["passed"]]


def test_too_many_shots_are_refused():
    with pytest.raises(ValueError, match="num_fewshot: got 4 for mbpp, expected 0 to 3"):
        list(mbpp.build_items(4, None, None))
