"""A run that was interrupted goes on with the same data and model or not at all, whatever their paths are called."""

import json

import pytest
import torch

from deepseek_records.exit_codes import SameInAllProcessesError
from deepseek_records.run_folder import RunFolder
from deepseek_training.recipes.loading import build_recipe, load_recipe
from deepseek_training.recipes.sft import SftRecipe
from deepseek_training.stages.pretrain import PretrainRecipe, pretrain
from deepseek_training.stages.sft import sft
from deepseek_training.trainer import inputs_held
from deepseek_training.trainer.run_callbacks import ProgressBar
from modeling_deepseek import DeepseekForCausalLM


def write(path, word, split="train", count=8):
    rows = [
        {"text": f"{word} {number}. " * 30, "prompt": f"{word}?", "answer": f"{number}", "split": part}
        for part in ("train", "validation")
        for number in range(count if part == split else 8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def interrupted(monkeypatch):
    """Runs a stage to its second step, as Ctrl-C ends it."""

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt

    def run(stage, *args):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ProgressBar, "on_step_end", stop)
            stage(*args)

    return run


SMALL = {"max_steps": 3, "logging_steps": 1, "save_steps": 1, "report_to": [], "batch_size": 2, "learning_rate": 1e-3}


@pytest.mark.slow
def test_other_data_under_the_same_path_is_refused(interrupted, tmp_path):
    data = tmp_path / "texts.jsonl"
    settings = {**SMALL, "data": str(data), "preset": "debug", "vocab_size": 270, "sequence_length": 32}
    recipe = build_recipe({**settings, "check_bigram": False}, PretrainRecipe)
    write(data, "monday")
    interrupted(pretrain, recipe, tmp_path / "run")
    for word, split, name in (("tuesday", "train", "data"), ("monday", "validation", "held out")):
        write(data, word, split, 8 if name == "data" else 5)
        with pytest.raises(FileExistsError, match=f"begun with another content of {name}") as caught:
            pretrain(recipe, tmp_path / "run")
        assert "\n" not in str(caught.value)
    write(data, "monday")
    assert pretrain(recipe, tmp_path / "run").stage == "pretrain"
    assert RunFolder(tmp_path / "run").inputs.keys() == {"rows_per_step", "data", "held_out"}


def test_another_model_under_the_same_path_is_refused(interrupted, policy_path, tmp_path):
    data, base = tmp_path / "asked.jsonl", tmp_path / "base"
    write(data, "when")
    model = DeepseekForCausalLM.from_pretrained(policy_path)
    for path in policy_path.glob("tokenizer*"):
        base.mkdir(exist_ok=True)
        (base / path.name).write_bytes(path.read_bytes())
    (base / "chat_template.jinja").write_bytes((policy_path / "chat_template.jinja").read_bytes())
    model.save_pretrained(base)
    own = {**SMALL, "model": str(base), "data": str(data), "sources": [], "sequence_length": 32, "sample_tokens": 2}
    recipe = load_recipe("sft-debug", SftRecipe, {**own, "warmup_steps": 0})
    interrupted(sft, recipe, tmp_path / "run")
    with torch.no_grad():
        model.lm_head.weight[3] += 1
    model.save_pretrained(base)
    with pytest.raises(FileExistsError, match="begun with another content of model"):
        sft(recipe, tmp_path / "run")


def test_processes_with_other_files_or_versions_are_refused_in_all(monkeypatch):
    own = {}

    def with_another(rows):
        own.update(rows[0])
        return [*rows, {**rows[0], "data": "f" * 64}]

    monkeypatch.setattr(inputs_held, "gather_object", with_another)
    with pytest.raises(SameInAllProcessesError, match=r"^data: got f{12} in process 1, expected a{12} as"):
        inputs_held._check_agreement({"data": "a" * 64})
    assert {"torch", "transformers", "accelerate", "python", "data"} == own.keys()
