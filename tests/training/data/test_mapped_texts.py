"""Large sources are copied into the cache once, read from disk, and nothing half-written is taken for whole."""

import os
import signal
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch

from deepseek_records import document_files
from deepseek_training.data import arrow_cache, mapped_texts
from deepseek_training.data.corpus import Corpus
from deepseek_training.data.mapped_texts import MappedTexts
from deepseek_training.data.packing import PackedDataset, encode_documents
from deepseek_training.data.separate import SeparateDataset
from deepseek_training.data.texts import count_bytes, load_texts
from deepseek_training.data.tokenizer import train_tokenizer

TEXTS = [*load_texts("medicine", "all")[:200], "a <|end|> that is spelled, and U+2028 \u2028 too"]


@pytest.fixture
def large(tmp_path, monkeypatch):
    """Every source counts as large, and batches are small."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(mapped_texts, "LEAST_MAPPED_BYTES", 1)
    monkeypatch.setattr(mapped_texts, "_BATCH_CHARACTERS", 3000)
    return tmp_path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "texts.parquet"
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


def test_on_disk_and_in_memory_are_the_same(source, tokenizer, large, monkeypatch):
    mapped = Corpus.load(str(source))
    with monkeypatch.context() as patch:
        patch.setattr(mapped_texts, "LEAST_MAPPED_BYTES", 10**9)
        plain = Corpus.load(str(source))
    assert isinstance(mapped.train, MappedTexts) and isinstance(plain.train, list)
    assert list(mapped.train) == plain.train and list(mapped.validation) == plain.validation
    assert mapped.train[3] == plain.train[3] and mapped.train[-2:] == plain.train[-2:]
    assert count_bytes(mapped.train) == count_bytes(plain.train)
    documents = [encode_documents(one.train, tokenizer) for one in (mapped, plain)]
    assert all(np.array_equal(*pair) for pair in zip(*documents, strict=True))
    blocks = [PackedDataset(one, 32, seed=4) for one in documents]
    assert [len(one) for one in blocks] == [len(blocks[0])] * 2
    for place in range(len(blocks[0])):
        assert torch.equal(blocks[0][place]["input_ids"], blocks[1].blocks[place].long())
    apart = [SeparateDataset(one, 32, pad_token_id=0) for one in documents]
    assert all(torch.equal(apart[0][3][name], apart[1][3][name]) for name in apart[0][3])
    assert len({one.identity for one in [*blocks, *apart]}) == 4


def test_a_second_start_neither_reads_nor_tokenizes(source, tokenizer, large, monkeypatch):
    first = encode_documents(Corpus.load(str(source)).train, tokenizer)
    assert len(list((large / "cache/deepseek-moe").glob("*.arrow"))) == 2
    monkeypatch.setattr(mapped_texts, "read_rows", lambda *_, **__: pytest.fail("read again"))
    monkeypatch.setattr("deepseek_training.data.token_cache.encode_documents_plainly", lambda *_: pytest.fail("again"))
    again = encode_documents(Corpus.load(str(source)).train, tokenizer)
    assert np.array_equal(first[5], again[5]) and first.fingerprint == again.fingerprint


def test_other_content_column_encoding_or_tokenizer_makes_another_file(large, tokenizer):
    path = large / "a.jsonl"
    found = []
    for content, column, encoding in (("one", None, "utf-8"), ("two", None, "utf-8"), ("two", "text", "latin-1")):
        path.write_text(f'{{"text": "{content}"}}\n{{"text": "more of {content}"}}\n')
        documents = mapped_texts.read_documents(str(path), column=column, encoding=encoding)
        assert documents.texts[0]["text"] == content
        found.append(documents.fingerprint)
    assert len(set(found)) == 3
    texts = documents.choose("all")[0]
    tokens = {encode_documents(texts, one).fingerprint for one in (tokenizer, train_tokenizer(TEXTS, 310))}
    assert len(tokens) == 2


@pytest.mark.parametrize("moment", ["a full disk", "a kill"])
def test_nothing_half_written_is_taken_for_whole(source, large, monkeypatch, moment):
    folder = large / "cache/deepseek-moe"
    if moment == "a kill":
        code = (
            "import datasets, os, signal, sys\n"
            "import deepseek_training.data.arrow_cache as a, deepseek_training.data.mapped_texts as m\n"
            "datasets.config.HF_DATASETS_CACHE = sys.argv[2]; m.LEAST_MAPPED_BYTES = 1; m._BATCH_CHARACTERS = 3000\n"
            "write = a.ArrowWriter.write_batch; calls = []\n"
            "def third(*args, **kwargs):\n"
            "    calls.append(write(*args, **kwargs))\n"
            "    if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
            "a.ArrowWriter.write_batch = third\n"
            "m.read_documents(sys.argv[1])\n"
        )  # fmt: skip
        done = subprocess.run([sys.executable, "-c", code, str(source), str(large / "cache")], capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert list(folder.glob("*.incomplete"))
    else:
        write, calls = arrow_cache.ArrowWriter.write_batch, []

        def full(self, *args, **kwargs):
            calls.append(write(self, *args, **kwargs))
            if len(calls) == 3:
                raise OSError(28, os.strerror(28))

        with (
            monkeypatch.context() as patch,
            pytest.raises(OSError, match=r"data: got a cache .* expected room") as error,
        ):
            patch.setattr(arrow_cache.ArrowWriter, "write_batch", full)
            Corpus.load(str(source))
        assert "\n" not in str(error.value) and "No space left on device" in str(error.value)
        assert not list(folder.glob("*.incomplete"))
    assert not list(folder.glob("*.arrow"))
    documents = mapped_texts.read_documents(str(source))
    assert documents.texts[:]["text"] == TEXTS and not list(folder.glob("*.incomplete"))


@pytest.mark.slow
def test_two_processes_share_one_copy(source, large):
    code = (
        "import datasets, sys, deepseek_training.data.mapped_texts as m, deepseek_training.data.arrow_cache as a\n"
        "datasets.config.HF_DATASETS_CACHE = sys.argv[2]; m.LEAST_MAPPED_BYTES = 1\n"
        "write = a._write\n"
        "def counted(*args): print('wrote'); write(*args)\n"
        "a._write = counted\n"
        "print(len(m.read_documents(sys.argv[1]).texts))\n"
    )
    arguments = [sys.executable, "-c", code, str(source), str(large / "cache")]
    running = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [one.communicate(timeout=120)[0].split() for one in running]
    assert sorted(map(len, outputs)) == [1, 2] and {one[-1] for one in outputs} == {str(len(TEXTS))}


def test_a_hub_data_set_is_streamed_once_per_commit(large, monkeypatch):
    opened = []

    def load(name, configuration, *, streaming):
        opened.append((name, configuration, streaming))
        rows = {"train": TEXTS[:20], "test": TEXTS[20:24]}
        return {
            part: datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset() for part, texts in rows.items()
        }

    revision = ["one"]
    monkeypatch.setattr(datasets, "load_dataset", load)
    for module in (document_files, mapped_texts):
        monkeypatch.setattr(module, "hub_revision", lambda name: revision[0])
    for _ in range(2):
        corpus = Corpus.load("owner/data:part")
        assert list(corpus.train) == TEXTS[:20] and list(corpus.validation) == TEXTS[20:24]
    assert opened == [("owner/data", "part", True)]
    revision[0] = "two"
    Corpus.load("owner/data:part")
    assert len(opened) == 2
