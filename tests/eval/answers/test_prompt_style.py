"""The prompt styles: item by item lm-evaluation-harness' prompts, its way to take code from an answer, and errors."""

import copy
import gzip
import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from deepseek_eval.answers.generation import encode_prompt
from deepseek_eval.answers.prompt_style import apply_chat, apply_style, take_code
from deepseek_eval.harness import evaluate_model
from deepseek_eval.metrics.loading import load_metric
from deepseek_eval.tasks import humaneval, mbpp, mmlu
from deepseek_records.run_folder import RunFolder

pytestmark = pytest.mark.xdist_group("harness")
REFERENCE = Path(__file__).resolve().parents[1] / "reference"
# Printed by reference/hash_lm_eval_prompts.py under lm_eval 0.4.13, where the chat tasks are called _instruct.
PROMPT_HASHES = {
    ("humaneval", "base", 0): "6a712466e64fa7d27ca572fefd68e30c7a0c05b799232c5700220fb5b96e7d62",
    ("humaneval", "chat", 0): "99701c740db7f6452d9ad1b142bb32b7d7fc884939d8bd195ad0b135f95229d0",
    ("mbpp", "base", 3): "b09746904aefaa696bf54d6663046bc5f84f3e32d0d239213c3e5ba298aa697c",
    ("mbpp", "chat", 0): "702c9a0b359d81014f54c424308ba5ac1d8986b5eaae03491f15a0c17f5db25b",
    ("mbpp", "chat", 3): "06e7aaebb3347a9d2503ab57573f6257e092dd47b63c7872860ee80e87bd342e",
}
BUILDERS = {"humaneval": humaneval.build_items, "mbpp": mbpp.build_items}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "ours")
    tokenizer.chat_template = (REFERENCE / "chat_template.jinja").read_text()
    return tokenizer


@pytest.mark.parametrize(("task", "style", "num_fewshot"), PROMPT_HASHES)
def test_prompts_equal_lm_eval(tokenizer, task, style, num_fewshot):
    items = apply_style(style, list(BUILDERS[task](num_fewshot, None, None)), tokenizer, "x")
    digest = hashlib.sha256("\0".join(item.prompt for item in items).encode()).hexdigest()
    assert digest == PROMPT_HASHES[task, style, num_fewshot]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("    return 1\n```\nThat is it. ```x```", "    return 1\n"),
        ("    return 1\n", "    return 1\n"),
        ("```", ""),
    ],
)
def test_humaneval_takes_what_stands_before_the_closing_fence(answer, code):
    item = next(humaneval.build_items(0, 1, None))
    assert take_code("chat", item, answer) == code
    assert take_code("base", item, answer) == answer


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("def f(x):\n    return x\n```\nDone.", "def f(x):\n    return x"),  # lm-eval 0.4.13 drops `def` here.
        ("\ndef f(x): return x\n```", "\ndef f(x): return x"),
        ("```python\ndef f(x): return x\n```\n```python\nother\n```", "def f(x): return x"),
        ("```\nimport re\n```", "import re"),
        ("def f(x): return x", ""),  # Never closed: nothing, as there.
    ],
)
def test_mbpp_takes_the_first_block(answer, code):
    assert take_code("chat", next(mbpp.build_items(0, 1, None)), answer) == code


def test_reference_solutions_in_a_chat_answer_pass_and_wrong_ones_fail():
    items = [*humaneval.build_items(0, 20, None), *mbpp.build_items(3, 20, None)]
    answers = [f"{item.target}\n```\nThis solves it." for item in items]
    for wrong in (False, True):
        codes = [item.program(take_code("chat", item, answer)) for item, answer in zip(items, answers, strict=True)]
        if wrong:
            codes = [code.replace("return", "return 'wrong',") for code in codes]
        result = load_metric("pass_at_k").compute(
            predictions=[[code] for code in codes], references=[item.tests for item in items], k=1, timeout_s=20.0
        )
        passed = [row[0]["passed"] for row in result["samples"]]
        assert not any(passed) if wrong else all(passed)


