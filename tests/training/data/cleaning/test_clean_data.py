"""The whole command on a small folder: what is dropped, that each row leads back to its line, that nothing varies."""

import gzip
import json
from pathlib import Path

import datasets
import pytest

pytest.importorskip("ftfy", reason="pip install 'deepseek-moe[data]'")

from deepseek_records.run_folder import RunFolder
from deepseek_training.data.texts import load_texts
from deepseek_training.recipes.data import DataRecipe
from deepseek_training.stages.clean_data import clean_data

ITEM = "Which of the following organs stores the bile that is made by the liver of an adult human being?"
CLEAN = [text[:900] for text in load_texts("medicine", "all")[:150]]
PLANTED = {
    "mojibake": "Na\u00c3\u00afve cells of the patient\u00e2\u20ac\u2122s blood were counted in each of the samples.",
    "german": "Das Kind hat seit drei Tagen hohes Fieber und soll viel Wasser trinken, sagte die \u00c4rztin.",
    "leak": f"An exam of last year. {ITEM} The answer is easy.",
    "mail": "For the protocol of the study write to jane.doe@example.org, who keeps it for five years.",
    "copy": CLEAN[3],
    "near": CLEAN[4].replace("the", "THE").replace(" with ", " with a ", 1),
    "empty": "   ",
}


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("*.gz")) for line in gzip.open(path, "rt")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    lines = [json.dumps({"text": text}) for text in CLEAN[:60]]
    (folder / "a.jsonl").write_text("\n\n".join(lines) + "\n")  # a blank line after each row
    datasets.Dataset.from_dict({"text": CLEAN[60:100]}).to_parquet(str(folder / "b.parquet"))
    datasets.Dataset.from_dict({"text": CLEAN[100:130]}).to_csv(str(folder / "c.csv"))
    (folder / "d.txt").write_text("\n\n".join(CLEAN[130:]))
    (folder / "planted.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PLANTED.values()))
    return folder


def recipe_for(folder: Path, **settings) -> DataRecipe:
    return DataRecipe(sources=[{"path": str(folder), "license": "MIT"}], languages=["en"], **settings)


@pytest.fixture(scope="module")
def done(sources, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "run"
    return clean_data(recipe_for(sources), output, {"quiz": [("7", ITEM)]}), output


def test_every_planted_fault_is_found_by_its_filter(done):
    summary, output = done
    dropped = {row["name"]: row["num_dropped"] for row in summary.details["filters"]}
    assert dropped["language"] == dropped["contamination"] == dropped["empty"] == 1
    assert dropped["exact duplicates"] == dropped["near-duplicates"] == 1
    assert dropped["quality"] <= 2 and dropped["toxicity"] == 0
    texts = "\n".join(row["text"] for row in rows_of(output / "data"))
    assert "Na\u00efve cells of the patient\u2019s blood" in texts
    assert "[EMAIL]" in texts and "jane.doe" not in texts and ITEM not in texts
    told = json.loads((output / "dropped/contamination.jsonl").read_text())
    assert told["file"] == "planted.jsonl" and told["line"] == 3 and told["why"] == "quiz/7 (100%)"
    assert "jane.doe" not in "".join(path.read_text() for path in (output / "dropped").iterdir())


def test_counts_add_up(done):
    summary, output = done
    rows, reached = rows_of(output / "data"), sum(summary.details["read"].values())
    for count in summary.details["filters"]:
        assert count["num_in"] == reached == sum(count["reached"].values())
        reached -= count["num_dropped"]
    assert reached == len(rows) == sum(use.num_rows for use in summary.data) == sum(summary.details["kept"].values())
    assert sum(len(row["text"].encode()) for row in rows) == sum(use.num_bytes for use in summary.data)


def test_every_row_leads_back_to_its_file_and_line(done, sources):
    table = load_texts(sources / "b.parquet", "all")
    for row in rows_of(done[1] / "data"):
        path = sources / row["file"]
        if path.suffix == ".jsonl":
            origin = json.loads(path.read_text().split("\n")[row["line"] - 1])["text"]
        elif path.suffix == ".txt":
            origin = "\n".join(path.read_text().split("\n")[row["line"] - 1 :])
        elif path.suffix == ".csv":
            assert row["text"].split("\n")[-1][-60:] in path.read_text().split("\n")[row["line"] - 1]
            continue
        else:
            origin = table[row["line"] - 1]
        assert row["id"] == f"{sources.name}/{row['file']}#{row['line']}"
        if "[EMAIL]" not in row["text"] and "Na\u00efve" not in row["text"]:
            assert origin.startswith(row["text"].rstrip("\n")), row["id"]


def test_training_reads_the_result(done):
    _, output = done
    rows = rows_of(output / "data")
    for split in ("train", "validation"):
        wanted = [row["text"] for row in rows if row["split"] == split]
        assert wanted and load_texts(output / "data", split) == wanted


def test_the_run_folder_says_what_it_is_made_of(done, sources):
    run = RunFolder(done[1])
    assert run.is_finished and not (run.path / "work").exists()
    assert set(run.inputs) == {f"source {sources.name}", "benchmarks"}
    assert set(run.summary.details["inputs"][sources.name]) == {path.name for path in sources.iterdir()}
    with pytest.raises(FileExistsError, match="finished run"):
        clean_data(recipe_for(sources), run.path, {})


def test_without_filters_all_that_holds_text_stays(sources, tmp_path):
    recipe = DataRecipe(sources=[{"path": str(sources)}], filters=[], format="parquet", validation_share=0.0)
    summary = clean_data(recipe, tmp_path / "run", {})
    assert sum(summary.details["kept"].values()) == sum(summary.details["read"].values()) - 1
    assert [path.name for path in (tmp_path / "run/data").iterdir()] == ["train-00000-of-00001.parquet"]


def test_a_dry_run_writes_nothing(sources, tmp_path, capsys):
    assert clean_data(recipe_for(sources), tmp_path / "run", {}, is_dry=True) is None
    assert not (tmp_path / "run").exists() and "MB/s per process" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "settings", "told"),
    [
        ("a.txt", b"", {}, "is empty"),
        ("a.jsonl", b'{"text": " "}\n', {}, "holds no text"),
        ("a.jsonl", b'{"body": "x"}\n', {}, "a.jsonl has no column 'text' .it has: body"),
        ("a.jsonl", b'{"text": 3}\n', {}, "a.jsonl, line 1: 'text' holds int"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', {}, "a.jsonl, line 2: got no JSON"),
        ("a.txt", b"caf\xe9 and more", {}, "a.txt, line 1: got bytes that are not utf-8"),
        ("a.txt", b"text", {"encoding": "klingon"}, "encoding: got 'klingon'"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-9], {}, "cut short or broken"),
        ("a.bin", b"text", {}, "expected .csv"),
        ("a.txt", b"word " * 99, {"filters": ["nothing"]}, "filters: got 'nothing'"),
        ("a.txt", b"word " * 99, {"filters": ["repair"], "languages": ["en"]}, "languages: got"),
        ("a.txt", b"Das ist ein deutscher Satz." * 9, {"languages": ["en"]}, "no document is left to train on"),
    ],
)
def test_bad_input_is_told_in_one_line(tmp_path, name, content, settings, told):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=told) as error:
        clean_data(DataRecipe(sources=[{"path": str(path)}], **settings), tmp_path / "run", {})
    assert "\n" not in str(error.value)
    assert not RunFolder(tmp_path / "run").is_finished


def test_other_encodings_are_read_when_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("\u809d\u708e\u662f\u4ec0\u4e48\uff1f".encode("gb18030"))
    recipe = DataRecipe(sources=[{"path": str(tmp_path / "a.txt")}], encoding="gb18030", validation_share=0.0)
    clean_data(recipe, tmp_path / "run", {})
    assert load_texts(tmp_path / "run/data", "all") == ["\u809d\u708e\u662f\u4ec0\u4e48\uff1f"]
