import random

import pytest
from transformers import AutoTokenizer

from deepseek_training.data.tokenizer import MIN_VOCAB_SIZE, train_tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog " * 20, "a doctor, a patient and 1234 pills\n" * 20]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(CORPUS, 400).save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)  # as every later stage meets it


def test_any_text_survives_the_round_trip(tokenizer):
    generator = random.Random(0)
    texts = ["", " ", "  two  spaces ", "tabs\t\r\n\x00\x7f", "e\u0301 is not \u00e9", "don 't . ,", *CORPUS]
    for _ in range(200):  # every plane of Unicode, surrogates aside: these are not text
        codes = (
            generator.choice([generator.randrange(0xD800), generator.randrange(0xE000, 0x110000)]) for _ in range(20)
        )
        texts.append("".join(map(chr, codes)))
    for text in texts:
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_every_byte_has_a_token(tokenizer):
    # all 256 single bytes must be in the vocabulary, also those that UTF-8 never uses
    from tokenizers.pre_tokenizers import ByteLevel

    assert all(letter in tokenizer.get_vocab() for letter in ByteLevel.alphabet())


def test_special_tokens_are_three_and_added_by_nobody(tokenizer):
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    together = tokenizer("fox jumps")["input_ids"]
    assert tokenizer("fox")["input_ids"] + tokenizer(" jumps")["input_ids"] == together


def test_a_document_cannot_smuggle_special_tokens(tokenizer):
    ids = tokenizer(f"x{tokenizer.eos_token}y", split_special_tokens=True)["input_ids"]
    assert tokenizer.eos_token_id not in ids


def test_merges_are_learned(tokenizer):
    assert len(tokenizer) <= 400
    assert len(tokenizer("the quick brown fox")["input_ids"]) <= 6


def test_chat_template(tokenizer):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin|>S\n\nUser: Hi\n\nAssistant:"
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "Yo"}], tokenize=False)
    assert whole == "<|begin|>S\n\nUser: Hi\n\nAssistant: Yo<|end|>"


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match=f"vocab_size: got 258, expected at least {MIN_VOCAB_SIZE}"):
        train_tokenizer(CORPUS, 258)
