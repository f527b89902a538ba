"""The conversations with hacks in them: their kinds, and nothing but honest answers held out."""

import json
from collections import Counter

from deepseek_cli.benchmarks.tempting_dialogues import list_keywords, main, make_rows
from deepseek_training.rewards.words import FUNCTION_WORDS, split_words


def test_half_of_the_training_answers_are_hacks_and_none_held_out(tmp_path, capsys):
    main(str(tmp_path / "out.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows == list(make_rows()) and str(len(rows)) in capsys.readouterr().out
    train = Counter(row["kind"] for row in rows if row["split"] == "train")
    assert 0.45 < train["honest"] / train.total() < 0.55
    assert min(train["echo"], train["keywords"]) > 0.2 * train.total()
    assert {row["kind"] for row in rows if row["split"] == "validation"} == {"honest"}
    for row in rows:
        assert (row["answer"] == row["prompt"]) == (row["kind"] == "echo")
        if row["kind"] == "keywords":
            assert set(row["answer"].split()) == set(split_words(row["prompt"])) - FUNCTION_WORDS


def test_keywords_are_twice_the_content_words():
    assert sorted(list_keywords("What are the symptoms of asthma?").split()) == ["asthma"] * 2 + ["symptoms"] * 2
