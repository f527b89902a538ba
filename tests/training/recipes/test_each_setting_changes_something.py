"""Every setting of every stage: a run with another value ends otherwise, or refuses the value in one line.

What is compared: the plan that is printed, the log, the summary, the names of files and the weights. Marked slow, for
each setting is a run of its own, of a few steps; the default tests look that none is left out.
"""

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from deepseek_cli.main import main
from deepseek_records.run_folder import RunFolder
from deepseek_training.recipes.align import AlignRecipe
from deepseek_training.recipes.dpo import DpoRecipe
from deepseek_training.recipes.grpo import GrpoRecipe
from deepseek_training.recipes.loading import offered
from deepseek_training.recipes.multimodal import MultimodalRecipe
from deepseek_training.recipes.pretrain_and_adapt import AdaptRecipe, PretrainRecipe
from deepseek_training.recipes.sft import SftRecipe

RECIPES = {
    "pretrain": PretrainRecipe,
    "adapt": AdaptRecipe,
    "sft": SftRecipe,
    "dpo": DpoRecipe,
    "align": AlignRecipe,
    "grpo": GrpoRecipe,
    "multimodal": MultimodalRecipe,
}
TRAINER = {"max_steps": 3, "logging_steps": 1, "save_steps": 0, "report_to": [], "batch_size": 2, "warmup_steps": 0}
TEXT = {**TRAINER, "sequence_length": 32, "eval_bytes": 2000, "sample_prompts": ["The"], "sample_tokens": 4}
ASKED = {**TRAINER, "sequence_length": 112, "eval_bytes": 2000, "frozen_steps": 1, "replay_share": 0.5}
ASKED |= {"audio": {"time_stride": 45}, "data": ["{seen}", "{heard}"], "general_data": "{texts}", "answer_tokens": 6}
REWARDED = {"num_updates": 2, "batch_size": 4, "response_length": 4, "report_to": [], "prompt_sources": ["medquad"]}
# What each stage is run with; a name in braces is a file of the fixture.
BASE = {
    "pretrain": {**TEXT, "data": "{texts}", "vocab_size": 300, "preset": "debug", "learning_rate": 0.01},
    "adapt": {**TEXT, "model": "{model}", "data": "{texts}", "general_data": "{others}", "learning_rate": 0.01},
    "sft": {**TRAINER, "model": "{model}", "data": "{chats}", "sequence_length": 64, "learning_rate": 0.01},
    "dpo": {**TRAINER, "model": "{model}", "data": "{pairs}", "sequence_length": 64, "learning_rate": 0.01},
    "align": {**REWARDED, "model": "{model}", "learning_rate": 0.01},
    "grpo": {**REWARDED, "model": "{model}", "learning_rate": 0.01, "num_generations": 2, "save_steps": 0},
    "multimodal": {**ASKED, "model": "{model}", "learning_rate": 0.01},
}
# Long answers of the likeliest tokens, among which some come again.
REPEATING = {"response_length": 24, "temperature": 0.05}
# A rate at which the general text is forgotten at once.
FORGETTING = {"stop_general_loss": 0.0, "eval_steps": 1, "learning_rate": 1.0}
# Another value, where doubling a number, turning a switch or adding to nothing does not do; with what it needs beside.
OTHER = {
    "*": {
        "bias_update_speed": {"bias_update_speed": 0.5},
        "experts_implementation": {"experts_implementation": "eager"},
        "max_grad_norm": {"max_grad_norm": 1e-4},
        "optimizer": {"optimizer": "muon"},
        "adam_beta2": {"adam_beta2": 0.5},
        "weight_decay": {"weight_decay": 5.0},
        "warmup_steps": {"warmup_steps": 2},
        "eval_steps": {"eval_steps": 1},
        "save_steps": {"save_steps": 1},
        "sample_steps": {"sample_steps": 1},
        "sample_prompts": {"sample_prompts": ["A"]},
        "report_to": {"report_to": ["no_such_tracker"]},
        "bf16": {"bf16": True},
        "gradient_checkpointing": {"gradient_checkpointing": True},
        "data": {"data": "{others}"},
        "model": {"model": "{second}"},
        "mtp_loss_coef": {"mtp_loss_coef": 0.3},
        "lora_alpha": {"lora_rank": 2, "lora_alpha": 64.0},
        "lora_targets": {"lora_rank": 2, "lora_targets": ["o_proj"]},
        "lora_rank": {"lora_rank": 2},
        "esft_top_p": {"esft_top_p": 0.3},
        "esft_score": {"esft_top_p": 0.3, "esft_score": "gate"},
        "stop_general_loss": {"stop_general_loss": 0.0, "eval_steps": 1},
        "stop_patience": {"stop_patience": 1, **FORGETTING},
        "chat_template": {"chat_template": "{template}"},
        "prompt_template": {"prompt_template": "Q: {prompt}\nA:"},
        "prompts": {"prompts": "dialogues_zh", "prompt_sources": []},
        "prompt_sources": {"prompt_sources": ["taskmaster"]},
        "prompt_column": {"prompt_column": "source"},
        "reward_model": {"reward_model": "{judge}"},
        "value_model": {"value_model": "{judge}"},
        "weights": {"weights": [0.1, 0.1, 0.8]},
        "gate_threshold": {"gate_threshold": None},
        "repetition_penalty": {"repetition_penalty": 5.0, **REPEATING},
        "is_standardized": {"is_standardized": True},
        "min_gain_stderr": {"min_gain_stderr": None},
        "missing_eos_penalty": {"missing_eos_penalty": 9.0},
        "target_kl": {"target_kl": 1e-6},
        "stop_kl": {"stop_kl": 1e-9},
        "lam": {"lam": 0.1},
        "cliprange": {"cliprange": 1e-6, "num_ppo_epochs": 4},
        "cliprange_value": {"cliprange_value": 1e-6, "num_ppo_epochs": 4},
        "kl_coef": {"kl_coef": 5.0},
        "max_prompt_tokens": {"max_prompt_tokens": 2},
        "num_eval_prompts": {"num_eval_prompts": 16},
        "num_eval_samples": {"num_eval_samples": 2},
        "num_mini_batches": {"num_mini_batches": 4},
        "num_generations": {"num_generations": 4},
        "num_iterations": {"num_iterations": 2},
        "replay_share": {"replay_share": 0.5},
        "packing": {"packing": "separate"},
        "encoding": {"encoding": "utf-16"},
        "epochs": {"epochs": 2.0, "max_steps": 0},
        "expert_parallel_size": {"expert_parallel_size": 2},
        "save_in_background": {"save_in_background": True, "save_steps": 2},
    },
    "pretrain": {
        "data_column": {"data_column": "other"},
        "tokenizer": {"tokenizer": "{model}"},
        "tokenizer_data": {"tokenizer_data": ["{chats}"]},
        "vocab_size": {"vocab_size": 260},
        "preset": {"preset": "nano"},
        "model": {"model": {"num_hidden_layers": 1}},
        "check_bigram": {"check_bigram": False},
    },
    "adapt": {
        "data": {"data": "{third}"},
        "data_column": {"data_column": "other"},
        "general_data": {"general_data": "{third}"},
        "general_column": {"general_column": "other"},
    },
    "sft": {
        "data": {"data": "{more_chats}"},
        "messages_column": {"messages_column": "turns"},
        "prompt_column": {"prompt_column": "answer"},
        "answer_column": {"answer_column": "prompt"},
        "sources": {"sources": ["b"]},
        "num_eval_conversations": {"num_eval_conversations": 2},
        "sequence_length": {"sequence_length": 16},
        "sample_tokens": {"sample_tokens": 1},
    },
    "dpo": {
        "data": {"data": "{more_pairs}"},
        "prompt_column": {"prompt_column": "chosen"},
        "chosen_column": {"chosen_column": "rejected", "rejected_column": "chosen"},
        "rejected_column": {"chosen_column": "rejected", "rejected_column": "chosen"},
        "sequence_length": {"sequence_length": 24},
        "num_eval_pairs": {"num_eval_pairs": 2},
        "min_accuracy": {"min_accuracy": None},
    },
    "grpo": {"cliprange": {"cliprange": 1e-6, "num_iterations": 4}},
    "multimodal": {
        "data": {"data": ["{seen}"]},
        "sequence_length": {"sequence_length": 120},
        "vision_encoder": {"vision_encoder": "none", "data": ["{heard}"]},
        "vision": {"vision": {"num_hidden_layers": 1}},
        "vision_layer": {"vision_layer": -2},
        "vision_strategy": {"vision_strategy": "default"},
        "audio_encoder": {"audio_encoder": "none", "audio": {}, "data": ["{seen}"]},
        "audio": {"audio": {"time_stride": 60}},
        "audio_layer": {"audio_layer": -2},
        "audio_seconds": {"audio_seconds": 0.6},
        "general_data": {"general_data": "{others}"},
        "general_column": {"general_column": "other"},
        "max_text_loss": {"max_text_loss": 0.9},
        "num_eval_items": {"num_eval_items": 2},
        "answer_tokens": {"answer_tokens": 1},
        "replay_share": {"replay_share": 0.0},
    },
}
# What a setting is compared with, where that is not the base itself.
BESIDE = {
    "lora_alpha": {"lora_rank": 2},
    "lora_targets": {"lora_rank": 2},
    "esft_score": {"esft_top_p": 0.3},
    "stop_general_loss": {"eval_steps": 1},
    "stop_patience": FORGETTING,
    "cliprange": {"num_ppo_epochs": 4},
    "cliprange_value": {"num_ppo_epochs": 4},
    "repetition_penalty": REPEATING,
    "vision_encoder": {"data": ["{heard}"]},
    "audio_encoder": {"data": ["{seen}"]},
}
# Of memory alone: less is kept for the backward pass.
OF_MEMORY = ("gradient_checkpointing",)
# Of several processes alone: test_failing_processes.py.
OF_PROCESSES = ("collective_timeout_s",)
# No two runs agree on these.
CLOCKED = ("second", "memory", "mfu", "time", "samples_per", "steps_per")
CASES = [(stage, field.name) for stage, one in RECIPES.items() for field in offered(one)]
CASES = [(stage, name) for stage, name in CASES if (stage, name) not in [("grpo", "value_model")]]
CASES = [(stage, name) for stage, name in CASES if name not in OF_PROCESSES]


