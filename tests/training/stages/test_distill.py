"""What the distill stage refuses, plans and writes; with a teacher that has learned nothing."""

import json

import pytest
import torch
from distill_runs import distill_settings, run
from transformers import LlamaConfig, LlamaForCausalLM

from deepseek_cli.main import main
from deepseek_records.loading import load_model
from deepseek_training.compress.outcome import distill_outcome
from deepseek_training.data.texts import load_texts
from deepseek_training.data.tokenizer import train_tokenizer
from deepseek_training.recipes.distill import DistillRecipe
from deepseek_training.recipes.loading import build_recipe
from deepseek_training.trainer.bits_per_byte import BitsPerByte
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM


@pytest.fixture(scope="module")
def teacher(tiny_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher")
    tokenizer = train_tokenizer(load_texts(str(tiny_data)), 300)
    torch.manual_seed(0)
    DeepseekForCausalLM(DeepseekConfig.from_preset("debug", vocab_size=len(tokenizer))).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def settings(tiny_settings, tiny_data, teacher):
    return {**distill_settings(tiny_settings, tiny_data, teacher), "max_steps": 2, "save_steps": 0, "eval_bytes": 1000}


@pytest.fixture(scope="module")
def cached(settings, tmp_path_factory):
    path = tmp_path_factory.mktemp("cached") / "run"
    return path, run(settings, path, cache=str(path.parent / "cache"))


def test_the_run_folder_says_what_was_done(cached, settings, teacher):
    path, summary = cached
    before, after = summary.results
    assert (before.when, after.when, after.baseline_name) == ("before", "after", "teacher")
    assert after.baseline == summary.details["teacher_bits_per_byte"]
    assert summary.base_model == settings["teacher"]
    student = load_model(path)
    assert summary.num_parameters == student.num_parameters() < load_model(teacher).num_parameters()
    assert (student.config.n_routed_experts, student.config.hidden_size) == (4, 16)
    assert [len(row) for row in summary.tokens_per_expert] == [4, 4]
    assert json.loads((path / "summary.json").read_text())["stage"] == "distill"
    assert json.loads((path / "inputs.json").read_text()).keys() >= {"teacher", "start", "tokenizer", "data"}
    cache = path.parent / "cache"
    kept = sum((cache / name).stat().st_size for name in ("ids.bin", "log_probs.bin"))
    assert kept == 8 * 31 * (16 * 2 + 17 * 2), "two steps of four blocks, and no more"


BAD = {
    "a student that is not a slice": (
        {"student": {"v_head_dim": 16}},
        "this student is not a slice of the teacher: v_head_dim: got 16, expected the teacher's 32",
    ),
    "a larger student": ({"start": "fresh", "student": {"hidden_size": 96}}, "expected at most the teacher's"),
    "an unknown setting": ({"student": {"hidden": 3}}, "hidden: no such setting of deepseek_moe"),
    "too few tokens": ({"calibration_tokens": 10}, "calibration_tokens: got 10, expected at least 43"),
    "too little data": ({"calibration_tokens": 10**6}, "calibration_tokens: got data of"),
    "no such teacher": ({"teacher": "no/such/folder"}, "no/such/folder"),
    "k above the vocabulary": ({"cache": "cache", "cache_top_k": 301}, "cache_top_k: got 301, expected at most"),
    "beta without effect": ({"beta": 0.5}, "beta: got 0.5, expected null with divergence=forward_kl"),
    "a cache without effect": ({"cache": "cache", "distill_weight": 0.0}, "expected null with distill_weight=0"),
    "settings of a model that is there": ({"start": "there"}, "expected empty with start=there"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change, message = BAD[name]
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        run(settings, tmp_path / "run", **change)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_of_another_teacher_is_refused_before_anything_is_written(cached, settings, teacher, tmp_path):
    other = load_model(teacher)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    for path in teacher.glob("tokenizer*"):
        (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="was made with another teacher"):
        run(settings, tmp_path / "run", cache=str(cached[0].parent / "cache"), teacher=str(tmp_path / "other"))
    assert not (tmp_path / "run").exists()


def test_a_student_of_another_tokenizer_is_refused(settings, tmp_path):
    tokenizer = train_tokenizer(load_texts("medicine")[:50], 300)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="with another tokenizer, expected the teacher's"):
        run(settings, tmp_path / "run", start=str(tmp_path / "llama"), student={}, bias_update_speed=None)


def test_the_command_plans_and_runs(settings, teacher, tmp_path, capsys):
    words = ["distill", "distill-debug", "--teacher", str(teacher), "--data", settings["data"], "--output"]
    small = ["--sequence-length", "32", "--max-steps", "2", "--save-steps", "0", "--logging-steps", "2"]
    small += ["--calibration-tokens", "256", "--cache", str(tmp_path / "cache"), "--report-to", "[]"]
    small += ["--batch-size", "4", "--eval-bytes", "1000", "--sample-prompts", "[]", "--student", "{hidden_size: 48}"]
    small += ["--bias-update-speed", "0"]
    assert main([*words, str(tmp_path / "run"), *small, "--warmup-steps", "0", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "cut out of the teacher" in told and "130 bytes a position of 600 in full" in told
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
    assert main([*words, str(tmp_path / "run"), *small, "--warmup-steps", "0", "--learning-rate", "1e-15"]) == 3
    told = capsys.readouterr()
    assert "bits per byte (teacher:" in told.out
    assert "done, but a target was missed: bits per byte on tales fall" in told.err


@pytest.mark.parametrize(
    ("values", "least", "gap", "passed"),
    [
        ((3.0, 2.5, 2.0), None, 0.5, (True,)),
        ((3.0, 2.5, 2.0), 0.4, 0.5, (True, True)),
        ((3.0, 2.5, 2.0), 0.6, 0.5, (True, False)),
        ((2.0, 2.2, 2.1), 0.6, None, (False, False)),  # began below its teacher, and ended above
        ((2.0, 1.9, 2.1), 0.6, None, (True, True)),
    ],
)
def test_the_targets_are_those_of_the_recipe(values, least, gap, passed, settings):
    before, after, teacher = (BitsPerByte(value, 0.01, 10, 10, 2) for value in values)
    recipe = build_recipe({**settings, "min_gap_closed": least}, DistillRecipe)
    found = distill_outcome(recipe, "tales", before=before, after=after, teacher=teacher)
    assert found["details"].get("gap_closed") == (None if gap is None else pytest.approx(gap))
    assert tuple(check.passed for check in found["checks"]) == passed
