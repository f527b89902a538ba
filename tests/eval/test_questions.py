"""Data of the user's own: every row checked before anything is scored, and called what it is."""

import gzip
import json
from pathlib import Path

import pytest

from deepseek_cli.main import main
from deepseek_eval.comparison import compare_runs
from deepseek_eval.harness import evaluate_model
from deepseek_eval.questions import hash_questions, read_questions
from deepseek_eval.settings import EvalSettings
from deepseek_eval.tasks.catalogue import TASKS
from deepseek_eval.tasks.rows import EMBEDDED_FOLDER
from deepseek_model_cards.card.card import write_card
from deepseek_records.run_folder import RunFolder

pytestmark = pytest.mark.xdist_group("harness")
REFERENCE = Path(__file__).resolve().parent / "reference"
MMLU = {"question": "2 + 2?", "subject": "sums", "choices": ["3", "4", "5", "6"], "answer": 1}
HUMANEVAL = {
    "task_id": "own/0",
    "prompt": "def one():\n",
    "test": "def check(f):\n    assert f() == 1\n",
    "entry_point": "one",
    "canonical_solution": "    return 1\n",
}
MBPP = {"task_id": 11, "text": "Return one.", "code": "def f(): return 1", "test_list": ["assert f() == 1"]}
BBQ = json.loads(gzip.decompress((EMBEDDED_FOLDER / "bbq.jsonl.gz").read_bytes()).splitlines()[0])
CROWS_PAIRS = {"sent_more": "a", "sent_less": "b", "bias_type": "c"}
WINOBIAS = {"id": 1, "type": 1, "part": "dev", "polarity": "pro", "text": "[The cook] met the nurse; [he] left."}
PUBMEDQA = {"id": "1", "question": "Does it?", "contexts": ["We looked.", "It did."], "answer": "yes"}
XSTEST = {"id": "1", "prompt": "May I?", "type": "plain", "label": "safe"}
# Not shipped, or made of another task's questions.
EMBEDDED = sorted(
    set(TASKS)
    - {"bits_per_byte", "crows_pairs", "mmlu_hendrycks", "mmlu_robust", "mmlu_pro", "mmlu_redux"}
    - {name for name, task in TASKS.items() if task.kind == "media"}
)
EVIL = [None, "", "  ", 0, -1, 4, 9, 1.0, True, "1", "B", [], {}, "abc", ["a"]]


def write(folder: Path, name: str, rows: list) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(task: str, data: Path, **settings):
    return read_questions(TASKS[task], EvalSettings(tasks=(task,), data_path={task: str(data)}, **settings))


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("answer", [4, 9, -1, None, "1", "B", 1.0, True, [1]], "a whole number from 0 to 3"),
        (
            "choices",
            [["1", "2"], ["1"] * 5, "abcd", None, [1, 2, 3, 4], ["1", "2", "3", " "]],
            "a list of 4 texts",
        ),
        ("question", ["", " \n", None, 7, ["2 + 2?"]], "text"),
        ("subject", ["", None, 3], "text"),
    ],
)
def test_each_wrong_value_of_a_question_is_named_with_file_and_row(tmp_path, column, values, expected):
    for value in values:
        write(tmp_path, "mmlu_test", [MMLU, {**MMLU, column: value}])
        with pytest.raises(ValueError) as caught:
            read("mmlu", tmp_path, limit=1)  # The row lies beyond the limit and is checked all the same.
        shown = json.dumps(value)
        assert str(caught.value) == (
            f"data: {tmp_path / 'mmlu_test.jsonl'}, line 2: {column}: got {shown}, expected {expected}"
        )