@pytest.fixture(scope="session")
def files(tmp_path_factory, policy_path):
    """Texts, conversations, pairs and models by the name in braces."""
    root = tmp_path_factory.mktemp("settings")
    found = {"model": str(policy_path)}

    def write(name, rows):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found[name] = str(root / f"{name}.jsonl")

    def split(index):
        return "train" if index % 4 else "validation"

    for shift, name in enumerate(("texts", "others", "third")):
        texts = [" ".join(f"word{(i * 7 + j * (shift + 1)) % 31}" for j in range(90)) for i in range(24)]
        write(name, [{"text": t, "other": t[::-1], "split": split(i)} for i, t in enumerate(texts)])
    for shift, name in enumerate(("chats", "more_chats")):
        chats = [
            {"prompt": f"What is {i + shift}?", "answer": f"It is {i}.", "source": "ab"[i % 2]} for i in range(40)
        ]
        turns = [
            [{"role": "user", "content": one["prompt"]}, {"role": "assistant", "content": "Yes."}] for one in chats
        ]
        write(
            name,
            [
                {**one, "turns": turn, "split": split(i // 2)}
                for i, (one, turn) in enumerate(zip(chats, turns, strict=True))
            ],
        )
        pairs = [{"prompt": f"{i + shift}?", "chosen": f"{i}, sir.", "rejected": f"{i}!"} for i in range(24)]
        write(name.replace("chats", "pairs"), [{**one, "split": split(i)} for i, one in enumerate(pairs)])
    _write_questions(root, found, split)
    (root / "template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    found["template"] = str(root / "template.jinja")
    torch.manual_seed(1)
    judge = AutoModelForSequenceClassification.from_pretrained(policy_path, num_labels=1)
    judge.save_pretrained(root / "judge")
    AutoTokenizer.from_pretrained(policy_path).save_pretrained(root / "judge")
    found["judge"] = str(root / "judge")
    from transformers import AutoModelForCausalLM

    second = AutoModelForCausalLM.from_pretrained(policy_path)
    second.lm_head.weight.data.mul_(-1)
    second.save_pretrained(root / "second")
    AutoTokenizer.from_pretrained(policy_path).save_pretrained(root / "second")
    return {**found, "second": str(root / "second")}


def _write_questions(root, found, split):
    """Tables of questions about pictures of one color, and about low and high tones."""
    for kind in ("seen", "heard"):
        rows, folder = [], root / kind
        folder.mkdir()
        for number in range(12):
            is_first = number % 2 == 0
            answer = "what is it" if is_first else "it is no one"
            row = {"prompt": "Which?", "answer": answer, "split": split(number // 2)}
            if kind == "seen":
                row["image"] = f"{number}.png"
                Image.new("RGB", (9, 9), (20 * number, 200 * is_first, 0)).save(folder / row["image"])
            else:
                row["audio"] = f"{number}.wav"
                wave = np.sin(np.arange(4000) * (0.3 if is_first else 0.9)) * (12000 + 500 * number)
                wavfile.write(folder / row["audio"], 8000, wave.astype(np.int16))
            rows.append(row)
        (folder / "metadata.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        found[kind] = str(folder)


def filled(value, files):
    if isinstance(value, str) and value[1:-1] in files:
        return files[value[1:-1]]
    if isinstance(value, list):
        return [filled(one, files) for one in value]
    return value


def another(stage, name):
    """Another value of a setting, with what it needs beside it."""
    for table in (OTHER.get(stage, {}), OTHER["*"]):
        if name in table:
            return table[name]
    field = next(one for one in dataclasses.fields(RECIPES[stage]) if one.name == name)
    value = BASE[stage].get(name, field.default)
    if isinstance(value, bool):
        return {name: not value}
    assert isinstance(value, int | float), f"{stage}: {name} needs an entry in OTHER"
    return {name: value * 2 or 1}


def outcome(stage, settings, files, folder, capsys):
    """All that a run leaves but for times; or its error."""
    (folder.parent / f"{folder.name}.yaml").write_text(json.dumps({k: filled(v, files) for k, v in settings.items()}))
    capsys.readouterr()
    code = main([stage, str(folder.parent / f"{folder.name}.yaml"), "--output", str(folder)])
    printed = capsys.readouterr()
    if code == 2:
        return printed.err.strip().splitlines()[-1]
    assert code in (0, 3), printed.err[-2000:]
    run = RunFolder(folder)
    rows = [{k: v for k, v in row.items() if not any(word in k for word in CLOCKED)} for row in run.metrics]
    summary = {**run.summary.to_json(), "seconds": None, "energy": None}
    weights = hashlib.sha256((run.model_path / "model.safetensors").read_bytes()).hexdigest()
    plan = [line for line in printed.out.splitlines() if not any(word in line for word in (*CLOCKED, str(folder)))]
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    tokenizer = (run.model_path / "tokenizer.json").read_text()
    return json.dumps([rows, summary, weights, plan, names, tokenizer], sort_keys=True)


@contextlib.contextmanager
def kept_for_backward():
    """Count the bytes of the tensors that forward passes keep; what a checkpoint computes again is not among them."""
    num_bytes = [0]

    def pack(tensor):
        if torch._C._current_graph_task_id() == -1:  # outside of a backward pass
            num_bytes[0] += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield num_bytes


@pytest.fixture(scope="session")
def bases():
    """What the stages end with as they are, by what was set beside."""
    return {}


def test_no_setting_is_left_out():
    for stage, name in CASES:
        value = another(stage, name)
        assert name in value, (stage, name)
    known = {name for stage in RECIPES for name in (field.name for field in dataclasses.fields(RECIPES[stage]))}
    assert {name for table in OTHER.values() for name in table} <= known


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "name"), CASES)
def test_another_value_changes_something_or_is_refused(stage, name, files, bases, tmp_path, capsys):
    beside = {
        k: v for k, v in BESIDE.get(name, {}).items() if k in {f.name for f in dataclasses.fields(RECIPES[stage])}
    }
    key = (stage, json.dumps(beside))
    if key not in bases:
        bases[key] = outcome(stage, {**BASE[stage], **beside}, files, tmp_path / "base", capsys)
        assert bases[key].startswith("["), bases[key]
    fields = {field.name for field in dataclasses.fields(RECIPES[stage])}
    changed = {k: v for k, v in another(stage, name).items() if k in fields}
    if name in OF_MEMORY:
        kept = []
        for settings in ({}, changed):
            with kept_for_backward() as num_bytes:
                outcome(stage, {**BASE[stage], **settings}, files, tmp_path / f"run{len(kept)}", capsys)
            kept.append(num_bytes[0])
        assert 0 < kept[1] < 0.75 * kept[0], kept
        return
    found = outcome(stage, {**BASE[stage], **beside, **changed}, files, tmp_path / "changed", capsys)
    if not found.startswith("["):
        words = {name, *changed, name.replace("_", "-"), *map(str, changed.values())}
        assert any(word in found for word in words) or Path(str(filled(changed[name], files))).name in found, found
        return
    assert found != bases[key], f"{stage}: {name}={changed[name]!r} changed nothing"
