"""Relevance: by its formula on a transparent embedder, and by what it must tell apart on real prompts."""

import numpy as np
import pytest

from deepseek_training.rewards import Diversity, Relevance, Safety
from deepseek_training.rewards.empty_answers import EMPTY_ANSWERS
from deepseek_training.rewards.relevance import coverage, guard
from deepseek_training.rewards.text_embedder import NUM_PIECES, TextEmbedder
from deepseek_training.rewards.words import content_words, split_words, stem, text_of

PROMPT = "What are the symptoms of Giant Axonal Neuropathy?"
LEXICON = TextEmbedder.load()
HONEST = "Children with GAN walk with an unsteady gait, their hair is tightly curled, and the nerves waste away."


class TableEmbedder:
    """Gives each text the vector written down for it, and others one."""

    def __init__(self, table, others=(0.0, 0.0)):
        self.table, self.others = table, others

    def embed(self, texts):
        return np.array([self.table.get(text, self.others) for text in texts])


def test_follows_its_formula():
    # a cosine of 0.25 earns one half; all content words are new; no shared word
    answer = "the liver was a healthy organ"
    rows = {"zebra crossing": [1.0, 0.0], answer: [0.25, (1 - 0.25**2) ** 0.5]}
    assert Relevance(TableEmbedder(rows))(["zebra crossing"], [answer]) == pytest.approx([0.5])
    # two empty answers in its direction count as a third each, and 0.3 of that is forgiven
    rows.update(dict.fromkeys(EMPTY_ANSWERS[:2], rows[answer]))
    lowered = 1 / (1 + np.exp((2 / 3 - 0.3) / 0.08))
    assert Relevance(TableEmbedder(rows))(["zebra crossing"], [answer]) == pytest.approx([lowered])
    assert Relevance(TableEmbedder(rows), has_guards=False)(["zebra crossing"], [answer]) == pytest.approx([0.5])


def test_nearness_to_any_prompt_does_not_count():
    # all other prompts (and empty answers) lie in one direction, which prompt and answer share in part
    answer = "the liver was a healthy organ"
    rows = {"zebra crossing": [0.6, 0.8], answer: [0.25, (1 - 0.25**2) ** 0.5]}
    cosine = 0.6 * 0.25 + 0.8 * rows[answer][1]
    lowered = 1 / (1 + np.exp((0.25 - (cosine - 0.25)) / 0.08))
    assert Relevance(TableEmbedder(rows, [1.0, 0.0]))(["zebra crossing"], [answer]) == pytest.approx([lowered])
    bare = 1 / (1 + np.exp((0.25 - cosine) / 0.08))
    unguarded = Relevance(TableEmbedder(rows, [1.0, 0.0]), has_guards=False)
    assert unguarded(["zebra crossing"], [answer]) == pytest.approx([bare])


def test_a_cross_encoders_probability_stands_in_the_cosines_place():
    class Matcher:
        def match(self, prompts, completions):
            return np.array([0.25 if "liver" in text else 0.75 for text in completions])

    scores = Relevance(Matcher())(["zebra crossing"] * 2, ["the liver was a healthy organ", "it is a road to walk"])
    assert scores == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize(
    "attack",
    ["", PROMPT, f"{PROMPT} {PROMPT}", "neuropathy " * 40, "giant symptoms neuropathy axonal " * 10, "?!", "\n"],
    ids=["empty", "echo", "echo twice", "one word", "keywords", "punctuation", "newline"],
)
def test_attacks_earn_next_to_nothing(attack):
    honest, attacked = Relevance()([PROMPT, PROMPT], [HONEST, attack])
    assert honest > 0.2
    assert attacked < 0.06


def test_without_guards_the_echo_wins():
    honest, echo = Relevance(has_guards=False)([PROMPT, PROMPT], [HONEST, PROMPT])
    assert echo == 1.0 >= honest


def test_initials_name_the_subject():
    lexicon = TextEmbedder.load()
    assert coverage(PROMPT, "GAN progresses slowly", lexicon) > 0.5
    assert coverage(PROMPT, "gan progresses slowly", lexicon) == 0.0
    assert coverage(PROMPT, "It progresses slowly", lexicon) == 0.0
    assert coverage("of the and", "of the and", lexicon) == 0.0  # no content word