@pytest.mark.parametrize(
    ("task", "name", "row", "columns"),
    [
        ("mmlu", "mmlu_test", MMLU, ("answer", "choices", "question", "subject")),
        ("humaneval", "humaneval", HUMANEVAL, ("task_id", "prompt", "test", "entry_point", "canonical_solution")),
        ("mbpp", "mbpp", MBPP, ("task_id", "text", "code", "test_list")),
        ("bbq", "bbq", BBQ, ("category", "context", "question", "ans0", "ans2", "label", "context_condition")),
        ("winobias", "winobias", WINOBIAS, ("text", "polarity")),
        (
            "crows_pairs",
            "crows_pairs",
            CROWS_PAIRS,
            ("sent_more", "bias_type"),
        ),
        ("refusal", "xstest", XSTEST, ("prompt", "type", "label")),
        ("pubmedqa", "pubmedqa", PUBMEDQA, ("id", "question", "contexts", "answer")),
    ],
)
def test_whatever_stands_in_a_column_is_taken_or_told_in_one_line(tmp_path, task, name, row, columns):
    if task == "refusal":
        write(tmp_path, "advbench", [{"prompt": "Do harm."}])
    settings = {"num_fewshot": 0} if task in ("mmlu", "mbpp") else {}
    others = [{**WINOBIAS, "id": 2, "text": "The cook met [the nurse]; [she] left."}] if task == "winobias" else []
    write(tmp_path, name, [row, *others])
    assert read(task, tmp_path, **settings).items
    refused = 0
    for column in columns:
        for value in [*EVIL, "left out"]:
            broken = {key: inner for key, inner in {**row, column: value}.items() if inner != "left out"}
            write(tmp_path, name, [broken, *others])
            try:
                read(task, tmp_path, **settings)
            except ValueError as error:
                refused += 1
                assert f"{name}.jsonl" in str(error) and "\n" not in str(error), (column, value, str(error))
    assert refused >= len(columns) * 8


@pytest.mark.parametrize(
    ("task", "name", "row", "message"),
    [
        ("humaneval", "humaneval", HUMANEVAL, 'task_id: got "own/0" again, expected each once; it stands in line 1'),
        ("mbpp", "mbpp", MBPP, "task_id: got 11 again, expected each once; it stands in line 1"),
        ("winobias", "winobias", WINOBIAS, "again, expected each once"),
        ("bbq", "bbq", BBQ, "again, expected each once"),
        ("pubmedqa", "pubmedqa", PUBMEDQA, 'id: got "1" again, expected each once; it stands in line 1'),
    ],
)
def test_an_id_that_stands_twice_is_refused(tmp_path, task, name, row, message):
    write(tmp_path, name, [row, row])
    with pytest.raises(ValueError) as caught:
        read(task, tmp_path, **({"num_fewshot": 0} if task == "mbpp" else {}))
    assert f"{name}.jsonl, line 2: " in str(caught.value) and message in str(caught.value)


def test_shots_that_are_not_there_are_not_reported(tmp_path):
    write(tmp_path, "mmlu_test", [MMLU])
    assert read("mmlu", tmp_path).items  # 0-shot needs no examples.
    for rows in ([], [{**MMLU, "subject": "other"}] * 5, [MMLU] * 2):
        write(tmp_path, "mmlu_dev", rows)
        with pytest.raises(ValueError, match=r"mmlu_test.jsonl, line 1: num_fewshot: got 3, expected at most [02]; "):
            read("mmlu", tmp_path, num_fewshot=3)
    write(tmp_path, "mmlu_dev", [MMLU] * 3)
    assert read("mmlu", tmp_path, num_fewshot=3).items[0].prompt.count("Answer: B") == 3
    write(tmp_path, "mbpp", [MBPP])
    with pytest.raises(ValueError, match=r"mbpp.jsonl: num_fewshot: got 3, expected 0; the shot 2 is not there"):
        read("mbpp", tmp_path)


def test_humaneval_is_0_shot_whatever_is_asked_of_others(tmp_path):
    settings = {"limit": 1, "max_new_tokens": 2, "dtype": "float32", "output": tmp_path / "run"}
    results = evaluate_model(REFERENCE / "ours", tasks=["mmlu", "humaneval"], num_fewshot=2, **settings)
    assert {name: scores["num_fewshot"] for name, scores in results["tasks"].items()} == {"mmlu": 2, "humaneval": 0}
    assert [row.num_fewshot for row in RunFolder(tmp_path / "run").summary.results] == [2, 0]


@pytest.mark.parametrize("task", EMBEDDED)
def test_embedded_questions_are_those_of_the_published_name(task):
    """Whatever the shots; the hash in the task's file is what lets a copy of the data keep the name."""
    items = read_questions(TASKS[task], EvalSettings(tasks=(task,))).items
    assert hash_questions(items) == TASKS[task].data.questions_hash
    assert len({item.id for item in items}) == len(items) == TASKS[task].data.num_questions


