"""Tokens from the cache are those of the tokenizer, and no other text or tokenizer gets them."""

import datasets
import pytest

from deepseek_training.data import token_cache
from deepseek_training.data.packing import encode_documents
from deepseek_training.data.texts import load_texts
from deepseek_training.data.tokenizer import train_tokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(token_cache, "_LEAST_CHARACTERS", 1000)
    return tmp_path / "deepseek-moe"


def test_a_second_run_does_not_tokenize_again(cache, monkeypatch):
    texts = [*load_texts("medicine", "validation")[:40], "", "a <|end|> that is spelled, and U+2028 \u2028 too"]
    tokenizers = [train_tokenizer(texts, size) for size in (300, 320)]
    monkeypatch.setattr(token_cache, "_LEAST_CHARACTERS", 10**9)
    plain = [[encode_documents([text], tokenizer)[0].tolist() for text in texts] for tokenizer in tokenizers]
    monkeypatch.setattr(token_cache, "_LEAST_CHARACTERS", 1000)
    for tokenizer, expected in zip(tokenizers, plain, strict=True):
        found = encode_documents(texts, tokenizer)
        assert [ids.tolist() for ids in found] == expected and all(ids.dtype == "int32" for ids in found)
    assert len(list(cache.glob("tokens-*.arrow"))) == 2
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "encode_documents_plainly", lambda *_: pytest.fail("tokenized again"))
        assert [ids.tolist() for ids in encode_documents(texts, tokenizers[0])] == plain[0]
    assert encode_documents([*texts, "more"], tokenizers[0])[:-1][3].tolist() == plain[0][3]
    assert len(list(cache.glob("tokens-*.arrow"))) == 3


def test_a_cache_that_cannot_be_written(tmp_path, cache, caplog):
    cache.write_text("a file where the folder should be")
    texts = load_texts("medicine", "validation")[:40]
    assert len(encode_documents(texts, train_tokenizer(texts, 300))) == 40
    assert "tokens are not cached" in caplog.text
