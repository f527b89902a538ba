"""A disk that is full in the middle: one line, nothing half-written taken for whole, and on it goes with more room."""

import errno
import json
import os
import subprocess
from contextlib import contextmanager

import datasets
import pyarrow.parquet
import pytest

pytest.importorskip("ftfy", reason="pip install 'deepseek-moe[data]'")

from cleaning_stops import clean, write_sources

from deepseek_cli.main import main
from deepseek_records.run_folder import RunFolder
from deepseek_training.data import token_cache
from deepseek_training.data.cleaning import passes, shards
from deepseek_training.data.packing import encode_documents
from deepseek_training.data.texts import load_texts
from deepseek_training.data.tokenizer import train_tokenizer


@contextmanager
def small_disk(folder, kilobytes):
    """A file system of a given size in memory; skipped where this process must not mount one."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root mounts a file system")
    try:
        yield lambda more: subprocess.run(
            ["mount", "-o", f"remount,size={more}k", str(folder)], check=True, capture_output=True
        )
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def words_for(path, output):
    return ["data", "data-debug", "--sources", f"[{{path: {path}}}]", "--languages", "[]",
            "--filters", "[repair, personal_data, duplicates]", "--output", str(output)]  # fmt: skip


def data_of(run):
    return {path.name: path.read_bytes() for path in (run / "data").glob("*")}


@pytest.mark.slow
def test_a_disk_that_grows_until_the_run_fits(tmp_path, capsys):
    """Each size ends the run at another moment: in a part, in a shard, in a record."""
    path = tmp_path / "a.jsonl"
    texts = [text[:900] for text in load_texts("medicine", "all")[:700]]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert main(words_for(path, tmp_path / "whole/run")) == 0
    whole, left = data_of(tmp_path / "whole/run"), []
    with small_disk(tmp_path / "disk", 24) as grow:
        run = tmp_path / "disk/run"
        for kilobytes in range(24, 4000, 160):
            grow(kilobytes)
            capsys.readouterr()
            if (code := main(words_for(path, run))) == 0:
                break
            told = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
            assert code == 1 and len(told) == 1 and "No space left on device" in told[0]
            assert not RunFolder(run).is_finished and data_of(run) in ({}, whole)
            left.append({entry.name for entry in run.rglob("*")})
        assert code == 0 and data_of(run) == whole
    assert len(left) > 2 and any("part-000002.parquet" in names for names in left)


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("owner", "name"), [(pyarrow.parquet, "write_table"), (shards.gzip, "GzipFile")])
def test_a_write_that_fails_is_one_line(tmp_path, monkeypatch, capsys, owner, name):
    path = write_sources(tmp_path / "sources") / "a.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        assert main(words_for(path, tmp_path / "run")) == 1
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1].endswith("No space left on device") and sum("error" in line for line in told) == 1
    assert not RunFolder(tmp_path / "run").is_finished and not (tmp_path / "run/data").exists()
    assert main(words_for(path, tmp_path / "run")) == 0


@pytest.mark.slow
def test_another_process_tells_of_a_full_disk_too(tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "BATCH_DOCUMENTS", passes.BATCH_DOCUMENTS)  # `clean` sets it
    sources = write_sources(tmp_path / "sources")
    with small_disk(tmp_path / "disk", 40) as grow:
        with pytest.raises(OSError) as error:
            clean(sources, tmp_path / "disk/run", workers=2)
        assert error.value.errno == errno.ENOSPC and not (tmp_path / "disk/run/data").exists()
        grow(4000)
        clean(sources, tmp_path / "disk/run", workers=2)


def test_tokens_on_a_full_disk_are_not_cached_and_not_half_read(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(token_cache, "_LEAST_CHARACTERS", 1000)
    texts = [text[:900] for text in load_texts("medicine", "all")[:200]]
    tokenizer = train_tokenizer(texts[:40], 300)
    with small_disk(tmp_path / "disk", 100) as grow:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "disk/cache")
        tokens = encode_documents(texts, tokenizer)
        told = [record.getMessage() for record in caplog.records if "not cached" in record.getMessage()]
        assert len(told) == 1 and "No space left" in told[0]
        assert not list((tmp_path / "disk").rglob("tokens-*"))
        grow(4000)
        again = encode_documents(texts, tokenizer)
        assert list((tmp_path / "disk").rglob("tokens-*.arrow"))
    assert [one.tolist() for one in again] == [one.tolist() for one in tokens]
