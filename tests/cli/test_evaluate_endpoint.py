"""`deepseek-moe evaluate URL` and `monitor evaluate` against a real server, which writes programs that run here."""

import json

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
from endpoint_server import make_model, make_tokenizer, serving

from deepseek_cli.main import main
from deepseek_serving.monitoring.evaluations import add_evaluation

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def running():
    with serving(make_model("ours"), context=2048, max_tokens=8, cache_tokens=8192) as server:
        yield server


def test_a_served_model_writes_the_programs(running, tmp_path, capsys):
    words = ["evaluate", running.url, "--tasks", "humaneval", "--limit", "3", "--max-new-tokens", "8"]
    assert main([*words, "--output", str(tmp_path / "run")]) == 0
    assert "pass@1" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run.samples.jsonl").read_text().splitlines()]
    assert [row["task_id"] for row in rows] == ["HumanEval/0", "HumanEval/1", "HumanEval/2"]
    from deepseek_eval.tasks.catalogue import find_task

    item = next(iter(find_task("humaneval").build_items(0, 1, None)))
    ids = make_tokenizer()(item.prompt, return_tensors="pt")
    written = running.engine.model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    text = make_tokenizer().decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.startswith(rows[0]["completion"])  # what follows a stop string is cut
    for wrong, named in (("mmlu", "log-probabilities"), ("humaneval,mbpp", "expected one")):
        assert main(["evaluate", running.url, "--tasks", wrong, "--output", str(tmp_path / "other")]) == 2
        assert named in capsys.readouterr().err
    assert main([*words, "--max-new-tokens", "9", "--output", str(tmp_path / "long")]) == 2
    assert "max_tokens" in capsys.readouterr().err


def test_a_significant_fall_is_told_and_shown(running, tmp_path, capsys):
    words = ["monitor", "evaluate", running.url, "--requests", str(tmp_path), "--limit", "8", "--max-new-tokens", "4"]
    first = {f"HumanEval/{number}": 1.0 for number in range(8)}
    add_evaluation(tmp_path, 0.0, "humaneval", first)
    assert main(words) == 3  # random weights solve nothing
    assert "0.000 of 8, p of a fall 0.0039" in capsys.readouterr().out
    from deepseek_serving.openai_endpoint.metrics import Metrics

    page = Metrics(running.engine, "tiny", tmp_path).render().decode()
    assert 'deepseek_moe_evaluation_fell{task="humaneval"} 1.0' in page
