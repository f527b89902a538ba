"""MMLU perturbed and by term frequency: the changes themselves, and a real model whose figures follow by hand."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import unigram_model

from deepseek_eval.harness import evaluate_model
from deepseek_eval.runners import choice
from deepseek_eval.tasks import long_tail, mmlu_robust

pytestmark = pytest.mark.xdist_group("harness")
REFERENCE = Path(__file__).resolve().parents[1] / "reference"


@pytest.fixture(scope="module")
def forms() -> dict[str, dict]:
    """Ten questions per subject in all their forms, by question and form."""
    result: dict[str, dict] = {}
    for item in mmlu_robust.build_items(0, 10, None):
        result.setdefault(item.facts["question"], {})[item.id.partition("#")[2] or "original"] = item
    return result


def distance(first: str, second: str) -> int:
    """Levenshtein's, with a swap of neighbors as one step."""
    rows = {(i, 0): i for i in range(len(first) + 1)} | {(0, j): j for j in range(len(second) + 1)}
    for i in range(1, len(first) + 1):
        for j in range(1, len(second) + 1):
            steps = [rows[i - 1, j] + 1, rows[i, j - 1] + 1, rows[i - 1, j - 1] + (first[i - 1] != second[j - 1])]
            if i > 1 and j > 1 and first[i - 1] == second[j - 2] and first[i - 2] == second[j - 1]:
                steps.append(rows[i - 2, j - 2] + 1)
            rows[i, j] = min(steps)
    return rows[len(first), len(second)]


def test_every_tenth_word_gets_one_error_inside_it():
    text = "Somebody walked along the narrow mountain footpath towards " * 5
    seen = Counter()
    for seed in range(40):
        mistyped = mmlu_robust.mistype(text, random.Random(seed))
        pairs = [(a, b) for a, b in zip(text.split(), mistyped.split(), strict=True) if a != b]
        assert len(pairs) == 4  # 35 words of four letters or more.
        for word, wrong in pairs:
            assert distance(word, wrong) == 1
            assert (word[0], word[-1]) == (wrong[0], wrong[-1])
            seen[len(wrong) - len(word)] += 1
    # Letters are lost, gained and replaced or swapped.
    assert min(seen[-1], seen[0], seen[1]) > 10


def test_short_words_and_numbers_stay():
    assert mmlu_robust.mistype("Is 2 + 2 = 4 or 5?", random.Random(0)) == "Is 2 + 2 = 4 or 5?"


def test_each_form_changes_one_thing(forms):
    assert len(forms) == 570
    for question in forms.values():
        original = question["original"]
        assert set(question) <= {
            *("original", "typos", "distraction", "instruction"),
            *("reordered/1", "reordered/2", "reordered/3"),
        }
        # The sentence stands before the question and nothing else is touched.
        added = question["distraction"].prompt
        sentence = next(text for text in mmlu_robust.DISTRACTIONS if text in added)
        assert added.replace(f"{sentence} ", "", 1) == original.prompt
        # Only the description differs.
        assert question["instruction"].prompt.split("\n\n", 1)[1] == original.prompt.split("\n\n", 1)[1]
        assert question["instruction"].prompt != original.prompt
        if "typos" in question:
            assert question["typos"].prompt != original.prompt
            assert question["typos"].prompt.rpartition("\nA.")[2] == original.prompt.rpartition("\nA.")[2]
    assert sum("typos" in question for question in forms.values()) > 560


def test_moved_options_carry_their_answers(forms):
    moved = 0
    for question in forms.values():
        original = question["original"]
        options = options_of(original.prompt)
        for shift in (1, 2, 3):
            item = question.get(f"reordered/{shift}")
            if item is None:
                continue
            moved += 1
            shifted = options_of(item.prompt)
            assert [options[answer] for answer in item.answers] == shifted
            assert sorted(item.answers) == [0, 1, 2, 3]
            assert item.target == original.target
            assert shifted[item.answers.index(item.target)] == options[original.target]
    assert moved > 1400
    # Over the four orders every answer stands once behind each letter.
    whole = next(question for question in forms.values() if "reordered/1" in question)
    orders = [item.answers for name, item in whole.items() if name.split("/")[0] in ("original", "reordered")]
    assert all(sorted(column) == [0, 1, 2, 3] for column in zip(*orders, strict=True))


def options_of(prompt: str) -> list[str]:
    text = prompt.rpartition("\nAnswer:")[0]
    parts = []
    for letter in "DCBA":
        text, _, option = text.rpartition(f"\n{letter}. ")
        parts.insert(0, option)
    return parts


@pytest.mark.parametrize(
    ("option", "speaks"),
    [
        ("All of the above", True),
        ("none of these", True),
        ("Both A and C", True),
        ("A, B and D", True),
        ("Neither", True),
        ("Option B is right", True),
        ("All of (a) to (c) are drawbacks", True),
        ("a cat and a dog", False),
        ("Vitamin A deficiency", False),
        ("All mammals are warm-blooded", False),
        ("Both parents carry the gene", False),
        ("$42", False),
    ],
)
def test_options_that_speak_of_others_are_not_moved(option, speaks):
    assert mmlu_robust.speaks_of_options(["one", "two", "three", option]) == speaks


