"""Bias tasks: log-likelihoods against lm-evaluation-harness 0.4.13, and real models whose figures follow by hand.

``reference/lm_eval_0.4.13_bias.jsonl.gz`` holds what lm_eval gave for the three small checkpoints on twenty sentence
pairs of our own in CrowS-Pairs' columns (the real ones may not be shipped), five BBQ questions of each category and
five WinoBias pairs of each type. The slow test runs lm_eval again, where ``LM_EVAL_PYTHON`` names an interpreter that
has it; with ``CROWS_PAIRS`` naming the real file, on all of its pairs.
"""

import csv
import dataclasses
import gzip
import json
import os
import subprocess
from pathlib import Path

import pytest
import unigram_model

from deepseek_eval.answers.continuations import encode_continuations, plan_continuations, score_continuations
from deepseek_eval.harness import evaluate_model
from deepseek_eval.metrics.loading import load_metric
from deepseek_eval.model_loading import load_model
from deepseek_eval.tasks import bbq, crows_pairs, winobias
from deepseek_eval.tasks.rows import read_rows

pytestmark = pytest.mark.xdist_group("harness")
REFERENCE = Path(__file__).resolve().parents[1] / "reference"
PAIRS = REFERENCE / "sentence_pairs.csv"
MODELS = ("ours", "llama", "v3")
TASKS = ("crows_pairs", "bbq", "winobias")
SLICE = 5


def build_items(task: str, pairs: Path = PAIRS) -> list:
    if task == "crows_pairs":
        return list(crows_pairs.build_items(0, None, pairs))
    return list({"bbq": bbq, "winobias": winobias}[task].build_items(0, SLICE, None))


def score(model: str, items: list, batch_size: int = 32) -> dict[str, list[float]]:
    loaded = load_model(REFERENCE / model, dtype="float32")
    batches = plan_continuations(encode_continuations(loaded, items), batch_size)
    return {row.item.id: scores for row, scores in score_continuations(loaded, batches)}


@pytest.fixture(scope="module")
def reference() -> dict[tuple[str, str], dict[str, list[float]]]:
    answers: dict = {}
    with gzip.open(REFERENCE / "lm_eval_0.4.13_bias.jsonl.gz", "rt") as file:
        for row in map(json.loads, file):
            answers.setdefault((row["model"], row["task"]), {})[row["id"]] = row["loglikelihoods"]
    return answers


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def largest_difference(ours: dict, theirs: dict) -> float:
    assert set(ours) == set(theirs)
    return max(abs(a - b) for name in theirs for a, b in zip(ours[name], theirs[name], strict=True))


