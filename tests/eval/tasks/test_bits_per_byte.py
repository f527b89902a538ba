"""Bits per byte of any text: against a plain loop over transformers, against training's held-out figure, and shown."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_deepseek  # noqa: F401, registers the model type
from deepseek_cli.main import main
from deepseek_eval.comparison import compare_runs
from deepseek_eval.harness import evaluate_model
from deepseek_eval.metrics.loading import load_metric
from deepseek_eval.runners import document
from deepseek_model_cards.card.card import write_card
from deepseek_records.run_folder import RunFolder
from deepseek_training.data.texts import load_texts
from deepseek_training.recipes.pretrain_and_adapt import PretrainRecipe
from deepseek_training.trainer.held_out import HeldOut

pytestmark = pytest.mark.xdist_group("harness")
REFERENCE = Path(__file__).resolve().parents[1] / "reference"
TEXTS = ["Once upon a time.", "A much longer one, " + "with words and words, " * 20, "</s> is spelled out", "Über 9 €"]
SETTINGS = {"tasks": ["bits_per_byte"], "dtype": "float32", "batch_size": 3}


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "pages.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def read_samples(run: Path, task: str = "bits_per_byte") -> list[dict]:
    return [json.loads(line) for line in (run / f"samples_{task}.jsonl").read_text().splitlines()]


@torch.no_grad()
def plain_nats(model, ids: list[int], length: int) -> float:
    """Token by token: each is predicted from the tokens before it that its window holds, and from no other."""
    step = length - max(1, length // 4)
    total = 0.0
    for target in range(1, len(ids)):
        begin = 0 if target < length else ((target - length) // step + 1) * step
        logits = model(input_ids=torch.tensor([ids[begin:target]])).logits[0, -1].double()
        total -= logits.log_softmax(-1)[ids[target]].item()
    return total


@pytest.mark.parametrize("name", ["ours", "llama"])
@pytest.mark.parametrize("length", [16, None])
def test_the_figure_equals_a_plain_loop(name, length, text_file, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(REFERENCE / name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE / name)
    output = tmp_path / "run"
    scores = evaluate_model(REFERENCE / name, output=output, data_path=text_file, max_length=length, **SETTINGS)
    rows = read_samples(output)
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    total = 0.0
    for row, text in zip(rows, TEXTS, strict=True):
        plain = tokenizer(text.replace("</s>", "<\0/s>").replace("\0", ""), split_special_tokens=True)["input_ids"]
        ids = [begin, *(id for id in plain if id != tokenizer.bos_token_id), tokenizer.eos_token_id]
        expected = plain_nats(model, ids, length or model.config.max_position_embeddings)
        assert -row["loglikelihood"] == pytest.approx(expected, rel=1e-5)
        assert (row["num_tokens"], row["num_bytes"]) == (len(ids) - 1, len(text.encode()))
        total += expected
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    figures = scores["tasks"]["bits_per_byte"]
    assert figures["bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-5)
    assert (figures["n"], figures["num_bytes"]) == (4, num_bytes) and figures["bits_per_byte_stderr"] > 0
    if length:
        assert rows[1]["num_windows"] > 1 and figures["context"] == length


def test_it_equals_trainings_held_out_figure_on_the_same_file(tmp_path):
    path = tmp_path / "books.jsonl"
    rows = [{"text": text, "split": "validation" if index % 3 else "train"} for index, text in enumerate(TEXTS * 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = AutoModelForCausalLM.from_pretrained(REFERENCE / "ours", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "ours")
    recipe = PretrainRecipe(sequence_length=24, batch_size=4, max_steps=1, learning_rate=1e-3)
    held_out = HeldOut.prepare("books", load_texts(path, "validation"), tokenizer, None).measure(model, recipe)
    (tmp_path / "books.yaml").write_text("name: held\nkind: text\ndata: books.jsonl\nsplit: validation\n")
    settings = {**SETTINGS, "tasks": [str(tmp_path / "books.yaml")], "max_length": 24}
    scores = evaluate_model(REFERENCE / "ours", output=tmp_path / "run", **settings)["tasks"]["held"]
    assert scores["bits_per_byte"] == pytest.approx(held_out.value, rel=1e-6)
    assert (scores["num_tokens"], scores["num_bytes"]) == (held_out.num_tokens, held_out.num_bytes)
    assert scores["n"] == 8


def test_a_folder_is_read_whole_and_shows_in_table_card_and_report(tmp_path, capsys):
    folder = tmp_path / "pages"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    words = ["evaluate", str(REFERENCE / "ours"), "--tasks", "bits_per_byte", "--data", str(folder)]
    assert main([*words, "--output", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("bits_per_byte"))
    assert line.split()[1] == "bits_per_byte" and line.split()[-1] == "4"
    summary = RunFolder(tmp_path / "run").summary
    (row,) = summary.results
    assert (row.dataset, row.label, row.n, row.higher_is_better) == ("pages", "pages", 4, False)
    assert row.measures == "language" and row.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert (summary.data[0].name, summary.data[0].license) == ("pages", "not stated")
    card = write_card(tmp_path / "run", output=tmp_path / "card").read_text()
    assert "| pages | bits per byte (lower is better) |" in card
    assert "bits per byte (lower is better)" in (tmp_path / "run/report.html").read_text()
    assert main(["evaluate", "--table", str(tmp_path / "run")]) == 0
    assert "pages, bits_per_byte (lower is better)" in capsys.readouterr().out


def test_one_document_has_no_error(tmp_path, capsys):
    (tmp_path / "one.txt").write_text("Just this.")
    words = ["evaluate", str(REFERENCE / "ours"), "--tasks", "bits_per_byte", "--data", str(tmp_path / "one.txt")]
    assert main([*words, "--output", str(tmp_path / "run")]) == 0
    (row,) = RunFolder(tmp_path / "run").summary.results
    assert row.stderr is None and row.n == 1


def test_an_interrupted_run_goes_on_to_the_same_figures(text_file, tmp_path, monkeypatch):
    def evaluate():
        return evaluate_model(REFERENCE / "ours", output=tmp_path / "run", data_path=text_file, **SETTINGS)

    whole = evaluate_model(REFERENCE / "ours", output=tmp_path / "whole", data_path=text_file, **SETTINGS)
    original, calls = document.score_windows, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(document, "score_windows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate()
    assert 0 < len((tmp_path / "run/samples_bits_per_byte.partial.jsonl").read_text().splitlines()) < len(TEXTS)
    monkeypatch.setattr(document, "score_windows", original)
    assert evaluate()["tasks"] == whole["tasks"]


def test_two_models_are_compared_on_the_same_documents(text_file, tmp_path, capsys):
    for name in ("ours", "llama"):
        evaluate_model(REFERENCE / name, output=tmp_path / name, data_path=text_file, **SETTINGS)
    row = compare_runs(tmp_path / "ours", tmp_path / "llama")["bits_per_byte"]
    first, second = (read_samples(tmp_path / name) for name in ("ours", "llama"))
    fewer = sum(b["loglikelihood"] > a["loglikelihood"] for a, b in zip(first, second, strict=True))
    assert (row["num_better"], row["num_worse"], row["n"]) == (fewer, 4 - fewer, 4)
    assert row["difference"] == pytest.approx(row["second"] - row["first"])
    assert main(["evaluate", "--compare", str(tmp_path / "ours"), str(tmp_path / "llama")]) == 0
    assert "Bits per byte, lower is better: bits_per_byte." in capsys.readouterr().out


def test_the_error_is_that_of_a_ratio_over_documents():
    generator = torch.Generator().manual_seed(0)
    metric, errors, values = load_metric("bits_per_byte"), [], []
    for _ in range(150):
        sizes = torch.randint(50, 150, (30,), generator=generator)
        bits = sizes * (2 + 0.3 * torch.randn(30, generator=generator))
        scores = metric.compute(predictions=(-bits * math.log(2)).tolist(), references=sizes.tolist())
        errors.append(scores["bits_per_byte_stderr"])
        values.append(scores["bits_per_byte"])
    assert torch.tensor(values).std().item() == pytest.approx(sum(errors) / len(errors), rel=0.15)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "data: got none for bits_per_byte, expected a text: --data FILE"),
        (["--data", "{file}", "--prompt-style", "chat"], "prompt_style = chat: task bits_per_byte has base only"),
        (["--data", "{file}", "--num-fewshot", "2"], "bits_per_byte shows no examples"),
        (["--data", "{file}", "--max-length", "1"], "max_length: got 1, expected 2 or more"),
        (["--data", "{file}", "--max-length", "99999"], "max_length: got 99999, expected at most"),
        (["--data", "{empty}"], "is empty"),
        (["--data", "{missing}"], "does not exist"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(text_file, tmp_path, words, message, capsys):
    (tmp_path / "empty.txt").write_text("")
    names = {"file": text_file, "empty": tmp_path / "empty.txt", "missing": tmp_path / "missing.txt"}
    words = [word.format(**names) for word in words]
    command = ["evaluate", str(REFERENCE / "ours"), "--tasks", "bits_per_byte", "--output", str(tmp_path / "run")]
    assert main([*command, *words]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("prompt: hello", "got the unknown key 'prompt', expected for a text task: name, kind, data, label"),
        ("split: dev", "split: got 'dev', expected train or validation or all"),
        ("column: body", "has no column 'body'"),
        ("column: [a]", "column: got ['a'], expected text"),
    ],
)
def test_a_wrong_file_of_ones_own_is_told_in_one_line(text_file, line, message, capsys):
    path = text_file.with_suffix(".yaml")
    path.write_text(f"name: pages\nkind: text\ndata: {text_file.name}\n{line}\n")
    command = ["evaluate", str(REFERENCE / "ours"), "--tasks", str(path), "--output", str(text_file.parent / "run")]
    assert main(command) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
