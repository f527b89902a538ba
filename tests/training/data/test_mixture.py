"""Mixtures: shares in every stretch, one order whatever the length, sources that are refused in one line."""

import json

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

from deepseek_cli.main import main
from deepseek_training.data.corpus import check_corpora, load_corpora
from deepseek_training.data.mixture import Mixture
from deepseek_training.data.packing import PackedDataset
from deepseek_training.data.texts import load_texts

TEXTS = load_texts("medicine", "all")[:60]


def part(base, blocks):
    return PackedDataset([np.arange(base, base + 4 * blocks, dtype=np.int32)], 4)


def first_tokens(mixture):
    return [int(mixture[place]["input_ids"][0]) for place in range(len(mixture))]


def test_every_stretch_holds_the_shares_and_a_longer_stream_begins_alike():
    parts = [part(0, 50), part(1000, 8), part(5000, 3)]
    short, long = (Mixture(parts, [5, 3, 2], length, seed=1) for length in (40, 200))
    tokens = first_tokens(long)
    assert first_tokens(short) == tokens[:40]
    for begin in range(0, 200, 10):
        sources = [0 if one < 1000 else 1 if one < 5000 else 2 for one in tokens[begin : begin + 10]]
        counts = np.bincount(sources, minlength=3)
        assert abs(counts - [5, 3, 2]).max() <= 1
    assert long.counts() == [100, 60, 40]
    # each pass over a source holds each of its blocks once, in another order
    small = [one for one in tokens if 1000 <= one < 5000]
    passes = [small[place : place + 8] for place in range(0, 56, 8)]
    assert all(sorted(one) == sorted(passes[0]) for one in passes) and passes[0] != passes[1]
    assert first_tokens(Mixture(parts, [5, 3, 2], 40, seed=2)) != tokens[:40]
    assert set(first_tokens(Mixture(parts, [1, 0, 0], 50, seed=1))) == set(range(0, 200, 4))


def write(path, texts, **more):
    path.write_text("".join(json.dumps({"text": text, **more}, ensure_ascii=False) + "\n" for text in texts))
    return str(path)


def load(data):
    corpora = load_corpora(data, "data", column=None, encoding="utf-8")
    check_corpora(corpora)
    return corpora


def test_own_validation_and_shares(tmp_path):
    one = write(tmp_path / "one.jsonl", TEXTS[:20])
    two = write(tmp_path / "two.jsonl", TEXTS[20:50])
    held_out = write(tmp_path / "held.jsonl", TEXTS[50:])
    first, second = load([{"path": one, "validation": held_out}, {"path": two, "validation_share": 0.0}])
    assert first.train == TEXTS[:20] and first.validation == TEXTS[50:]
    assert second.train == TEXTS[20:50] and not second.validation
    (half,) = load([{"path": two, "validation_share": 0.5}])
    assert 8 <= len(half.validation) <= 22 and sorted([*half.train, *half.validation]) == sorted(TEXTS[20:50])


@pytest.mark.parametrize("change", ["none", "case and spaces", "two words"])
def test_held_out_text_that_is_trained_on_is_refused(tmp_path, change):
    train = write(tmp_path / "train.jsonl", TEXTS[:40])
    text = TEXTS[7]
    if change == "case and spaces":
        text = "  ".join(text.upper().split())
    if change == "two words":
        words = text.split()
        text = " ".join(["one", *words[1:-1], "another"])
    held_out = write(tmp_path / "held.jsonl", [*TEXTS[50:], text])
    with pytest.raises(ValueError, match=r"validation: got .*held.jsonl, which holds") as error:
        load([{"path": train, "validation": held_out}])
    assert ("the same text" if change == "none" else "a near-duplicate") in str(error.value)
    assert "\n" not in str(error.value) and "train.jsonl" in str(error.value)
    load([{"path": train, "validation": write(tmp_path / "other.jsonl", TEXTS[50:])}])


