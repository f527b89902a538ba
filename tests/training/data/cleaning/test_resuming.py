"""The same bytes with any number of processes, and after a stop at any moment; changed sources are refused."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import datasets
import pytest

pytest.importorskip("ftfy", reason="pip install 'deepseek-moe[data]'")

from cleaning_stops import STOPS, arm, clean, clean_until_killed, write_sources

from deepseek_records.run_folder import RunFolder
from deepseek_training.data.cleaning import passes
from deepseek_training.data.texts import load_texts

# Where and when a run was started is no part of what it makes.
OF_THE_START = {"environment.json", "summary.json"}
# In the first pass and in the second; the other moments take as long.
QUICK = {"within the third part", "between the splits"}


class Stopped(BaseException):
    """What no code catches."""


def stop():
    raise Stopped


def bytes_of(folder):
    """Every file that a run leaves, and its summary without the time."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found = {name: content for name, content in files.items() if name not in OF_THE_START}
    summary = json.loads(files["summary.json"])
    assert summary.pop("seconds") >= 0 and summary.pop("energy")["cpu_seconds"] >= 0
    return {**found, "summary": summary}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(passes, "BATCH_DOCUMENTS", passes.BATCH_DOCUMENTS)  # `clean` sets it


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("texts") / "sources")


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    clean(sources, output)
    return bytes_of(output)


def test_what_is_compared_is_all_there_is(whole):
    names = {name.partition("/")[0] for name in whole}
    assert names == {"data", "dropped", "README.md", "croissant.json", "counts.json", "recipe.yaml", "inputs.json",
                     "summary"}  # fmt: skip
    shards = [name for name in whole if name.startswith("data/")]
    assert len(shards) > 3 and {name.split("-")[0] for name in shards} == {"data/train", "data/validation"}
    dropped = {row["name"]: row["num_dropped"] for row in json.loads(whole["counts.json"])["filters"]}
    assert all(dropped[name] for name in ("language", "contamination", "exact duplicates"))


@pytest.mark.slow
def test_two_processes_leave_the_bytes_of_one(sources, whole, tmp_path):
    clean(sources, tmp_path / "run", workers=2)
    assert bytes_of(tmp_path / "run") == whole


def check_unfinished(output, whole):
    """What a stop has left is not taken for whole, unless the data are."""
    assert not RunFolder(output).is_finished
    files = {f"data/{path.name}": path.read_bytes() for path in (output / "data").glob("*")}
    assert not files or files == {name: content for name, content in whole.items() if name.startswith("data/")}
    with pytest.raises(ValueError, match="got the run folder"):
        load_texts(output, "train")


@pytest.mark.parametrize(
    "moment", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STOPS]
)
def test_a_stopped_run_ends_with_the_same_bytes(sources, whole, tmp_path, monkeypatch, moment):
    output = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        arm(moment, output, stop, patch.setattr)
        clean(sources, output)
    check_unfinished(output, whole)
    clean(sources, output)
    assert bytes_of(output) == whole


def test_whole_parts_are_not_made_again(sources, tmp_path, monkeypatch):
    output = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        arm("within the third part", output, stop, patch.setattr)
        clean(sources, output, filters=["repair"], languages=[])
    made, original = [], passes.make_part
    monkeypatch.setattr(passes, "make_part", lambda task: made.append(task[0].name) or original(task))
    clean(sources, output, filters=["repair"], languages=[])
    assert made == ["part-000002.parquet", "part-000003.parquet"]


@pytest.mark.slow
@pytest.mark.parametrize("moment", STOPS)
def test_a_killed_run_ends_with_the_same_bytes(sources, whole, tmp_path, moment):
    output = tmp_path / "run"
    process = multiprocessing.get_context("spawn").Process(target=clean_until_killed, args=(sources, output, moment))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    check_unfinished(output, whole)
    clean(sources, output)
    assert bytes_of(output) == whole


@pytest.mark.slow
def test_the_command_is_killed_with_its_processes_and_goes_on(tmp_path):
    """The real command with two processes, by its process id, as soon as there is a part."""
    texts = [text[:500] for text in load_texts("medicine", "all")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    outputs = [tmp_path / "undisturbed/run", tmp_path / "killed/run"]
    sources = f"[{{path: {tmp_path}/a.jsonl}}]"
    words = [sys.executable, "-m", "deepseek_cli.main", "data", "data-debug", "--sources", sources]
    words += ["--languages", "[]", "--filters", "[repair, quality, personal_data, duplicates]", "--output"]
    subprocess.run([*words, str(outputs[0])], check=True, capture_output=True)
    command = [*words, str(outputs[1]), "--workers", "2"]
    work = outputs[1] / "work"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (work / "part-000001.parquet").exists():
        time.sleep(0.005)
    children = [pid for pid in filter(str.isdigit, os.listdir("/proc")) if state_of(pid)[1:] == [str(process.pid)]]
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and len(children) >= 2
    num_parts = len(list(work.glob("*.parquet")))
    assert 0 < num_parts < -(-len(texts) // 256) and not (outputs[1] / "data").exists()
    deadline = time.monotonic() + 20  # the processes end with the command that started them
    while any(state_of(pid)[:1] not in ([], ["Z"]) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    subprocess.run(command, check=True, capture_output=True)
    assert bytes_of(outputs[1]) == bytes_of(outputs[0])


def state_of(pid):
    """State and parent of a process; nothing where there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[:2]
    except OSError:
        return []


def append(folder):
    with open(folder / "a.jsonl", "a") as file:
        file.write('{"text": "One more."}\n')


def add(folder):
    (folder / "c.jsonl").write_text('{"text": "One more."}\n')


def rename(folder):
    (folder / "b.jsonl").rename(folder / "d.jsonl")


@pytest.mark.parametrize("change", [append, add, rename])
def test_changed_sources_are_refused(tmp_path, monkeypatch, change):
    sources, output = write_sources(tmp_path / "sources"), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        arm("within the third part", output, stop, patch.setattr)
        clean(sources, output, filters=["repair"], languages=[])
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    change(sources)
    with pytest.raises(FileExistsError, match="another content of source sources") as error:
        clean(sources, output, filters=["repair"], languages=[])
    assert "\n" not in str(error.value)
    after = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before if path.name != ".lock"} == {
        path: content for path, content in before.items() if path.name != ".lock"
    }


def test_a_changed_datasets_directory_is_refused(tmp_path, monkeypatch):
    texts = load_texts("medicine", "all")[:50]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        arm("before the duplicates", tmp_path / "run", stop, patch.setattr)
        clean(tmp_path / "saved", tmp_path / "run", filters=["repair"], languages=[])
    datasets.Dataset.from_dict({"text": texts[1:]}).save_to_disk(str(tmp_path / "other"))
    (tmp_path / "saved").rename(tmp_path / "old")
    (tmp_path / "other").rename(tmp_path / "saved")
    with pytest.raises(FileExistsError, match="another content of source saved"):
        clean(tmp_path / "saved", tmp_path / "run", filters=["repair"], languages=[])


def test_changed_settings_are_refused(tmp_path, monkeypatch):
    sources, output = write_sources(tmp_path / "sources"), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        arm("within the third part", output, stop, patch.setattr)
        clean(sources, output, filters=["repair"], languages=[])
    with pytest.raises(FileExistsError, match="differs in validation_share"):
        clean(sources, output, filters=["repair"], languages=[], validation_share=0.3)
