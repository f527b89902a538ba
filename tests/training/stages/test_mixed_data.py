"""Stages on a list of sources: an interrupted run ends like a whole one, also from disk; epochs; bad tokenizers."""

import json

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from deepseek_records.run_folder import RunFolder
from deepseek_training.data import mapped_texts
from deepseek_training.data.texts import load_texts
from deepseek_training.recipes.loading import build_recipe
from deepseek_training.stages.adapt import AdaptRecipe, adapt
from deepseek_training.stages.pretrain import PretrainRecipe, pretrain
from deepseek_training.trainer import stage_trainer


@pytest.fixture
def sources(tmp_path):
    """Three sources as JSON Lines; the second holds nothing out, the third has its own held-out text."""
    medicine = load_texts("medicine", "all")
    for name, texts in (("one", medicine[:30]), ("two", medicine[30:50]), ("three", medicine[50:60])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    (tmp_path / "held.txt").write_text("\n\n".join(medicine[60:64]))
    paths = {name: str(tmp_path / f"{name}.jsonl") for name in ("one", "two", "three")}
    return [
        {"path": paths["one"], "weight": 2, "languages": ["en"], "license": "MIT"},
        {"path": paths["two"], "weight": 1, "validation_share": 0.0},
        {"path": paths["three"], "weight": 1, "validation": str(tmp_path / "held.txt")},
    ]


@pytest.fixture
def settings(tiny_settings, sources):
    return {**tiny_settings, "data": [{**one, "column": "body"} for one in sources], "max_steps": 8, "eval_steps": 0}


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def run_twice(recipe, folder, monkeypatch):
    """Interrupt a run in its fifth step, go on, and return it."""
    with monkeypatch.context() as patch:
        original = stage_trainer.StageTrainer.__init__

        def with_stop(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.add_callback(Stop())

        patch.setattr(stage_trainer.StageTrainer, "__init__", with_stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe, folder)
    return pretrain(recipe, folder)


def weights(folder):
    return load_file(folder / "model/model.safetensors")


def test_a_mixture_trains_measures_each_source_and_resumes(settings, tmp_path, monkeypatch):
    recipe = build_recipe(settings, PretrainRecipe)
    whole = pretrain(recipe, tmp_path / "whole")
    assert {row.dataset for row in whole.results} == {"one", "three"}
    assert all(1 < row.baseline < 8 for row in whole.results)
    uses = {(use.name, use.used_for): use for use in whole.data}
    assert uses["one.jsonl", "training"].languages == ("en",) and uses["one.jsonl", "training"].license == "MIT"
    assert ("held.txt", "evaluation") in uses and ("two.jsonl", "evaluation") not in uses
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(mapped_texts, "LEAST_MAPPED_BYTES", 1)
    again = run_twice(recipe, tmp_path / "stopped", monkeypatch)  # and from disk, as large sources are
    assert [row.value for row in again.results] == [row.value for row in whole.results]
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_epochs_make_the_steps(settings, tmp_path):
    data = [{"path": one["path"], "column": "body"} for one in settings["data"]]
    recipe = {**settings, "data": data, "max_steps": 0, "epochs": 0.05, "packing": "separate", "warmup_steps": 0}
    summary = pretrain(build_recipe(recipe, PretrainRecipe), tmp_path / "run")
    steps = max(row["step"] for row in RunFolder(tmp_path / "run").metrics)
    assert summary.num_training_tokens == steps * 4 * 32
    with pytest.raises(ValueError, match=r"epochs: got 0\.05, expected null with max_steps=3"):
        build_recipe({**recipe, "max_steps": 3}, PretrainRecipe)
    with pytest.raises(ValueError, match="max_steps: got 0, expected at least 1, or epochs"):
        build_recipe({**recipe, "epochs": None}, PretrainRecipe)


@pytest.mark.slow
def test_adapt_on_lists_checks_each_source(settings, policy_path, tmp_path):
    own = {"model": str(policy_path), "data": settings["data"][:1], "general_data": [{"path": "books", "weight": 1}]}
    small = {"max_steps": 2, "logging_steps": 1, "report_to": [], "batch_size": 2, "learning_rate": 1e-2}
    text = {"sequence_length": 32, "eval_bytes": 2000, "packing": "separate"}
    recipe = build_recipe({**own, **small, **text}, AdaptRecipe)
    summary = adapt(recipe, tmp_path / "run")
    assert [check.dataset for check in summary.checks] == ["one", "books"]
    assert {(row.dataset, row.when) for row in summary.results} == {
        (name, when) for name in ("one", "books") for when in ("before", "after")
    }


def test_a_tokenizer_without_end_token_is_refused(policy_path, settings, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    recipe = build_recipe({**settings, "tokenizer": str(tmp_path / "tokenizer")}, PretrainRecipe)
    with pytest.raises(ValueError, match="tokenizer: got one without end token, expected one") as error:
        pretrain(recipe, tmp_path / "run")
    assert "\n" not in str(error.value)
