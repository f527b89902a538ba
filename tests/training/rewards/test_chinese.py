"""Chinese: the embedded rewards tell answers from attacks as in English, and say what they cannot judge."""

import json

import numpy as np
import pytest
from transformers.utils import logging

from deepseek_training.data.texts import DATA_FOLDER, read_rows
from deepseek_training.rewards import Diversity, Relevance, Safety, WeightedReward
from deepseek_training.rewards.copied_text import without_quoted_prompt
from deepseek_training.rewards.empty_answers import EMPTY_ANSWERS_ZH
from deepseek_training.rewards.scripts import cut_unspaced, find_foreign_script, han_share
from deepseek_training.rewards.words import content_words, find_words, split_words

ASKED = "什么是肝炎？"
HONEST = "肝炎是由病毒引起的肝脏炎症，会损伤肝功能。"
HELD_OUT = [row for row in read_rows("dialogues_zh") if row["split"] == "validation"]


def test_function_words_are_words_and_the_rest_is_cut_into_pairs() -> None:
    assert split_words(ASKED) == ["什么", "是", "肝炎"]
    assert content_words(split_words("如何治疗哮喘")) == ["治疗", "疗哮", "哮喘"]
    assert split_words("太阳的COVID-19病毒") == ["太阳", "的", "covid", "19", "病毒"]  # "too" begins the sun
    assert cut_unspaced("") == []
    for text in (ASKED, HONEST, "新冠 2020 and 病"):
        assert all(text[start:end].lower() == word for word, start, end in find_words(text))


def test_the_samples_that_were_meaningless() -> None:
    honest, off_topic, threat = Relevance()(
        [ASKED] * 3, [HONEST, "今天股市上涨了，投资者很高兴。", "我要杀了你全家。"]
    )
    assert honest > 0.8 > 0.1 > max(off_topic, threat)
    safe, unsafe = Safety()([""] * 2, [HONEST, "我要杀了你全家。"])
    assert safe > 0.9 > 0.5 > unsafe


def test_held_out_answers_are_above_other_answers() -> None:
    prompts, answers = [row["prompt"] for row in HELD_OUT], [row["answer"] for row in HELD_OUT]
    own, others = Relevance()(prompts, answers), Relevance()(prompts, answers[7:] + answers[:7])
    assert np.mean([a > b for a, b in zip(own, others, strict=True)]) > 0.93
    assert np.mean(own) > 0.7 and np.mean(others) < 0.15
    assert np.mean(Safety()([""] * len(answers), answers)) > 0.85


@pytest.mark.parametrize(
    "attack",
    [
        "",
        ASKED,
        f"{ASKED}{ASKED}",
        "肝炎" * 40,
        "炎肝是么什",
        "你问的是：什么是肝炎？",
        *EMPTY_ANSWERS_ZH[:2],
        "。，？",
    ],
)
def test_attacks_earn_next_to_nothing(attack: str) -> None:
    assert Relevance()([ASKED], [attack])[0] < 0.1


def test_a_prompt_quoted_whole_is_taken_out() -> None:
    asked = "请介绍一下太阳能发电的优点和缺点。"
    assert han_share(without_quoted_prompt(asked, f"你问：{asked}")) == 1.0
    assert len(without_quoted_prompt(asked, f"{asked}")) < 3
    assert without_quoted_prompt(asked, "太阳能发电很清洁，但是要有阳光。") == "太阳能发电很清洁，但是要有阳光。"


def test_diversity_counts_pairs_of_characters() -> None:
    answers = [row["answer"] for row in HELD_OUT[:64]]
    assert np.mean(Diversity(0)([""] * 64, answers)) > 0.8  # common characters are no copies
    assert Diversity(0)([""], ["肝炎" * 40])[0] < 0.12
    assert max(Diversity(0)([""] * 2, [HONEST] * 2)) < 0.05


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Что такое гепатит?", "Cyrillic"),
        ("ما هو التهاب الكبد؟", "Arabic"),
        ("肝炎とは何ですか。教えてください。", "Japanese"),
        ("간염이란 무엇입니까?", "Hangul"),
        ("τι είναι ηπατίτιδα", "Greek"),
        ("हेपेटाइटिस क्या है", "Devanagari"),
        (ASKED, None),
        ("What is hepatitis (гепатит)?", None),
        ("Qu'est-ce que l'hépatite ?", None),
        ("", None),
        ("123 !?", None),
    ],
)
def test_other_scripts_are_not_judged_and_said_once(
    text: str, script: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    assert find_foreign_script(text) == script
    logging.get_logger("deepseek_training").warning_once.cache_clear()
    logging.enable_propagation()
    try:
        relevance, safety = Relevance()([text] * 3, [text or "x"] * 3), Safety()([text] * 3, [text] * 3)
        under_english = Relevance()(["What is hepatitis?"], [text])
    finally:
        logging.disable_propagation()
    said = [record.message for record in caplog.records if "expected English or Chinese" in record.message]
    if script is None:
        assert not said and None not in relevance + safety
    else:
        assert relevance == safety == [None] * 3
        assert under_english == [0.0]
        assert len(said) == 2 and all(script in line and "\n" not in line for line in said)
        score = WeightedReward([Relevance(), Safety(), Diversity()], [0.7, 0.2, 0.1])([text], [text])[0]
        assert score is not None and 0 <= score <= 1


def test_abuse_is_heard_among_other_scripts() -> None:
    assert Safety()([""], ["Это предложение довольно длинное и безобидное. you stupid worthless bitch"])[0] < 0.5


def test_the_card_says_what_was_measured() -> None:
    card = json.loads((DATA_FOLDER / "safety_classifier_zh.json").read_text(encoding="utf-8"))["measured"]
    assert card["cold_test_auc"]["value"] > 0.82 and card["cold_test_auc"]["n"] > 5000
    assert card["hand_written_threats_flagged"]["value"] > 0.5
    assert card["hand_written_harmless_uses_flagged"]["value"] < 0.1
    assert card["dialogues_zh_answers_flagged"]["value"] < 0.02
    embedder = json.loads((DATA_FOLDER / "text_embedder_zh.json").read_text(encoding="utf-8"))
    measured = embedder["measured_on_held_out_dialogues"]["alpaca_zh"]
    assert measured["n"] == len(HELD_OUT) and measured["own_answer_above_others"] > 0.95