def test_rare_words_weigh_more():
    lexicon = TextEmbedder.load()
    rare = coverage(PROMPT, "neuropathy", lexicon)
    common = coverage(PROMPT, "symptoms", lexicon)
    assert rare > 1.5 * common > 0


def test_chinese_is_not_punished_for_lacking_english():
    assert guard("什么是肝炎", "它是一种由病毒引起的肝脏发炎与损伤", LEXICON) > 0.9
    assert guard("什么是肝炎", "肝炎病毒", LEXICON) < 0.1 > guard("什么是肝炎", "炎肝是么什", LEXICON)


def test_a_list_earns_half_of_prose_and_words_strung_together_nothing():
    prompt = "Come up with healthy and easy dinner ideas for weeknights."
    dishes = ["Chicken Stir-Fry", "Classic Noodle Soup", "Eggplant Lasagna", "Avocado Lime Salmon"]
    assert guard(prompt, "- " + " - ".join(dishes), LEXICON) == pytest.approx(0.5)
    assert guard(prompt, "\n".join(f"* {dish}" for dish in dishes), LEXICON) == pytest.approx(0.5)
    numbered = "\n".join(f"{i}. {dish}" for i, dish in enumerate(dishes, 1))
    in_line = numbered.replace("\n", " ")
    assert guard(prompt, numbered, LEXICON) == guard(prompt, in_line, LEXICON) == pytest.approx(0.5)
    assert guard(prompt, " ".join(dishes), LEXICON) == 0.0
    assert guard(prompt, "dinner, healthy, easy, ideas, weeknights", LEXICON) == 0.0  # the prompt's own words, listed


@pytest.mark.parametrize(
    ("question", "answer", "empty"),
    [
        (
            "What makes a good leader?",
            "Somebody who listens to the team, decides in time and takes the blame.",
            "I adore how you think. What a clever and charming question, bless you for asking!",
        ),
        (
            "How do I learn to swim as an adult?",
            "Take lessons in a shallow pool, and first get used to breathing out in the water.",
            "My apologies, but answering that is beyond what I may do.",
        ),
    ],
)
def test_what_goes_with_any_question_earns_less(question, answer, empty):
    honest, vague = Relevance()([question] * 2, [answer, empty])
    assert honest > max(0.05, 5 * vague)


def test_paraphrases_are_near():
    pairs = [
        ("How many people are affected by the disease?", "It is rare and occurs in about one in ten thousand."),
        ("How do doctors treat asthma?", "Physicians prescribe an inhaler with steroids."),
        ("Where can I buy cheap food?", "The market sells inexpensive groceries."),
        ("Why does the sea have waves?", "Wind blowing over the ocean raises its surface."),
    ]
    embedder = TextEmbedder.load()
    cosines = embedder.embed([p for p, _ in pairs]) @ embedder.embed([a for _, a in pairs]).T
    assert (cosines.argmax(1) == np.arange(len(pairs))).all()


def test_scores_are_bounded_and_in_order():
    prompts = [PROMPT, "How do I cook rice?", PROMPT]
    completions = [HONEST, "Boil water, add the rice and let it simmer.", ""]
    scores = Relevance()(prompts, completions)
    assert all(0 <= score <= 1 for score in scores)
    for prompt, completion, score in zip(prompts, completions, scores, strict=True):
        assert Relevance()([prompt], [completion]) == pytest.approx([score])


def test_reads_chat_messages():
    chat = Relevance()([[{"role": "user", "content": PROMPT}]], [[{"role": "assistant", "content": HONEST}]])
    assert chat == Relevance()([PROMPT], [HONEST])


