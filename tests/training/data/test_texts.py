import bz2
import gzip
import json
import lzma
import subprocess
import sys

import datasets
import pytest

from deepseek_records.document_files import is_validation
from deepseek_training.data.texts import DATA_FOLDER, describe_data, load_texts

PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
ROWS = [{"text": f"Document number {i}.", "note": "x"} for i in range(40)]


def write_jsonl(path, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(PACKERS.get(path.suffix, bytes)(text.encode()))
    return path


@pytest.fixture(
    params=["jsonl", "jsonl.gz", "jsonl.bz2", "jsonl.xz", "json", "tsv", "csv", "parquet", "folder", "saved"]
)
def source(request, tmp_path):
    """The same forty documents in every form a user may have."""
    if request.param == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "d.parquet"))
        return tmp_path / "d.parquet"
    if request.param == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
        return tmp_path / "saved"
    if request.param == "csv":
        datasets.Dataset.from_list(ROWS).to_csv(str(tmp_path / "d.csv"))
        return tmp_path / "d.csv"
    if request.param == "json":
        (tmp_path / "d.json").write_text(json.dumps(ROWS))
        return tmp_path / "d.json"
    if request.param == "tsv":
        (tmp_path / "d.tsv").write_text("text\tnote\n" + "".join(f"{row['text']}\tx\n" for row in ROWS))
        return tmp_path / "d.tsv"
    if request.param == "folder":
        write_jsonl(tmp_path / "a.jsonl", ROWS[:15])
        (tmp_path / "ignored.png").write_bytes(b"\x89PNG")
        (tmp_path / "sub").mkdir()
        datasets.Dataset.from_list(ROWS[15:]).to_parquet(str(tmp_path / "sub" / "b.parquet"))
        return tmp_path
    return write_jsonl(tmp_path / f"d.{request.param}", ROWS)


def test_every_form_gives_the_same_texts(source):
    assert load_texts(source, "all") == [row["text"] for row in ROWS]
    train, held_out = load_texts(source, "train"), load_texts(source, "validation")
    assert held_out == [row["text"] for row in ROWS if is_validation(row["text"])]
    assert sorted(train + held_out) == sorted(row["text"] for row in ROWS) and held_out


def test_hash_split_does_not_depend_on_order_or_company(tmp_path):
    first = load_texts(write_jsonl(tmp_path / "a.jsonl", ROWS), "validation")
    more = [{"text": "A new one."}, *reversed(ROWS)]
    assert set(first) <= set(load_texts(write_jsonl(tmp_path / "b.jsonl", more), "validation"))


