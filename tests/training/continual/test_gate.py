"""The gate's arithmetic: paired by document, open to gains, closed to losses and to sets that could not show one."""

import json
import math

import numpy as np
import pytest

from deepseek_training.continual.decision import GateSets
from deepseek_training.continual.gate import (
    choose_candidate,
    compare_bits,
    judge_gain,
    judge_loss,
    judge_order,
    judge_safety,
    judge_text,
)
from deepseek_training.continual.held_out_units import HeldOutUnits, cut_passages, shuffle_words
from deepseek_training.data.corpus import Corpus
from deepseek_training.data.texts import load_texts
from deepseek_training.data.tokenizer import train_tokenizer
from deepseek_training.recipes.text_sources import TextSource
from deepseek_training.recipes.update import UpdateRecipe

RNG = np.random.default_rng(0)
BYTES = RNG.integers(200, 4000, 40).astype(float)
# Documents differ far more from one another than two models on one of them.
HARDNESS = RNG.uniform(1.0, 4.0, 40)


def recipe(**settings):
    return UpdateRecipe(data="new", model="model", learning_rate=1e-3, max_steps=1, epochs=None, **settings)


def bits(change, noise=0.0, *, seed=1, is_exact=True):
    """Before, after and bytes, each document's bits changed by `change` give or take `noise`, exactly so in all."""
    before = HARDNESS * BYTES
    spread = np.random.default_rng(seed).normal(0, noise, len(before))
    spread -= (spread * before).sum() / before.sum() if is_exact else 0.0
    return before, before * (1 + change + spread), BYTES


def test_the_error_is_that_of_pairs_and_covers_the_truth():
    """Over many draws the change lies within 1.96 errors of the truth 95 times in 100; unpaired it is wider."""
    inside, widths = 0, []
    for seed in range(400):
        change, error, _, _ = compare_bits(*bits(0.01, noise=0.05, seed=seed, is_exact=False))
        inside += abs(change - 0.01) < 1.96 * error
        widths.append(error)
    assert 0.9 < inside / 400 < 0.98
    before, _, sizes = bits(0.0)
    residuals = before - before.sum() / sizes.sum() * sizes
    unpaired = math.sqrt(2 * np.square(residuals).sum()) / before.sum()
    assert unpaired > 5 * np.mean(widths)


def test_bits_per_byte_are_of_the_whole_set():
    change, _, before, after = compare_bits(*bits(-0.1))
    assert before == pytest.approx((HARDNESS * BYTES).sum() / BYTES.sum())
    assert after == pytest.approx(0.9 * before) and change == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("change", "noise", "settings", "passed"),
    [
        (-0.05, 0.01, {}, True),
        (-0.001, 0.05, {}, False),  # within chance
        (0.0, 0.0, {}, False),  # nothing learned is no gain
        (0.05, 0.01, {}, False),
        (-0.05, 0.01, {"min_gain": 0.1}, False),
        (-0.15, 0.01, {"min_gain": 0.1}, True),
        (float("nan"), 0.0, {}, False),
    ],
)
def test_the_new_text_must_gain(change, noise, settings, passed):
    found = judge_gain("new", "document", bits(change, noise), recipe(**settings))
    assert found.passed is passed and bool(found.why) is not passed


@pytest.mark.parametrize(
    ("change", "noise", "settings", "passed"),
    [
        (0.0, 0.01, {}, True),
        (-0.1, 0.01, {}, True),
        (0.019, 0.0, {}, True),
        (0.021, 0.0001, {}, False),  # beyond the bound, and the error is too small to excuse it
        (0.021, 0.05, {}, True),  # beyond the bound by less than the error
        (0.021, 0.05, {"loss_errors": 0.0}, False),
        (0.015, 0.05, {"loss_errors": -1.645}, False),  # not shown to be within
        (0.1, 0.01, {}, False),
        (0.0, 0.5, {}, False),  # an error above the bound: such a set lets everything pass
        (float("inf"), 0.0, {}, False),
    ],
)
def test_no_earlier_text_may_lose(change, noise, settings, passed):
    found = judge_loss("old", "document", bits(change, noise), recipe(**settings))
    assert found.passed is passed, found
    assert bool(found.why) is not passed


def test_a_set_without_error_decides_against():
    one = tuple(part[:1] for part in bits(0.0))
    assert not judge_loss("old", "document", one, recipe()).passed
    assert not judge_gain("new", "document", one, recipe()).passed