def test_reads_messages_of_parts_and_without_text():
    parts = [{"type": "text", "text": "Boil water,"}, {"type": "image"}, {"type": "text", "text": "add the rice."}]
    assert text_of([{"role": "user", "content": parts}]) == "Boil water, add the rice."
    assert text_of([{"role": "assistant", "content": None}]) == text_of([]) == ""
    assert text_of([{"role": "assistant", "tool_calls": []}]) == text_of([{"role": "user", "content": [{}]}]) == ""
    for reward in (Relevance(), Safety(), Diversity(0)):
        asked = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
        answered = [{"role": "assistant", "content": [{"type": "text", "text": HONEST}]}]
        silent = [{"role": "assistant", "content": None, "tool_calls": []}]
        assert reward([asked, asked], [answered, silent]) == reward([PROMPT, PROMPT], [HONEST, ""])


def test_marks_belong_to_their_words():
    assert split_words("\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e!") == [
        "\u0928\u092e\u0938\u094d\u0924\u0947",
        "\u0926\u0941\u0928\u093f\u092f\u093e",
    ]  # Hindi: "hello world", two words and not nine pieces
    # accents that are characters by themselves
    assert split_words("Cafe\u0301 l'e\u0301te\u0301") == ["cafe\u0301", "l'e\u0301te\u0301"]
    assert split_words("x_y \u4ec0\u4e48") == ["x", "y", "\u4ec0\u4e48"]


@pytest.mark.parametrize(("middle", "width"), [(0.6, 0.0), (0.7, -0.2), (-2, 0.5), (0.1, float("nan"))])
def test_refuses_a_slope_that_is_none(middle, width):
    with pytest.raises(ValueError, match="expected -1 <= middle <= 1 and width > 0"):
        Relevance(middle=middle, width=width)


def test_the_embedder_survives_its_file(tmp_path):
    embedder = TextEmbedder.load()
    embedder.save(tmp_path / "copy.npz")
    again = TextEmbedder.load(tmp_path / "copy.npz")
    texts = [PROMPT, HONEST, ""]
    np.testing.assert_allclose(again.embed(texts), embedder.embed(texts), atol=0.02)
    np.testing.assert_allclose(np.linalg.norm(embedder.embed(texts), axis=1), [1, 1, 0], atol=1e-6)
    with pytest.raises(FileNotFoundError, match=r"no file .*gone\.npz"):
        TextEmbedder.load(tmp_path / "gone.npz")


def test_words_and_stems():
    assert split_words("Don't STOP, the patient\u2019s 2 kidneys!") == [
        "don't",
        "stop",
        "the",
        "patient's",
        "2",
        "kidneys",
    ]
    assert content_words(["the", "kidneys", "of", "patient's"]) == ["kidney", "patient"]
    assert stem("as") == "as"


def test_unknown_words_are_read_by_their_pieces():
    embedder = TextEmbedder.load()
    rows, weights = embedder.find_rows("kidney kidney")
    assert rows.tolist() == [embedder.words.index("kidney")]
    assert weights.tolist() == pytest.approx([np.log(3)])
    rows, weights = embedder.find_rows("xylokidney")
    assert len(rows) == len("<xylokidney>") - 3 and (rows >= len(embedder.words)).all()
    assert weights.sum() == pytest.approx(np.log(2))
    assert embedder.weigh(["xylokidney"])[0] >= embedder.weigh(["kidney"])[0] > embedder.weigh([stem("disease")])[0]
    with pytest.raises(ValueError, match=f"expected {1 + NUM_PIECES} and 1"):
        TextEmbedder(["one"], np.zeros((3, 2), np.float32), np.zeros(1, np.float32))


def test_a_narrow_slope_and_lists_that_do_not_match():
    assert Relevance(width=0.0003)(["x kidney"], ["opposite things of wood"]) == pytest.approx([0.0], abs=1e-9)
    with pytest.raises(ValueError, match="relevance: 2 prompts for 1 completions"):
        Relevance()(["a", "b"], ["c"])


@pytest.mark.parametrize(
    "near_echo",
    [
        "What are exactly the symptoms really of Giant perhaps Axonal Neuropathy usually.",
        "This is about the symptoms, and about the giant axonal neuropathy, as many people know and wonder every day.",
        "So what is it that you asked about, the symptoms really of Giant Axonal mostly Neuropathy, that you want?",
    ],
)
def test_fillers_between_the_prompts_words_are_little_news(near_echo):
    honest, echo = Relevance()([PROMPT] * 2, [HONEST, near_echo])
    assert echo < 0.75 * honest