def test_all_models_see_the_same_changes(forms):
    again = list(mmlu_robust.build_items(0, 1, None))
    for item in again[:40]:
        first = forms[item.facts["question"]][item.id.partition("#")[2] or "original"]
        assert (item.prompt, item.answers) == (first.prompt, first.answers)


@pytest.fixture(scope="module")
def own_questions(tmp_path_factory) -> Path:
    """Two subjects of eight questions; the right letter goes round."""
    folder = tmp_path_factory.mktemp("questions")
    rows = [
        {
            "question": f"Which of the following numbers, counted from zero, is number {index}?",
            "subject": subject,
            "choices": ["zero", "one", "two", "three"],
            "answer": index % 4,
        }
        for subject in ("astronomy", "virology")
        for index in range(8)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "mmlu_test.jsonl").write_text(text)
    (folder / "mmlu_dev.jsonl").write_text(text)
    return folder


def test_a_model_that_always_says_a_is_found_out(own_questions, tmp_path):
    model = unigram_model.make_unigram_model(tmp_path / "model", {" A": 5.0})
    results = evaluate_model(
        model, tasks=["mmlu_robust"], data_path=own_questions, dtype="float32", output=tmp_path / "run"
    )["tasks"]["mmlu_robust"]
    # A quarter of the answers stand behind A, in any order.
    assert (results["acc_original"], results["acc_perturbed"]) == (0.25, pytest.approx(0.25))
    for name in ("typos", "distraction", "instruction"):
        assert results["variants"][name]["flip_rate"] == results["variants"][name]["difference"] == 0.0
    # Another content behind A each time.
    assert results["variants"]["reordered"]["flip_rate"] == 1.0
    assert results["most_flipped_variant"] == "reordered"
    for part in ("original", "all_orders"):
        assert results["position_bias"][part]["letters"]["A"]["predicted"] == 1.0
        assert results["position_bias"][part]["rstd"] == pytest.approx(3**0.5 / 4)
    # chi2 = (16 - 4)^2 / 4 + 3 * 4^2 / 4
    assert results["position_bias"]["original"]["chi2"] == pytest.approx(48.0)
    assert results["position_bias"]["all_orders"]["chi2"] is None


def test_answers_are_taken_over_from_mmlu(own_questions, tmp_path, monkeypatch):
    asked = []
    original = choice._choice_row
    monkeypatch.setattr(choice, "_choice_row", lambda row, scores: asked.append(row.item.id) or original(row, scores))
    tasks = ["mmlu", "long_tail"]
    settings = {"limit": 1, "dtype": "float32", "output": tmp_path / "run"}
    evaluate_model(REFERENCE / "ours", tasks=tasks, **settings)
    assert len(asked) == 57
    rows = {name: (tmp_path / f"run/samples_{name}.jsonl").read_text() for name in tasks}
    assert rows["mmlu"] == rows["long_tail"]
    # Elsewhere are other questions under the same ids.
    asked.clear()
    settings |= {"data_path": {"mmlu": own_questions}, "output": tmp_path / "elsewhere"}
    evaluate_model(REFERENCE / "ours", tasks=tasks, **settings)
    assert len(asked) == 2 + 57


def test_term_frequency_by_hand():
    # One in a thousand of 100,000 words is 100.
    counts = long_tail.drop_function_words(Counter({"that": 99_892, "cell": 99, "membrane": 9}))
    assert counts == {"that": None, "cell": 99, "membrane": 9}
    # log10(100), log10(10), log10(1); the function word and the short words do not count.
    assert long_tail.term_frequency("Is that a cell, Membrane or zygote?", counts) == pytest.approx((2 + 1 + 0) / 3)
    assert long_tail.term_frequency("2 + 2 = 4", counts) is None
    assert long_tail.count_words(["The cell, the CELL.", "cells"]) == {"cell": 2, "cells": 1}


def test_the_embedded_counts_are_those_of_the_training_text():
    """Counted again from the package's own text, not from the table."""
    from deepseek_training.data.texts import load_texts

    counts = long_tail.count_words(text for name in ("books", "medicine") for text in load_texts(name, "train"))
    assert long_tail.read_counts(None) == long_tail.drop_function_words(counts)


def test_common_terms_are_in_the_head(tmp_path):
    items = {item.id: item for item in long_tail.build_items(0, None, None)}
    frequencies = [item.facts["frequency"] for item in items.values() if item.facts["frequency"] is not None]
    assert len(items) == 14_042 and len(frequencies) > 14_000
    # Few ties, or the bands would be cut at random.
    assert max(Counter(frequencies).values()) < 100
    (tmp_path / "reference_text.txt").write_text("abstract algebra\n" * 50 + "whatever else there is\n" * 50)
    own = {item.id: item.facts["frequency"] for item in long_tail.build_items(0, 1, tmp_path)}
    assert own.keys() < items.keys()
    assert own != {name: items[name].facts["frequency"] for name in own}
    with pytest.raises(FileNotFoundError, match="holds neither reference_text"):
        list(long_tail.build_items(0, 1, REFERENCE))
