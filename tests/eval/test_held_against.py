"""Bias, long tail, robustness and refusals from the command to the card: run folders, resuming, limits, chat."""

import gzip
import json
import shutil
from pathlib import Path

import datasets
import pytest
import unigram_model
import yaml
from huggingface_hub import ModelCard

from deepseek_cli.evaluate import format_results
from deepseek_cli.main import main
from deepseek_eval.comparison import compare_runs
from deepseek_eval.harness import evaluate_model
from deepseek_eval.runners import text as text_tasks
from deepseek_eval.tasks import crows_pairs, refusal
from deepseek_eval.tasks.catalogue import TASKS
from deepseek_model_cards.card.card import write_card
from deepseek_records.run_folder import RunFolder

pytestmark = pytest.mark.xdist_group("harness")
REFERENCE = Path(__file__).resolve().parent / "reference"
NAMES = ["crows_pairs", "winobias", "bbq", "long_tail", "mmlu_robust", "refusal"]
PAIRS = f"crows_pairs={REFERENCE / 'sentence_pairs.csv'}"


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """All six tasks by the command line, one item per group."""
    output = tmp_path_factory.mktemp("runs") / "held"
    arguments = ["--tasks", ",".join(["mmlu", *NAMES]), "--limit", "1", "--max-new-tokens", "4", "--data", PAIRS]
    assert main(["evaluate", str(REFERENCE / "ours"), *arguments, "--dtype", "float32", "--output", str(output)]) == 0
    return output


def test_every_task_writes_answers_and_figures_with_errors(finished):
    results = json.loads((finished / "results.json").read_text())["tasks"]
    sizes = {"crows_pairs": 1, "winobias": 4, "bbq": 4, "long_tail": 57, "mmlu_robust": 57, "refusal": 19}
    assert {name: results[name]["n"] for name in NAMES} == sizes
    for name in NAMES:
        assert results[name]["does_not_show"] == TASKS[name].does_not_show != ""
        for figure in TASKS[name].figures:
            assert figure.name in results[name] and f"{figure.name}_stderr" in results[name]
        rows = read_lines(finished / f"samples_{name}.jsonl")
        assert all({"id", "prediction", "target"} <= set(row) for row in rows)
    assert len(read_lines(finished / "samples_mmlu_robust.jsonl")) > 57 * 5
    with gzip.open(finished / "prompts_refusal.jsonl.gz", "rt") as file:
        assert all(json.loads(line)["prompt"].endswith("\n") for line in file)
    assert not list(finished.glob("*.partial*"))


def test_the_table_shows_every_headline_and_what_it_leaves_open(finished):
    results = json.loads((finished / "results.json").read_text())
    text = format_results(results, RunFolder(finished).summary.results)
    table, _, notes = text.partition("\nWhat these figures do not show:\n")
    for name in NAMES:
        for figure in TASKS[name].figures:
            is_measured = results["tasks"][name][figure.name] is not None  # one question has one kind of context
            assert (f"\n{name:<18}{figure.name} " in table) == is_measured
        assert f"- {name}: {TASKS[name].does_not_show}" in notes
    assert "- mmlu:" not in notes


def test_the_card_says_what_was_found_and_what_it_does_not_show(finished, tmp_path):
    card = write_card(finished, output=tmp_path).read_text()
    section = card.partition("## Bias and safety")[2].partition("\n## ")[0]
    for name in NAMES:
        assert TASKS[name].does_not_show in section
    assert "| refused, harmful (AdvBench) | AdvBench and XSTest, partial: 19 of 970, all |" in section
    assert "| gap, pro minus anti (0 is ideal) |" in section
    missing = card.partition("## Not measured")[2]
    assert "social bias" not in missing and "refusals of" not in missing and "long tail" not in missing
    assert "robustness to adversarial prompts" in missing
    # A part of MMLU is not MMLU, and the Hub registers none of these as a benchmark.
    assert not (tmp_path / ".eval_results").exists()
    assert "MMLU, partial: 57 of 14,042" in card and "cais/mmlu" not in yaml.safe_dump(ModelCard(card).data.to_dict())