def test_two_sources_that_share_a_held_out_text_are_refused(tmp_path):
    one = write(tmp_path / "one.jsonl", TEXTS[:20], split="train")
    two = tmp_path / "two.jsonl"
    rows = [{"text": TEXTS[3], "split": "test"}, {"text": TEXTS[30], "split": "train"}]
    two.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"got .*two.jsonl, which holds the same text as the training text of .*one"):
        load([{"path": one, "validation_share": 0.0}, {"path": str(two)}])


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "data: got an empty list, expected at least one source"),
        ([{"weight": 1}], "data[0]: setting 'path' is missing"),
        ([{"path": "{one}", "wieght": 1}], "data[0]: got the unknown setting 'wieght'; did you mean weight"),
        ([{"path": "{one}", "weight": 0}, {"path": "{two}", "weight": 0.0}], "data: got weights that sum to 0"),
        ([{"path": "{one}", "weight": 1}, {"path": "{two}"}], "data: got weights for 1 of 2 sources, expected all"),
        ([{"path": "{one}", "weight": -1}], "weight: got -1.0, expected null or at least 0, and finite"),
        ([{"path": "{one}", "validation_share": 1}], "validation_share: got 1.0, expected null or in [0, 1)"),
        ([{"path": "{empty}"}], "is empty; it holds no text"),
        ([{"path": "{folder}"}], "b.jsonl has no column 'text' (it has: body)"),
        ([{"path": "{latin}"}], "line 2: got bytes that are not UTF-8"),
        ([{"path": "{latin}", "encoding": "latin1x"}], "encoding: got 'latin1x', expected one that Python knows"),
        ([{"path": "{one}", "validation_share": 0}], "data: got no held-out text, expected some"),
        ([{"path": "{none}"}], "data: no file or folder"),
    ],
)
def test_sources_that_cannot_be_are_refused_in_one_line(tmp_path, sources, message):
    places = {name: str(tmp_path / name) for name in ("one.jsonl", "two.jsonl", "empty.jsonl", "folder", "latin.txt")}
    write(tmp_path / "one.jsonl", TEXTS[:20])
    write(tmp_path / "two.jsonl", TEXTS[20:40])
    write(tmp_path / "empty.jsonl", [" ", "\n"])
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder/a.jsonl", TEXTS[:3])
    (tmp_path / "folder/b.jsonl").write_text('{"body": "abc"}\n')
    (tmp_path / "latin.txt").write_bytes("one\ncaf\u00e9\n".encode("latin-1"))
    names = {f"{{{name.split('.')[0]}}}": place for name, place in places.items()} | {"{none}": str(tmp_path / "none")}
    filled = [{key: names.get(value, value) for key, value in one.items()} for one in sources]
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(filled)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_encoding_reads_what_is_no_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes("\n\n".join(f"caf\u00e9 {n} " * 300 for n in range(9)).encode("latin-1"))
    (corpus,) = load([{"path": str(tmp_path / "a.txt"), "encoding": "latin-1"}])
    assert all("caf\u00e9" in text for text in [*corpus.train, *corpus.validation])


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_each_step_takes_the_same_blocks_whatever_the_number_of_processes(num_processes):
    mixture = Mixture([part(0, 50), part(1000, 8)], [2, 1], 64, seed=3)
    tokens = first_tokens(mixture)
    batches = BatchSampler(SequentialSampler(mixture), 8 // num_processes, drop_last=False)
    shares = [list(BatchSamplerShard(batches, num_processes, number)) for number in range(num_processes)]
    steps = [sorted(tokens[place] for one in step for place in one) for step in zip(*shares, strict=True)]
    assert steps == [sorted(tokens[begin : begin + 8]) for begin in range(0, 64, 8)]


def test_the_command_takes_an_encoding_and_names_what_does_not_decode(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes("\n\n".join(f"caf\u00e9 {n} " * 300 for n in range(40)).encode("latin-1"))
    words = ["pretrain", "pretrain-debug", "--data", str(tmp_path / "a.txt"), "--output", str(tmp_path / "run")]
    words += ["--tokenizer-data", "[]", "--vocab-size", "300"]
    assert main([*words, "--dry-run"]) == 2
    error = capsys.readouterr().err.strip()
    assert "a.txt, line 1: got bytes that are not UTF-8" in error and "\n" not in error
    assert "set encoding" in error
    assert main([*words, "--dry-run", "--encoding", "latin-1"]) == 0
    assert not (tmp_path / "run").exists()
