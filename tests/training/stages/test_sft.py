"""The fine-tuning stage: what it teaches, the template it saves, its measure against a plain one, and resuming."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepseek_records.run_folder import RunFolder
from deepseek_training.data.conversations import load_conversations, question_of
from deepseek_training.data.texts import load_texts
from deepseek_training.data.tokenizer import train_tokenizer
from deepseek_training.recipes.loading import load_recipe
from deepseek_training.recipes.sft import SftRecipe
from deepseek_training.stages.sft import sft
from deepseek_training.trainer.answers import HeldOutAnswers
from deepseek_training.trainer.run_callbacks import ProgressBar
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<q> ' if m['role'] == 'user' else '<a> ' }}{{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endfor %}{{ '<a> ' if add_generation_prompt }}"
)


@pytest.fixture(scope="module")
def base_path(tmp_path_factory):
    """A debug-size model of ours with random weights, and its tokenizer."""
    path = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(load_texts("dialogues", "validation"), 400)
    torch.manual_seed(0)
    config = DeepseekConfig.from_preset("debug", vocab_size=len(tokenizer), router_bias_update_speed=0.01)
    DeepseekForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """Forty short conversations of the user's own, in other columns than the embedded ones."""
    path = tmp_path_factory.mktemp("data") / "mine.jsonl"
    rows = [{"asked": f"What is {i} and {i}?", "said": f"It is {2 * i}.", "split": "train"} for i in range(32)]
    rows += [
        {"asked": f"What is {i} and {i}?", "said": f"It is {2 * i}.", "split": "validation"} for i in range(32, 40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make_recipe(base_path, conversations):
    def make(**settings):
        own = {"model": str(base_path), "data": str(conversations), "prompt_column": "asked", "answer_column": "said"}
        small = {"sources": [], "sequence_length": 64, "max_steps": 6, "logging_steps": 3, "save_steps": 3}
        return load_recipe("sft-debug", SftRecipe, {**own, **small, "report_to": [], "sample_tokens": 4, **settings})

    return make


def test_teaches_balances_and_saves_the_template(make_recipe, tmp_path):
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    recipe = make_recipe(chat_template=str(tmp_path / "mine.jinja"), learning_rate=1e-2, bias_update_speed=0.02)
    summary = sft(recipe, tmp_path / "run")
    before, after = summary.results
    assert (before.when, after.when) == ("before", "after")
    assert after.value < 0.8 * before.value
    assert summary.checks[0].passed
    run = RunFolder(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(run.model_path)
    assert tokenizer.chat_template == TEMPLATE
    text = tokenizer.apply_chat_template(question_of({"prompt": "a", "answer": "b"}), tokenize=False)
    assert text == "<|begin|><q> a\n"
    model = AutoModelForCausalLM.from_pretrained(run.model_path)
    biases = [
        module.e_score_correction_bias for module in model.modules() if hasattr(module, "e_score_correction_bias")
    ]
    assert biases and all(bias.abs().max() >= 0.02 for bias in biases)  # the balancing callback was at work
    rows = [row for row in run.metrics if "loss" in row]
    assert [row["step"] for row in rows] == [3, 6]
    assert all(row["load_imbalance"] >= 1 and sum(map(sum, row["tokens_per_expert"])) > 0 for row in rows)
    assert len(summary.samples) == 4


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bits(make_recipe, tmp_path, monkeypatch):
    whole = sft(make_recipe(), tmp_path / "whole")

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ProgressBar, "on_step_end", interrupt)
        sft(make_recipe(), tmp_path / "cut")
    assert not RunFolder(tmp_path / "cut").is_finished
    resumed = sft(make_recipe(), tmp_path / "cut")
    assert resumed.results == whole.results
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / n / "model").state_dict() for n in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_loss_is_of_the_answers_only(make_recipe, base_path):
    recipe = make_recipe()
    tokenizer, model = AutoTokenizer.from_pretrained(base_path), AutoModelForCausalLM.from_pretrained(base_path)
    rows = load_conversations(recipe, "validation")
    measured = HeldOutAnswers("mine", rows, tokenizer).measure(model, recipe)
    nats = num_bytes = num_tokens = 0
    for row in rows:  # one by one, without padding
        asked = tokenizer(f"<|begin|>User: {row['prompt']}\n\nAssistant:", add_special_tokens=False)["input_ids"]
        answer = tokenizer(f" {row['answer']}<|end|>", add_special_tokens=False)["input_ids"]
        logps = model(torch.tensor([asked + answer])).logits[0, len(asked) - 1 : -1].log_softmax(-1)
        nats -= logps[range(len(answer)), answer].sum().item()
        num_bytes += len(f" {row['answer']}")
        num_tokens += len(answer)
    assert measured.num_tokens == num_tokens
    assert measured.value == pytest.approx(nats / torch.log(torch.tensor(2.0)).item() / num_bytes, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": ["nowhere"]}, "has no train row from them"),
        ({"answer_column": "reply"}, "answer_column='reply'"),
        ({"prompt_column": "question"}, "no column 'question'"),
        ({"sequence_length": 8}, "leaves no room for an answer"),
        ({"chat_template": "gone.jinja"}, r"no file gone\.jinja"),
        ({"max_steps": 0}, "max_steps: got 0, expected at least 1"),
        ({"num_eval_conversations": 1}, "num_eval_conversations: got 1"),
    ],
)
def test_bad_settings_are_one_line(make_recipe, change, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        sft(make_recipe(**change), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_a_template_is_refused(make_recipe, base_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base_path)
    AutoModelForCausalLM.from_pretrained(base_path).save_pretrained(tmp_path / "bare")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="chat_template=null"):
        sft(make_recipe(model=str(tmp_path / "bare")), tmp_path / "run")


def test_the_shipped_recipes_load():
    for name in ("sft-debug", "sft-demo"):
        assert load_recipe(name, SftRecipe).sources == ["medquad"]
