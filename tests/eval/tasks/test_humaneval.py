"""HumanEval: prompts, completions and verdicts against the references'."""

import dataclasses
import gzip
import json
from pathlib import Path

import pytest
import torch

from deepseek_eval.answers.generation import SamplingSettings, complete_batches, cut_at_stop, plan_prompts
from deepseek_eval.metrics.loading import load_metric
from deepseek_eval.model_loading import load_model
from deepseek_eval.tasks import humaneval

REFERENCE = Path(__file__).resolve().parents[1] / "reference"


@pytest.fixture(scope="module")
def items():
    return list(humaneval.build_items(0, None, None))


@pytest.fixture(scope="module")
def ours():
    return load_model(REFERENCE / "ours", dtype="float32")


def complete(loaded, items, batch_size, **settings) -> dict[tuple[str, int], str]:
    settings = SamplingSettings(**settings)
    batches = plan_prompts(loaded, items, settings, batch_size)
    return {(p.item.id, p.sample): text for p, text in complete_batches(loaded, batches, settings)}


def test_completions_equal_lm_eval(ours, items):
    with gzip.open(REFERENCE / "lm_eval_0.4.13_humaneval.jsonl.gz", "rt") as file:
        theirs = {row["id"]: row["completion"] for row in map(json.loads, file)}
    texts = complete(ours, items, 32, max_new_tokens=48)
    assert {name: texts[name, 0] for name in theirs} == theirs


def test_batches_cache_and_stop_strings_equal_a_plain_loop(ours, items):
    """Against a loop that knows neither padding nor cache, and looks for stop strings in the whole text."""
    # Strings this checkpoint does write, one of them spelled by several tokens; lm-eval's own it never does.
    stop = ("\nC. 1.\n", "\nAns", ".\nC.\nC", "gggl")
    few = [dataclasses.replace(item, stop=stop) for item in sorted(items, key=lambda item: len(item.prompt))[::40]]
    num_steps = []
    settings = SamplingSettings(max_new_tokens=24)
    batches = plan_prompts(ours, few, settings, 8)
    batched = {p.item.id: text for p, text in complete_batches(ours, batches, settings, lambda: num_steps.append(1))}
    longest = 0
    for item in few:
        token_ids = ours.tokenizer.encode(item.prompt)
        start = len(token_ids)
        text = ""
        while len(token_ids) < start + 24 and not any(mark in text for mark in stop):
            with torch.inference_mode():
                logits = ours.model(input_ids=torch.tensor([token_ids]), use_cache=False).logits
            token_ids.append(int(logits[0, -1].argmax()))
            text = ours.tokenizer.decode(token_ids[start:], skip_special_tokens=True)
        longest = max(longest, len(token_ids) - start)
        assert batched[item.id] == cut_at_stop(text, stop)
    assert longest < 24  # All met one of the strings,
    assert len(num_steps) == longest  # and the batch ended with the last of them.


def test_sampling_is_repeatable_and_varies(ours, items):
    settings = {"max_new_tokens": 16, "num_samples": 3, "temperature": 0.8, "top_p": 0.95}
    first, second = (complete(ours, items[:4], 5, **settings) for _ in range(2))
    assert first == second
    assert len(first) == 12
    assert len({first["HumanEval/0", sample] for sample in range(3)}) > 1
    assert complete(ours, items[:4], 5, **settings, seed=1) != first


def test_a_prompt_too_long_loses_tokens_from_the_left(ours, items):
    prompt = max(
        plan_prompts(ours, items, SamplingSettings(max_new_tokens=1200), 1), key=lambda b: len(b[0].token_ids)
    )[0]
    assert prompt.is_truncated
    assert len(prompt.token_ids) == ours.max_length - 1200
    assert ours.tokenizer.encode(prompt.item.prompt)[-20:] == prompt.token_ids[-20:]


def test_no_room_for_a_prompt_is_refused(ours, items):
    with pytest.raises(ValueError, match=r"max_new_tokens = 1536 leaves no room .* expected 1 to 1535"):
        plan_prompts(ours, items, SamplingSettings(max_new_tokens=1536), 1)


def score(items, completions: list[str]) -> dict:
    return load_metric("pass_at_k").compute(
        predictions=[[item.program(text)] for item, text in zip(items, completions, strict=True)],
        references=[item.tests for item in items],
        k=[1],
        timeout_s=10.0,  # Generous: a loaded machine must not decide a correctness test.
    )


def test_reference_solutions_all_pass(items):
    assert len(items) == 164
    result = score(items, [item.target for item in items])
    assert result["pass@1"] == 1.0, [row for row in result["samples"] if not row[0]["passed"]]


def mutate(item) -> str:
    """The reference solution behind a first statement that returns something no test expects."""
    return "    return 'mutated'\n" + item.target


def test_wrong_solutions_all_fail(items):
    assert score(items, [mutate(item) for item in items])["pass@1"] == 0.0


def test_empty_completions_fail(items):
    # The prompt alone is a function that returns None.
    result = score(items, ["" for _ in items])
    assert result["pass@1"] == 0.0
