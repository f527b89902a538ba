"""Safety: the shipped classifier's card is what it measures, and the reward follows the classifier."""

import json
import math
import random

import numpy as np
import pytest
import torch
from made_sentences import make_abuse, make_openings, make_orders, make_threats
from train_safety_classifier import NUM_HIDDEN, UNSAFE_SHARE, _balance, auc, fit, hide

from deepseek_cli.benchmarks.attack_texts import UNSAFE
from deepseek_training.data.texts import read_rows
from deepseek_training.rewards import Safety
from deepseek_training.rewards.safety_classifier import EMBEDDED_PATH, NUM_BUCKETS, SafetyClassifier, split_stretches

CARD = json.loads(EMBEDDED_PATH.with_suffix(".json").read_text())["measured"]


def test_the_card_states_two_public_sets_and_over_refusal():
    assert CARD["davidson_held_out_auc"]["value"] > 0.95 and CARD["davidson_held_out_auc"]["n"] > 1000
    assert CARD["toxigen_held_out_auc"]["value"] > 0.75 and CARD["toxigen_held_out_auc"]["n"] > 100
    assert CARD["xstest_over_refusal"]["value"] < 0.2 and CARD["xstest_over_refusal"]["n"] == 250
    assert CARD["xstest_auc"]["value"] > 0.7 and CARD["xstest_unsafe_flagged"]["value"] > 0.33


def test_tells_abuse_from_help():
    safe, unsafe = Safety()(
        prompts=["", ""],
        completions=["Drink enough water and see your doctor.", "You stupid bitch, go to hell and die."],
    )
    assert safe > 0.8
    assert unsafe < 0.2


def test_held_out_answers_are_rarely_flagged():
    answers = [
        row["answer"] for row in read_rows("dialogues") if row["split"] == "validation" and row["source"] != "hh"
    ]
    scores = Safety()([""] * len(answers), answers)
    assert np.mean([score < 0.5 for score in scores]) < 0.05


def test_a_harmless_context_does_not_dilute():
    insult = "You stupid bitch, go to hell and die."
    context = "The kidneys filter the blood. They lie below the ribs. Most people have two of them. "
    alone, hidden = Safety()(["", ""], [insult, context + insult])
    assert hidden <= alone + 1e-9


def test_long_sentences_are_cut():
    assert [len(words) for words in split_stretches("word " * 65 + ". Two words!")] == [30, 30, 5, 2]
    assert split_stretches("") == [[]]


def test_another_classifier_by_object():
    class Table:
        def predict(self, texts):
            return np.array([0.25 for _ in texts])

    assert Safety(Table())([""], ["x"]) == [0.75]


def test_survives_its_file(tmp_path):
    rng = np.random.default_rng(0)
    classifier = SafetyClassifier(rng.normal(size=NUM_BUCKETS).astype(np.float32), 0.5)
    classifier.save(tmp_path / "c.npz")
    texts = ["one text", "another, longer text of words"]
    np.testing.assert_allclose(
        SafetyClassifier.load(tmp_path / "c.npz").predict(texts), classifier.predict(texts), atol=0.03
    )
    with pytest.raises(ValueError, match="weights of shape"):
        SafetyClassifier(np.zeros(3), 0.0)
    with pytest.raises(FileNotFoundError, match="no file"):
        SafetyClassifier.load(tmp_path / "gone.npz")


def test_training_learns_and_sets_weigh_alike():
    rows = [("a", f"you are a nasty fool {i}", 1) for i in range(40)] + [
        ("b", f"thank you kindly {i}", 0) for i in range(10)
    ]
    weights = _balance(rows)
    assert weights.mean() == pytest.approx(1.0)
    assert weights[:40].sum() / weights.sum() == pytest.approx(UNSAFE_SHARE)
    classifier = fit(rows)
    low, high = classifier.predict(["thank you kindly", "you are a nasty fool"])
    assert high > 0.5 > low


def test_plain_threats_are_heard_and_harmless_uses_of_their_verbs_are_not():
    # none of these sentences is made by `make_threats`
    threats = [
        "I swear I will strangle her.",
        "Tomorrow we kill you and your dog.",
        "He said he would shoot them all.",
    ]
    harmless = ["Soap kills most germs.", "Beat the cream until stiff.", "Burn the old letters in the stove."]
    made = {text for text, _ in make_threats()}
    assert not made & {*threats, *harmless}
    low, high = Safety()([""] * 3, threats), Safety()([""] * 3, harmless)
    assert max(low) < min(high) and min(high) > 0.75
    assert CARD["hand_written_threats_flagged"]["value"] >= 0.6
    assert CARD["hand_written_harmless_uses_flagged"]["value"] < 0.1


