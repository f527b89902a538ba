"""A benchmark's rows from files of the user's own: what they may look like, and one line for what is broken."""

import gzip
import json

import datasets
import pytest

from deepseek_eval.tasks.rows import read_rows

ROWS = [{"a": 'one, \u2028\n"two"', "b": "\u00e9"}, {"a": "", "b": "x"}]


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "byte order mark"])
@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.csv"])
def test_every_form_gives_the_same_rows(tmp_path, name, mark):
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    if name == "d.csv":
        text = 'a,b\r\n"one, \u2028\n""two""",\u00e9\r\n,x\r\n'
    raw = (mark + text).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert list(read_rows("d", tmp_path)) == list(read_rows("d", tmp_path / name)) == ROWS


def test_a_parquet_file_gives_the_same_rows(tmp_path):
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "d.parquet"))
    rows = list(read_rows("d", tmp_path))
    assert rows == ROWS and rows[1].where.endswith("d.parquet, row 2")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"{broken", "d.jsonl, line 1: got no JSON (Expecting"),
        ("d.jsonl", b"\n" + b"[" * 100_000, "d.jsonl, line 2: got no JSON (maximum recursion"),
        ("d.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "d.jsonl, line 1: got no JSON (Exceeds the limit"),
        ("d.jsonl", b"[1]\n", "d.jsonl, line 1: got a list, expected an object"),
        (
            "d.jsonl",
            b'{"a": "\xff"}',
            "d.jsonl, line 1: got bytes that are not UTF-8 (invalid start byte), expected text",
        ),
        ("d.jsonl.gz", b'{"a": 1}', "d.jsonl.gz: got no whole gzip file"),
        ("d.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], "d.jsonl.gz: got no whole gzip file"),
        ("d.jsonl.gz", gzip.compress(b"{}\n", mtime=0)[:10] + b"\xff" * 30, "d.jsonl.gz: got no whole gzip file"),
        ("d.csv", b"a,b\n" + b"x" * 200_000, "d.csv: got no CSV (field larger than field limit"),
        ("d.parquet", b"PAR1", "d.parquet: got no whole Parquet file, expected one"),
        ("d.txt", b"\xfe\xff", "d.txt, line 1: got bytes that are not UTF-8 (invalid start byte), expected text"),
    ],
)
def test_a_broken_file_is_told_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        list(read_rows("d", tmp_path))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert "encoding" not in str(caught.value), "no setting of this command"
