"""``--prompt-style chat`` with every task and with one's own: the prompts are turns, or the task refuses."""

import gzip
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from deepseek_cli.main import main
from deepseek_eval.answers.prompt_style import check_style
from deepseek_eval.harness import evaluate_model
from deepseek_eval.tasks.catalogue import TASKS
from deepseek_records.run_folder import RunFolder

pytestmark = pytest.mark.xdist_group("harness")
REFERENCE = Path(__file__).resolve().parents[1] / "reference"
LETTERS = json.loads(gzip.decompress((REFERENCE / "lm_eval_0.4.13_letters.json.gz").read_bytes()))
# Tasks whose questions are sentences to be continued or scored as they stand, in a fixed wording, or no questions.
REFUSE = {"bbq", "bits_per_byte", "crows_pairs", "mmlu_hendrycks", "mmlu_robust", "pubmedqa", "winobias"}
REFUSE |= {name for name, task in TASKS.items() if task.kind == "media"}
OWN = {
    "own_choice": "kind: choice\nchoices: [first, second]\nanswer: right\n",
    "own_words": "kind: generation\nanswer: right\nmax_new_tokens: 2\n",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(REFERENCE / "ours", folder)
    path = folder / "tokenizer_config.json"
    template = (REFERENCE / "chat_template.jinja").read_text()
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return folder


@pytest.fixture
def data(tmp_path):
    """Data for the tasks that ship none, and two tasks of one's own."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = {"mmlu_pro_test": LETTERS["pro_rows"]["test"], "mmlu_pro_validation": LETTERS["pro_rows"]["validation"]}
    for name, lines in {**rows, "mmlu_redux": LETTERS["redux_rows"]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "own.csv").write_text("country,first,second,right\nFrance,Paris,Rome,Paris\nItaly,Paris,Rome,Rome\n")
    for name, lines in OWN.items():
        text = f'name: {name}\ndata: own.csv\nprompt: "The capital of {{country}} is"\n{lines}'
        (folder / f"{name}.yaml").write_text(text)
    return folder


def read_prompts(run: Path, task: str) -> list[dict]:
    with gzip.open(run / f"prompts_{task}.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def evaluate(model, task, data, output, monkeypatch, style):
    """The prompts of the first six questions."""
    if task in TASKS:
        build = TASKS[task].build_items
        monkeypatch.setitem(
            TASKS, task, replace(TASKS[task], build_items=lambda *given: itertools.islice(build(*given), 6))
        )
    sources = {name: str(data) for name in ("mmlu_pro", "mmlu_redux") if name == task}
    evaluate_model(
        model,
        tasks=[task if task in TASKS else str(data / f"{task}.yaml")],
        output=output,
        data_path=sources or None,
        max_new_tokens=2,
        num_fewshot=1 if task in ("mmlu", "long_tail", "mmlu_pro") else None,
        prompt_style=style,
    )
    monkeypatch.undo()
    return read_prompts(output, task)


@pytest.mark.parametrize("task", sorted({*TASKS, *OWN} - REFUSE))
def test_prompts_are_turns(model, task, data, tmp_path, monkeypatch):
    chat = evaluate(model, task, data, tmp_path / "chat", monkeypatch, "chat")
    base = evaluate(model, task, data, tmp_path / "base", monkeypatch, "base")
    for row in chat:
        assert row["prompt"].count("<|im_start|>user\n") >= 1 and "<|im_start|>assistant\n" in row["prompt"]
        assert all(not choice.startswith(" ") for choice in row.get("choices", []))
    if task == "refusal":  # a request is the user's turn in both
        assert chat == base
    else:
        assert not any("<|im_start|>" in row["prompt"] for row in base)
    assert {row.prompt_style for row in RunFolder(tmp_path / "chat").summary.results} == {"chat"}


@pytest.mark.parametrize("task", sorted(REFUSE))
def test_or_the_task_refuses_in_one_line(model, task, tmp_path, capsys):
    with pytest.raises(ValueError, match=f"prompt_style = chat: task {task} has base only"):
        check_style("chat", [TASKS[task]])
    words = ["evaluate", str(model), "--tasks", task, "--apply_chat_template", "--output", str(tmp_path / "run")]
    assert main(words) == 2
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("deepseek-moe evaluate: error: prompt_style")


def test_examples_of_mmlu_pro_are_turns_of_their_own(model, data, tmp_path, monkeypatch):
    row = evaluate(model, "mmlu_pro", data, tmp_path / "chat", monkeypatch, "chat")[0]
    assert row["prompt"].startswith("<|im_start|>system\nThe following are multiple choice questions")
    assert row["prompt"].count("<|im_start|>user\n") == 2 and row["prompt"].count("<|im_start|>assistant\n") == 2
    assert row["prompt"].endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("task", ["mmlu_pro", "mmlu_redux", "refusal", "own_choice", "own_words"])
def test_a_model_without_template_is_refused(task, data, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="has no chat template; use base"):
        evaluate(REFERENCE / "ours", task, data, tmp_path / "run", monkeypatch, "chat")
