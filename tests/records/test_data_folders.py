"""A folder of data as the Hub's download leaves it: each file in its role, or named."""

import json
import logging
from pathlib import Path

import datasets
import pytest

from deepseek_records.data_folders import data_files, split_of
from deepseek_training.data.texts import load_texts


def write(folder, name, count=4):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": f"{name} {number}"} for number in range(count)]
    if name.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("train", "held"),
    [
        ("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train.jsonl", "dev.jsonl"),
        ("my_train_file.jsonl", "my_eval_file.jsonl"),
        ("train/a.jsonl", "valid/a.jsonl"),
        ("en/training/a.jsonl", "en/val/a.jsonl"),
    ],
)
def test_names_are_splits_as_the_hub_reads_them(tmp_path, train, held):
    for name in (train, held):
        write(tmp_path, name)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Card\n")
    assert load_texts(tmp_path, "train") == [f"{train} {number}" for number in range(4)]
    assert load_texts(tmp_path, "validation") == [f"{held} {number}" for number in range(4)]
    known = datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / ".cache"))
    assert {len(rows) for rows in known.values()} == {4} and len(known) == 2 and "train" in known


def test_a_users_own_names_are_no_splits(tmp_path, caplog):
    for name in ("notes.jsonl", "test kitchen.jsonl", "more.jsonl"):
        write(tmp_path, name, 20)
    assert (
        len(load_texts(tmp_path, "all")) == 60 == len(load_texts(tmp_path)) + len(load_texts(tmp_path, "validation"))
    )
    assert not caplog.records


def test_what_is_not_read_is_named_once(tmp_path, caplog):
    for name in ("a.jsonl", ".git/description.txt", ".ipynb_checkpoints/a-checkpoint.jsonl", "__pycache__/a.jsonl"):
        write(tmp_path, name)
    for name in ("b.jsonl.lz4", "c.pdf", "d.JSONL.GZ"):
        (tmp_path / name).write_bytes(b"(\xb5/\xfd..")
    with caplog.at_level(logging.WARNING):
        assert (
            load_texts(tmp_path, "all") == load_texts(tmp_path, "all") == [f"a.jsonl {number}" for number in range(4)]
        )
    (line,) = [record.getMessage() for record in caplog.records]
    assert "not read: b.jsonl.lz4, c.pdf, d.JSONL.GZ" in line and ".git" not in line


def test_a_file_beside_named_splits_is_told(tmp_path, caplog):
    for name in ("train.jsonl", "validation.jsonl", "extra.jsonl"):
        write(tmp_path, name)
    assert len(load_texts(tmp_path, "all")) == 8
    assert "not read: extra.jsonl; others are named by split" in caplog.text


def test_a_folder_of_nothing_readable_says_what_it_holds(tmp_path):
    (tmp_path / "a.pdf").write_text("text\nx\n")
    with pytest.raises(ValueError, match=r"holds no \.txt, .*it holds a\.pdf"):
        data_files(tmp_path, {".txt"})
    (tmp_path / "README.md").write_text("Only this.")
    assert [path.name for path, _ in data_files(tmp_path, {".md", ".pdf"})] == ["a.pdf"]


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.txt", "train"),
        ("constrained.txt", None),
        ("a/testing/x.txt", "test"),
        ("latest.txt", None),
        ("x-dev", "validation"),
    ],
)
def test_a_split_is_a_whole_word_of_the_name(path, split):
    assert split_of(Path(path)) == split
