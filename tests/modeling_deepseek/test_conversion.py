import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from deepseek_training.balance.callback import ExpertBalanceCallback
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

EXTENDED = {
    "scoring_func": "softmax",
    "min_experts_per_tok": 1,
    "target_experts_per_tok": 1.7,
    "router_key_dim": 6,
    "norm_type": "layernorm",
    "hidden_dropout": 0.1,
}


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("per_expert", [True, False])
def test_both_layouts_of_stock_checkpoints_load(stock, input_ids, tmp_path, per_expert):
    stock.save_pretrained(tmp_path, save_original_format=per_expert)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert ("model.layers.1.mlp.experts.7.up_proj.weight" in names) == per_expert
    ours, info = DeepseekForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(ours(input_ids).logits, stock(input_ids).logits)


@pytest.mark.parametrize("per_expert", [True, False])
def test_saved_names_and_values_are_the_official_ones(stock, tmp_path, per_expert):
    """Bit for bit what transformers' own model saves, whatever layout ours was loaded from."""
    stock.save_pretrained(tmp_path / "official")
    stock.save_pretrained(tmp_path / "source", save_original_format=per_expert)
    ours = DeepseekForCausalLM.from_pretrained(tmp_path / "source")
    ours.save_pretrained(tmp_path / "ours")
    expected = load_file(tmp_path / "official" / "model.safetensors")
    found = load_file(tmp_path / "ours" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("settings", [{}, EXTENDED], ids=["default", "extended"])
def test_round_trip_from_scratch(tiny, input_ids, tmp_path, settings):
    torch.manual_seed(0)
    model = DeepseekForCausalLM(DeepseekConfig(**{**tiny, **settings})).eval()
    model.save_pretrained(tmp_path)
    assert "model.layers.2.mlp.experts.0.gate_proj.weight" in load_file(tmp_path / "model.safetensors")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is DeepseekForCausalLM and not any(info.values())
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


CLEAN_PROCESS = """
import sys
for name in ("modeling_deepseek", "deepseek_kernels"):
    sys.modules[name] = None  # Importing it now fails.
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

path, again = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
assert type(model).__module__.startswith("transformers_modules."), type(model)
input_ids = torch.load(path + "/input_ids.pt")
torch.save(model(input_ids).logits, path + "/logits.pt")
scorer = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True, num_labels=1)
assert torch.equal(scorer.model.embed_tokens.weight, model.model.embed_tokens.weight)
assert scorer(input_ids).logits.shape == (2, 1)
model.train()(input_ids, labels=input_ids).loss.backward()
model.save_pretrained(again)
"""


@pytest.mark.parametrize(
    "settings", [pytest.param({}, id="default", marks=pytest.mark.slow), pytest.param(EXTENDED, id="extended")]
)
def test_loads_in_a_clean_process_without_the_package(tiny, input_ids, tmp_path, settings, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    torch.manual_seed(0)
    model = DeepseekForCausalLM(DeepseekConfig(**{**tiny, **settings})).eval()
    path, again = tmp_path / "saved", tmp_path / "again"
    model.save_pretrained(path)
    torch.save(input_ids, path / "input_ids.pt")
    command = [sys.executable, "-c", CLEAN_PROCESS, str(path), str(again)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(path / "logits.pt"), model(input_ids).logits)
    # What that process saved is a whole checkpoint again: code, names, weights.
    files = {file.name for file in again.iterdir()}
    assert {file.name for file in path.glob("*.py")} <= files
    assert (
        json.loads((again / "config.json").read_text())["auto_map"]
        == json.loads((path / "config.json").read_text())["auto_map"]
    )
    loaded = DeepseekForCausalLM.from_pretrained(again)
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_the_package_and_its_copy_live_in_one_process(tiny, input_ids, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = DeepseekForCausalLM(DeepseekConfig(**tiny)).eval()
    model.save_pretrained(tmp_path / "saved")
    both = [
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=trust) for trust in (True, False)
    ]
    for loaded in both:
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_load_state_dict_takes_a_saved_file(tiny, tmp_path):
    """As Trainer resumes: per-expert names straight into `load_state_dict`, without transformers' conversion."""
    saved, fresh = (DeepseekForCausalLM(DeepseekConfig(**tiny)) for _ in range(2))
    saved.save_pretrained(tmp_path)
    result = fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert not result.missing_keys and not result.unexpected_keys
    expected = saved.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in fresh.state_dict().items())
    fresh.load_state_dict(expected)  # Fused names as ever.


def test_stock_trainer_resumes_bit_for_bit(tiny, tmp_path):
    """Six steps at once against three, a checkpoint, and three more in a fresh trainer, dynamic experts on."""
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 97, (12, 17), generator=generator)]
    settings = {**tiny, "min_experts_per_tok": 1, "target_experts_per_tok": 1.7, "expert_top_p": 0.4}

    def train(folder, num_steps, resume=None):
        torch.manual_seed(0)
        model = DeepseekForCausalLM(DeepseekConfig(**settings))
        arguments = TrainingArguments(
            folder, max_steps=6, save_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
            report_to=[], disable_tqdm=True, logging_steps=1, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[ExpertBalanceCallback(), StopAt(num_steps)])
        trainer.train(resume_from_checkpoint=resume)
        return model, [row["loss"] for row in trainer.state.log_history if "loss" in row]

    whole, losses = train(tmp_path / "whole", 6)
    train(tmp_path / "parts", 3)
    resumed, resumed_losses = train(tmp_path / "parts", 6, resume=str(tmp_path / "parts" / "checkpoint-3"))
    assert resumed_losses == losses
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())
