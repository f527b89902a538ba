"""The report of the long tail where it can't be made: refused in one line, before a step is taken."""

import json
from types import SimpleNamespace

import pytest

from deepseek_records.run_folder import RunFolder
from deepseek_training.knowledge.frequency_loss import TailText, measure_tail
from deepseek_training.recipes.loading import build_recipe
from deepseek_training.stages.adapt import AdaptRecipe, adapt
from deepseek_training.trainer.tail_report import TailReport


@pytest.fixture
def settings(policy_path, tiny_settings, tiny_data):
    kept = ("sequence_length", "batch_size", "eval_bytes", "report_to")
    return {
        **{key: tiny_settings[key] for key in kept},
        **{"model": str(policy_path), "general_data": str(tiny_data), "max_steps": 1, "learning_rate": 1e-3},
        **{"long_tail": True},
    }


def test_a_domain_without_words_is_refused_before_training(settings, tmp_path):
    path = tmp_path / "doses.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} mg, {i + 1} ml."}) + "\n" for i in range(20)), encoding="utf-8")
    data = [{"path": str(path), "validation_share": 0.3}]
    with pytest.raises(ValueError, match=r"^long_tail: got true, expected false; the held-out text has no topic, and"):
        adapt(build_recipe({**settings, "data": data}, AdaptRecipe), tmp_path / "run")
    assert [row["step"] for row in RunFolder(tmp_path / "run").metrics] == [0]


def test_a_model_in_parts_is_refused(settings, tmp_path):
    with pytest.raises(ValueError, match=r"^long_tail: got True, expected false with expert_parallel_size=2"):
        build_recipe({**settings, "data": "medicine", "expert_parallel_size": 2}, AdaptRecipe)
    recipe = build_recipe({**settings, "data": "medicine"}, AdaptRecipe)
    with pytest.raises(ValueError, match=r"^long_tail: got true with a model sharded over processes, expected false"):
        TailReport.begin(recipe, SimpleNamespace(is_sharded=True), None, [], [])


def test_a_tokenizer_without_places_is_refused():
    tail = TailText.prepare(["Uric acid, in crystals."], ["Crystals of gout."])
    with pytest.raises(ValueError, match=r"^long_tail: got SimpleNamespace, expected a tokenizer that tells tokens'"):
        measure_tail(None, SimpleNamespace(is_fast=False), tail, sequence_length=8)
