"""A thousand documents with known faults: what each filter finds, and what it hits beside."""

import json

import pytest

pytest.importorskip("ftfy", reason="pip install 'deepseek-moe[data]'")

import planted_dirt

from deepseek_cli.data import collect_benchmarks
from deepseek_training.recipes.data import DataRecipe
from deepseek_training.stages.clean_data import clean_data

# What may be missed: limits that are fitted to the dirty documents too leave one in twenty; a line of the text itself
# may be common.
LEAST_RECALL = {"words shuffled": 0.9, "a line repeated": 0.95, "boilerplate": 0.95}
# Medical pages hold real phone numbers beside the planted ones.
LEAST_PRECISION = {"personal data": 0.9, "mojibake": 0.9}


@pytest.mark.slow
def test_each_filter_finds_its_fault_and_leaves_clean_text(tmp_path):
    rows = planted_dirt.plant()
    path = tmp_path / "planted.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert len(rows) == 1000 and all(row["text"].strip() for row in rows)
    recipe = DataRecipe(sources=[{"path": str(path)}], languages=["en", "zh"], num_samples=1000)
    clean_data(recipe, tmp_path / "run", collect_benchmarks(recipe))
    found = planted_dirt.score(rows, tmp_path / "run")
    assert found.pop("clean")["lost"] <= 0.01
    assert set(found) == set(planted_dirt.KINDS)
    for kind, figures in found.items():
        assert figures["recall"] >= LEAST_RECALL.get(kind, 0.99), kind
        assert figures["precision"] >= LEAST_PRECISION.get(kind, 0.98), kind
