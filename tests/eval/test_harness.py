"""The harness end to end: run folders, resuming, limits, and errors in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deepseek_eval.answers.loglikelihood import encode_items
from deepseek_eval.harness import evaluate_model
from deepseek_eval.model_loading import LoadedModel, load_model
from deepseek_eval.runners import choice
from deepseek_eval.tasks import mmlu
from deepseek_eval.tasks.catalogue import TASKS, find_task
from deepseek_records.run_folder import RunFolder

pytestmark = pytest.mark.xdist_group("harness")
REFERENCE = Path(__file__).resolve().parent / "reference"
# One question per subject and three problems: enough for every branch.
SMALL = {"limit": {"mmlu": 1, "humaneval": 3}, "max_new_tokens": 8, "batch_size": 8, "dtype": "float32"}


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "evaluate"
    evaluate_model(REFERENCE / "ours", output=output, **SMALL)
    return output


def test_a_run_writes_results_and_samples(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["tasks"]["mmlu"]["n"] == 57
    assert set(results["tasks"]["mmlu"]["categories"]) == {"stem", "humanities", "social_sciences", "other"}
    assert results["tasks"]["humaneval"]["n"] == 3
    rows = read_lines(finished / "samples_mmlu.jsonl")
    assert [row["id"].split("/")[0] for row in rows] == [subject for subject in results["tasks"]["mmlu"]["groups"]]
    assert all({"id", "prediction", "target", "acc", "loglikelihoods"} <= set(row) for row in rows)
    assert sum(row["prediction"] == row["target"] for row in rows) / 57 == results["tasks"]["mmlu"]["acc"]
    rows = read_lines(finished / "samples_humaneval.jsonl")
    assert [row["id"] for row in rows] == [f"HumanEval/{index}" for index in range(3)]
    assert all({"prediction", "target", "passed", "reason"} <= set(row) for row in rows)


def test_the_summary_is_what_cards_read(finished):
    run = RunFolder(finished)
    assert run.is_finished
    lines = {line.task: line for line in run.summary.results}
    assert (lines["mmlu"].metric, lines["mmlu"].n) == ("acc", 57)
    assert (lines["humaneval"].metric, lines["humaneval"].n) == ("pass@1", 3)
    assert all(line.stderr is None or line.stderr >= 0 for line in lines.values())
    assert [data.license for data in run.summary.data] == ["MIT", "MIT"]


class _Interrupt(Exception):
    pass


@pytest.mark.parametrize("stop_after", [1, 20])
def test_an_interrupted_run_goes_on_to_the_same_result(finished, tmp_path, monkeypatch, stop_after):
    seen = []
    original = choice._choice_row

    def interrupted(row, scores):
        if len(seen) == stop_after:
            raise _Interrupt
        seen.append(row)
        return original(row, scores)

    monkeypatch.setattr(choice, "_choice_row", interrupted)
    with pytest.raises(_Interrupt):
        evaluate_model(REFERENCE / "ours", output=tmp_path / "run", **SMALL)
    partial = tmp_path / "run" / "samples_mmlu.partial.jsonl"
    assert len(read_lines(partial)) == stop_after
    with open(partial, "a") as file:
        file.write('{"id": "cut sho')  # A kill may leave half a line.
    monkeypatch.setattr(choice, "_choice_row", original)
    evaluate_model(REFERENCE / "ours", output=tmp_path / "run", **SMALL)
    for name in ("results.json", "samples_mmlu.jsonl", "samples_humaneval.jsonl"):
        ours, whole = ((folder / name).read_text() for folder in (tmp_path / "run", finished))
        if name == "results.json":
            ours, whole = (json.loads(text)["tasks"]["mmlu"] for text in (ours, whole))
        assert ours == whole
    assert not partial.exists()


def test_shots_change_the_prompt_and_share_their_cache(tmp_path):
    results = evaluate_model(
        REFERENCE / "llama", tasks=["mmlu"], num_fewshot=2, limit=2, batch_size=3, output=tmp_path / "run"
    )
    assert results["tasks"]["mmlu"]["num_fewshot"] == 2
    assert results["tasks"]["mmlu"]["n"] == 114


def test_batch_size_changes_no_answer(finished, tmp_path):
    evaluate_model(
        REFERENCE / "ours", tasks=["mmlu"], limit=1, batch_size=57, dtype="float32", output=tmp_path / "run"
    )
    for ours, theirs in zip(
        read_lines(tmp_path / "run/samples_mmlu.jsonl"), read_lines(finished / "samples_mmlu.jsonl"), strict=True
    ):
        assert ours["loglikelihoods"] == pytest.approx(theirs["loglikelihoods"], abs=1e-4)


def test_users_own_data_is_read_from_a_folder(tmp_path):
    row = {"question": "2 + 2?", "subject": "astronomy", "choices": ["3", "4", "5", "6"], "answer": 1}
    for name in ("mmlu_test", "mmlu_dev"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    results = evaluate_model(REFERENCE / "v3", tasks=["mmlu"], data_path=tmp_path, output=tmp_path / "run")
    assert results["tasks"]["mmlu"]["n"] == 1
    assert list(results["tasks"]["mmlu"]["groups"]) == ["astronomy"]


def test_every_task_has_a_file_of_its_name():
    files = {path.stem for path in Path(mmlu.__file__).parent.glob("*.py")}
    # The two formats of MMLU share a file, and so do pictures and sounds; every other task has one of its name.
    shared = {"mmlu_hendrycks", *(name for name, task in TASKS.items() if task.kind == "media")}
    assert files == (set(TASKS) - shared) | {
        *("__init__", "catalogue", "media", "letter_answers", "own_task", "row", "rows", "task")
    }
    assert find_task("mmlu") is mmlu.TASK


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["mmul"]}, "did you mean mmlu"),
        ({"num_fewshot": 6}, "num_fewshot: got 6 for mmlu, expected 0 to 5"),
        ({"batch_size": 0}, "batch_size: got 0, expected 1 or more"),
        ({"limit": 0}, "limit: got 0, expected 1 or more"),
        ({"limit": {"humanevall": 1}}, "did you mean humaneval"),
        ({"temperature": -1.0}, "temperature: got -1.0, expected 0"),
        ({"temperature": float("nan")}, "temperature: got nan, expected 0"),
        ({"top_p": 0.0}, r"top_p: got 0.0, expected more than 0, at most 1"),
        ({"top_p": 1.5}, r"top_p: got 1.5, expected more than 0, at most 1"),
        ({"num_samples": 3}, "num_samples: got 3 with temperature 0"),
        ({"tasks": ["humaneval"], "num_fewshot": 1}, "num_fewshot: got 1, expected none; humaneval shows no examples"),
        ({"batchsize": 1}, "got the unknown setting 'batchsize'"),
        ({"tasks": ["humaneval"]}, "max_new_tokens = 1024"),
    ],
)
def test_bad_settings_are_told_in_one_line(tmp_path, settings, message):
    if "max_new_tokens" in message:
        shutil.copytree(REFERENCE / "llama", tmp_path / "short")
        config = json.loads((tmp_path / "short/config.json").read_text())
        (tmp_path / "short/config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    model = tmp_path / "short" if "max_new_tokens" in message else REFERENCE / "llama"
    with pytest.raises(ValueError, match=message) as caught:
        evaluate_model(model, output=tmp_path / "run", **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["mmlu"]}, r"the logits of question .* are NaN or infinite"),
        # Greedy decoding would write the first token over and over and call that a score.
        ({"tasks": ["humaneval"], "max_new_tokens": 4}, r"the logits of problem HumanEval/0 are NaN or infinite"),
        (
            {"tasks": ["humaneval"], "max_new_tokens": 4, "temperature": 1.0},
            r"the logits of problem HumanEval/0 are NaN",
        ),
    ],
)
def test_a_model_that_returns_nan_is_refused_and_partial_results_kept(tmp_path, settings, message):
    shutil.copytree(REFERENCE / "llama", tmp_path / "nan")
    loaded = load_model(REFERENCE / "llama", dtype="float32")
    with torch.no_grad():
        loaded.model.model.norm.weight.fill_(float("nan"))
    loaded.model.save_pretrained(tmp_path / "nan")
    with pytest.raises(ValueError, match=message) as caught:
        evaluate_model(tmp_path / "nan", limit=1, output=tmp_path / "run", **settings)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "run/recipe.yaml").exists()
    assert not RunFolder(tmp_path / "run").is_finished


def test_a_tokenizer_that_splits_the_answer_is_refused():
    loaded = load_model(REFERENCE / "llama", dtype="float32")
    state = json.loads(loaded.tokenizer.backend_tokenizer.to_str())
    # Without the merge of space and letter, " A" is two tokens.
    letters = {"\u0120A", "\u0120B", "\u0120C", "\u0120D"}
    state["model"]["merges"] = [pair for pair in state["model"]["merges"] if "".join(pair) not in letters]
    from tokenizers import Tokenizer

    split = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>")
    items = list(mmlu.build_items(0, 1, None))
    with pytest.raises(ValueError, match="' A' becomes 2 tokens after a question, expected exactly 1"):
        encode_items(LoadedModel(loaded.model, split, 1536), items)


def test_a_context_too_short_for_any_question_is_refused():
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "llama")
    model = load_model(REFERENCE / "llama").model
    with pytest.raises(ValueError, match="context: 16 tokens hold not even the shortest question"):
        encode_items(LoadedModel(model, tokenizer, 16), list(mmlu.build_items(0, 1, None)))


def test_broken_data_names_file_and_line(tmp_path):
    (tmp_path / "mmlu_dev.jsonl").write_text("")
    (tmp_path / "mmlu_test.jsonl").write_text("{}\n{broken\n".replace("{}\n", "\n"))
    with pytest.raises(ValueError, match=r"mmlu_test.jsonl, line 2: got no JSON"):
        evaluate_model(REFERENCE / "llama", tasks=["mmlu"], data_path=tmp_path, output=tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"holds neither humaneval.jsonl nor humaneval.jsonl.gz"):
        evaluate_model(
            REFERENCE / "llama", tasks=["humaneval"], data_path=tmp_path, output=tmp_path / "run2", max_new_tokens=8
        )


def test_the_original_format_drops_shots_and_not_tokens():
    """Hendrycks' code takes shots away from the end until the prompt fits; the description always stays."""
    loaded = load_model(REFERENCE / "llama")
    items = list(mmlu.HENDRYCKS_TASK.build_items(5, 1, None))
    assert items[0].prompt.startswith("The following are multiple choice questions (with answers) about  abstract")
    numbers = set()
    for row in encode_items(loaded, items):
        prompts = (row.item.prompt, *row.item.shorter_prompts)
        assert len(prompts) == 6
        fitting = [prompt for prompt in prompts if len(loaded.tokenizer.encode(prompt)) <= loaded.max_length]
        if fitting:
            assert list(row.token_ids) == loaded.tokenizer.encode(fitting[0])
            numbers.add(fitting[0].count("\nAnswer:") - 1)
        else:
            assert row.is_truncated
    assert 5 in numbers and len(numbers) > 1  # Some kept all shots, some fewer.