@pytest.mark.parametrize("model", MODELS)
def test_loglikelihoods_equal_lm_eval(model, reference):
    items = {task: build_items(task) for task in TASKS}
    assert {task: len(rows) for task, rows in items.items()} == {"crows_pairs": 20, "bbq": 20, "winobias": 20}
    ours = score(model, [item for rows in items.values() for item in rows])
    for task, rows in items.items():
        mine = {item.id: ours[item.id] for item in rows}
        # Sums over up to 40 tokens of bf16 weights in fp32.
        assert largest_difference(mine, reference[model, task]) < 5e-4
        for name, scores in reference[model, task].items():
            best, second = sorted(scores, reverse=True)[:2]
            assert mine[name].index(max(mine[name])) == scores.index(best) or best - second < 1e-3


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", MODELS)
def test_loglikelihoods_equal_lm_eval_run_afresh(model, task, tmp_path):
    python = os.environ.get("LM_EVAL_PYTHON")
    if not python:
        pytest.skip("LM_EVAL_PYTHON names no interpreter with lm_eval 0.4.13")
    pairs = Path(os.environ.get("CROWS_PAIRS", PAIRS))
    items = build_items(task, pairs)
    data, output = tmp_path / "data.jsonl", tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_for_lm_eval(task, items, pairs)))
    command = [python, str(REFERENCE / "run_lm_eval_bias.py"), str(REFERENCE / model), task, str(data), str(output)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    scores = [row["loglikelihoods"] for row in read_lines(output)]
    theirs = {item.id: row for item, row in zip(items, scores, strict=True)}
    ours = score(model, items)
    assert largest_difference(ours, theirs) < 5e-4
    check_aggregates(task, items, theirs, json.loads(done.stdout.splitlines()[-1]))


def rows_for_lm_eval(task: str, items: list, pairs: Path) -> list[dict]:
    if task == "crows_pairs":
        with open(pairs, encoding="utf-8", newline="") as file:
            return [{"sent_more": row["sent_more"], "sent_less": row["sent_less"]} for row in csv.DictReader(file)]
    if task == "bbq":
        wanted = {item.id for item in items}
        return [row for row in read_rows("bbq") if f"{row['category']}/{row['example_id']}" in wanted]
    return [{"prompt": item.prompt, "choices": list(item.choices), "target": item.target} for item in items]


def check_aggregates(task: str, items: list, scores: dict, theirs: dict) -> None:
    """Our metric on their log-likelihoods gives their figures."""
    rows = []
    for item in items:
        values = scores[item.id]
        choice = values.index(max(values))
        rows.append({"prediction": item.answer(choice), "target": item.target, "loglikelihoods": values})
    if task == "crows_pairs":
        ours = load_metric("stereotype_preference").compute(**crows_pairs.metric_inputs(items, rows))
        names = {"pct_stereotype": "pct_stereotype", "likelihood_diff": "likelihood_diff"}
    elif task == "bbq":
        ours = load_metric("bbq_bias").compute(**bbq.metric_inputs(items, rows))
        names = {"acc": "acc", "acc_ambig": "accuracy_amb", "acc_disambig": "accuracy_disamb"}
        for context, name in (("ambig", "amb_bias_score"), ("disambig", "disamb_bias_score")):
            pairs = [p for p in zip(items, rows, strict=True) if p[0].facts["context"] == context]
            # Where no answer is biased, lm_eval says 0; the paper's formula gives -1 (times the wrong answers' share).
            if any(row["prediction"] == item.facts["biased"] for item, row in pairs):
                names[f"bias_score_{context}"] = name
            else:
                known = sum(row["prediction"] != item.facts["unknown"] for item, row in pairs)
                assert theirs[name] == 0.0
                assert ours[f"bias_score_{context}"] == (-known / len(pairs) if context == "ambig" else -bool(known))
    else:
        ours = {"acc": sum(row["prediction"] == row["target"] for row in rows) / len(rows)}
        names = {"acc": "acc"}
    for mine, other in names.items():
        assert ours[mine] == pytest.approx(theirs[other], abs=1e-9), other


@pytest.mark.parametrize(("favoured", "share"), [(" he", 1.0), (" his", 0.0)])
def test_a_model_that_favours_a_word_prefers_its_sentences(tmp_path, favoured, share):
    model = unigram_model.make_unigram_model(tmp_path / "model", {favoured: 2.0})
    pairs = [
        f'{index},"There was he, {name}","There was his, {name}",stereo,gender\n' for index, name in enumerate("abc")
    ]
    (tmp_path / "crows_pairs_anonymized.csv").write_text(
        ",sent_more,sent_less,stereo_antistereo,bias_type\n" + "".join(pairs)
    )
    results = evaluate_model(
        model, tasks=["crows_pairs"], data_path={"crows_pairs": tmp_path}, dtype="float32", output=tmp_path / "run"
    )["tasks"]["crows_pairs"]
    assert results["pct_stereotype"] == share
    assert results["likelihood_diff"] == pytest.approx(2.0, abs=1e-3)


def test_a_model_that_knows_no_context_has_no_gap(tmp_path):
    """It cannot see the pronoun, so pro and anti sentences get the same answer; nor the context, so BBQ's neither."""
    model = unigram_model.make_unigram_model(tmp_path / "model", {" he": 1.0, " man": 2.0})
    results = evaluate_model(
        model, tasks=["winobias", "bbq"], limit=8, dtype="float32", output=tmp_path / "run", batch_size=16
    )["tasks"]
    assert (results["winobias"]["gap"], results["winobias"]["gap_stderr"]) == (0.0, 0.0)
    assert results["winobias"]["acc_pro"] == results["winobias"]["acc_anti"] > 0
    rows = read_lines(tmp_path / "run/samples_bbq.jsonl")
    assert len(rows) == 32
    # In the data an ambiguous question stands before its settled form.
    assert [row["prediction"] for row in rows[::2]] == [row["prediction"] for row in rows[1::2]]


def test_perplexity_decides_and_not_length(tmp_path):
    evaluate_model(REFERENCE / "llama", tasks=["winobias"], limit=20, dtype="float32", output=tmp_path / "run")
    rows = read_lines(tmp_path / "run/samples_winobias.jsonl")
    for row in rows:
        means = [score / count for score, count in zip(row["loglikelihoods"], row["num_tokens"], strict=True)]
        assert row["choice"] == means.index(max(means))
    by_sum = [row["loglikelihoods"].index(max(row["loglikelihoods"])) for row in rows]
    assert by_sum != [row["choice"] for row in rows]  # Occupations differ in length, so the rule matters.


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batches_change_no_loglikelihood(batch_size):
    items = build_items("crows_pairs")
    assert largest_difference(score("ours", items, batch_size), score("ours", items, 64)) < 1e-3


def test_a_batch_holds_whole_questions():
    loaded = load_model(REFERENCE / "llama", dtype="float32")
    batches = plan_continuations(encode_continuations(loaded, build_items("bbq")), 30)
    assert [len(batch) for batch in batches] == [2] * 10  # Twelve answers each.
    longest = [max(len(ids) for row in batch for ids in row.token_ids) for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_too_long_a_pair_loses_tokens_from_the_left():
    loaded = load_model(REFERENCE / "llama", dtype="float32")
    item = build_items("winobias")[0]
    long = dataclasses.replace(item, prompt="word " * 2000 + item.prompt)
    (row,) = encode_continuations(loaded, [long])
    assert row.is_truncated
    assert all(len(ids) == loaded.max_length + 1 for ids in row.token_ids)
    (whole,) = encode_continuations(loaded, [item])
    assert row.token_ids[0][-20:] == whole.token_ids[0][-20:]
    with pytest.raises(ValueError, match="do not hold the answer"):
        encode_continuations(loaded, [dataclasses.replace(item, choices=("word " * 2000, " a"))])


def test_a_model_that_returns_nan_is_refused(tmp_path):
    model = unigram_model.make_unigram_model(tmp_path / "model", {" he": float("nan")})
    with pytest.raises(ValueError, match=r"the logits of question type\d/dev/\d+/\w+ are NaN or infinite"):
        evaluate_model(model, tasks=["winobias"], limit=1, output=tmp_path / "run")


def test_crows_pairs_without_data_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"CC BY-SA 4.0; pass --data crows_pairs=PATH") as caught:
        evaluate_model(REFERENCE / "llama", tasks=["crows_pairs"], output=tmp_path / "run")
    assert "\n" not in str(caught.value)
    (tmp_path / "crows_pairs.csv").write_text("sent_more,sent_less\na,b\n")
    with pytest.raises(ValueError, match=r"crows_pairs.csv, line 2: bias_type: got no bias_type, expected text"):
        list(crows_pairs.build_items(0, None, tmp_path))


def test_bbq_reads_the_original_files(tmp_path):
    rows = [row for row in read_rows("bbq") if row["category"] == "Religion"][:3]
    (tmp_path / "Religion.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [item.group for item in bbq.build_items(0, None, tmp_path)] == ["Religion"] * 3
    with pytest.raises(FileNotFoundError, match=r"holds neither bbq\.jsonl nor Age\.jsonl"):
        list(bbq.build_items(0, None, REFERENCE))


def test_winobias_names_two_occupations_in_every_sentence():
    items = {item.id: item for item in winobias.build_items(0, None, None)}
    assert len(items) == 3168
    assert all(len(set(item.choices)) == 2 for item in items.values())
    first = items["type1/dev/1/pro"]
    assert first.prompt.endswith('because he did not like the design. "He" refers to the')
    assert (first.choices, first.target) == ((" developer", " designer"), 0)
    assert items["type1/dev/1/anti"].prompt.endswith('"She" refers to the')
    # A third occupation at the end is nobody the pronoun could mean.
    assert items["type2/dev/72/pro"].choices == (" developer", " cleaner")
    assert any(" CEO" in item.choices for item in items.values())
