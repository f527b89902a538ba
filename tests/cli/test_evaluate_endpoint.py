"""`deepseek-moe evaluate URL` and `monitor evaluate` against a real server, which writes programs that run here."""

import json

import pytest
from tokenizers import Tokenizer

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
from endpoint_server import make_model, make_tokenizer, serving
from scored_samples import assert_scored_alike, read_rows

from deepseek_cli.main import main
from deepseek_serving.monitoring.evaluations import add_evaluation, read_evaluations

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def running():
    tokenizer = make_tokenizer_of_letters()
    with serving(make_model("ours"), tokenizer=tokenizer, context=2048, max_tokens=8, cache_tokens=8192) as server:
        yield server


def test_a_served_model_writes_the_programs(running, tmp_path, capsys):
    words = ["evaluate", running.url, "--tasks", "humaneval", "--limit", "3", "--max-new-tokens", "8"]
    assert main([*words, "--output", str(tmp_path / "run")]) == 0
    assert "pass@1" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run.samples.jsonl").read_text().splitlines()]
    assert [row["task_id"] for row in rows] == ["HumanEval/0", "HumanEval/1", "HumanEval/2"]
    from deepseek_eval.tasks.catalogue import find_task

    item = next(iter(find_task("humaneval").build_items(0, 1, None)))
    ids = make_tokenizer_of_letters()(item.prompt, return_tensors="pt")
    written = running.engine.model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    text = make_tokenizer_of_letters().decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.startswith(rows[0]["completion"])  # what follows a stop string is cut
    for wrong, named in (("mmlu", "--tokenizer"), ("humaneval,mbpp", "expected one")):
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


def make_tokenizer_of_letters():
    """Of the same size, with a token for each letter of an answer in place of bytes that no text holds."""
    tokenizer = make_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    unused = sorted(vocabulary, key=vocabulary.__getitem__)[-11:]
    for letter, token in zip("ABCDEFGHIJ", unused, strict=False):
        vocabulary[f"\u0120{letter}"] = vocabulary.pop(token)
        content["model"]["merges"].append(["\u0120", letter])
    marks = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **marks)


TASKS = {
    "mmlu": ["--limit", "1"],
    "bbq": ["--limit", "1"],
    "winobias": ["--limit", "2"],
    "long_tail": ["--limit", "2"],
    "bits_per_byte": ["--limit", "3"],
    "refusal": ["--limit", "3", "--max-new-tokens", "8"],
    "humaneval": ["--limit", "2", "--max-new-tokens", "8"],
}


@pytest.mark.parametrize("task", TASKS)
def test_every_kind_of_task_scores_a_server_as_its_checkpoint(running, tmp_path, task):
    """The same predictions, and log-likelihoods equal up to rounding, one of each kind and of each trap."""
    running.engine.model.save_pretrained(tmp_path / "model")
    make_tokenizer_of_letters().save_pretrained(tmp_path / "model")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{n} nodes. " * 40}) + "\n" for n in range(3)))
    own = ["--data", str(tmp_path / "text.jsonl")] if task == "bits_per_byte" else []
    words = ["--tasks", task, "--max-length", "200", *own, *TASKS[task], "--output"]
    assert main(["evaluate", str(tmp_path / "model"), *words, str(tmp_path / "local")]) == 0
    served = ["evaluate", running.url, "--tokenizer", str(tmp_path / "model")]
    assert main([*served, *words, str(tmp_path / "served")]) == 0
    assert_scored_alike(read_rows(tmp_path / "local", task), read_rows(tmp_path / "served", task))


def test_what_has_no_effect_on_a_server_is_refused(running, tmp_path, capsys):
    words = ["evaluate", running.url, "--tasks", "mmlu", "--limit", "1", "--output", str(tmp_path / "run")]
    assert main([*words, "--tokenizer", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
    assert main([*words, "--tokenizer", str(tmp_path), "--dtype", "float16"]) == 2
    assert "--dtype: without effect on a server" in capsys.readouterr().err
    assert main([*words, "--batch-size", "3"]) == 2
    assert "--batch-size: without effect on a server without --tokenizer" in capsys.readouterr().err


def test_bias_the_long_tail_and_attacks_are_watched_in_service(running, tmp_path, capsys):
    """One run of several tasks, kept by task; the second run of the same model is no fall, a worse one is."""
    running.engine.model.save_pretrained(tmp_path / "model")
    make_tokenizer_of_letters().save_pretrained(tmp_path / "model")
    requests = tmp_path / "requests"
    words = ["monitor", "evaluate", running.url, "--requests", str(requests), "--tokenizer", str(tmp_path / "model")]
    words += ["--tasks", "bbq,winobias,refusal", "--limit", "2", "--max-new-tokens", "4", "--max-length", "200"]
    assert main(words) == 0
    assert main(words) == 0
    kept = read_evaluations(requests)
    assert [row["task"] for row in kept] == ["bbq", "refusal", "winobias"] * 2
    assert all(row["fell"] is False for row in kept) and [row["p"] for row in kept[3:]] == [1.0] * 3
    first = {row["task"]: row for row in kept[:3]}
    assert all(first[row["task"]]["scores"] == row["scores"] for row in kept[3:])
    (requests / "evaluations.jsonl").unlink()
    add_evaluation(requests, 0.0, "refusal", {name: 1.0 for name in first["refusal"]["scores"]})
    assert main(words) == 3
    assert "refusal" in capsys.readouterr().out