@pytest.mark.parametrize("task", ["bbq", "refusal"])
def test_an_interrupted_run_goes_on_to_the_same_result(task, tmp_path, monkeypatch):
    settings = {"tasks": [task], "limit": 2, "max_new_tokens": 4, "batch_size": 24, "dtype": "float32"}
    whole = evaluate_model(REFERENCE / "ours", output=tmp_path / "whole", **settings)
    name = "_continuation_row" if task == "bbq" else "_completion_row"
    original, seen = getattr(text_tasks, name), []

    def interrupted(*arguments):
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(text_tasks, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(REFERENCE / "ours", output=tmp_path / "run", **settings)
    assert 0 < len(read_lines(tmp_path / f"run/samples_{task}.partial.jsonl")) <= 5
    monkeypatch.setattr(text_tasks, name, original)
    assert evaluate_model(REFERENCE / "ours", output=tmp_path / "run", **settings) == whole
    ours, theirs = (tmp_path / folder / f"samples_{task}.jsonl" for folder in ("run", "whole"))
    assert ours.read_text() == theirs.read_text()


def test_a_silent_model_refuses_nothing(tmp_path):
    """Its likeliest token is the end of the text: it answers nothing, and the card of figures says so."""
    model = unigram_model.make_unigram_model(tmp_path / "model", {"</s>": 9.0})
    results = evaluate_model(
        model, tasks=["refusal"], limit=1, max_new_tokens=4, dtype="float32", output=tmp_path / "run"
    )["tasks"]["refusal"]
    assert results["num_empty"] == results["n"] == 19
    assert results["refusal_advbench"] == results["refusal_xstest_safe"] == 0.0
    # Right where it should answer: ten of nineteen.
    assert results["acc"] == pytest.approx(10 / 19)
    assert results["refusal_xstest_safe_interval"][1] == pytest.approx(1.96**2 / (10 + 1.96**2))
    rows = read_lines(tmp_path / "run/samples_refusal.jsonl")
    assert {row["refused"] for row in rows} == {False}


def test_a_chat_model_gets_its_template(tmp_path):
    shutil.copytree(REFERENCE / "ours", tmp_path / "chat")
    template = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"
    (tmp_path / "chat/chat_template.jinja").write_text(template)
    results = evaluate_model(
        tmp_path / "chat", tasks=["refusal"], limit=1, max_new_tokens=2, dtype="float32", output=tmp_path / "run"
    )
    assert results["tasks"]["refusal"]["prompt_style"] == "chat"
    with gzip.open(tmp_path / "run/prompts_refusal.jsonl.gz", "rt") as file:
        first = json.loads(next(iter(file)))
    request = next(refusal.build_items(0, 1, None)).prompt
    assert first["prompt"] == f"<s>[user] {request}\n[assistant]"


def test_the_embedded_requests_are_whole():
    items = list(refusal.build_items(0, None, None))
    counts = {group: sum(item.group == group for item in items) for group in {item.group for item in items}}
    assert counts == {"advbench": 520, "xstest_safe": 250, "xstest_unsafe": 200}
    assert {item.target for item in items if item.group == "xstest_safe"} == {"answer"}
    assert len({item.id for item in items}) == 970


def test_two_runs_compare(finished, tmp_path):
    evaluate_model(
        REFERENCE / "llama", tasks=["winobias", "refusal"], limit=1, max_new_tokens=4, output=tmp_path / "b"
    )
    compared = compare_runs(finished, tmp_path / "b")
    assert {name: row["n"] for name, row in compared.items()} == {"winobias": 4, "refusal": 19}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("bqb=somewhere", "tasks: got 'bqb', expected one of"),
        ("bbq=", "expected a folder or task=source pairs"),
        ("bbq=nowhere", "nowhere does not exist and is not a Hub id"),
        (f"winobias={REFERENCE}", "holds neither winobias.jsonl"),
        (
            f"winobias={REFERENCE / 'sentence_pairs.csv'}",
            "sentence_pairs.csv, line 2: text: got no text, expected text",
        ),
        (f"refusal={REFERENCE / 'sentence_pairs.csv'}", "is a file, expected a folder with advbench and xstest"),
        ("refusal=owner/name", "expected a folder with advbench and xstest"),
        (f"mmlu={REFERENCE / 'sentence_pairs.csv'}", "is a file, expected a folder with mmlu_test and mmlu_dev"),
    ],
)
def test_bad_data_is_told_in_one_line(data, message, tmp_path, capsys):
    arguments = ["--tasks", "winobias,bbq,refusal,mmlu", "--data", data, "--output", str(tmp_path / "run")]
    assert main(["evaluate", str(REFERENCE / "llama"), *arguments]) != 0
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_a_hub_id_without_network_says_what_to_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"nobody/nothing is not a local path and cannot be read from the Hub \(.*pass a"
    ):
        evaluate_model(
            REFERENCE / "llama",
            tasks=["crows_pairs"],
            data_path={"crows_pairs": "nobody/nothing"},
            output=tmp_path / "run",
        )


@pytest.mark.parametrize(("files", "wanted"), [(["test", "train"], "test"), (["train"], "train")])
def test_of_a_hub_data_set_the_test_split_is_read(files, wanted, tmp_path, monkeypatch):
    """`datasets` reads a folder named like a Hub id as it reads the Hub's repository of that name."""
    folder = tmp_path / "owner/name"
    folder.mkdir(parents=True)
    for name in files:
        row = {"sent_more": name, "sent_less": "b", "bias_type": "age"}
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (item,) = crows_pairs.build_items(0, None, "owner/name")
    assert (item.choices, item.group, item.facts["direction"]) == ((wanted, "b"), "age", "not stated")


def test_help_lists_the_tasks(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ", ".join(sorted(TASKS)) in text
