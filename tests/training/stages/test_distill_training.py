"""A student nears its teacher, live or from its cache; exact under accumulation, and exact when taken up again."""

import json

import pytest
from distill_runs import distill_settings, largest_difference, losses, run, trace
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from deepseek_records.hashes import hash_model
from deepseek_records.loading import load_model
from deepseek_training.compress.distill_loss import distill_loss, shorten
from deepseek_training.recipes.loading import build_recipe
from deepseek_training.stages import distill as stage
from deepseek_training.stages.pretrain import PretrainRecipe, pretrain
from deepseek_training.trainer import distill_trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def teacher(tiny_settings, tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "run"
    settings = {**tiny_settings, "max_steps": 60, "save_steps": 0, "eval_steps": 0, "sample_prompts": []}
    pretrain(build_recipe({**settings, "model": {"router_bias_update_speed": 0.01}}, PretrainRecipe), path)
    return path / "model"


@pytest.fixture(scope="module")
def settings(tiny_settings, tiny_data, teacher):
    return distill_settings(tiny_settings, tiny_data, teacher)


@pytest.fixture(scope="module")
def cached(settings, tmp_path_factory):
    path = tmp_path_factory.mktemp("cached") / "run"
    return path, run(settings, path, cache=str(path.parent / "cache"))


def test_a_student_from_the_cache_nears_its_teacher(cached):
    path, summary = cached
    before, after = summary.results
    assert (before.when, after.when, after.baseline_name) == ("before", "after", "teacher")
    assert after.baseline == summary.details["teacher_bits_per_byte"] < after.value < before.value
    expected = (before.value - after.value) / (before.value - after.baseline)
    assert summary.details["gap_closed"] == pytest.approx(expected) and summary.checks[0].passed
    student = AutoModelForCausalLM.from_pretrained(path / "model")
    moved = [t for name, t in student.state_dict().items() if name.endswith("e_score_correction_bias")]
    assert any(bool(bias.abs().max() > 0) for bias in moved), "balancing is on"


def test_a_whole_bucket_trains_as_the_live_teacher_does(settings, tmp_path):
    """With every token in the cache only fp16 is between the two; the loss agrees to 1e-3."""
    live = run(settings, tmp_path / "live")
    cached = run(settings, tmp_path / "cached", cache=str(tmp_path / "cache"), cache_top_k=300)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "live"), rel=1e-3)
    assert cached.results[1].value == pytest.approx(live.results[1].value, abs=2e-3)


def test_a_short_bucket_trains_as_a_live_teacher_that_is_shortened(cached, settings, tmp_path, monkeypatch):
    def shortened(logits, teacher, *args, **kwargs):
        return distill_loss(logits, shorten(teacher[:, :-1], 16, 1.0), *args, **kwargs)

    monkeypatch.setattr(distill_trainer, "distill_loss", shortened)
    run(settings, tmp_path / "live")
    assert losses(cached[0]) == pytest.approx(losses(tmp_path / "live"), abs=1e-3)


def test_another_seed_and_batch_size_read_the_same_cache(cached, settings, tmp_path):
    cache = cached[0].parent / "cache"
    before = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    change = {"batch_size": 2, "gradient_accumulation_steps": 2, "seed": 1}
    run(settings, tmp_path / "run", cache=str(cache), **change)
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == before


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_accumulation_trains_as_one_large_batch(divergence, settings, tmp_path):
    change = {"max_steps": 4, "save_steps": 0, "divergence": divergence, "temperature": 2.0}
    run(settings, tmp_path / "one", **change)
    run(settings, tmp_path / "four", batch_size=1, gradient_accumulation_steps=4, **change)
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert largest_difference(tmp_path / "one", tmp_path / "four") < 1e-4


def test_a_run_that_was_stopped_ends_with_the_same_bits(cached, settings, tmp_path, monkeypatch):
    change = {"cache": str(cached[0].parent / "cache")}
    calls = [0]
    original = distill_trainer.DistillTrainer.compute_loss

    def stopping(self, *args, **kwargs):
        calls[0] += 1
        if calls[0] == 7:
            raise RuntimeError("killed")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(distill_trainer.DistillTrainer, "compute_loss", stopping)
    with pytest.raises(RuntimeError, match="killed"):
        run(settings, tmp_path / "run", **change)
    monkeypatch.undo()
    run(settings, tmp_path / "run", **change)
    assert largest_difference(cached[0], tmp_path / "run") == 0.0
    assert trace(tmp_path / "run") == trace(cached[0])


def test_the_teacher_is_not_touched(settings, teacher, tmp_path):
    before = hash_model(load_model(teacher))
    files = {path.name: path.stat().st_mtime_ns for path in teacher.iterdir()}
    kept = []
    original = distill_trainer.DistillTrainer.__init__

    class Watching(distill_trainer.DistillTrainer):
        def __init__(self, *args, **kwargs):
            kept.append(kwargs["teacher"])
            original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "DistillTrainer", Watching)
        run(settings, tmp_path / "run", max_steps=4)
    assert hash_model(kept[0]) == before == hash_model(load_model(teacher))
    assert all(parameter.grad is None for parameter in kept[0].parameters())
    assert {path.name: path.stat().st_mtime_ns for path in teacher.iterdir()} == files


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_weight_chooses_between_text_and_teacher(weight, settings, tmp_path, monkeypatch):
    """At 0 no teacher is asked, at 1 the labels do not matter."""
    seen = []

    def spying(logits, teacher, labels, **kwargs):
        seen.append(teacher)
        return distill_loss(logits, teacher, labels if weight == 0 else labels.flip(0), **kwargs)

    run(settings, tmp_path / "plain", max_steps=4, save_steps=0, distill_weight=weight)
    monkeypatch.setattr(distill_trainer, "distill_loss", spying)
    run(settings, tmp_path / "spied", max_steps=4, save_steps=0, distill_weight=weight)
    assert all((teacher.numel() == 0) == (weight == 0) for teacher in seen)
    assert largest_difference(tmp_path / "plain", tmp_path / "spied") == 0.0


def test_a_dense_student_and_a_fresh_one_learn_too(settings, teacher, tmp_path):
    tokenizer_files = [path for path in teacher.iterdir() if path.name.startswith(("tokenizer", "special"))]
    vocab_size = load_model(teacher).config.vocab_size
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes)).save_pretrained(tmp_path / "llama")
    for path in tokenizer_files:
        (tmp_path / "llama" / path.name).write_bytes(path.read_bytes())
    change = {"save_steps": 0, "bias_update_speed": None, "student": {}, "learning_rate": 3e-3}
    dense = run(settings, tmp_path / "dense", start=str(tmp_path / "llama"), **change)
    assert dense.base_model == str(tmp_path / "llama") and dense.results[1].value < dense.results[0].value
    change = {"save_steps": 0, "bias_update_speed": None, "student": {"num_hidden_layers": 2, "hidden_size": 48}}
    fresh = run(settings, tmp_path / "fresh", start="fresh", learning_rate=3e-3, **change)
    assert fresh.results[1].value < fresh.results[0].value
    saved = json.loads((tmp_path / "fresh" / "model" / "config.json").read_text())
    assert (saved["hidden_size"], saved["num_hidden_layers"]) == (48, 2)
