"""Samples and settings as users have them: compressed, without ids, with endless time, with prompts that are cut."""

import gzip
import json
import logging
import shutil
from pathlib import Path

import pytest

from deepseek_eval.comparison import compare_runs
from deepseek_eval.harness import evaluate_model
from deepseek_eval.metrics.loading import load_metric
from deepseek_eval.runners.program import choose_k
from deepseek_eval.samples_reader import read_samples, score_samples
from deepseek_eval.tasks import humaneval

pytestmark = pytest.mark.xdist_group("harness")
REFERENCE = Path(__file__).resolve().parent / "reference"
ITEMS = list(humaneval.build_items(0, 2, None))


def test_compressed_samples_are_read_and_scored_for_k_of_2_and_5(tmp_path):
    rows = [{"task_id": ITEMS[0].id, "completion": ITEMS[0].target if n < 2 else "    pass\n"} for n in range(5)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = tmp_path / "samples.jsonl.gz"
    path.write_bytes(gzip.compress(text))
    scores = score_samples(path, "humaneval", output=tmp_path / "run", limit=1)["tasks"]["humaneval"]
    # 2 of 5 pass: 1 - C(3, k) / C(5, k).
    assert {name: scores[name] for name in ("pass@1", "pass@2", "pass@5")} == {
        "pass@1": pytest.approx(0.4),
        "pass@2": pytest.approx(0.7),
        "pass@5": 1.0,
    }
    for broken in (text, gzip.compress(text)[:-9]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="got no whole gzip file") as caught:
            read_samples(path, ITEMS[:1])
        assert "\n" not in str(caught.value)


def test_k_goes_as_far_as_there_are_samples():
    assert [choose_k(n) for n in (1, 2, 7, 100)] == [[1], [1, 2], [1, 2, 5], [1, 2, 5, 10, 100]]


@pytest.mark.parametrize("timeout_s", [float("inf"), float("nan"), 0, -1])
def test_a_time_limit_that_is_none_is_refused(timeout_s):
    with pytest.raises(ValueError, match=r"timeout_s: got .*, expected a finite number of seconds"):
        load_metric("pass_at_k").compute(predictions=[["x = 1"]], references=["assert x"], k=[1], timeout_s=timeout_s)


@pytest.mark.parametrize("line", ['{"acc": 1}', '{"id": 3, "acc": 1}', "[1]", "{cut"])
def test_a_run_whose_samples_have_no_id_is_told_in_one_line(tmp_path, line):
    (tmp_path / "samples_mmlu.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"samples_mmlu.jsonl, line 1: .*expected") as caught:
        compare_runs(tmp_path, tmp_path)
    assert "\n" not in str(caught.value)


def test_cut_prompts_of_programs_are_said_aloud(tmp_path, caplog):
    shutil.copytree(REFERENCE / "llama", tmp_path / "short")
    config = json.loads((tmp_path / "short/config.json").read_text())
    (tmp_path / "short/config.json").write_text(json.dumps({**config, "max_position_embeddings": 24}))
    settings = {"tasks": ["humaneval"], "limit": 2, "max_new_tokens": 4, "output": tmp_path / "run"}
    with caplog.at_level(logging.WARNING):
        results = evaluate_model(tmp_path / "short", **settings)
    assert results["tasks"]["humaneval"]["num_truncated"] == 2
    assert "humaneval: 2 of 2 prompts lost tokens to the context of 24" in caplog.text
