"""Text that the data command left: its own folder is refused as data, and its licenses and counts are recorded."""

import json
import logging

import pytest

pytest.importorskip("ftfy", reason="pip install 'deepseek-moe[data]'")

from deepseek_records.summary import Summary
from deepseek_training.data.corpus import Corpus, describe_corpora
from deepseek_training.data.texts import describe_data, load_texts
from deepseek_training.recipes.data import DataRecipe
from deepseek_training.stages.clean_data import clean_data

TEXTS = load_texts("medicine", "all")[:90]
SOURCES = {"first": ("CC BY 4.0", "https://example.org/first"), "second": ("MIT", "https://example.org/second")}


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    parts = {"first": [*TEXTS[:50], TEXTS[3], " "], "second": TEXTS[50:]}
    for name, texts in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sources = [
        {"path": f"{folder}/{name}.jsonl", "license": license, "url": url} for name, (license, url) in SOURCES.items()
    ]
    recipe = DataRecipe(sources=sources, filters=["repair", "duplicates"], validation_share=0.2)
    return clean_data(recipe, folder / "run", {}), folder / "run"


def test_the_runs_own_folder_is_refused(cleaned):
    """Without held-out text it would be read whole, with what was dropped."""
    _, run = cleaned
    with pytest.raises(ValueError) as error:
        load_texts(run, "train")
    assert str(error.value) == f"data: got the run folder {run}, expected its data; pass {run / 'data'}"
    with pytest.raises(ValueError, match=f"pass {run / 'data'}"):
        clean_data(DataRecipe(sources=[{"path": str(run)}], filters=[]), run.parent / "again", {})


def test_an_unfinished_runs_folder_is_refused(tmp_path):
    from deepseek_records.run_folder import RunFolder

    RunFolder.create(tmp_path / "run", {}, command="data")
    (tmp_path / "run/work").mkdir()
    (tmp_path / "run/work/train-00000.jsonl").write_text('{"text": "half of it"}\n')
    with pytest.raises(ValueError, match=r"the run has left none") as error:
        load_texts(tmp_path / "run", "train")
    assert "\n" not in str(error.value)


def test_licenses_sources_and_counts_are_recorded(cleaned):
    summary, run = cleaned
    corpus = Corpus.load(str(run / "data"))
    train, held_out = describe_corpora([corpus], [corpus.validation[:3]])
    assert (train.license, train.source) == ("CC BY 4.0; MIT", "https://example.org/first; https://example.org/second")
    assert train.num_rows == sum(use.num_rows for use in summary.data if use.split == "train") and train.name == "data"
    assert train.languages == ("en",) and held_out.num_rows == 3 and held_out.cleaning == train.cleaning
    kept = {(one.name, one.split): (one.num_rows, one.license, one.source) for one in train.cleaning.sources}
    assert kept == {(use.name, use.split): (use.num_rows, *SOURCES[use.name]) for use in summary.data}
    assert sum(count for count, _, _ in kept.values()) == 90
    dropped = {one.name: (one.num_in, one.num_dropped) for one in train.cleaning.filters}
    assert dropped["empty"] == (92, 1) and dropped["exact duplicates"] == (91, 1)
    kept_summary = Summary(stage="pretrain", data=(train, held_out))
    assert Summary.from_json(json.loads(json.dumps(kept_summary.to_json())), "summary.json") == kept_summary


def test_one_file_of_it_is_traced_too(cleaned):
    _, run = cleaned
    path = next((run / "data").glob("train-*"))
    assert describe_data(path, "train", ["a"], "training").cleaning.run == str(run.resolve())


def test_altered_text_is_not_the_runs(cleaned, tmp_path, caplog):
    import shutil

    copy = shutil.copytree(cleaned[1], tmp_path / "copy")
    assert describe_data(copy / "data", "train", ["a"], "training").cleaning is not None
    (copy / "data/train-more.jsonl").write_text('{"text": "from elsewhere"}\n')
    with caplog.at_level(logging.WARNING):
        use = describe_data(copy / "data", "train", ["a"], "training")
    assert use.cleaning is None and use.license == "not stated"
    assert "train-more.jsonl is not as its run left it" in caplog.text
    (copy / "data/train-more.jsonl").unlink()
    path = next((copy / "data").glob("train-*"))
    path.write_bytes(path.read_bytes()[:-1])
    assert describe_data(copy / "data", "train", ["a"], "training").cleaning is None