def with_template(folder: Path, template: str) -> Path:
    shutil.copytree(REFERENCE / "ours", folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return folder


def test_a_chat_run_end_to_end(tmp_path):
    model = with_template(tmp_path / "model", (REFERENCE / "chat_template.jinja").read_text())
    settings = {"tasks": ["humaneval"], "limit": 2, "max_new_tokens": 8, "dtype": "float32"}
    results = evaluate_model(model, prompt_style="chat", output=tmp_path / "run", **settings)
    assert results["tasks"]["humaneval"]["prompt_style"] == "chat"
    # A card must not pass the figure off as one of base prompts.
    assert RunFolder(tmp_path / "run").summary.results[0].prompt_style == "chat"

    with gzip.open(tmp_path / "run/prompts_humaneval.jsonl.gz", "rt") as file:
        prompts = [json.loads(line)["prompt"] for line in file]
    assert len(prompts) == 2
    assert all(prompt.startswith("<|im_start|>user\nWrite a solution") for prompt in prompts)
    assert all("<|im_start|>assistant\nHere is the completed function:\n```python\n" in prompt for prompt in prompts)


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_mmlu_in_a_chat_equals_lm_eval(tmp_path, num_fewshot):
    with gzip.open(REFERENCE / "lm_eval_0.4.13_chat.json.gz", "rt") as file:
        expected = {row["id"]: row for row in json.load(file)[str(num_fewshot)]}
    model = with_template(tmp_path / "model", (REFERENCE / "chat_template.jinja").read_text())
    whole = {}
    for split in ("test", "dev"):
        with gzip.open(mmlu.__file__.replace("tasks/mmlu.py", f"data/mmlu_{split}.jsonl.gz"), "rt") as file:
            whole[split] = [json.loads(line) for line in file]
    # own data: the questions that lm-eval was asked, so that ids count from 0 in each subject
    asked, ids, counts, places = [], [], Counter(), Counter()
    for row in whole["test"]:
        name = f"{row['subject']}/{places[row['subject']]}"
        places[row["subject"]] += 1
        if name in expected:
            asked.append(row)
            ids.append((f"{row['subject']}/{counts[row['subject']]}", name))
            counts[row["subject"]] += 1
    data = tmp_path / "data"
    data.mkdir()
    for split, rows in (("test", asked), ("dev", whole["dev"])):
        (data / f"mmlu_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"tasks": ["mmlu"], "num_fewshot": num_fewshot, "dtype": "float32", "data_path": data}
    results = evaluate_model(model, prompt_style="chat", output=tmp_path / "run", **settings)["tasks"]["mmlu"]
    assert (results["prompt_style"], results["num_fewshot"], results["n"]) == ("chat", num_fewshot, len(expected))
    assert RunFolder(tmp_path / "run").summary.results[0].prompt_style == "chat"
    lines = (tmp_path / "run/samples_mmlu.jsonl").read_text().splitlines()
    samples = {row["id"]: row for row in map(json.loads, lines)}
    with gzip.open(tmp_path / "run/prompts_mmlu.jsonl.gz", "rt") as file:
        prompts = {row["id"]: row["prompt"] for row in map(json.loads, file)}
    for own, name in ids:
        assert hashlib.sha256(prompts[own].encode()).hexdigest() == expected[name]["prompt_hash"]
        assert samples[own]["loglikelihoods"] == pytest.approx(expected[name]["loglikelihoods"], abs=1e-4)
        assert samples[own]["acc"] == expected[name]["acc"]


def test_a_template_without_a_system_turn_gets_the_others(tokenizer):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template + tokenizer.chat_template
    item = next(mmlu.build_items(1, 1, None))
    prompt = apply_chat([item], tokenizer, "x")[0].prompt
    assert prompt.count("<|im_start|>user") == 2 and "multiple choice questions" not in prompt


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_style": "chatty"}, "prompt_style: got 'chatty', expected base or chat"),
        ({"prompt_style": "chat", "tasks": ["mmlu_robust"]}, "prompt_style = chat: task mmlu_robust has base only"),
        ({"prompt_style": "chat"}, "prompt_style = chat: the tokenizer of .* has no chat template"),
    ],
)
def test_a_style_that_does_not_fit_is_refused_in_one_line(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        evaluate_model(
            REFERENCE / "ours", output=tmp_path / "run", max_new_tokens=8, **{"tasks": ["humaneval"], **settings}
        )
    assert "\n" not in str(caught.value)


def test_a_template_that_refuses_the_messages_is_told_in_one_line(tmp_path):
    model = with_template(tmp_path / "model", "{{ raise_exception('only system\\nmessages') }}")
    with pytest.raises(ValueError, match=r"the chat template of .* refuses HumanEval/0 \(.+\)") as caught:
        evaluate_model(model, tasks=["humaneval"], prompt_style="chat", max_new_tokens=8, output=tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_template_that_writes_the_first_token_gets_no_second_one():
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "ours")
    tokenizer.bos_token = "</s>"  # Any special token does.
    number = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", number)]
    )
    assert encode_prompt(tokenizer, "def f(): pass").count(number) == 1
    assert encode_prompt(tokenizer, "</s>def f(): pass") == encode_prompt(tokenizer, "def f(): pass")