def test_small_set_still_has_one_held_out_document(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    assert not any(is_validation(text) for text in ("one", "two"))
    assert len(load_texts(path, "validation")) == len(load_texts(path, "train")) == 1


def test_split_column_wins(tmp_path):
    rows = [{"text": "a", "split": "train"}, {"text": "b", "split": "test"}, {"text": "c", "split": "train"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert load_texts(path) == ["a", "c"] and load_texts(path, "validation") == ["b"]


def test_saved_dict_keeps_its_splits(tmp_path):
    parts = {"train": datasets.Dataset.from_list(ROWS[:5]), "validation": datasets.Dataset.from_list(ROWS[5:8])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "d"))
    assert load_texts(tmp_path / "d", "validation") == [row["text"] for row in ROWS[5:8]]
    assert load_texts(tmp_path / "d", "train") == [row["text"] for row in ROWS[:5]]


def test_text_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    text = "\n\n".join(f"Paragraph {i}. " + "word " * 150 for i in range(60)) + "\n"
    (tmp_path / "a.txt").write_text(text)
    passages = load_texts(tmp_path / "a.txt", "all")
    assert "".join(passages) == text and len(passages) > 10
    assert load_texts(tmp_path / "a.txt", "validation")


def test_unicode_line_separators_inside_json_strings_are_kept(tmp_path):
    rows = [{"text": "one\u2028two"}, {"text": "three\x85four"}]
    assert load_texts(write_jsonl(tmp_path / "a.jsonl", rows), "all") == [row["text"] for row in rows]


def test_embedded_data_has_disjoint_splits_and_a_license():
    for name in ("books", "medicine"):
        train, held_out = load_texts(name), load_texts(name, "validation")
        assert len(held_out) >= 2 and not set(train) & set(held_out)
        row = describe_data(name, "train", train, "training")
        assert row.num_bytes > 1e6 and row.license and row.hub_id is None
    files = [path for path in DATA_FOLDER.iterdir() if path.name.startswith(("books", "medicine"))]
    assert sum(path.stat().st_size for path in files) < 4.3e6
    assert all(path.name in (DATA_FOLDER / "SOURCES.md").read_text() for path in files)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"text": " "}\n', "holds no text"),
        ("a.txt", b"\x89PNG\r\n\xff\xfe", "got bytes that are not UTF-8"),
        ("a.txt", b"abc\0def", "got zero bytes, expected text"),
        ("a.jsonl", b"\xff\xfe", "got bytes that are not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\nnot json\n', "line 2: got no JSON (Expecting value), expected an object"),
        ("a.jsonl", b"[1, 2]\n", "line 1: got a list, expected an object"),
        ("a.jsonl", b'{"body": "a", "title": "b"}\n', "has no column 'text' (it has: body, title)"),
        ("a.jsonl", b'{"text": 3}\n', "holds int, not text"),
        ("a.jsonl", b'{"text": "a", "split": "dev2"}\n', "has no row with split 'train'"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "line 1: got no JSON (Exceeds the limit"),
        ("a.jsonl", b"[" * 100_000, "line 1: got no JSON (maximum recursion"),
        ("a.jsonl", b'\n{"text": "a", "note": ["b \\uD800 c"]}\n', "line 2: got half a surrogate pair"),
        ("a.csv", b"text\nabc,d\n", "line 2: got more cells than columns, expected 1"),
        ("a.json", b'[{"text": "abc"', "got no whole JSON file, expected one"),
        ("a.tsv", b"text\tnote\nabc\td\te\n", "line 2: got more cells than columns, expected 2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"}\n{"text": "\xe4"}\n', "line 3: got bytes that are not UTF-8"),
        ("a.parquet", b"PAR1 not really", "got no whole Parquet file, expected one"),
        (
            "a.jsonl.gz",
            gzip.compress(b"{}", mtime=0)[:10] + b"\xff" * 30,
            "got no whole gzip file, expected one",
        ),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "got no whole gzip file, expected one"),
    ],
)
def test_bad_files_fail_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_texts(tmp_path / name)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud83d\\ude00"}\n')
    assert load_texts(tmp_path / "a.jsonl", "all") == ["\N{GRINNING FACE}"]


def test_missing_files_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_texts(tmp_path / "none.txt")
    with pytest.raises(ValueError, match=r"holds no \.txt"):
        load_texts(tmp_path)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a whole `datasets` directory"):
        load_texts(tmp_path)
    with pytest.raises(ValueError, match="expected one of train"):
        load_texts("books", "dev")


def test_hub_id_without_network_says_what_to_pass_instead():
    code = "from deepseek_training.data.texts import load_texts; load_texts('owner/data')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"HF_HUB_OFFLINE": "1", "PATH": ""}
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: data: owner/data is not a local path") and "pass an embedded name" in last


def test_a_text_without_blank_lines_is_cut_at_line_ends(tmp_path):
    text = "".join(f"Line {number} says something of its own.\n" for number in range(9000))
    (tmp_path / "lines.txt").write_text(text)
    assert len(load_texts(tmp_path / "lines.txt", "validation")) > 1
    assert "".join(load_texts(tmp_path / "lines.txt", "all")) == text