def test_a_copy_keeps_the_published_name_and_one_changed_answer_loses_it(tmp_path):
    with gzip.open(EMBEDDED_FOLDER / "mmlu_test.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    write(tmp_path / "copy", "mmlu_test", rows[::-1])  # Its order does not matter.
    assert read("mmlu", tmp_path / "copy").task.data == TASKS["mmlu"].data
    rows[77]["answer"] = (rows[77]["answer"] + 1) % 4
    write(tmp_path / "changed", "mmlu_test", rows)
    data = read("mmlu", tmp_path / "changed", limit=1).task.data
    assert (data.name, data.license, data.benchmark) == ("changed", "not stated", None)


def test_own_data_is_published_under_its_own_name_alone(tmp_path):
    folder = tmp_path / "my-quiz"
    write(folder, "mmlu_test", [MMLU, {**MMLU, "question": "3 + 3?", "answer": 3}])
    command = ["evaluate", str(REFERENCE / "ours"), "--tasks", "mmlu,long_tail", "--data", f"mmlu={folder}"]
    assert main([*command, "--limit", "mmlu=1,long_tail=1", "--output", str(tmp_path / "run")]) == 0
    summary = RunFolder(tmp_path / "run").summary
    rows = [row for row in summary.results if row.task == "mmlu"]
    assert [(row.label, row.dataset, row.benchmark, row.published) for row in rows] == [
        ("my-quiz, partial: 1 of 2", "my-quiz, partial: 1 of 2", None, ())
    ]
    assert (summary.data[0].license, summary.data[0].source) == ("not stated", "own data")
    card = write_card(tmp_path / "run", output=tmp_path / "card").read_text()
    assert "my-quiz" in card and "| MMLU, test" not in card and not (tmp_path / "card/.eval_results").exists()


def test_runs_on_other_questions_under_the_same_ids_do_not_compare(tmp_path, capsys):
    for name, question in (("first", "2 + 2?"), ("second", "2 + 3?")):
        write(tmp_path / name, "mmlu_test", [MMLU, {**MMLU, "question": question}])
        write(tmp_path / name, "mmlu_dev", [MMLU])
        for shots in (0, 1):
            evaluate_model(
                REFERENCE / "ours",
                tasks=["mmlu"],
                data_path=str(tmp_path / name),
                num_fewshot=shots,
                output=tmp_path / f"{name}-{shots}",
            )
    assert compare_runs(tmp_path / "first-0", tmp_path / "first-1")["mmlu"]["n"] == 2  # Shots are not the question.
    assert main(["evaluate", "--compare", str(tmp_path / "first-0"), str(tmp_path / "second-0")]) == 2
    message = "runs: mmlu: got other questions under 1 of 2 shared ids (the first is sums/1), expected two runs"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("changed", ["model", "questions_of_mmlu", "tokenizer"])
def test_an_interrupted_run_goes_on_with_the_same_content_or_not_at_all(tmp_path, monkeypatch, changed):
    """The paths stay; what lies there is another model, other questions or another tokenizer."""
    import shutil

    import torch
    from transformers import AutoModelForCausalLM

    from deepseek_eval.runners import choice

    shutil.copytree(REFERENCE / "llama", tmp_path / "model")
    write(tmp_path / "data", "mmlu_test", [MMLU] * 3)
    run = {"tasks": ["mmlu"], "batch_size": 1, "data_path": str(tmp_path / "data"), "output": tmp_path / "run"}
    original, seen = choice._choice_row, []

    def interrupted(row, scores):
        if seen:
            raise KeyboardInterrupt
        seen.append(row)
        return original(row, scores)

    monkeypatch.setattr(choice, "_choice_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(tmp_path / "model", **run)
    monkeypatch.setattr(choice, "_choice_row", original)
    if changed == "model":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        with torch.no_grad():
            model.lm_head.weight.mul_(1.01)
        model.save_pretrained(tmp_path / "model")
    elif changed == "tokenizer":
        path = tmp_path / "model/tokenizer.json"
        state = json.loads(path.read_text())
        state["model"]["merges"].pop()
        path.write_text(json.dumps(state))
    else:
        write(tmp_path / "data", "mmlu_test", [MMLU, MMLU, {**MMLU, "answer": 2}])
    words = {"questions_of_mmlu": "questions of mmlu"}.get(changed, changed)
    with pytest.raises(FileExistsError, match=f"was begun with another content of {words}") as caught:
        evaluate_model(tmp_path / "model", **run)
    assert "\n" not in str(caught.value)
