"""Copied text: an echo is taken out whatever stands around it, and a text that was given may be treated."""

import time

import pytest

from deepseek_training.rewards import Relevance
from deepseek_training.rewards.copied_text import treats_given_text, without_quoted_prompt

ASKED = "What are the symptoms of Giant Axonal Neuropathy?"
HONEST = "Children with GAN walk with an unsteady gait, their hair is tightly curled, and the nerves waste away."
PRAISE = "What a clever thing to wonder about! I admire people who want to learn, and I wish you a lovely day."


@pytest.mark.parametrize(
    ("answered", "left"),
    [
        (ASKED, "?"),
        (ASKED.lower(), "?"),
        (f"You asked: {ASKED} Well.", "You asked: ? Well."),
        (f"{ASKED} {ASKED}", "?"),
        ("what are the symptoms, of giant axonal neuropathy: it is a long story", ": it is a long story"),
        # seven of eight words in runs of three are less than nine tenths
        ("The symptoms of Giant Axonal Neuropathy are weakness.", None),
        ("What are the signs of Giant Axonal Neuropathy?", None),
        (HONEST, None),
        ("", None),
    ],
    ids=["echo", "case", "lead", "twice", "punctuation", "subject", "one word else", "answer", "empty"],
)
def test_takes_out_a_prompt_that_is_quoted_whole(answered, left):
    assert without_quoted_prompt(ASKED, answered) == (answered if left is None else left)


def test_a_prompt_of_two_words_is_a_name():
    assert (
        without_quoted_prompt("Describe hepatitis", "To describe hepatitis briefly") == "To describe hepatitis briefly"
    )
    assert without_quoted_prompt("", "anything") == "anything"


def test_nothing_around_an_echo_carries_it():
    # as new words, those of the praise would open the guard
    attacks = [f"You asked: {ASKED}", f"{PRAISE} {ASKED}", f"{ASKED} {PRAISE}", f"{ASKED} {ASKED} {PRAISE}"]
    honest, *attacked = Relevance()([ASKED] * 5, [HONEST, *attacks])
    assert honest > 0.2
    assert max(attacked) < 0.1
    beside_answer = Relevance()([ASKED], [f"{ASKED} {HONEST}"])[0]
    assert beside_answer == pytest.approx(Relevance()([ASKED], [f"? {HONEST}"])[0])


CORRECT = "Correct the grammar of this sentence: She have visited three museum in Paris yesterday."


def test_a_text_that_was_given_may_be_treated():
    corrected = "She visited three museums in Paris yesterday."
    assert treats_given_text(CORRECT, corrected)
    assert not treats_given_text(CORRECT, CORRECT)
    assert not treats_given_text("Where are the museums in Paris?", "The museums are in Paris.")  # one sentence
    assert not treats_given_text("", "Anything")
    honest, echo, keywords = Relevance()(
        [CORRECT] * 3, [corrected, CORRECT, "museum visited Paris museum three visited museum"]
    )
    assert honest > 0.3
    assert max(echo, keywords) < 0.05


def test_time_grows_with_the_text_and_not_with_its_square():
    begun = time.process_time()
    without_quoted_prompt("la " * 30_000, "la " * 30_000)
    assert time.process_time() - begun < 5, "every copy times every copy takes minutes"
