"""The align stage: the run folder it leaves, taking up an interrupted run, and its one-line errors."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from deepseek_records.run_folder import RunFolder
from deepseek_training.data.prompts import encode_prompt, load_prompts
from deepseek_training.ppo.trainer import CorrectedPPOTrainer
from deepseek_training.recipes.align import AlignRecipe
from deepseek_training.recipes.loading import build_recipe, load_recipe
from deepseek_training.stages.align import align


def make_recipe(policy_path, **settings):
    return load_recipe("align-debug", AlignRecipe, {"model": str(policy_path), **settings})


def test_leaves_a_whole_run_folder(policy_path, tmp_path):
    summary = align(make_recipe(policy_path), tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert run.summary == summary
    rows = [row for row in run.metrics if "reward" in row]
    assert [row["step"] for row in rows] == [1, 2]
    parts = ("reward_relevance", "reward_safety", "reward_diversity", "kl", "entropy", "grad_norm", "learning_rate")
    assert all(name in row for row in rows for name in parts)
    by_key = {(row.metric, row.when): row.value for row in summary.results}
    assert by_key["kl", "before"] == pytest.approx(0.0, abs=1e-4)
    gain = by_key["reward", "after"] - by_key["reward", "before"]
    assert summary.gain.value == pytest.approx(gain)
    assert {row.when for row in summary.samples} == {"before", "after"}
    AutoTokenizer.from_pretrained(run.model_path)
    reference = AutoModelForCausalLM.from_pretrained(run.path / "reference").state_dict()
    start = AutoModelForCausalLM.from_pretrained(policy_path).state_dict()
    policy = AutoModelForCausalLM.from_pretrained(run.model_path).state_dict()
    value = AutoModelForSequenceClassification.from_pretrained(run.path / "value_model")
    assert all(torch.equal(reference[name], start[name]) for name in start)
    assert any(not torch.equal(policy[name], start[name]) for name in start)
    assert value.score.weight.shape[0] == 1 and value.score.weight.abs().sum() > 0


def test_samples_over_time_leave_the_training_as_it_is(policy_path, tmp_path):
    runs = {}
    for every in (0, 1):
        summary = align(make_recipe(policy_path, sample_steps=every), tmp_path / str(every))
        runs[every] = load_file(tmp_path / str(every) / "model/model.safetensors")
        between = [one for one in summary.samples if one.step is not None]
        assert {one.step for one in between} == ({1} if every else set())
    shown = {one.prompt for one in summary.samples if one.when == "after"}
    assert {one.prompt for one in between} == shown
    assert all(torch.equal(value, runs[0][name]) for name, value in runs[1].items())


def test_lora_leaves_models_that_load_by_themselves(policy_path, tmp_path):
    align(make_recipe(policy_path, lora_rank=2, learning_rate=0.05), tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    start = AutoModelForCausalLM.from_pretrained(policy_path)
    reference = AutoModelForCausalLM.from_pretrained(run.path / "reference").state_dict()
    assert all(torch.equal(reference[name], weight) for name, weight in start.state_dict().items())
    policy = AutoModelForCausalLM.from_pretrained(run.model_path).eval()
    adapted = PeftModel.from_pretrained(start, run.path / "adapter").eval()
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        # Merged weights are rounded once more than the adapter's sum; fp32, and the adapter itself moves 1e-4.
        torch.testing.assert_close(policy(ids).logits, adapted(ids).logits, rtol=1e-5, atol=3e-5)
        assert (policy(ids).logits - adapted.get_base_model()(ids).logits).abs().max() < 1e-4
        with adapted.disable_adapter():
            assert (policy(ids).logits - adapted(ids).logits).abs().max() > 1e-4
    value = AutoModelForSequenceClassification.from_pretrained(run.path / "value_model")
    assert value.score.weight.abs().sum() > 0
    assert not torch.equal(
        value.model.layers[0].self_attn.o_proj.weight, start.model.layers[0].self_attn.o_proj.weight
    )


@pytest.mark.slow
def test_an_interrupted_run_ends_like_a_whole_one(policy_path, tmp_path, monkeypatch):
    recipe = make_recipe(policy_path, num_updates=12)
    whole = align(recipe, tmp_path / "whole")
    step = CorrectedPPOTrainer._train_step

    def stop(self, update):
        if update == 12:
            raise KeyboardInterrupt
        step(self, update)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CorrectedPPOTrainer, "_train_step", stop)
        align(recipe, tmp_path / "cut")
    resumed = align(recipe, tmp_path / "cut")
    assert resumed.results == whole.results and resumed.samples == whole.samples
    clocked = ("eps", "time/", "tokens_per_second")
    rows = [
        [{k: v for k, v in row.items() if not any(part in k for part in clocked)} for row in RunFolder(path).metrics]
        for path in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert rows[0] == rows[1]
    for name in ("model", "value_model", "reference"):
        left, right = (load_file(tmp_path / run / name / "model.safetensors") for run in ("whole", "cut"))
        assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_updates": 0}, "num_updates: got 0"),
        ({"response_length": 0}, "response_length: got 0, expected 1 or more"),
        ({"kl_coef": -0.1}, "kl_coef: got -0.1, expected 0 or more"),
        ({"learning_rate": float("nan")}, "learning_rate: got nan"),
        ({"lam": 2.0}, "lam: got 2.0, expected 0 to 1"),
        ({"lora_rank": -1}, "lora_rank: got -1"),
        ({"lora_rank": 2, "value_model": "x"}, "value_model=x: with lora_rank=2"),
        ({"weights": [0.7, -0.2, 0.1]}, "expected finite numbers of at least 0"),
        ({"weights": [0.0, 0.0, 0.0]}, "with a sum above 0"),
        ({"num_mini_batches": 3}, "expected a divisor of batch_size=8"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"prompt_template": "Question:"}, "that holds {prompt}"),
        ({"max_prompt_tokens": 3}, "longer than max_prompt_tokens=3"),
        ({"response_length": 4000}, "longer than the model's context"),
        ({"prompt_sources": ["nowhere"]}, "no train row from them"),
        ({"batch_size": 4096, "num_mini_batches": 1}, "batch_size=4096: dialogues has only"),
    ],
)
def test_bad_settings_are_one_line(change, message, policy_path, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        align(make_recipe(policy_path, **change), tmp_path / "run")
    assert "\n" not in str(caught.value)
    left = {path.name for path in (tmp_path / "run").glob("*")}
    assert left <= {"recipe.yaml", "environment.json"}  # no more, or the next try would be refused


def test_a_missing_model_is_one_line_and_leaves_nothing(policy_path, tmp_path):
    for name in ("value_model", "model"):
        with pytest.raises(FileNotFoundError, match=f"^{name}: .*nowhere") as caught:
            align(make_recipe(policy_path, **{name: str(tmp_path / "nowhere")}), tmp_path / "run")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()


def test_the_shipped_recipes_load():
    for name in ("align-demo", "align-debug"):
        assert load_recipe(name, AlignRecipe).weights == [0.7, 0.2, 0.1]
    with pytest.raises(ValueError, match="did you mean kl_coef"):
        build_recipe({"model": "x", "kl_coeff": 0.1}, AlignRecipe)


def test_prompts_come_from_the_users_file(policy_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {i}", "topic": "x"}) + "\n" for i in range(60)))
    recipe = make_recipe(policy_path, prompts=str(path))
    splits = {split: list(load_prompts(recipe, tokenizer, split)["prompt"]) for split in ("train", "validation")}
    assert sorted(splits["train"] + splits["validation"]) == sorted(f"Question {i}" for i in range(60))
    path.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        load_prompts(recipe, tokenizer, "train")


def test_prompts_follow_the_template(policy_path):
    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    assert tokenizer.decode(encode_prompt("Why?", tokenizer, "Q: {prompt}\nA:")) == "<|begin|>Q: Why?\nA:"
    chat = tokenizer.decode(encode_prompt("Why?", tokenizer, None))
    assert chat.endswith("User: Why?\n\nAssistant:") and chat.startswith("<|begin|>")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt("Why?", tokenizer, None)
