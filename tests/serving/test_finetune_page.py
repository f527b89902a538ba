"""The code block of docs/finetune_any_moe.md runs as it stands, and what it writes is whole."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from saved_families import FAMILIES, logits, save_base
from transformers import AutoModelForCausalLM

from deepseek_serving.expert_adapter import CONFIG, WEIGHTS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "finetune_any_moe.md"
(BLOCK,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "name", [name if name == "mixtral" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_the_block_runs_and_each_part_of_it_holds(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_base(name, tmp_path / "base")
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 61, (40, 16)).tolist()]
    space = {"base": str(tmp_path / "base"), "rows": rows}
    exec(compile(BLOCK, str(PAGE), "exec"), space)

    losses = [record["loss"] for record in space["trainer"].state.log_history if "train_loss" not in record]
    assert space["trainer"].state.global_step == 5 and all(0 < loss < 10 for loss in losses)
    assert len(space["balance"].history) == 5 and all(record.tokens_per_expert for record in space["balance"].history)
    assert any(part.endswith(".four_bit") for part, _ in space["model"].named_modules())
    adapter = load_file(tmp_path / "runs/tuned/adapter" / WEIGHTS)
    assert all(tensor.abs().max() > 0 for key, tensor in adapter.items()), "B has left 0"

    # Other than the base by the adapter alone.
    base = AutoModelForCausalLM.from_pretrained(space["base"], dtype=torch.float32)
    before = logits(base)
    fused = logits(PeftModel.from_pretrained(base, tmp_path / "runs/tuned/adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/tuned/merged", dtype=torch.float32)
    effect = (fused - before).norm()
    assert effect > 0 and (logits(merged) - fused).norm() < 0.5 * effect, "bf16 rounds the merged weights"

    # The exported adapter names what the checkpoint holds, and PEFT reads it back into fused experts.
    names = {key.removesuffix(".weight") for key in load_file(tmp_path / "base/model.safetensors")}
    single = load_file(tmp_path / "runs/tuned/expert-lora" / WEIGHTS)
    adapted = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in single}
    assert adapted <= names, sorted(adapted - names)
    routed = {key for key in names if re.search(r"\.experts\.\d+\.", key)}
    assert routed and routed <= adapted
    base = AutoModelForCausalLM.from_pretrained(space["base"], dtype=torch.float32)
    again = PeftModel.from_pretrained(base, tmp_path / "runs/tuned/expert-lora")
    torch.testing.assert_close(logits(again), fused, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "runs/tuned/expert-lora" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == space["base"] and config["target_parameters"] is None
