"""Each filter by itself, on text with a known fault."""

import random

import numpy as np
import pytest

pytest.importorskip("ftfy", reason="pip install 'deepseek-moe[data]'")

from deepseek_training.data.cleaning.boilerplate import find_boilerplate, remove_boilerplate
from deepseek_training.data.cleaning.contamination import ContaminationIndex
from deepseek_training.data.cleaning.duplicates import find_duplicates, sign
from deepseek_training.data.cleaning.language import identify
from deepseek_training.data.cleaning.ngram_model import NgramModel
from deepseek_training.data.cleaning.personal_data import mask
from deepseek_training.data.cleaning.quality import fit_quality
from deepseek_training.data.cleaning.repair import repair
from deepseek_training.data.cleaning.words import hash_ngrams, hash_words, words_of
from deepseek_training.data.texts import load_texts


def test_repair_mends_encodings_and_leaves_typography():
    damaged = "The patient\u00e2\u20ac\u2122s caf\u00c3\u00a9"
    assert repair(damaged)[0] == "The patient\u2019s caf\u00e9"
    for text in ("\u201cCurly\u201d quotes", "\u4f60\u597d\uff0c\u4e16\u754c\uff01", "&lt;b&gt; in a page on HTML"):
        assert repair(text) == (text, {"encoding": 0, "invisible": 0})
    assert repair("soft\u00adhyphen\ufeff")[0] == "softhyphen"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Das Kind hat seit drei Tagen Fieber und soll viel trinken.", "de"),
        ("\u809d\u708e\u662f\u809d\u810f\u7684\u708e\u75c7\u3002", "zh"),
        ("What is asthma?", "en"),
        ("1 2 3 ...", "und"),
    ],
)
def test_language(text, language):
    assert identify(text) == language
    assert identify(text, ["en", "zh"]) == language


def test_a_short_text_counts_as_a_wanted_language_unless_another_is_likelier_by_far():
    code = "def f(x): return x + 1"
    assert identify(code) != "en" and identify(code, ["en"]) == "en"