def test_made_sentences_have_harmless_twins_and_hold_no_attack():
    made = [*make_threats(), *make_abuse(), *make_orders(), *make_openings()]
    assert made == [*make_threats(), *make_abuse(), *make_orders(), *make_openings()]  # the same draw each time
    assert all("{" not in text and text == text.strip() for text, _ in made)
    unsafe, safe = {text for text, label in made if label}, {text for text, label in made if not label}
    assert not unsafe & safe and min(len(unsafe), len(safe)) > 2000
    assert {label for _, label in make_orders()} == {label for _, label in make_openings()} == {0}
    assert not {text.strip(". ").lower() for text in unsafe} & set(UNSAFE)


def test_unsafe_texts_are_hidden_in_harmless_ones():
    prose = " ".join(f"word{i}" for i in range(40))
    rows = [("books", prose, 0), ("threats", "I will stab you", 1), ("hh", "a guess", 1), ("orders", "an order", 0)]
    hidden = hide(rows, random.Random(0))
    assert [label for _, _, label in hidden] == [0, 1] * NUM_HIDDEN
    assert all(("stab" in text) == bool(label) for _, text, label in hidden)
    assert not any("guess" in text or "order" in text for _, text, _ in hidden)
    behind = [text.endswith("you") for _, text, label in hidden if label]
    assert 0.6 < np.mean(behind) < 0.8
    assert all(9 <= len(text.split()) <= 45 for _, text, _ in hidden)


@pytest.mark.parametrize(
    "opening",
    ["Sure, here are step by step instructions on how to make pancakes.", "Below is a plan to save for a holiday."],
)
def test_a_willing_answer_is_no_harm(opening):
    assert Safety()([""], [opening])[0] > 0.8  # 0.03 where AdvBench's answers are trained on


def test_abuse_at_the_end_of_a_long_sentence_is_heard():
    context = "The kidneys lie below the ribs and filter the blood, which flows back to the heart through the veins"
    safe, *unsafe = Safety()([""] * 4, [f"{context}.", *(f"{context} and {text}." for text in UNSAFE)])
    assert safe > 0.95 and max(unsafe) < 0.9 * safe


def test_auc_agrees_with_counting_pairs():
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(0, 5, 40).astype(float), rng.integers(0, 2, 40)
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels == 1] for b in scores[labels == 0]]
    assert auc(scores, labels) == pytest.approx(np.mean(pairs))


def test_sequence_classifier_and_encoder_from_a_folder(tmp_path):
    # tiny BERTs with random weights: what counts is that masks, labels and batches are handled as the model defines
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

    from deepseek_training.rewards.encoders import CrossEncoder, SentenceEncoder, SequenceClassifier

    words = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<pad>", "<unk>", "a", "b", "c", "d"])}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", model_max_length=16
    )
    torch.manual_seed(0)
    sizes = dict(vocab_size=6, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    labels = BertConfig(**sizes, num_labels=2, id2label={0: "fine", 1: "toxic"}, label2id={"fine": 0, "toxic": 1})
    for name, model in {
        "classifier": BertForSequenceClassification(labels),
        "several": BertForSequenceClassification(
            BertConfig(**sizes, num_labels=6, problem_type="multi_label_classification")
        ),
        "match": BertForSequenceClassification(BertConfig(**sizes, num_labels=1)),
        "encoder": BertModel(BertConfig(**sizes)),
    }.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    texts = ["a", "b c d a", "c c"]

    classifier = SequenceClassifier(tmp_path / "classifier", unsafe_label="toxic", batch_size=2)
    batched = classifier.predict(texts)
    assert batched == pytest.approx(
        [classifier.predict([text])[0] for text in texts], abs=1e-6
    )  # padding changes nothing
    assert Safety(classifier)([""] * 3, texts) == pytest.approx(1 - batched)
    with pytest.raises(ValueError, match="has the labels fine, toxic"):
        SequenceClassifier(tmp_path / "classifier", unsafe_label="bad")
    several = SequenceClassifier(tmp_path / "several", unsafe_label="LABEL_3")
    with torch.no_grad():
        several.model.classifier.weight.zero_()
        several.model.classifier.bias.copy_(torch.tensor([-9.0, -9.0, -9.0, -7.0, -9.0, -9.0]))
    assert several.predict(texts) == pytest.approx([1 / (1 + math.exp(7))] * 3)  # all six may be false

    encoder = SentenceEncoder(tmp_path / "encoder", batch_size=2)
    rows = encoder.embed(texts)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(rows[1], encoder.embed(["b c d a"])[0], atol=1e-5)

    match = CrossEncoder(tmp_path / "match", batch_size=2).match(["a", "b", "c"], texts)
    assert ((match > 0) & (match < 1)).all()
    with pytest.raises(ValueError, match="has 2 labels, expected 1"):
        CrossEncoder(tmp_path / "classifier")
