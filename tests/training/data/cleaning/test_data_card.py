"""The data card and the Croissant metadata: valid, and every count equal to a recount."""

import gzip
import hashlib
import json
import re
import shutil

import pyarrow
import pyarrow.parquet
import pytest
import yaml

pytest.importorskip("ftfy", reason="pip install 'deepseek-moe[data]'")

import mlcroissant

from deepseek_training.data.cleaning.data_card import count_terms
from deepseek_training.data.texts import load_texts
from deepseek_training.recipes.data import DataRecipe
from deepseek_training.stages.clean_data import clean_data

TEXTS = [text[:700] for text in load_texts("medicine", "all")[:60]]


@pytest.fixture(scope="module", params=["jsonl.gz", "parquet"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    rows = [*({"text": text} for text in TEXTS), {"text": TEXTS[0]}, {"text": "Mail me: a.b@example.org | now"}]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(folder / "texts.jsonl"), "license": "CC BY 4.0", "url": "https://example.org/texts"}
    recipe = DataRecipe(
        sources=[source], filters=["repair", "personal_data", "duplicates"], format=request.param, shard_megabytes=0.02
    )
    return clean_data(recipe, folder / "run", {}), folder / "run"


def test_croissant_is_valid_and_reads_every_row_back(run):
    _, folder = run
    data = mlcroissant.Dataset(jsonld=str(folder / "croissant.json"))
    assert not data.metadata.ctx.issues.errors
    texts = [
        row[f"{name.removeprefix('rows/')}/text"].decode()
        for name in [one.id for one in data.metadata.record_sets]
        for row in data.records(name)
    ]
    assert sorted(texts) == sorted(load_texts(folder / "data", "all")) and len(texts) == 61
    assert len(data.metadata.record_sets) > 2  # several shards


def test_checksums_and_sizes_are_those_of_the_files(run):
    _, folder = run
    value = json.loads((folder / "croissant.json").read_text())
    assert len(value["distribution"]) == len(list((folder / "data").iterdir()))
    for one in value["distribution"]:
        content = (folder / one["contentUrl"]).read_bytes()
        assert one["sha256"] == hashlib.sha256(content).hexdigest()
        assert one["contentSize"] == f"{len(content)} B"


def test_croissant_refuses_an_altered_file(run, tmp_path):
    _, folder = run
    copy = shutil.copytree(folder, tmp_path / "run")
    name = next(one for one in sorted(path.name for path in (copy / "data").iterdir()) if one.startswith("train"))
    rows = read_rows_of(copy / "data" / name)
    rows[0]["text"] = rows[0]["text"].replace("e", "a", 1)
    write_rows_to(copy / "data" / name, rows)
    data = mlcroissant.Dataset(jsonld=str(copy / "croissant.json"))
    (rows_name,) = [one.id for one in data.metadata.record_sets if one.id.endswith(name)]
    with pytest.raises(Exception, match=re.escape(f"Download(data/{name})")) as error:
        list(data.records(rows_name))
    assert "is not identical with the reference" in str(error.value.__cause__)
    untouched = mlcroissant.Dataset(jsonld=str(folder / "croissant.json"))
    assert len(list(untouched.records(rows_name))) == len(rows)


def read_rows_of(path):
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in gzip.open(path, "rt")]


def write_rows_to(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def test_the_card_tells_sources_counts_and_people(run):
    summary, folder = run
    card = (folder / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["language"] == ["en"]
    assert {one["split"] for one in metadata["configs"][0]["data_files"]} == {"train", "validation"}
    assert "| texts | train | CC BY 4.0 | https://example.org/texts |" in card
    assert "| exact duplicates | 62 | 1 | 61 |" in card and "a.b@example.org" not in card
    texts = load_texts(folder / "data", "all")
    women = sum(bool(re.search(r"\b(woman|women|girls?|she|her|female)\b", text.lower())) for text in texts)
    assert f"| women | {women} |" in card and summary.details["people"]["women"] == women > 1


def test_a_group_counts_once_per_document():
    assert count_terms("She told her; he, and the women, his") == {"women": 1, "men": 1}
    assert count_terms("\u5973\u513f\u548c\u7537\u53cb") == {"\u5973": 1, "\u7537": 1}
