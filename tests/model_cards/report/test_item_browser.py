"""The items that travel inside the report: complete, bounded, and unable to leave their place."""

import base64
import gzip
import json
import re
from dataclasses import replace

import pytest

from deepseek_model_cards.report import item_browser
from deepseek_model_cards.report.report import write_report
from deepseek_records.run_folder import RunFolder
from deepseek_records.summary import Published, Result, Summary

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }} \u2028 \x00 \U0001f40b"


def write_lines(path, rows):
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def evaluated(tmp_path):
    """A run with a multiple-choice task of two subjects and a programming task with two samples per problem."""
    run = RunFolder.create(tmp_path / "run", {"model": "fox"}, command="evaluate", seed=1)
    shots = {"birds": "About birds.\n" + "Q: shot\nA: B\n" * 8, "wolves": "About wolves.\n" + "Q: shot\nA: C\n" * 8}
    names = [(subject, number) for subject in shots for number in range(25)]
    write_lines(
        run.path / "samples_mmlu.jsonl",
        [
            {
                "id": f"{subject}/{number}",
                "prediction": number % 4,
                "target": 1,
                "acc": int(number % 4 == 1),
                "loglikelihoods": [-1.0, -2.0, -3.0, -4.0],
                "group": subject,
            }
            for subject, number in names
        ],
    )
    choices = [" A", " B", " C", " D"]
    write_lines(
        run.path / "prompts_mmlu.jsonl.gz",
        [
            {
                "id": f"{subject}/{number}",
                "prompt": f"{shots[subject]}Q: {number}?\nAnswer:",
                "choices": choices,
                **({"answers": [3, 2, 1, 0]} if (subject, number) == ("birds", 0) else {}),
            }
            for subject, number in names
        ],
    )
    write_lines(
        run.path / "samples_humaneval.jsonl",
        [
            {
                "id": "HumanEval/0",
                "sample": s,
                "prediction": EVIL,
                "target": "return 1",
                "passed": False,
                "reason": EVIL,
            }
            for s in range(2)
        ],
    )
    write_lines(run.path / "prompts_humaneval.jsonl.gz", [{"id": "HumanEval/0", "prompt": EVIL}])
    (run.path / "samples_mbpp.partial.jsonl").write_text("{")
    acc = {"acc": 0.25, "acc_stderr": 0.09, "n": 25}
    scores = {"acc": 0.25, "n": 50, "groups": {"birds": acc, "wolves": acc}}
    (run.path / "results.json").write_text(json.dumps({"tasks": {"mmlu": scores}}))
    figures = {"split": "test", "num_fewshot": 5, "is_share": True, "chance": 0.25, "label": "MMLU"}
    published = (
        Published(by="DeepSeek-V3 base", value=0.871, remark="5-shot"),
        Published(by="the article", value=0.823),
    )
    row = Result(metric="acc", value=0.25, stderr=0.06, n=50, task="mmlu", published=published, **figures)
    rows = (row, replace(row, task="mmlu_robust", label="MMLU, perturbed", value=0.2, published=()))
    run.finish(Summary(stage="evaluate", results=rows, seconds=1))
    return run.path


def unpack(packed: str) -> dict[str, dict]:
    return {task["name"]: task for task in json.loads(gzip.decompress(base64.b64decode(packed)))}


def test_every_item_comes_back_whole(evaluated):
    tasks = unpack(item_browser.pack_items(evaluated))
    assert set(tasks) == {"mmlu", "humaneval"}
    mmlu = tasks["mmlu"]
    assert mmlu["total"] == len(mmlu["items"]) == 50
    with gzip.open(evaluated / "prompts_mmlu.jsonl.gz", "rt") as file:
        prompts = {row["id"]: row["prompt"] for row in map(json.loads, file)}
    for item in mmlu["items"]:
        assert mmlu["prefixes"][item["prefix"]] + item["prompt"] == prompts[item["id"]]
        assert "shot" not in item["prompt"]  # What a subject's questions share is there once,
        assert item["ok"] == (item["prediction"] == 1)
        assert item["choices"] == [" A", " B", " C", " D"] and len(item["scores"]["loglikelihoods"]) == 4
    assert {item["prefix"] for item in mmlu["items"]} == {0, 1}  # and not mixed up with the other's.
    assert all(item["answers"] == ([3, 2, 1, 0] if item["id"] == "birds/0" else None) for item in mmlu["items"])
    programs = tasks["humaneval"]["items"]
    assert [item["id"] for item in programs] == ["HumanEval/0", "HumanEval/0 #1"]
    assert programs[0]["prediction"] == programs[0]["prompt"] == programs[0]["scores"]["reason"] == EVIL


def test_no_text_of_a_model_gets_out_of_its_place(evaluated, tmp_path):
    html = write_report(evaluated, tmp_path / "report.html", with_items=True).read_text()
    assert "alert(" not in html and "onerror" not in html
    assert html.count("<script") == html.count("</script>") == 2
    data = re.search(r'<script id="items-data" type="application/octet-stream">([A-Za-z0-9+/=]+)</script>', html)[1]
    assert set(unpack(data)) == {"mmlu", "humaneval"}
    # The page writes text as text and asks for nothing.
    script = html[html.rindex("<script>") : html.rindex("</script>")]
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch(", "http"):
        assert forbidden not in script


def test_the_file_stays_small_however_much_was_answered(evaluated, monkeypatch):
    write_lines(
        evaluated / "samples_humaneval.jsonl",
        [{"id": f"HumanEval/{i}", "prediction": "x" * 50_000, "passed": True} for i in range(40)],
    )
    tasks = unpack(item_browser.pack_items(evaluated, max_characters=200_000))
    humaneval = tasks["humaneval"]
    assert humaneval["total"] == 40 and 5 < len(humaneval["items"]) < 14
    text = humaneval["items"][0]["prediction"]
    assert len(text) < 9_000 and "[... 42000 characters left out ...]" in text
    assert len(tasks["mmlu"]["items"]) == 50  # One task's flood is not paid for by another.


def test_a_run_without_prompts_or_items_still_has_its_report(evaluated, tmp_path):
    for path in evaluated.glob("prompts_*"):
        path.unlink()
    assert unpack(item_browser.pack_items(evaluated))["mmlu"]["items"][0]["prompt"] == ""
    assert item_browser.pack_items(tmp_path / "nothing") == ""
    html = write_report(evaluated, tmp_path / "report.html").read_text()
    assert "<script" not in html


def test_published_scores_stand_beside_what_measures_the_same(evaluated, tmp_path):
    html = write_report(evaluated, tmp_path / "report.html").read_text()
    rows = [
        re.sub(r"<[^>]+>", "|", row)
        for row in re.findall(r"<tr>.*?</tr>", html)
        if "at chance" in row or "perturbed" in row
    ]
    assert any("MMLU, accuracy" in row and "0.871 (5-shot)" in row and "0.823" in row for row in rows)
    # Another measure on MMLU's data is not MMLU.
    assert not any("perturbed" in row and "0.871" in row for row in rows)
    assert "not a multiple of 1/164" in html
    assert "mmlu: accuracy by subject" in html
