"""What the embedded embedders and classifiers are trained on is the same in every process.

Python orders sets of strings by a hash that changes by process; an order taken from one changes the trained file.
"""

import os
import subprocess
import sys

import pytest

SHOWN = """
import hashlib, random, types
import train_safety_classifier, train_safety_classifier_zh, train_text_embedder, train_text_embedder_zh
from deepseek_training.data.texts import read_rows
from deepseek_training.rewards.safety_classifier import hash_features
from deepseek_training.rewards.words import split_words

chinese = [(row["prompt"], row["answer"]) for row in read_rows("dialogues_zh")]
english = [(row["prompt"], row["answer"]) for row in read_rows("dialogues")][:500]
comments = [answer for _, answer in chinese] * 4
teacher = types.SimpleNamespace(_tokenizer=types.SimpleNamespace(_pieces=[]))
rows = [("books", answer, 0) for _, answer in english] + [("threats", prompt, 1) for prompt, _ in english]
rows_zh = [("alpaca_zh", answer, 0) for _, answer in chinese] + [("cold", prompt, 1) for prompt, _ in chinese]
rows_zh += [(name, "text", 1) for name in list(train_safety_classifier_zh.MADE)[:3]]
shown = {
    "words zh": train_text_embedder_zh.choose_words([t for pair in chinese for t in pair], teacher),
    "sentences zh": train_text_embedder_zh.choose_sentences({"a": chinese}, comments, random.Random(0)),
    "words": train_text_embedder.choose_words({"a": english}, []),
    "sentences": train_text_embedder.choose_sentences({"a": english}, random.Random(0)),
    "hidden": train_safety_classifier.hide(rows, random.Random(0)),
    "hidden zh": train_safety_classifier_zh.hide(rows_zh, random.Random(0)),
    "features": [hash_features(split_words(t)).tolist() for t in (*english[0], *chinese[0])],
}
for name, value in shown.items():
    print(name, len(value), hashlib.sha256(repr(value).encode()).hexdigest())
"""


@pytest.mark.slow
def test_what_is_trained_on_is_the_same_under_every_hash_seed() -> None:
    folders = os.pathsep.join(sys.path)
    shown = [
        subprocess.run(
            [sys.executable, "-c", SHOWN],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": folders},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for seed in ("1", "2")
    ]
    assert shown[0] == shown[1] and len(shown[0]) == 7
    assert all(int(line.split()[-2]) >= 4 for line in shown[0])