def test_order_safety_and_text():
    ordered, shuffled, _ = bits(0.2, noise=0.05)
    assert judge_order("new", "document", ordered, shuffled, recipe()).passed
    assert not judge_order("new", "document", ordered, ordered, recipe()).passed
    before = RNG.uniform(0.7, 1, 30).tolist()
    assert judge_safety(before, [value - 0.01 for value in before], recipe()).passed
    assert not judge_safety(before, [0.2] * 30, recipe()).passed
    assert judge_text("new", [0.9] * 9 + [0.1], recipe()).passed
    assert not judge_text("new", [0.9] * 5 + [0.1] * 5, recipe()).passed


def test_the_candidate_within_the_bounds_that_gains_most():
    changes = {
        0.25: {"new": -0.05, "old": 0.0, "other": 0.01},
        0.5: {"new": -0.08, "old": 0.015, "other": 0.0},
        1.0: {"new": -0.2, "old": 0.04, "other": 0.0},
    }
    assert choose_candidate(changes, "new", recipe()) == 0.5
    assert choose_candidate(changes, "new", recipe(max_loss=0.05)) == 1.0
    assert choose_candidate(changes, "new", recipe(max_loss=0.001)) == 0.25


def test_halves_share_nothing_and_follow_the_text_alone():
    tokenizer = train_tokenizer(load_texts("dialogues", "validation"), 300)
    texts = [f"document {number} tells of {number * 7}" for number in range(40)]
    one = HeldOutUnits.prepare("a", texts, tokenizer, None)
    other = HeldOutUnits.prepare("a", texts[::-1], tokenizer, None)
    assert one.unit == "document" and one.half("choose").sum() == one.half("decide").sum() == 20
    assert not (one.half("choose") & one.half("decide")).any()
    chosen = [{text for text, is_in in zip(o.texts, o.half("decide"), strict=True) if is_in} for o in (one, other)]
    assert chosen[0] == chosen[1]
    book = "\n".join(f"line {number} of one long book" for number in range(2000))
    passages = HeldOutUnits.prepare("b", [book], tokenizer, None)
    assert passages.unit == "passage" and len(passages.texts) > 30 and "".join(passages.texts) == book


@pytest.mark.parametrize("line", ["one short line\n", "a longer line of a book that nobody reads twice, " * 12 + "\n"])
def test_little_held_out_text_is_enough_or_told_how_much_is_missing(line):
    """From 16 times 200 bytes on, whatever the lines; below, the setting or the data that has to change, by name."""
    tokenizer = train_tokenizer(load_texts("dialogues", "validation"), 300)
    book = line * (20_000 // len(line))
    for num_bytes in (4000, 6000, 8000):
        for texts, most in (([book], num_bytes), ([book[:num_bytes]], None), ([book[: num_bytes // 2]] * 2, None)):
            units = HeldOutUnits.prepare("books", texts, tokenizer, most)
            assert units.unit == "passage" and units.half("choose").sum() >= 8 and units.half("decide").sum() >= 8
    with pytest.raises(ValueError, match=r"eval_bytes: got \d+ passages of the held-out books, .* 3,200 bytes"):
        HeldOutUnits.prepare("books", [book], tokenizer, 1500)
    with pytest.raises(ValueError, match=r"data: got 1 held-out passages of c, 9 bytes, .* as validation"):
        HeldOutUnits.prepare("c", ["too short"], tokenizer, None)


def test_passages_are_the_text():
    for text in ("a" * 9000, "word " * 3000, "line\n" * 3000, "段落。" * 3000, "\n\n\nend"):
        assert "".join(cut_passages(text, 500)).strip() == text.strip()


def test_shuffled_words_are_the_same_words():
    draws = np.random.default_rng(0)
    for text in ("one two three four five six seven", "东周想种水稻但是西周不放水"):
        found = shuffle_words(text, draws)
        assert found != text and sorted(found) == sorted(text)


def test_without_a_baseline_or_held_out_text_there_is_no_gate(tmp_path):
    """Nothing to compare with, on either side: one line, before any training."""
    rows = [json.dumps({"text": f"note {number} of the day {number % 7}"}) for number in range(60)]
    (tmp_path / "both.jsonl").write_text("\n".join(rows[:40]))
    (tmp_path / "trained.jsonl").write_text("\n".join(rows[40:]))
    both = Corpus.read(TextSource(path=str(tmp_path / "both.jsonl"), validation_share=0.5))
    only_trained = Corpus.read(TextSource(path=str(tmp_path / "trained.jsonl"), validation_share=0))
    tokenizer = train_tokenizer(rows, 300)
    with pytest.raises(ValueError, match="data: got no held-out text of trained, expected some; without it no gain"):
        GateSets.prepare(only_trained, [both], tokenizer, recipe())
    for earlier in ([], [only_trained]):
        with pytest.raises(ValueError, match="general_data: got no held-out text of what the model learned before"):
            GateSets.prepare(both, earlier, tokenizer, recipe())
