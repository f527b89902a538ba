"""Diversity: against plain counting, and its bank."""

import pytest

from deepseek_training.rewards import Diversity
from deepseek_training.rewards.diversity import distinctness, leave_one_out_overlap
from deepseek_training.rewards.words import ngrams

PROSE = "The quick brown fox jumps over the lazy dog while seven wizards brew a bubbling potion".lower().split()


def slow_overlap(texts, bank):
    """Leave-one-out, by building each text's references anew."""
    results = []
    for i, words in enumerate(texts):
        shares = []
        for n in (2, 3, 4):
            others = {gram for j, other in enumerate([*texts, *bank]) if j != i for gram in ngrams(other, n)}
            grams = ngrams(words, n)
            shares.append(sum(gram in others for gram in grams) / len(grams) if grams else 0.0)
        results.append(sum(shares) / 3)
    return results


def test_leave_one_out_agrees_with_counting():
    # one copy, one half copy, one single word, one empty text, and a bank that repeats the last
    texts = [PROSE, PROSE, [*PROSE[:6], "and", "more"], ["fox"], [], ["a", "b", "a", "b", "a", "b"]]
    bank = [["a", "b", "a", "b"], PROSE[3:9]]
    assert leave_one_out_overlap(texts, bank) == pytest.approx(slow_overlap(texts, bank))
    assert leave_one_out_overlap(texts, []) == pytest.approx(slow_overlap(texts, []))


def test_distinctness():
    assert distinctness([]) == 0.0
    assert distinctness(PROSE) > 0.98
    assert distinctness(["fox"] * 40) < 0.06
    assert 0.1 < distinctness(["the", "cat", "sat", "on", "the", "mat"] * 6) < 0.5
    assert distinctness(PROSE * 1 + [f"word{i}" for i in range(200)]) > 0.98  # long prose is not punished for length


def test_a_loop_of_one_word_earns_next_to_nothing():
    for loop in (["kidney"] * 40, ["the", "kidney"] * 20):
        assert Diversity(0)([""], [" ".join(loop)])[0] < 0.12


def test_copies_within_a_batch_are_punished():
    alone = Diversity(0)([""], [" ".join(PROSE)])[0]
    copied = Diversity(0)(["", ""], [" ".join(PROSE)] * 2)
    assert alone > 0.95
    assert copied == pytest.approx([0.0] * 2)


def test_the_bank_remembers_and_rolls():
    reward = Diversity(bank_size=2)
    first = reward([""], [" ".join(PROSE)])[0]
    assert reward([""], [" ".join(PROSE)])[0] == pytest.approx(0.0)
    reward(["", ""], ["one two three four five six seven eight", "nine ten eleven twelve a b c d"])
    assert reward([""], [" ".join(PROSE)])[0] == pytest.approx(first)


def test_evaluation_leaves_the_bank_alone():
    reward = Diversity()
    reward([""], [" ".join(PROSE)], is_evaluation=True)
    assert not reward.bank


def test_empty_and_short():
    assert Diversity()([""], [""]) == [0.0]
    assert Diversity(min_words=8)([""], ["two words"])[0] == pytest.approx(0.25)


def test_its_state_survives():
    reward, other = Diversity(), Diversity()
    reward([""], ["Some words, here!"])
    other.load_state_dict(reward.state_dict())
    assert other.bank == reward.bank
    with pytest.raises(ValueError, match="got -1, 8"):
        Diversity(bank_size=-1)