def luhn(digits: str) -> str:
    """The number with its check digit, by another way than the filter's library."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if place % 2 == 0 else 1)
        total += value - 9 if value > 9 else value
    return digits + str(-total % 10)


def iban(country: str, account: str) -> str:
    number = "".join(str(int(c, 36)) for c in account + country + "00")
    return f"{country}{98 - int(number) % 97:02d}{account}"


def test_numbers_are_masked_where_their_check_digits_hold():
    rng = random.Random(0)
    for _ in range(50):
        card = luhn("4" + "".join(rng.choices("0123456789", k=14)))
        wrong = card[:-1] + str((int(card[-1]) + 1) % 10)
        spaced = " ".join(card[i : i + 4] for i in range(0, 16, 4))
        assert mask(f"Paid by {spaced}.")[0] == "Paid by [CARD]."
        assert mask(f"Order {wrong} shipped")[0] == f"Order {wrong} shipped"
        account = iban("DE", "".join(rng.choices("0123456789", k=18)))
        bad = account[:4] + account[4:-1] + str((int(account[-1]) + 1) % 10)
        assert mask(f"to {account} today")[0] == "to [IBAN] today"
        assert "[IBAN]" not in mask(f"to {bad} today")[0]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Write to jane.doe+x@mail.example.org.", "Write to [EMAIL]."),
        ("Call (301) 555-0172 or 1-800-555-0199.", "Call [PHONE] or [PHONE]."),
        ("Tel: +49 30 901820", "Tel: [PHONE]"),
        ("\u7535\u8bdd\uff1a13812345678\u3002", "\u7535\u8bdd\uff1a[PHONE]\u3002"),
        ("SSN 536-90-4399", "SSN [ID]"),
        ("MRN: 00482913, admitted", "MRN: [MRN], admitted"),
        ("NHS number: 943 476 5919", "NHS number: [ID]"),
        ("NHS number: 943 476 5918", "NHS number: 943 476 5918"),
        ("\u8eab\u4efd\u8bc1 11010519491231002X", "\u8eab\u4efd\u8bc1 [ID]"),
        ("from 192.168.10.4 at noon", "from [IP] at noon"),
    ],
)
def test_personal_data(text, masked):
    assert mask(text)[0] == masked


@pytest.mark.parametrize(
    "text",
    [
        "The trial (NCT00123456) ran from 1999-2003 in 1,234,567 people; p = 0.0012345678901234.",
        "version 3.11.7.2 of x@y, see section 1.2.3.4.5",
        "assert f([1, 22, 333, 4444], 1234567890123456) == 10",
        "pages 123-456-789 and 10.1016/j.jpedsurg.2007.02.020",
        "Dr. Miller saw Patient: Ann Smith",
    ],
)
def test_what_is_no_personal_data_stays(text):
    assert mask(text) == (text, {})


def test_names_only_on_demand():
    masked, counts = mask("Dr. Miller saw Patient: Ann Smith in Boston", names=True)
    assert masked == "Dr. [NAME] saw Patient: [NAME] in Boston" and counts == {"name": 2}


def test_contamination_finds_items_whatever_was_done_to_them():
    items = {
        "quiz": [
            ("1", "Which of the following organs stores the bile that is made by the liver of an adult human being?"),
            ("2", "What is the capital of the largest state?"),
            ("3", "Two words"),
        ]
    }
    index = ContaminationIndex.build(items)
    assert index.num_short == {"quiz": 1}
    planted = "Notes. WHICH of the following organs\nstores the bile, that is made by the liver of an adult human"
    assert index.find(f"{planted} being", 0.5) == [("quiz/1", 1.0)]
    cut = " ".join(items["quiz"][0][1].split()[2:])
    assert [name for name, _ in index.find(f"so {cut} Yes.", 0.5)] == ["quiz/1"]
    assert index.find("The gallbladder stores the bile that is made by the liver of an adult.", 0.5) == []
    assert [name for name, _ in index.find("what is the capital of the largest state", 0.5)] == ["quiz/2"]


def edited(words, share, rng):
    return [rng.choice(words) if rng.random() < share else word for word in words]


def test_duplicates_are_those_of_datasketch_and_of_brute_force():
    from datasketch import MinHash

    rng = random.Random(1)
    pieces = [passage for text in load_texts("medicine", "all")[:80] for passage in [text.split()[:150]]]
    texts = [" ".join(words) for words in pieces]
    texts += [" ".join(edited(words, 0.02, rng)) for words in pieces[:40]]
    shingles = [set(hash_ngrams(hash_words(words_of(text)), 5).tolist()) for text in texts]
    signatures = np.stack([sign(text, 0) for text in texts])
    reference = MinHash(num_perm=128, seed=0, hashfunc=int, scheme="affine32")
    reference.update_batch([value & 0xFFFFFFFF for value in shingles[3]])
    assert (reference.hashvalues == signatures[3]).all()
    exact = np.arange(len(texts), dtype=np.uint64)
    stays, _ = find_duplicates(signatures, exact, np.zeros(len(texts)), 0.6)
    found = {(int(keeper), text) for text, keeper in enumerate(stays) if keeper != text}
    near = {
        (a, b)
        for a in range(len(texts))
        for b in range(a + 1, len(texts))
        if len(shingles[a] & shingles[b]) / len(shingles[a] | shingles[b]) >= 0.7
    }
    assert len(near) >= 30 and near <= found
    assert all(len(shingles[a] & shingles[b]) / len(shingles[a] | shingles[b]) > 0.45 for a, b in found)


def test_of_duplicates_the_held_out_one_stays():
    texts = ["one two three four five six seven eight"] * 3 + ["something else altogether that is not like it"]
    signatures = np.stack([sign(text, 0) for text in texts])
    exact = np.array([7, 7, 7, 8], np.uint64)
    stays, is_exact = find_duplicates(signatures, exact, np.array([1, 1, 0, 1]), 0.6)
    assert stays.tolist() == [2, 2, 2, 3] and is_exact.tolist() == [True, True, False, False]


def test_boilerplate_lines_go_and_the_text_stays():
    texts = [f"Document {i} on a subject of its own.\nAccept all cookies to continue" for i in range(30)]
    known = find_boilerplate(texts)
    assert remove_boilerplate(texts[3], known) == ("Document 3 on a subject of its own.", 1)


def test_bits_of_the_model_fall_with_the_order_on_text_of_its_kind():
    texts = load_texts("medicine", "all")[:60]
    sequences = [hash_words(words_of(text)) for text in texts]
    model = NgramModel(2, sequences[:-1])
    unigram, bigram = model.bits(sequences[-1])
    shuffled = np.random.default_rng(0).permutation(sequences[-1])
    assert bigram < unigram and model.bits(shuffled)[1] > bigram + 0.5
    assert model.bits(shuffled)[0] == pytest.approx(unigram, abs=0.2)


def test_quality_keeps_clean_text_and_drops_noise():
    rng = random.Random(0)
    texts = load_texts("medicine", "all")[:200]
    halves = [i % 2 for i in range(200)]
    model = fit_quality(texts, halves, fence=3.0, max_loss=None)
    clean = load_texts("medicine", "all")[200:260]
    assert sum(bool(model.judge(model.measure(text, 0))) for text in clean) <= 2
    shuffled = []
    for text in clean[:20]:
        words = text.split()
        rng.shuffle(words)
        shuffled.append(" ".join(words))
    garbled = ["".join(rng.choice("abcdefghij klmnopqrstuvwxyz") for _ in range(400)) for _ in range(20)]
    repeated = [" ".join(text.split()[:12] * 12) for text in clean[:20]]
    symbols = ["<<>> {} || -- " * 30] * 5
    for noise, least in ((shuffled, 0.6), (garbled, 1.0), (repeated, 1.0), (symbols, 1.0)):
        found = [bool(model.judge(model.measure(text, 0))) for text in noise]
        assert sum(found) >= least * len(found), noise[0][:80]
