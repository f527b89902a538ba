"""A benchmark's rows from files of the user's own: what they may look like, and one line for what is broken."""

import gzip
import json

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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"{broken", "d.jsonl, line 1 is no JSON (Expecting"),
        ("d.jsonl", b"\n" + b"[" * 100_000, "d.jsonl, line 2 is no JSON (maximum recursion"),
        ("d.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "d.jsonl, line 1 is no JSON (Exceeds the limit"),
        ("d.jsonl", b"[1]\n", "d.jsonl, line 1 is list, expected an object"),
        ("d.jsonl", b'{"a": "\xff"}', "d.jsonl is no UTF-8 text"),
        ("d.jsonl.gz", b'{"a": 1}', "d.jsonl.gz is no whole gzip file"),
        ("d.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], "d.jsonl.gz is no whole gzip file"),
        ("d.jsonl.gz", gzip.compress(b"{}\n", mtime=0)[:10] + b"\xff" * 30, "d.jsonl.gz is no whole gzip file"),
        ("d.csv", b"a,b\n" + b"x" * 200_000, "d.csv is no CSV file (field larger than field limit"),
        ("d.txt", b"\xfe\xff", "d.txt is no UTF-8 text"),
    ],
)
def test_a_broken_file_is_told_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        list(read_rows("d", tmp_path))
    assert message in str(caught.value) and "\n" not in str(caught.value)
